"""What a running body can call: progress, parts, waits, locks and requests of its attempt; knows no process."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bgsupervisor import task_context
from bgsupervisor.errors import Cancelled
from bgsupervisor.ipc import messages
from bgsupervisor.worker.outcome import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import Run
    from bgsupervisor.task_context import Awaited, Handle
    from bgsupervisor.worker.coordination import Coordination
    from bgsupervisor.worker.mailbox import BodyConnection

__all__ = ["AttemptContext"]

PROGRESS_EVERY_S = 0.2
"""Shortest interval between two messages of progress, in seconds; the end of the attempt carries the last one."""
ALIVE_EVERY_S = 1.0
"""Interval of progress that reports nothing new, in seconds; it shows that the body is alive (`stall_s`)."""


class AttemptContext(task_context.Context):
    """The context of a body that a supervisor runs."""

    def __init__(
        self, assignment: Run, connection: BodyConnection, coordination: Coordination, config: Config, clock: Clock
    ) -> None:
        self.id = assignment.id
        self.attempt = assignment.attempt
        self.key = assignment.key
        self._connection = connection
        self._coordination = coordination
        self._config = config
        self._clock = clock
        self._sent_at = -PROGRESS_EVERY_S
        self.last = self._sent = Progress()

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt should end."""
        return self._connection.mailbox.cancel_message is not None

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Report progress; see `Context.progress`."""
        self.last = self.last.then(done, total, message)
        self._report()
        cancel = self._connection.mailbox.cancel_message
        if cancel is not None:
            raise Cancelled(cancel.reason, cancel.by, cancel.why)

    def _report(self) -> None:
        """Report that the body is alive, and its progress; rarely if that is not new."""
        now, is_news = self._clock.monotonic(), self.last != self._sent
        is_time = now - self._sent_at >= (PROGRESS_EVERY_S if is_news else ALIVE_EVERY_S)
        if self.id is None or not (is_news or is_time):
            return
        done, total, message = self.last
        report = messages.Progress(id=self.id, attempt=self.attempt, done=done, total=total, message=message)
        self._connection.mailbox.last_progress = report  # the next heartbeat sends it if this call does not
        if is_time:
            self._sent_at, self._sent, self._connection.mailbox.last_progress = now, self.last, None
            self._connection.send_from_body(report)

    @contextlib.contextmanager
    def _reporting_after(self) -> Iterator[None]:
        """Report that the body is alive again, after a wait."""
        try:
            yield
        finally:
            self._report()

    def reach(self, part: str, value: object = None) -> None:
        """Record a part of this task; see `Context.reach`."""
        self._coordination.reach(part, value)
        self._report()

    def wait_for(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - a value of the other task
        """Wait for a part, or the end, of others; see `Context.wait_for`."""
        several = isinstance(task, Sequence) and not isinstance(task, str | bytes)
        ids = task_context.checked_ids(task if isinstance(task, Sequence) and several else [task])
        with self._reporting_after():
            values = self._coordination.wait_for(ids, part, timeout_s=timeout_s, return_interrupted=return_interrupted)
        return values if several else values[0]

    def barrier(self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until *parties* have arrived; see `Context.barrier`."""
        with self._reporting_after():
            self._coordination.barrier(name, parties, scope=scope, timeout_s=timeout_s)

    def request(self, task: Any, data: Mapping[str, object] | None = None, **options: Any) -> Handle:  # noqa: ANN401 - as Context
        """Request a task whose parent is this one; see `Context.request`."""
        from bgsupervisor.service import Service  # noqa: PLC0415 - a body requests as any application does

        return Service.of_task(self._config, self.id).request(task, data, **options)

    def _acquire(self, name: str, permits: int, timeout_s: float | None) -> int | None:
        with self._reporting_after():
            return self._coordination.acquire(name, permits, timeout_s).abandoned_by

    def _release(self, name: str) -> None:
        self._coordination.release(name)

    def _rouse(self) -> None:
        self._connection.mailbox.wakes.rouse()
