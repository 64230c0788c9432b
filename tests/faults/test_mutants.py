"""Each guard that is marked in the package has a mutant that can be tried, and a test that would catch it."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torture import mutants  # noqa: E402 - no part of the package
from torture.mutants import Guard  # noqa: E402

each_guard = pytest.mark.parametrize("guard", mutants.find_guards(), ids=lambda guard: guard.name)


def test_each_guard_is_marked_once_and_has_a_test():
    assert sorted(guard.name for guard in mutants.find_guards()) == sorted(mutants.TESTS)
    assert mutants.TORTURE_S.keys() <= mutants.TESTS.keys()


@functools.cache
def attributes_of_the_package():
    sources = [path.read_text() for path in (mutants.ROOT / "bgsupervisor").rglob("*.py")]
    return {node.attr for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def variables_of(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@each_guard
def test_a_mutant_compiles_is_another_program_and_uses_known_names(guard):
    source = (mutants.ROOT / guard.path).read_text()
    whole, mutant = ast.parse(source), ast.parse(mutants.mutate(guard, source))
    assert ast.dump(mutant) != ast.dump(whole)
    assert variables_of(mutant) <= variables_of(whole)
    assert {node.attr for node in ast.walk(mutant) if isinstance(node, ast.Attribute)} <= attributes_of_the_package()


@pytest.mark.parametrize("test", sorted(set(mutants.TESTS.values())))
def test_the_test_of_a_guard_is_found_by_its_name(test):
    assert mutants.find_test(test).endswith(test)


def test_the_case_of_a_test_that_a_guard_names_exists():
    cases = [mutants.find_test(test) for test in mutants.TESTS.values() if "[" in test]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(command, cwd=mutants.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_the_table_of_guards_on_the_page_is_that_of_the_code():
    path, page = mutants.page_with_table()
    assert path.read_text() == page, "run `python -m torture.mutants --table`"


# ---- what a mark does ----


@pytest.mark.parametrize(
    ("how", "source", "mutant"),
    [
        ("", "save(1,\n  2)\n", "pass\n"),
        ("", "if a and b:\n  c\nelif d:\n  e\n", "if False:\n  c\nelif d:\n  e\n"),
        ("", "for a in b:\n  c\n", "pass\n"),
        ("", "  a == 1,\n", "  *(),\n"),
        ("always", "if a and b:\n  c\n", "if True:\n  c\n"),
        ("always", "    if a\n    == b\n", "    if True\n"),
        ("never", "a = (b if é else d), e\n", "a = (b if False else d), e\n"),
        ("never", "a = {b for b in c if b}\n", "a = {b for b in c if False}\n"),
        ("never", "a = b <= c\n", "a = False\n"),
        ("last condition", "return a and b and c(d)\n", "return a and b and True\n"),
        ("last condition", "while a or (b and c):\n  d\n", "while a or (False):\n  d\n"),
        ("last condition", "é(a & (b == c) & (d != e)).f()\n", "é(a & (b == c)).f()\n"),
        ("is A -> is not B", "if a is A:\n  b\n", "if a is not B:\n  b\n"),
        ("-> d()", "a[b] = c(\n)\n", "d()\n"),
    ],
)
def test_a_mark_changes_what_is_below_it(how, source, mutant):
    before, after = ("x = [\n", "]\n") if source.startswith("  ") else ("", "")
    before, after = ("x = [y for y in z\n", "]\n") if source.startswith("    ") else (before, after)
    guard = Guard("", how, Path("file.py"), len(before.splitlines()) + 1)
    assert mutants.mutate(guard, before + source + after) == before + mutant + after


@pytest.mark.parametrize("how", ["always", "last condition", "c -> d", "a -> d"])
def test_a_mark_that_does_not_fit_its_line_is_an_error(how):
    with pytest.raises(ValueError, match="the guard"):
        mutants.mutate(Guard("the guard", how, Path("file.py"), 1), "a(a)\n")


@pytest.mark.parametrize("line", ["a()  # guard: beside its line", "# guards: misspelt", "# guard"])
def test_a_mark_that_cannot_be_read_is_an_error(line, tmp_path, monkeypatch):
    (tmp_path / "bgsupervisor").mkdir()
    (tmp_path / "bgsupervisor" / "file.py").write_text(f"b()\n{line}\na()\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"file\.py:2"):
        mutants.find_guards()


def test_a_test_that_is_not_there_or_twice_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"{count} files"):
            mutants.find_test("test_a")
        for file in ("test_1.py", "test_2.py"):
            (tmp_path / "tests" / file).write_text("def test_a():\n    pass\n")
