"""What each recipe of the Makefile installs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("recipe", "extra"), [("demo", "rich"), ("shop", "shop"), ("test", "dev"), ("lint", "dev")])
def test_recipe_in_a_fresh_clone_installs_one_extra(tmp_path, recipe, extra):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--dry-run", recipe]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True).stdout
    assert [line.split("--editable ")[1] for line in said.splitlines() if "--editable" in line] == [f"'.[{extra}]'"]
