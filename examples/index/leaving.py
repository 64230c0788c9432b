"""How the demo sees to it that nothing which it started stays: by identities, never by PIDs alone."""

from __future__ import annotations

import dataclasses
import select
import signal
import time
from typing import TYPE_CHECKING

from bgsupervisor.system import process_tree, processes
from bgsupervisor.system.processes import ProcessIdentity, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from bgsupervisor import Service, TaskRecord
    from bgsupervisor.ledger.records import SupervisorRecord

GONE_S = 5.0
"""Limit of the wait for killed processes, in seconds; one in uninterruptible sleep stays longer."""


def identity(row: TaskRecord | SupervisorRecord) -> ProcessIdentity:
    """Return the identity of a row's process; a PID alone is not enough, it may be reused."""
    return ProcessIdentity(row.host, row.boot_id, row.pid_ns, row.pid, row.start_ticks)  # type: ignore[arg-type]


def identities(pids: Iterable[int]) -> Iterator[ProcessIdentity]:
    """Yield the identities of some PIDs, as far as they live."""
    for pid in pids:
        found = processes.identity_of(pid, processes.host_id(None))
        if found is not None:
            yield found


def known_processes(service: Service) -> Iterator[ProcessIdentity]:
    """Yield all processes that the database and the state directory know of: supervisor, fork servers, children."""
    for row in (*service.ledger.supervisors(), *service.list(limit=None)):
        if row.pid is not None:
            yield identity(row)
    for path in service.config.state_dir.glob("forkserver-*-*"):
        _, pid, ticks = path.name.split("-")
        here = processes.own_identity(processes.host_id(None))
        yield dataclasses.replace(here, pid=int(pid), start_ticks=int(ticks))


def end_all(started: Collection[ProcessIdentity], *, wait_s: float) -> list[int]:
    """Wait until all have left; kill those that are there after *wait_s*, with all they started; return their PIDs."""
    deadline_s = time.perf_counter() + wait_s
    while (left := [one for one in started if is_there(one)]) and time.perf_counter() < deadline_s:
        time.sleep(0.02)
    for one in left:
        kill(one)
    return sorted(one.pid for one in left)


def kill(one: ProcessIdentity) -> None:
    """Kill a process with all it started, and wait until it has gone."""
    _, handle = processes.open_process(one)
    if handle is not None:
        with handle:
            process_tree.signal_tree(handle, signal.SIGKILL)
            select.select([handle], [], [], GONE_S)


def is_there(one: ProcessIdentity) -> bool:
    """Return whether a process lives; an unknown verdict counts as living."""
    return processes.verdict(one) is not Verdict.DEAD
