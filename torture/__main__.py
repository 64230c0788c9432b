"""`python -m torture`: torture, check, and tell; exit code 1 if anything was not as it must be."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.linux import pidfd_exit
from torture import invariants
from torture.actors import Cron, Observer, Prober, Producer
from torture.arena import Arena, Who, command_of, is_alive
from torture.chaos import Chaos
from torture.invariants import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET_S = 120.0
"""How long the last tasks may take once chaos has ended."""
GONE_S = 30.0
"""How long processes may take to leave once their supervisor has."""
PRODUCERS = 2
BACKLOG = 40
CUT_OFF = ("EOFError: Ran out of input", "pickle data was truncated", "EOFError")


def main() -> int:
    """Run one torture."""
    options = _options()
    seed = options.seed or secrets.token_hex(4)
    replay = f"python -m torture --seed {seed} --seconds {options.seconds:g} --tasks {options.tasks}"
    print(f"seed {seed}; the same decisions again: {replay} --rate {options.rate:g}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    arena = Arena(folder, _configuration(seed))
    try:
        known = torture(arena, seed, options)
    finally:
        arena.end()
    found = invariants.violations(known)
    tell(known, found)
    if found or options.keep:
        print(f"kept in {folder}; replay: {replay} --rate {options.rate:g}")
    else:
        shutil.rmtree(folder)
    return 1 if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torture", description="Torture bgsupervisor and check its promises.")
    parser.add_argument("--seed", help="the same decisions as another run; the machine's timing is never the same")
    parser.add_argument("--seconds", type=float, default=30, help="how long chaos reigns (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=0, help="go on until so many tasks were requested")
    parser.add_argument("--rate", type=float, default=5, help="deeds of chaos a second (default %(default)s)")
    parser.add_argument("--slack", type=float, default=1, help="what promised times are multiplied with, on a busy machine")
    parser.add_argument("--keep", action="store_true", help="keep the folder also if nothing was found")
    return parser.parse_args()


def _configuration(seed: str) -> dict[str, object]:
    chance = random.Random(f"{seed}/configuration")
    return {
        "slots": chance.choice((4, 8, 16)),
        "spares": chance.choice((0, 2, 4)),
        "reuse": chance.choice((1, 1, 5)),
        "grace_s": 0.5,
        "heartbeat_s": 1.0,
    }


def torture(arena: Arena, seed: str, options: argparse.Namespace) -> Evidence:
    """Let loose, wait until all is quiet, and collect the evidence."""
    known = _configuration(seed)
    print(", ".join(f"{key} {value}" for key, value in known.items()), flush=True)
    stop, quiet = threading.Event(), threading.Event()
    begun = time.monotonic()
    observer, prober = Observer(arena), Prober(arena)
    cron = Cron(arena, seed)
    producers = [Producer(arena, seed, number, backlog=BACKLOG) for number in range(1, PRODUCERS + 1)]
    chaos = Chaos(arena, seed, rate=options.rate)
    threads = _start(observer.run, quiet.is_set) + _start(prober.run, quiet.is_set)
    actors = _start(cron.run, stop.is_set)
    for actor in (*producers, chaos):
        actors += _start(actor.run, stop.is_set)
    try:
        while time.monotonic() - begun < options.seconds or sum(one.requested for one in producers) < options.tasks:
            time.sleep(0.2)
    finally:
        stop.set()
        for thread in actors:
            thread.join(30)
    print(f"chaos ended after {time.monotonic() - begun:.0f} s; waiting until all is quiet", flush=True)
    complaints = []
    if not cron.keep_one(lambda: _is_quiet(arena), QUIET_S):
        complaints.append(f"all is not quiet {QUIET_S:g} s after chaos has ended")
    time.sleep(0.2)
    quiet.set()
    for thread in threads:
        thread.join(10)
    left, daemons = _send_home(arena)
    complaints += left
    return _evidence(arena, observer, prober, complaints, daemons, slots=int(str(known["slots"])), slack=options.slack)


def _start(run: Callable[[Callable[[], bool]], None], until: Callable[[], bool]) -> list[threading.Thread]:
    thread = threading.Thread(target=run, args=(until,), daemon=True)
    thread.start()
    return [thread]


def _is_quiet(arena: Arena) -> bool:
    query = "SELECT COUNT(*) FROM bgsupervisor_task WHERE status IN ('REQUEST', 'START')"
    with contextlib.suppress(sqlite3.Error):
        return bool(arena.rows(query)[0][0] == 0)
    return False


def _send_home(arena: Arena) -> tuple[list[str], list[Who]]:
    """Have the last supervisor leave; return sentences about who does not go, and the daemons of bodies that were left."""
    deadline = time.monotonic() + GONE_S
    known = {line["pid"]: line["ticks"] for line in arena.oracle.lines() if line["what"] == "daemon"}
    daemons: list[Who] = []
    while time.monotonic() < deadline and arena.ours():
        arena.reap()
        for life in arena.living():
            arena.send(life.who, signal.SIGTERM)
        left = arena.ours()
        if left and all(known.get(who.pid) == who.ticks or _is_tracker(who) for who in left):
            # They may have lost their nursery; and they keep open what multiprocessing's tracker waits for.
            daemons += [who for who in left if known.get(who.pid) == who.ticks]
            for who in daemons:
                arena.send(who, signal.SIGKILL)
        time.sleep(0.2)
    return [f"PID {who.pid} is still there: {command_of(who.pid)}" for who in arena.ours()], daemons


def _is_tracker(who: Who) -> bool:
    return "multiprocessing.resource_tracker" in command_of(who.pid)


def _evidence(
    arena: Arena, observer: Observer, prober: Prober, complaints: list[str], daemons: list[Who], *, slots: int, slack: float
) -> Evidence:
    with arena.connection() as connection:
        connection.row_factory = sqlite3.Row
        tasks = [dict(row) for row in connection.execute("SELECT * FROM bgsupervisor_task")]
        interruptions = [dict(row) for row in connection.execute("SELECT * FROM bgsupervisor_interruption")]
    supervised = {int(pid) for pid in re.findall(r"supervising .*, PID (\d+)", log_of(arena))}
    known = Evidence(
        lines=arena.oracle.lines(),
        entries=arena.oracle.entries,
        tasks={row["id"]: row for row in tasks},
        interruptions=interruptions,
        done_seen=observer.done,
        interrupted_seen=observer.interrupted,
        away=prober.away + [(one.at, one.until) for one in arena.oracle.entries if one.what == "lock"],
        lives=arena.lives,
        supervised=supervised,
        leftovers=complaints + _left_in_files(arena),
        wall_minus_mono=time.time() - time.monotonic(),
        slots=slots,
        slack=slack,
        kernel_tells=kernel_tells_exits(),
    )
    known.leftovers += _left_daemons(daemons, known)
    known.adopted = len(re.findall("looking after it", log_of(arena)))
    known.longest_look_s = observer.longest_look_s
    return known


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
    for table, condition in (("hold", "task_id IS NOT NULL"), ("wait", "1"), ("party", "1"), ("dependency", "1")):
        count = arena.rows(f"SELECT COUNT(*) FROM bgsupervisor_{table} WHERE {condition}")[0][0]  # noqa: S608 - ours
        if count:
            found.append(f"{count} rows are left in the table {table}")
    integrity = arena.rows("PRAGMA integrity_check")
    if integrity != [("ok",)]:
        found.append(f"the database is damaged: {integrity}")
    found += [f"PID {who.pid} was a nursery and its file is left" for who in arena.nurseries() if is_alive(who)]
    return found + [f"a traceback in the log: {text[:1500]}" for text in _tracebacks(log_of(arena))]


def _tracebacks(log: str) -> list[str]:
    found = re.findall(r"^Traceback.*?\n(?=\d{4}-|Traceback|\Z)", log, re.DOTALL | re.MULTILINE)
    # What a supervisor was just starting when it was killed cannot read its beginnings: multiprocessing's own words.
    return [text for text in found if not ("spawn_main" in text and text.strip().endswith(CUT_OFF))]


def _left_daemons(daemons: list[Who], known: Evidence) -> list[str]:
    """Return the daemons that outlived their task though somebody was there who had to end them."""
    nursery_of = {line["id"]: line["nursery"] for line in known.lines if line["what"] == "start"}
    killed = {one.pid for one in known.kills.values() if one.whom == "nursery"}
    left = {who.pid: who.ticks for who in daemons}
    return [
        f"the daemon of task {line['id']}, PID {line['pid']}, is still there"
        for line in known.lines
        if line["what"] == "daemon" and left.get(line["pid"]) == line["ticks"] and nursery_of[line["id"]] not in killed
    ]


def tell(known: Evidence, found: list[str]) -> None:
    """Print the figures, then what was found."""
    for what, counter in invariants.counts(known).items():
        print(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counter.items())))
    print(f"attempts begun {len(known.by_attempt)}, adopted {known.adopted}, `run` started {len(known.lives)} times")
    print(f"from death to truth: {invariants.latency(known)}; the observer was late by at most {known.longest_look_s:.2f} s")
    print(f"violations: {len(found)}")
    for sentence in found:
        print(f"  {sentence}")


if __name__ == "__main__":
    sys.exit(main())
