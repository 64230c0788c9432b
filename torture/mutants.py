"""Remove one guard of bgsupervisor at a time, and show that a test fails for each: who cannot fail proves nothing.

    python -m torture.mutants                      all of them, with their tests
    python -m torture.mutants "identity check"     only these
    python -m torture.mutants --torture            with the torture test instead, where it is to catch them

The checkout is not touched: each mutant lives in a copy, in a temporary folder. Survivors are listed; exit code 1 if
there are any. docs/reliability.md has the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MUTANTS", "Mutant"]

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".git", ".venv", ".demo", ".*_cache", ".hypothesis", "__pycache__", ".bgsupervisor", "*.db*")
LIMIT_S = 700


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One guard, and what must fail without it.

    Attributes:
        name: What is removed.
        file: Of the package.
        old: Must stand there exactly once.
        new: Stands there instead.
        test: "file::function" under tests/, perhaps one of its cases, which must fail.
        seconds: For how long the torture test runs, which must fail too; 0 if it is not to catch this one.
        rate: Of the torture's deeds.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    seconds: int = 0
    rate: int = 8


MUTANTS = (
    Mutant(
        name="the attempt in the compare-and-set",
        file="ledger.py",
        old="(task.id == attempt.id) & (task.attempt == attempt.attempt) & task.status.in_(list(statuses)),",
        new="(task.id == attempt.id) & task.status.in_(list(statuses)),",
        test="test_ledger.py::test_an_event_of_another_attempt_changes_nothing_in_any_status",
    ),
    Mutant(
        name="the status in the compare-and-set",
        file="ledger.py",
        old="(task.id == attempt.id) & (task.attempt == attempt.attempt) & task.status.in_(list(statuses)),",
        new="(task.id == attempt.id) & (task.attempt == attempt.attempt),",
        test="test_ledger.py::test_done_is_final",
        seconds=40,
    ),
    Mutant(
        name="the attempt in what is written out",
        file="statements.py",
        old=' AND {task}."attempt" = {name}."attempt" AND',
        new=" AND",
        test="test_ledger.py::test_an_event_of_another_attempt_changes_nothing_in_any_status",
    ),
    Mutant(
        name="the status in what is written out",
        file="statements.py",
        old=""" AND {task}."status" = '{status}'\n            RETURNING""",
        new="\n            RETURNING",
        test="test_ledger.py::test_done_is_final",
    ),
    Mutant(
        name="the attempt grows with the claim",
        file="statements.py",
        old='"attempt" = claim."attempt" + 1,',
        new='"attempt" = MAX(1, claim."attempt"),',
        test="test_ledger.py::test_the_attempt_grows_with_each_claim_and_never_falls",
        seconds=40,
    ),
    Mutant(
        name="the recorded ending wins over what the death looks like",
        file="ledger.py",
        old="case = peewee.Case(None, ((ordered, self._task.ending),), str(end.reason))",
        new="case = str(end.reason)",
        test="test_ledger.py::test_a_reason_that_was_recorded_before_the_death_wins_over_what_the_death_looks_like",
    ),
    Mutant(
        name="holds are freed with the end",
        file="ledger.py",
        old="keys += self.waits.free(attempt.id, attempt.attempt, reason=reason)",
        new="keys += []",
        test="test_waits.py::test_what_an_attempt_held_is_free_in_the_transaction_of_its_end",
        seconds=40,
    ),
    Mutant(
        name="only a waiting attempt is granted a slot",
        file="waits.py",
        old="mine = _IS_START & (self._task.id == id) & (self._task.attempt == attempt) & self._task.slot.is_null()",
        new="mine = _IS_START & (self._task.id == id) & (self._task.attempt == attempt)",
        test="test_waits.py::test_a_grant_gives_a_slot_to_a_waiting_attempt_alone",
    ),
    Mutant(
        name="permits are given in the order of asking",
        file="waits.py",
        old="if permit is not None and not queue.exists():",
        new="if permit is not None:",
        test="test_waits.py::test_permits_of_one_lock_may_differ_and_nobody_overtakes",
    ),
    Mutant(
        name="a permit is had once",
        file="waits.py",
        old='taken = {row["permit"] for row in rows if row["task_id"] is not None}',
        new="taken: set[int] = set()",
        test="test_waits.py::test_connections_that_race_for_permits_never_get_more_than_there_are",
        seconds=40,
    ),
    Mutant(
        name="the identity is compared, not the PID alone",
        file="processes.py",
        old="if ticks == handle.identity.start_ticks:",
        new="if ticks is not None:",
        test="test_processes.py::test_a_reused_pid_is_dead",
    ),
    Mutant(
        name="psutil confirms a death",
        file="processes.py",
        old="if found is Verdict.DEAD and _psutil_objects(identity):",
        new="if False:",
        test="test_processes.py::test_no_death_is_told_against_the_word_of_psutil",
    ),
    Mutant(
        name="a zombie is dead",
        file="processes.py",
        old="return (Verdict.DEAD if handle.is_dead() else Verdict.ALIVE), handle",
        new="return Verdict.ALIVE, handle",
        test="test_processes.py::test_a_zombie_is_dead_and_its_exit_is_readable",
    ),
    Mutant(
        name="who cannot be judged is not dead",
        file="wards.py",
        old="if verdict is Verdict.DEAD:",
        new="if verdict is not Verdict.ALIVE:",
        test="test_guards.py::test_a_child_that_cannot_be_judged_is_not_taken_for_dead",
    ),
    Mutant(
        name="an exit is written down before it is forgotten",
        file="nursery.py",
        old="                exits.write(self._record, exited)\n",
        new="",
        test="test_windows.py::test_the_row_is_true_in_the_end[nursery.buried-kill-supervisor+nursery]",
    ),
    Mutant(
        name="a second look before VANISHED",
        file="deaths.py",
        old="if processes.verdict(ward.identity) is not Verdict.DEAD:  # the second look; psutil's word counts",
        new="if False:",
        test="test_guards.py::test_without_an_exit_nobody_is_called_vanished_before_a_second_look",
    ),
    Mutant(
        name="the nursery is waited for before VANISHED",
        file="deaths.py",
        old="if ward.dead_since is None or now - ward.dead_since < wait_s:",
        new="if ward.dead_since is None:",
        test="test_guards.py::test_the_nurserys_word_is_waited_for_before_other_evidence",
    ),
    Mutant(
        name="a nursery that has died is not waited for",
        file="nurseries.py",
        old="self._awaited -= dead",
        new="pass",
        test="test_guards.py::test_a_nursery_that_dies_before_its_hello_is_not_waited_for_any_more",
    ),
    Mutant(
        name="adoption",
        file="recovery.py",
        old="self._adopt(self._wards.meet(self.identity_of(who)), record)",
        new="if who in self._wards:\n"
        "                self._adopt(self._wards.meet(self.identity_of(who)), record)\n"
        "            else:\n"
        '                self.ends[attempt] = End(reason=Reason.VANISHED, detail="not adopted")',
        test="test_endings.py::test_a_body_outlives_its_supervisor_in_one_attempt_and_one_process",
        seconds=40,
    ),
    Mutant(
        name="an ending that an earlier supervisor began goes on",
        file="recovery.py",
        old="if record.ending is not None and ward.order is None:",
        new="if False:",
        test="test_guards.py::test_a_stop_that_an_earlier_supervisor_had_begun_is_carried_to_its_end",
    ),
    Mutant(
        name="the last words of the dead are read",
        file="reception.py",
        old="messages = peer.channel.receive_all()",
        new="messages = []",
        test="test_guards.py::test_all_that_a_dead_child_has_written_is_read",
    ),
    Mutant(
        name="an order is read to the end before a child says that it never began",
        file="link.py",
        old="for message in channel.receive_all():",
        new="for message in []:",
        test="test_guards.py::test_an_order_that_came_before_the_connection_broke_is_taken",
    ),
    Mutant(
        name="only an order that was surely not read is given back",
        file="wards.py",
        old="has_not_left = channel.written_bytes <= self.run_place",
        new="has_not_left = True",
        test="test_unread_orders.py::test_never_told_of_an_order_that_was_read_is_false",
        seconds=60,
    ),
    Mutant(
        name="a child gives back only its own",
        file="ledger.py",
        old="== (identity.pid, identity.start_ticks, identity.boot_id)",
        new="!= (0, 0, identity.boot_id)",
        test="test_ledger.py::test_a_child_gives_back_only_what_was_claimed_for_itself",
    ),
    Mutant(
        name="the acknowledgement follows the commit",
        file="supervisor.py",
        old="            ward.end = message.end\n            if attempt != ward.attempt:",
        new="            ward.end = message.end\n"
        "            self._ears.send(ward.peer, wire.Ack(attempt.id, attempt.attempt))\n"
        "            if attempt != ward.attempt:",
        test="test_guards.py::test_an_end_is_not_acknowledged_before_it_is_committed",
        seconds=90,
    ),
    Mutant(
        name="the ending is committed before the kill",
        file="supervisor.py",
        old="batch.endings[attempt] = Ending(attempt, ward.order.reason, ward.order.detail())",
        new="self._enforcement.carry_out(ward, ward.order)",
        test="test_guards.py::test_no_signal_is_sent_before_its_reason_is_in_the_row",
    ),
    Mutant(
        name="a supervisor whose lock was replaced leaves",
        file="supervisor.py",
        old="if not self._lock.is_intact():",
        new="if False:",
        test="test_guards.py::test_a_supervisor_whose_lock_file_was_deleted_leaves_and_its_bodies_go_on",
    ),
    Mutant(
        name="exits are kept until they are acknowledged",
        file="nursery.py",
        old="self._exits[forked.who] = exited",
        new="pass",
        test="test_endings.py::test_an_exit_that_cannot_be_written_down_is_remembered",
    ),
    Mutant(
        name="strays of dead bodies are killed",
        file="nursery.py",
        old="            for pid in strays:\n                processes.kill_child(pid)",
        new="            break",
        test="test_endings.py::test_a_daemon_of_a_body_that_was_killed_is_gone_too",
        seconds=40,
    ),
    Mutant(
        name="a child ends what its body left before it reports",
        file="child.py",
        old="processes.end_descendants(self._pid, grace_s=LEFTOVER_GRACE_S, clock=self._clock)",
        new="pass",
        test="test_bad_bodies.py::test_a_daemon_is_gone_before_its_task_is_done_not_only_when_the_child_has_left",
    ),
    Mutant(
        name="a child whose supervisor is away records its end itself",
        file="child.py",
        old="if link.disconnected.is_set() or self._clock.monotonic() >= deadline:",
        new="if False:",
        test="test_endings.py::test_a_body_that_returns_while_no_supervisor_lives_is_done_recorded_by_its_child",
    ),
    Mutant(
        name="a copy that a body forked does not speak for the attempt",
        file="leftovers.py",
        old="if os.getpid() != pid:\n            end_like_python(raised)",
        new="pass",
        test="test_guards.py::test_a_copy_that_a_body_forked_leaves_at_once_and_records_no_end",
    ),
    Mutant(
        name="SIGTERM is a cancel only if a cancel is known",
        file="child.py",
        old='        if self._phase == "body" and self._is_order_known():\n            order = self._link.cancel_order',
        new='        if self._phase == "body":\n'
        '            order = wire.Cancel(id=0, attempt=0, reason="CANCELLED", why="cancelled", by=None)',
        test="test_endings.py::test_a_body_killed_from_outside_is_signalled_within_a_second",
    ),
    Mutant(
        name="a process that a body forks lets go of the connection",
        file="link.py",
        old="            self._channel.forget()\n            self._channel = None\n        self._wakes",
        new="            pass\n        self._wakes",
        test="test_guards.py::test_a_process_that_a_body_forked_does_not_keep_its_connection",
    ),
    Mutant(
        name="a transaction that a body left is rolled back",
        file="child.py",
        old="if not link.acknowledged.wait(ACK_SOON_S):",
        new="if False:",
        test="test_bad_bodies.py::test_a_transaction_that_a_body_left_keeps_nobody_from_recording_its_end",
    ),
    Mutant(
        name="who stands still and keeps the database locked goes on",
        file="supervisor.py",
        old="if self._put_offs > len(PUT_OFF_S) and is_locked(error):",
        new="if False:",
        test="test_windows.py::test_a_body_that_is_stopped_with_the_database_locked_goes_on_until_it_is_free",
    ),
    Mutant(
        name="requests are on disk when they are acknowledged",
        file="models.py",
        old='"synchronous": "full" if durable else "off",',
        new='"synchronous": "off",',
        test="test_ledger.py::test_a_database_of_ours_is_durable_and_shared",
    ),
    Mutant(
        name="a queue moves up when one that stands in it dies",
        file="waits.py",
        old="names = [name for (name,) in list(queued.tuples())]",
        new="names: list[str] = []",
        test="test_waits.py::test_the_next_in_a_queue_moves_up_when_a_waiter_dies",
    ),
    Mutant(
        name="a supervisor whose lock was replaced writes nothing more",
        file="supervisor.py",
        old="if not batch or self._is_replaced():",
        new="if not batch:",
        test="test_guards.py::test_a_supervisor_whose_lock_was_replaced_claims_nothing_more",
    ),
    Mutant(
        name="nothing is admitted before all rows were looked at",
        file="supervisor.py",
        old="return stays and self._recovery.done_once and",
        new="return stays and",
        test="test_guards.py::test_nothing_is_admitted_before_all_rows_were_looked_at",
    ),
    Mutant(
        name="no exit is acknowledged at leaving before all rows were looked at",
        file="supervisor.py",
        old="if self._recovery.done_once:  # else a row may depend on one of them",
        new="if True:",
        test="test_guards.py::test_no_exit_is_acknowledged_before_all_rows_were_looked_at",
    ),
    Mutant(
        name="a superseded end is acknowledged",
        file="supervisor.py",
        old="        elif ward.peer is not None:\n"
        "            self._ears.send(ward.peer, wire.Ack(attempt.id, attempt.attempt))  # superseded: it must not wait",
        new="",
        test="test_guards.py::test_an_end_that_was_superseded_is_acknowledged",
    ),
    Mutant(
        name="a child that is to leave dials nobody",
        file="link.py",
        old="self._leaving = self.run_order is None",
        new="pass",
        test="test_guards.py::test_a_child_that_is_to_leave_dials_no_supervisor",
    ),
    Mutant(
        name="a slot is taken only for the present wait",
        file="link.py",
        old="if wanted is not None and message.number in (None, wanted.number):",
        new="if True:",
        test="test_guards.py::test_a_slot_that_was_granted_for_an_earlier_wait_is_not_taken",
    ),
    Mutant(
        name="a waiter that asks for a slot again keeps its place",
        file="waits.py",
        old='wait.delete().where(rows & (wait.kind != "slot")).execute()',
        new="wait.delete().where(rows).execute()",
        test="test_waits.py::test_a_waiter_that_asks_for_a_slot_again_keeps_its_place",
    ),
    Mutant(
        name="a supervisor that is to kill waits for tasks without a slot",
        file="supervisor.py",
        old="return ward.slot is None and ward.end is None and ward.order is None",
        new="return ward.slot is None and ward.end is None",
        test="test_words.py::test_stop_kill_waits_for_the_end_of_a_task_without_a_slot",
    ),
    Mutant(
        name="silence counts only while heartbeats can be written",
        file="cli/cells.py",
        old="if written_at is not None and written_at - record.heartbeat_at <= limit:",
        new="if False:",
        test="test_words.py::test_no_body_is_unresponsive_because_the_database_is_locked",
    ),
    Mutant(
        name="a fork server that loads dies with its supervisor",
        file="nursery.py",
        old="    die_with_parent(signal.SIGKILL)\n",
        new="",
        test="test_words.py::test_a_fork_server_that_hangs_at_the_import_dies_with_its_supervisor",
    ),
)


def main() -> int:
    """Try all mutants, or those that are named, and print who caught them."""
    parser = argparse.ArgumentParser(prog="python -m torture.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of mutants")
    parser.add_argument("--torture", action="store_true", help="have the torture test catch them, not their tests")
    parser.add_argument("--seed", default="mutant")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if not options.names or any(name in one.name for name in options.names)]
    if options.torture:
        chosen = [one for one in chosen if one.seconds]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        Path(temporary).chmod(0o755)  # as root, the PostgreSQL of the tests runs as another user
        copy = Path(temporary) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        _check_that_the_copy_is_used(copy)
        if not options.torture:
            _check_that_all_pass(copy, chosen)
        for mutant in chosen:
            begun = time.monotonic()
            caught = _catch(copy, mutant, seed=options.seed if options.torture else None)
            by = f"the torture test, {mutant.seconds} s" if options.torture else mutant.test
            verdict = "caught  " if caught else "SURVIVED"
            said = f": {caught}" if options.torture else ""
            print(f"{verdict} {mutant.name}: {by} ({time.monotonic() - begun:.0f} s){said}", flush=True)
            survivors += [] if caught else [mutant.name]
    print(f"{len(chosen)} mutants, {len(survivors)} survived{': ' if survivors else ''}{', '.join(survivors)}")
    return 1 if survivors else 0


def mutate(mutant: Mutant, text: str) -> str:
    """Return the text of its file without the guard.

    Raises:
        ValueError: The guard does not stand there exactly once: the table must follow the code.
    """
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has the guard {text.count(mutant.old)} times, not once")
    return text.replace(mutant.old, mutant.new)


def _catch(copy: Path, mutant: Mutant, *, seed: str | None) -> str:
    """Return what the named check says with the mutant, or nothing if it passes."""
    path = copy / "bgsupervisor" / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutate(mutant, whole), encoding="utf-8")
    try:
        if seed is None:
            return _pytest(copy, [mutant.test])
        command = ["-m", "torture", "--seed", seed, "--seconds", str(mutant.seconds), "--rate", str(mutant.rate)]
        said = _run(copy, [*command, "--slack", "10"])
        return (
            "; ".join(line.strip()[:150] for line in said.partition("violations: ")[2].splitlines()[:2]) if said else ""
        )
    finally:
        path.write_text(whole, encoding="utf-8")


def _check_that_all_pass(copy: Path, chosen: Sequence[Mutant]) -> None:
    """See the tests pass without any mutant; else a failure would show nothing."""
    if _pytest(copy, sorted({mutant.test for mutant in chosen})):
        sys.exit("the tests fail without any mutant; see `make test`")


def _check_that_the_copy_is_used(copy: Path) -> None:
    code = f"import bgsupervisor, sys; sys.exit(not bgsupervisor.__file__.startswith({str(copy)!r}))"
    if _run(copy, ["-c", code], cwd=copy.parent):
        sys.exit("the copy is not the package that Python imports; nothing can be shown")


def _pytest(copy: Path, tests: Sequence[str]) -> str:
    names = [f"tests/{test}" for test in tests]
    return _run(copy, ["-m", "pytest", "-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", *names])


def _run(copy: Path, arguments: Sequence[str], *, cwd: Path | None = None) -> str:
    """Run Python with the copy; return what it said if it failed, or nothing."""
    own = {"PYTHONPATH": str(copy), "TMPDIR": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or copy,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return f"{process.stdout}{process.stderr} exit code {process.returncode}" if process.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
