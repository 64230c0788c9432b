"""How a dead child ended: the evidence, best first, and the sentence that the row gets. Never guesses."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.termination import Stage
from bgsupervisor.system import processes
from bgsupervisor.system.processes import Exit, Verdict

if TYPE_CHECKING:
    from bgsupervisor.ipc.messages import Exited
    from bgsupervisor.supervisor.children import ChildHandle
    from bgsupervisor.system.oom import OomWatch
    from bgsupervisor.system.processes import ProcessHandle

__all__ = ["EXIT_WAIT_S", "exit_of", "result_of_exit"]

EXIT_WAIT_S = 0.5
"""Wait for the fork server's report of a dead child before other evidence is taken, in seconds."""


def exit_of(child: ChildHandle, exited: Exited | None, *, now: float, wait_s: float, inherited: bool) -> Exit | None:
    """Return how a dead child's process ended, (None, None) if unknown; None while better evidence may come.

    Args:
        child: The dead child.
        exited: What its fork server reported.
        now: Monotonic.
        wait_s: How long after the death the fork server is waited for.
        inherited: Its fork server is dead and this process may have become its parent.
    """
    if exited is not None and (exited.exit_code, exited.signal) != (None, None):
        return Exit(exited.exit_code, exited.signal)
    if inherited and child.handle is not None:
        reaped = _reap(child.handle)
        if reaped is not None:
            return reaped
    # guard, last condition: the fork server's report is awaited before VANISHED
    if child.dead_since is None or now - child.dead_since < wait_s:
        return None
    seen = None if child.handle is None else child.handle.exit_status()
    if seen is not None:
        return seen
    # guard: a second look precedes VANISHED
    if processes.verdict(child.identity) is not Verdict.DEAD:  # psutil confirms
        child.dead_since = now
        return None
    return Exit(None, None)


def result_of_exit(child: ChildHandle, exit: Exit, exited: Exited | None, oom: OomWatch) -> AttemptResult:
    """Return what is recorded of a child that died before it reported."""
    facts: dict[str, Any] = {"exit_code": exit.exit_code, "signal": exit.signal}
    termination = child.termination
    intended = exited.ordered if exited is not None else None
    if intended is None and termination is not None and termination.stage >= Stage.TERM and not termination.unsent:
        intended = termination.reason
    if intended is not None:
        detail = (
            termination.detail()
            if termination is not None
            else "ended by its supervisor, which could not record it before"
        )
        return AttemptResult(reason=intended, detail=detail, **facts)
    if exit.signal is not None:
        evidence = _oom_evidence(child, exit, oom)
        if evidence is not None:
            return AttemptResult(reason=Reason.OUT_OF_MEMORY, detail=evidence, **facts)
        detail = f"killed by {_signal_name(exit.signal)}, which bgsupervisor did not send"
        if child.suspension.lasts:
            detail += ", while it was suspended"
        return AttemptResult(reason=Reason.SIGNALLED, detail=detail, **facts)
    if exit.exit_code is not None:
        detail = f"the process exited with code {exit.exit_code} before it reported an end"
        return AttemptResult(reason=Reason.EXITED, detail=detail, **facts)
    return AttemptResult(reason=Reason.VANISHED, detail="its process is gone and nobody could see how it ended")


def _oom_evidence(child: ChildHandle, exit: Exit, oom: OomWatch) -> str | None:
    if exit.signal != signal.SIGKILL or child.oom is None:
        return None
    return oom.evidence(child.identity.pid, child.oom)


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"


def _reap(handle: ProcessHandle) -> Exit | None:
    """Reap a dead child that became ours when its fork server died; None if it is not ours."""
    try:
        info = os.waitid(os.P_PIDFD, handle.fileno(), os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    return None if info is None else Exit.from_waitid(info)
