"""Running a body in the process of a test."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from bgsupervisor import task_context
from bgsupervisor.errors import Cancelled, UnsupportedSystem
from bgsupervisor.ledger.attempts import Attempt, Claim, Telemetry
from bgsupervisor.system.processes import ProcessIdentity, host_id, own_identity
from bgsupervisor.worker.outcome import Progress

if TYPE_CHECKING:
    from collections.abc import Coroutine


__all__ = ["BoxContext", "identity", "run_coroutine"]


class BoxContext(task_context.Context):
    """The context of a body that runs in a test."""

    def __init__(self, claim: Claim) -> None:
        self.token: Attempt = claim.attempt
        self.id = claim.due.id
        self.attempt = self.token.attempt
        self.key = claim.due.key
        self.slot = claim.slot
        self.last = self._noted = Progress()
        self._asked: Cancelled | None = None

    @property
    def cancel_requested(self) -> bool:
        """Whether the task was cancelled since it began."""
        return self._asked is not None

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Report the progress of the body; see `Context.progress`."""
        self.last = self.last.then(done, total, message)
        if self._asked is not None:
            raise self._asked

    def ask_to_end(self, by: str | None) -> None:
        """Let the next call of `progress` raise Cancelled."""
        self._asked = Cancelled("CANCELLED", by)

    def take_note(self) -> Telemetry | None:
        """Return the progress that is not in the row yet."""
        if self.last == self._noted:
            return None
        self._noted = self.last
        done, total, message = self.last
        return Telemetry(progress_done=done, progress_total=total, message=message)


def run_coroutine(coroutine: Coroutine[Any, Any, object]) -> object:
    """Run a coroutine in a loop of its own; beside the loop of an asynchronous test that waits for it."""
    import asyncio  # noqa: PLC0415 - 30 ms that only such a body pays
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - the same

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def identity() -> ProcessIdentity:
    """Return the identity of this process; without a process table, a stand-in with its PID."""
    try:
        return own_identity(host_id(None))
    except (UnsupportedSystem, OSError):
        return ProcessIdentity(socket.gethostname(), "unknown", 0, os.getpid(), 0)
