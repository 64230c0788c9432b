"""docs/security.md: each line names its tests, and docs/deploy.md each line by which the unit hardens."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
UNIT = (ROOT / "systemd" / "bgsupervisor.service").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not re.match(r"\|( user | what |---)", line)
]
HARDENED = UNIT.partition("# Hardening")[2].partition("\n\n")[0].splitlines()[1:]


def known_tests():
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_security_page_names_only_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))

    assert len(named) > 20
    assert named - known_tests() == set()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_security_page_names_a_test_beside_each_line(row):
    assert len(row) == 3
    assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", row[2].removesuffix(" |"))


def test_security_page_has_a_line_for_everybody_and_is_linked():
    everybody = ("supervisor's user", "write the database", "read the database", "other users", "body", "browser")
    for one in everybody:
        assert any(one in row[0] for row in ROWS), one
    assert "(security.md" in DEPLOY
    assert "(docs/security.md)" in (ROOT / "README.md").read_text()


def test_deploy_page_has_a_reason_for_each_line_that_hardens():
    table = DEPLOY.partition("### What the unit forbids")[2].partition("Left out")[0]
    documented = [match[1] for match in re.finditer(r"^\| `([^`]+)` \| .+ \|$", table, re.MULTILINE)]

    assert len(HARDENED) > 10
    assert documented == HARDENED


def test_deploy_page_leaves_out_only_what_the_unit_leaves_out():
    table = DEPLOY.partition("Left out")[2].partition("\n`bgsupervisor systemd --uninstall`")[0]
    left_out = re.findall(r"`([A-Z]\w+=\S*)", "\n".join(line.split(" | ")[0] for line in table.splitlines()))

    assert len(left_out) > 10
    for line in left_out:
        assert line not in HARDENED
        key = line.partition("=")[0]
        assert key in {"ProtectSystem", "SystemCallFilter"} or not any(one.startswith(f"{key}=") for one in HARDENED)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there to measure the unit")
def test_deploy_page_tells_the_exposure_that_systemd_measures(tmp_path):
    unit = tmp_path / "bgsupervisor.service"
    unit.write_text(UNIT.replace("/srv/myapp/venv/bin/bgsupervisor", "/bin/true"))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]

    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    measured = float(re.search(r"exposure level for \S+: ([0-9.]+)", told.stdout)[1])
    documented = float(re.search(r"says ([0-9.]+) for this unit", DEPLOY)[1])
    assert abs(measured - documented) < 0.5  # each version of systemd weighs otherwise
