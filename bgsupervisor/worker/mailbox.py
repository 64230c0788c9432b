"""What the two threads of a child leave for each other: the assignment, its cancel, the slot. Knows no socket."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Protocol

from bgsupervisor import failpoints
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from bgsupervisor.ipc.messages import AttemptResult

__all__ = ["BodyConnection", "Mailbox", "Wakes"]


class Wakes(Protocol):
    """Ways to wake the threads of a body that wait. A wake is what `waking` yields; only `quiet` and `rest` read it."""

    def waking(self) -> AbstractContextManager[Any]:
        """Yield a wake for one wait; it is set at first, so that earlier news count."""

    def quiet(self, wake: Any) -> None:  # noqa: ANN401 - see above
        """Clear a wake, before its cause is looked for."""

    def rest(self, wake: Any, timeout_s: float) -> None:  # noqa: ANN401 - see above
        """Wait for news, at most *timeout_s*."""

    def rouse(self) -> None:
        """Set all wakes: every waiting thread polls again."""


class Mailbox:
    """News for the thread of the body, and its reports for the thread of the connection.

    Attributes:
        assignments: The attempts to run; None means to leave.
        assignment: The present attempt, from its assignment until its end is recorded.
        end_report: The end of the present attempt, until it is acknowledged.
        acknowledged: The end of the present attempt is committed.
        disconnected: There is no connection; cleared when there is one again.
        cancel_message: The present attempt should end, and why.
        last_progress: The newest progress of the body, until it is sent.
        slot_granted: The slot that the body wants is granted.
        wanted: The request for a slot, repeated to every later supervisor.
        waiting: The body waits for another task, without a slot.
        wakes: The threads that wait for any of this.
    """

    def __init__(self, wakes: Wakes) -> None:
        self.wakes = wakes
        self.assignments: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.assignment: Run | None = None
        self.end_report: AttemptResult | None = None
        self.acknowledged = threading.Event()
        self.disconnected = threading.Event()
        self.cancel_message: messages.Cancel | None = None
        self.last_progress: messages.Progress | None = None
        self.slot_granted = threading.Event()
        self.wanted: messages.WantSlot | None = None
        self.waiting = False

    def take(self, message: messages.Message) -> None:
        """Take in one message of the supervisor; one about another attempt is ignored."""
        present = self.assignment
        if isinstance(message, Run):
            self.assignment = message
            failpoints.at("child.ordered")
            self.assignments.put(message)
        elif isinstance(message, messages.Leave):
            self.assignments.put(None)
        elif present is None or not isinstance(message, messages.Ack | messages.Cancel | messages.SlotGranted):
            return
        elif (message.id, message.attempt) == (present.id, present.attempt):
            if isinstance(message, messages.Ack):
                self.acknowledged.set()
            elif isinstance(message, messages.SlotGranted):
                self._take_slot(message)
            else:
                self.cancel_message = message
                self.wakes.rouse()

    def _take_slot(self, message: messages.SlotGranted) -> None:
        """Let the body continue, unless the grant came late: then the body took that slot itself, and waits anew."""
        wanted = self.wanted
        # guard, always: a granted slot serves the present wait only
        if wanted is not None and message.number in (None, wanted.number):
            self.slot_granted.set()
            self.wakes.rouse()

    def become_idle(self) -> None:
        """Forget the attempt, whose end has been recorded."""
        self.assignment = self.end_report = self.cancel_message = self.last_progress = None
        self.waiting = False
        self.acknowledged.clear()


class BodyConnection(threading.Thread):
    """The connection to the process that started the attempt, as the body and its waits use it; runs in a thread.

    Attributes:
        mailbox: What both threads share.
        is_writing: The main thread is writing a message; a signal must not interrupt it there.
    """

    def __init__(self, wakes: Wakes) -> None:
        super().__init__(name="bgsupervisor connection", daemon=True)
        self.mailbox = Mailbox(wakes)
        self.is_writing = False

    def send(self, message: messages.Message) -> None:
        """Send what may be lost."""
        raise NotImplementedError

    def notify(self, keys: Sequence[str]) -> None:
        """Notify the waiters of *keys*; may be lost."""
        raise NotImplementedError

    def set_waiting(self, waiting: bool) -> None:
        """Note whether the body waits without a slot."""
        raise NotImplementedError

    def send_from_body(self, message: messages.Message) -> None:
        """Send what may be lost, from the thread that SIGTERM interrupts: never in the middle of a message."""
        if threading.current_thread() is not threading.main_thread():
            self.send(message)
            return
        self.is_writing = True
        try:
            self.send(message)
        finally:
            self.is_writing = False
