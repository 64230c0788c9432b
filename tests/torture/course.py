"""One run: let all actors and chaos loose, wait until all is quiet, see everybody go home, and collect the evidence."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING

from bgsupervisor.system.syscalls import pidfd_exit
from torture.actors import Cron, Observer, Prober, Producer
from torture.arena import ProcessRef, command_of, is_alive
from torture.chaos import Chaos
from torture.invariants import Evidence
from torture.oracle import Attempted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torture.arena import Arena

__all__ = ["Plan", "torture"]

QUIET_S = 120.0
"""How long the last tasks may take once chaos has ended."""
GONE_S = 30.0
"""How long processes may take to leave once their supervisor has."""
PRODUCERS = 2
BACKLOG = 40
CUT_OFF = ("EOFError: Ran out of input", "pickle data was truncated", "EOFError")
"""How a traceback ends of what a supervisor was just starting when it was killed: multiprocessing's own words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to be.

    Attributes:
        seconds: How long chaos reigns at least.
        tasks: How many tasks must have been requested before it ends.
        rate: Deeds of chaos a second.
        slack: What promised times are multiplied with.
        slots: As configured.
    """

    seed: str
    seconds: float
    tasks: int
    rate: float
    slack: float
    slots: int


def torture(arena: Arena, plan: Plan) -> Evidence:
    """Let loose, wait until all is quiet, and collect the evidence. Blocks for plan.seconds, and QUIET_S + GONE_S."""
    observer, prober = Observer(arena), Prober(arena)
    quiet = threading.Event()
    watchers = _start([observer.run, prober.run], quiet.is_set)
    cron = Cron(arena, plan.seed)
    complaints = []
    try:
        _let_loose(arena, plan, cron)
        if not cron.keep_one(lambda: _is_quiet(arena), QUIET_S):
            complaints.append(f"all is not quiet {QUIET_S:g} s after chaos has ended")
        time.sleep(0.2)  # the observer's last look
    finally:
        quiet.set()
        for thread in watchers:
            thread.join(10)
    daemons = _send_home(arena)
    complaints += [f"PID {ref.pid} is still there: {command_of(ref.pid)}" for ref in arena.ours()]
    known = _evidence(arena, plan)
    known.done_seen, known.interrupted_seen = observer.done, observer.interrupted
    known.longest_look_s = observer.longest_look_s
    known.away += prober.away
    known.leftovers = [*complaints, *_left_in_files(arena), *_left_daemons(daemons, known)]
    return known


def _let_loose(arena: Arena, plan: Plan, cron: Cron) -> None:
    stop = threading.Event()
    begun = time.monotonic()
    producers = [Producer(arena, plan.seed, number, backlog=BACKLOG) for number in range(1, PRODUCERS + 1)]
    chaos = Chaos(arena, plan.seed, rate=plan.rate)
    actors = _start([cron.run, chaos.run, *[producer.run for producer in producers]], stop.is_set)
    try:
        while time.monotonic() - begun < plan.seconds or sum(one.requested for one in producers) < plan.tasks:
            time.sleep(0.2)
    finally:
        stop.set()
        for thread in actors:
            thread.join(30)


def _start(runs: Sequence[Callable[[Callable[[], bool]], None]], until: Callable[[], bool]) -> list[threading.Thread]:
    threads = [threading.Thread(target=run, args=(until,), daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    return threads


def _is_quiet(arena: Arena) -> bool:
    query = "SELECT COUNT(*) FROM bgsupervisor_task WHERE status IN ('REQUEST', 'START')"
    with contextlib.suppress(arena.database.error):
        return bool(arena.database.rows(query)[0][0] == 0)
    return False


def _send_home(arena: Arena) -> list[ProcessRef]:
    """Have the last supervisor leave, and all others after it; return the daemons of bodies that were left."""
    deadline = time.monotonic() + GONE_S
    known = {line["pid"]: line["ticks"] for line in arena.oracle.lines() if line["what"] == "daemon"}
    daemons: list[ProcessRef] = []
    while time.monotonic() < deadline and arena.ours():
        arena.reap()
        for life in arena.living():
            arena.send(life.ref, signal.SIGTERM)
        left = arena.ours()
        if left and all(known.get(ref.pid) == ref.ticks or _is_tracker(ref) for ref in left):
            # They may have lost their fork server; and they keep open what multiprocessing's tracker waits for.
            daemons += [ref for ref in left if known.get(ref.pid) == ref.ticks]
            for ref in daemons:
                arena.send(ref, signal.SIGKILL)
        time.sleep(0.2)
    return daemons


def _is_tracker(ref: ProcessRef) -> bool:
    return "multiprocessing.resource_tracker" in command_of(ref.pid)


def _evidence(arena: Arena, plan: Plan) -> Evidence:
    tasks = arena.database.dicts("SELECT * FROM bgsupervisor_task")
    interruptions = arena.database.dicts("SELECT * FROM bgsupervisor_interruption")
    log = log_of(arena)
    return Evidence(
        lines=arena.oracle.lines(),
        entries=arena.oracle.entries,
        tasks={row["id"]: row for row in tasks},
        interruptions=interruptions,
        away=[(one.at, one.until) for one in arena.oracle.entries if one.what in ("lock", "hang up")],
        lives=arena.lives,
        supervised={int(pid) for pid in re.findall(r"supervising .*, PID (\d+)", log)},
        wall_minus_mono=time.time() - time.monotonic(),
        slots=plan.slots,
        slack=plan.slack,
        kernel_tells=kernel_tells_exits(),
        reaper=os.getpid(),
        adopted=len(re.findall("looking after it", log)),
    )


def kernel_tells_exits() -> bool:
    """Whether the kernel keeps the exit of a reaped process for who holds a pidfd of it (6.15 and later)."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    told = pidfd_exit(pidfd) is not None
    os.close(pidfd)
    return told


def log_of(arena: Arena) -> str:
    """Return all that supervisors have written."""
    paths = [*sorted(arena.state.logs.glob("supervisor.log*")), arena.folder / "run.log"]
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths if path.exists())


def _left_in_files(arena: Arena) -> list[str]:
    found = []
    for table, condition in (
        ("hold", "task_id IS NOT NULL"),
        ("wait", "true"),
        ("participant", "true"),
        ("dependency", "true"),
    ):
        count = arena.database.rows(f"SELECT COUNT(*) FROM bgsupervisor_{table} WHERE {condition}")[0][0]
        if count:
            found.append(f"{count} rows are left in the table {table}")
    integrity = arena.database.rows("PRAGMA integrity_check") if arena.database.is_sqlite else []
    if integrity not in ([], [("ok",)]):
        found.append(f"the database is damaged: {integrity}")
    found += [f"PID {ref.pid} was a fork server and its file is left" for ref in arena.fork_servers() if is_alive(ref)]
    return found + [f"a traceback in the log: {text[:1500]}" for text in _tracebacks(log_of(arena))]


def _tracebacks(log: str) -> list[str]:
    found = re.findall(r"^Traceback.*?\n(?=\d{4}-|Traceback|\Z)", log, re.DOTALL | re.MULTILINE)
    # What a supervisor was just starting when it was killed cannot read its beginnings: multiprocessing's own words.
    return [text for text in found if not ("spawn_main" in text and text.strip().endswith(CUT_OFF))]


def _left_daemons(daemons: list[ProcessRef], known: Evidence) -> list[str]:
    """Return the daemons that outlived their task though somebody was there who had to end them."""
    left = {ref.pid: ref.ticks for ref in daemons}
    return [
        f"the daemon of task {line['id']}, PID {line['pid']}, is still there"
        for line in known.lines
        if line["what"] == "daemon" and left.get(line["pid"]) == line["ticks"]
        if not known.fork_server_was_killed(Attempted(line["id"], line["attempt"]))
    ]
