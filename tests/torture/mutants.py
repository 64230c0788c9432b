"""Remove one guard of bgsupervisor at a time, and see a test fail for each: a test that cannot fail proves nothing.

    python -m torture.mutants                      all of them, with their tests
    python -m torture.mutants "a zombie"           only these
    python -m torture.mutants --torture            with the torture test instead, where it should catch them
    python -m torture.mutants --table              write the table of docs/reliability.md

A guard is marked in the package, by a comment above its line. The mark says what its mutant changes there, so that
moved files and renamed things need no change here:

    # guard: NAME                    leaves out the statement, list item or argument; an `if` never applies
    # guard, always: NAME            takes the condition, or else the value, to be true
    # guard, never: NAME             takes it to be false
    # guard, last condition: NAME    leaves out the last operand of `and`, `or` or `&`
    # guard, OLD -> NEW: NAME        replaces a text of the line; without OLD, the statement

The checkout stays as it is: each mutant lives in a copy, in a temporary folder. Survivors are listed; exit code 1 if
there are any.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torture import interrupts

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TESTS", "TORTURE_S", "Guard", "find_guards", "find_test", "mutate", "page_with_table"]

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
TORTURE = __package__ or "torture"
IMPORTED_FROM = Path(__file__).parents[TORTURE.count(".") + 1].relative_to(ROOT)
LEFT_OUT = (".git", ".venv", ".demo", ".*_cache", ".hypothesis", "__pycache__", ".bgsupervisor", "*.db*")
LIMIT_S = 700
RATE = 8
MARK = re.compile(r"\s*# guard(?:, (?P<how>.+?))?: (?P<name>.+)")
ENDING_S = 60
"""Limit of what an interrupted test needs to end all that it has started, in seconds."""
TABLE_BEGIN, TABLE_END = "<!-- guards -->\n", "<!-- end of guards -->"

TESTS = {
    "the compare-and-set names the attempt": "test_an_event_of_another_attempt_changes_nothing_in_any_status",
    "the compare-and-set names the status": "test_done_is_final",
    "the batch statements name the attempt": "test_an_event_of_another_attempt_changes_nothing_in_any_status",
    "the batch statements name the status": "test_done_is_final",
    "each claim raises the attempt": "test_the_attempt_grows_with_each_claim_and_never_falls",
    "the recorded reason wins over what the death looks like": (
        "test_a_reason_that_was_recorded_before_the_death_wins_over_what_the_death_looks_like"
    ),
    "an end frees its locks": "test_what_an_attempt_held_is_free_in_the_transaction_of_its_end",
    "a slot is granted to waiting attempts only": "test_a_grant_gives_a_slot_to_a_waiting_attempt_alone",
    "permits are given in the order of asking": "test_permits_of_one_lock_may_differ_and_nobody_overtakes",
    "a permit has one holder": "test_connections_that_race_for_permits_never_get_more_than_there_are",
    "the start ticks are compared, not the PID alone": "test_a_reused_pid_is_dead",
    "psutil confirms a death": "test_no_death_is_told_against_the_word_of_psutil",
    "a zombie is dead": "test_a_zombie_is_dead_and_its_exit_is_readable",
    "UNKNOWN is not DEAD": "test_a_child_that_cannot_be_judged_is_not_taken_for_dead",
    "an exit is written to disk before it is forgotten": (
        "test_the_row_is_true_in_the_end[forkserver.buried-kill-supervisor+fork_server]"
    ),
    "a second look precedes VANISHED": "test_without_an_exit_nobody_is_called_vanished_before_a_second_look",
    "the fork server's report is awaited before VANISHED": (
        "test_the_fork_servers_word_is_waited_for_before_other_evidence"
    ),
    "a dead fork server is not awaited": "test_a_fork_server_that_dies_before_its_hello_is_not_waited_for_any_more",
    "running bodies are adopted": "test_progress_log_and_heartbeat_go_on_under_the_next_supervisor",
    "an ending that an earlier supervisor began continues": (
        "test_a_stop_that_an_earlier_supervisor_had_begun_is_carried_to_its_end"
    ),
    "the last messages of a dead child are read": "test_all_that_a_dead_child_has_written_is_read",
    "an order is read to the end before a child reports that it never began": (
        "test_an_order_that_came_before_the_connection_broke_is_taken"
    ),
    "only an order that was surely not read is given back": "test_undelivered_of_an_assignment_that_was_read_is_false",
    "a child gives back only its own claims": "test_a_child_gives_back_only_what_was_claimed_for_itself",
    "the acknowledgement follows the commit": "test_an_end_is_not_acknowledged_before_it_is_committed",
    "the reason is committed before the signal": "test_no_signal_is_sent_before_its_reason_is_in_the_row",
    "a supervisor whose lock was replaced leaves": (
        "test_a_supervisor_whose_lock_file_was_deleted_leaves_and_its_bodies_go_on"
    ),
    "an exit is kept until it is acknowledged": "test_an_exit_that_cannot_be_written_down_is_remembered",
    "strays of dead bodies are killed": "test_a_daemon_of_a_body_that_was_killed_is_gone_too",
    "a child ends what its body left before it reports": (
        "test_a_daemon_is_gone_before_its_task_is_done_not_only_when_the_child_has_left"
    ),
    "a child without a supervisor records its end itself": (
        "test_a_body_that_returns_while_no_supervisor_lives_is_done_recorded_by_its_child"
    ),
    "a copy that a body forked does not report for the attempt": (
        "test_a_copy_that_a_body_forked_leaves_at_once_and_records_no_end"
    ),
    "SIGTERM is a cancel only if a cancel is known": "test_a_body_killed_from_outside_is_signalled_within_a_second",
    "a process forked by a body lets go of the connection": (
        "test_a_process_that_a_body_forked_does_not_keep_its_connection"
    ),
    "a transaction left open by a body is rolled back": (
        "test_a_transaction_that_a_body_left_keeps_nobody_from_recording_its_end"
    ),
    "a suspended child that may hold the database lock is resumed": (
        "test_a_body_that_is_stopped_with_the_database_locked_goes_on_until_it_is_free"
    ),
    "requests are on disk when they are acknowledged": "test_a_database_of_ours_is_durable_and_shared",
    "a queue moves up when a waiter dies": "test_the_next_in_a_queue_moves_up_when_a_waiter_dies",
    "a supervisor whose lock was replaced writes nothing": (
        "test_a_supervisor_whose_lock_was_replaced_claims_nothing_more"
    ),
    "nothing is admitted before all rows are compared": "test_nothing_is_admitted_before_all_rows_were_looked_at",
    "no exit is acknowledged before all rows are compared": (
        "test_no_exit_is_acknowledged_before_all_rows_were_looked_at"
    ),
    "a superseded end is acknowledged": "test_an_end_that_was_superseded_is_acknowledged",
    "a leaving child connects to no supervisor": "test_a_child_that_is_to_leave_dials_no_supervisor",
    "a granted slot serves the present wait only": "test_a_slot_that_was_granted_for_an_earlier_wait_is_not_taken",
    "a repeated request for a slot keeps its place": "test_a_waiter_that_asks_for_a_slot_again_keeps_its_place",
    "stop --kill waits for tasks without a slot": "test_stop_kill_waits_for_the_end_of_a_task_without_a_slot",
    "silence counts only while heartbeats can be written": (
        "test_no_body_is_unresponsive_because_the_database_is_locked"
    ),
    "a loading fork server dies with its supervisor": (
        "test_a_fork_server_that_hangs_at_the_import_dies_with_its_supervisor"
    ),
}
"""The test, perhaps one of its cases, that fails without the guard; its file is found by search."""

TORTURE_S = {
    "the compare-and-set names the status": 40,
    "each claim raises the attempt": 40,
    "an end frees its locks": 40,
    "a permit has one holder": 40,
    "running bodies are adopted": 40,
    "only an order that was surely not read is given back": 60,
    "the acknowledgement follows the commit": 90,
    "strays of dead bodies are killed": 40,
}
"""Duration of a torture test that fails too, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """One mark: its name, what the mutant does (empty: leave out), the file, and the line that it is about."""

    name: str
    how: str
    path: Path
    line: int

    @property
    def effect(self) -> str:
        """The mutant in words, for the table."""
        words = {"": "left out", "always": "always true", "never": "never true"}
        return words.get(self.how, f"`{self.how}`" if "->" in self.how else f"{self.how} left out")


def main() -> int:
    """Try all mutants, or those that are named, and print which survive."""
    interrupts.heed()
    parser = argparse.ArgumentParser(prog=f"python -m {TORTURE}.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of guards")
    parser.add_argument("--torture", action="store_true", help="run the torture test, not the tests of the guards")
    parser.add_argument("--seed", default="mutant")
    parser.add_argument("--table", action="store_true", help="write the table of docs/reliability.md, and nothing else")
    options = parser.parse_args()
    if options.table:
        path, page = page_with_table()
        path.write_text(page, encoding="utf-8")
        return 0
    chosen = [one for one in find_guards() if not options.names or any(name in one.name for name in options.names)]
    if options.torture:
        chosen = [one for one in chosen if one.name in TORTURE_S]
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        Path(temporary).chmod(0o755)  # as root, the PostgreSQL of the tests runs as another user
        copy = Path(temporary) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        survivors = _try_all(copy, chosen, seed=options.seed if options.torture else None)
    print(f"{len(chosen)} mutants, {len(survivors)} survived{': ' if survivors else ''}{', '.join(survivors)}")
    return 1 if survivors else 0


def find_guards() -> list[Guard]:
    """Return the marked guards of the package, in the order of TESTS.

    Raises:
        ValueError: A mark is not written as it should be.
    """
    guards = []
    for path in sorted((ROOT / "bgsupervisor").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if "# guard" not in line:
                continue
            mark = MARK.fullmatch(line)
            if mark is None:
                raise ValueError(f"{path}:{number + 1}: cannot read the mark; write it as in {__name__}")
            below = next(place for place in range(number, len(lines)) if not lines[place].lstrip().startswith("#"))
            guards.append(Guard(mark["name"], mark["how"] or "", path.relative_to(ROOT), below + 1))
    order = list(TESTS)
    return sorted(guards, key=lambda guard: order.index(guard.name) if guard.name in TESTS else len(order))


def find_test(test: str) -> str:
    """Return what pytest calls a test that is named by its function.

    Raises:
        ValueError: There is not exactly one of this name.
    """
    definition = re.compile(rf"^def {test.partition('[')[0]}\(", re.MULTILINE)
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if definition.search(path.read_text("utf-8"))]
    if len(found) != 1:
        raise ValueError(f"{test}: cannot tell which test is meant; {len(found)} files have one of this name")
    return f"{found[0].relative_to(ROOT)}::{test}"


def mutate(guard: Guard, source: str) -> str:
    """Return the source of its file without the guard.

    Raises:
        ValueError: The line has nothing that can be changed in this way.
    """
    lines = source.encode().splitlines(keepends=True)  # the parser counts bytes
    old, _, new = guard.how.rpartition("->")
    if old.strip():
        line = lines[guard.line - 1].decode()
        if line.count(old.strip()) != 1:
            raise ValueError(f"{guard.name}: the line has {old.strip()!r} {line.count(old.strip())} times, not once")
        lines[guard.line - 1] = line.replace(old.strip(), new.strip()).encode()
        return b"".join(lines).decode()
    try:
        node, text = _replacement(guard, source)
    except IndexError:
        raise ValueError(f"{guard.name}: {guard.path}:{guard.line} has nothing to change in this way") from None
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before = b"".join(lines[:first]) + lines[first][: node.col_offset]
    after = lines[last][node.end_col_offset :] + b"".join(lines[last + 1 :])
    return (before + text.encode() + after).decode()


def _replacement(guard: Guard, source: str) -> tuple[ast.stmt | ast.expr, str]:
    """Return the part of the source that a mutant replaces, and with what; IndexError if there is none."""
    tree = list(ast.walk(ast.parse(source)))  # the outermost first
    here = [node for node in tree if isinstance(node, ast.stmt | ast.expr) and node.lineno == guard.line]
    if guard.how in ("always", "never"):
        tests = [node.test for node in here if isinstance(node, ast.If | ast.While | ast.IfExp)]
        tests += [test for node in tree if isinstance(node, ast.comprehension) for test in node.ifs if test in here]
        tests += [node.value for node in here if isinstance(node, ast.Assign | ast.Return) and node.value is not None]
        return tests[0], str(guard.how == "always")
    if guard.how == "last condition":
        chain = [node for node in here if isinstance(node, ast.BoolOp | ast.BinOp)][0]  # noqa: RUF015 - IndexError
        if isinstance(chain, ast.BoolOp):
            return chain.values[-1], str(isinstance(chain.op, ast.And))
        return chain, ast.get_source_segment(source, chain.left) or ""
    if guard.how:
        return here[0], guard.how.removeprefix("-> ")
    if isinstance(here[0], ast.If | ast.While):
        return here[0].test, "False"
    return here[0], "pass" if isinstance(here[0], ast.stmt) else "*()"


def page_with_table() -> tuple[Path, str]:
    """Return the page that has the table of guards, and what should stand there."""
    path = next(path for path in sorted((ROOT / "docs").rglob("*.md")) if TABLE_BEGIN in path.read_text("utf-8"))
    before, _, rest = path.read_text("utf-8").partition(TABLE_BEGIN)
    rows = [("Guard", "mutant", "test that fails", "torture test fails too"), ("---", "---", "---", "---")]
    for guard in find_guards():
        seconds = TORTURE_S.get(guard.name)
        rows.append((guard.name, guard.effect, f"`{TESTS[guard.name]}`", f"yes, {seconds} s" if seconds else ""))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return path, f"{before}{TABLE_BEGIN}{table}{TABLE_END}{rest.partition(TABLE_END)[2]}"


def _try_all(copy: Path, chosen: Sequence[Guard], *, seed: str | None) -> list[str]:
    """Try each mutant, print which check caught it, and return the names of survivors."""
    _check_that_the_copy_is_used(copy)
    failure = _pytest(copy, sorted({TESTS[guard.name] for guard in chosen})) if seed is None else ""
    if failure:
        sys.exit(f"cannot show anything: the tests fail without any mutant\n{failure}")
    survivors = []
    for guard in chosen:
        begun = time.monotonic()
        failure = _catch(copy, guard, seed=seed)
        by = TESTS[guard.name] if seed is None else f"the torture test, {TORTURE_S[guard.name]} s"
        verdict = "caught  " if failure else "SURVIVED"
        print(f"{verdict} {guard.name} ({time.monotonic() - begun:.0f} s): {failure or by}", flush=True)
        survivors += [] if failure else [guard.name]
    return survivors


def _catch(copy: Path, guard: Guard, *, seed: str | None) -> str:
    """Return how the check fails with the mutant, or nothing if it passes."""
    path = copy / guard.path
    source = path.read_text(encoding="utf-8")
    path.write_text(mutate(guard, source), encoding="utf-8")
    try:
        if seed is None:
            output = _pytest(copy, [TESTS[guard.name]])
            return next((line[1:].strip() for line in output.splitlines() if line.startswith("E  ")), output)
        seconds = str(TORTURE_S[guard.name])
        output = _run(copy, ["-m", TORTURE, "--seed", seed, "--seconds", seconds, "--rate", str(RATE), "--slack", "10"])
        return "; ".join(line.strip()[:150] for line in output.partition("violations: ")[2].splitlines()[:2])
    finally:
        path.write_text(source, encoding="utf-8")


def _check_that_the_copy_is_used(copy: Path) -> None:
    code = f"import bgsupervisor, sys; sys.exit(not bgsupervisor.__file__.startswith({str(copy)!r}))"
    if _run(copy, ["-c", code], cwd=copy.parent):
        sys.exit("cannot show anything: Python imports another package than the copy")


def _pytest(copy: Path, tests: Sequence[str]) -> str:
    names = [find_test(test) for test in tests]
    return _run(copy, ["-m", "pytest", "-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", *names])


def _run(copy: Path, arguments: Sequence[str], *, cwd: Path | None = None) -> str:
    """Run Python with the copy; return what it prints if it fails, or nothing."""
    path = f"{copy}{os.pathsep}{copy / IMPORTED_FROM}"
    own = {"PYTHONPATH": path, "TMPDIR": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd or copy,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C is passed on, once
    ) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT_S)
        except BaseException:
            process.send_signal(signal.SIGINT)  # it ends what it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=ENDING_S)
            process.kill()
            raise
    return f"{said} exit code {process.returncode}" if process.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
