"""The child's connection to whichever supervisor there is: dials, redials, listens, beats. Knows no body.

One daemon thread, started before the body, which imports nothing after that. All it knows is plain state under one
lock, so that a hello can always tell it anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

from bgsupervisor import failpoints
from bgsupervisor.errors import WireError
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.channel import REDIAL_S, UNRESPONSIVE_BYTES, Channel, Redial
from bgsupervisor.ipc.messages import ProcessRef, Run
from bgsupervisor.ipc.sockets import connect, notify_waiters
from bgsupervisor.system.files import inode_of, is_another

if sys.platform != "win32":  # a body on Windows loads this module too
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.messages import AttemptResult
    from bgsupervisor.system.stacks import Answering

__all__ = ["Line", "Link"]

log = logging.getLogger("bgsupervisor")

CONTROL = "control.sock"
LONELY_S = 10.0
"""An idle child leaves when no supervisor has come for this long: the next one starts children of its own."""
WAITING_BEATS = 12
"""A body that waits beats so many times slower; `ps` does not expect more of it."""
PARENT_LOOK_S = 10.0


class Line(Protocol):
    """What a body and its waits need of the connection to the process that started the attempt; see `Link`.

    A wake is whatever `waking` yields; only `quiet` and `rest` look into it.
    """

    cancel_message: messages.Cancel | None
    last_progress: messages.Progress | None
    slot_granted: threading.Event
    disconnected: threading.Event

    def say_from_body(self, message: messages.Message) -> None:
        """See `Link.say_from_body`."""

    def notify(self, keys: Sequence[str]) -> None:
        """See `Link.notify`."""

    def rouse(self) -> None:
        """See `Link.rouse`."""

    def set_waiting(self, waiting: bool) -> None:
        """See `Link.set_waiting`."""

    def waking(self) -> contextlib.AbstractContextManager[Any]:
        """See `Link.waking`."""

    def quiet(self, wake: Any) -> None:  # noqa: ANN401 - see above
        """See `Link.quiet`."""

    def rest(self, wake: Any, timeout_s: float) -> None:  # noqa: ANN401 - see above
        """See `Link.rest`."""

    def want_slot(self, id: int, attempt: int, number: int) -> None:
        """See `Link.want_slot`."""

    def want_no_slot(self) -> None:
        """See `Link.want_no_slot`."""


class Link(threading.Thread):
    """The thread, and what the main thread may ask of it.

    Attributes:
        orders: What to do next; None is to leave.
        assignment: The present attempt, from its order until its end is recorded.
        acknowledged: The end of the present attempt is committed.
        disconnected: There is no connection; cleared when there is one again.
        cancel_message: The present attempt is to end, and why.
        last_progress: What the body said last and has not been sent.
        waiting: The body waits for another task, without a slot.
        beat_alone: Writes a heartbeat where no supervisor does; the body cannot fork meanwhile.
        questions: Where others ask for the stacks of this process; the thread answers.
        main_inside: The main thread is writing a frame, and must not be torn out of it by a signal.
    """

    def __init__(
        self, state_dir: Path, ref: ProcessRef, fork_server: ProcessRef, *, heartbeat_s: float, clock: Clock
    ) -> None:
        super().__init__(name="bgsupervisor link", daemon=True)
        self._heartbeat_s = heartbeat_s
        self._fork_server = fork_server
        self._ref = ref
        self._clock = clock
        self._folder = state_dir
        self._dialled: int | None = None
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._parent = os.getppid()
        self.assignments: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.assignment: Run | None = None
        self.end_report: AttemptResult | None = None
        self.acknowledged = threading.Event()
        self.disconnected = threading.Event()
        self.cancel_message: messages.Cancel | None = None
        self.main_inside = self.waiting = False
        self.last_progress: messages.Progress | None = None
        self.slot_granted = threading.Event()
        self._wanted: messages.WantSlot | None = None
        self._wakes: set[int] = set()
        self._stir: int | None = None
        self.questions: Answering | None = None
        self.beat_alone: Callable[[Run], None] | None = None
        self._redial = Redial(clock)
        self._leaving = False
        self._last_beat = 0.0
        self._last_look = clock.monotonic()
        self._beating_alone = threading.Lock()
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
        )

    # For the main thread

    def report(self, end: AttemptResult) -> None:
        """Tell the end of the present attempt, now and in every later hello, until it is acknowledged."""
        with self._lock:
            self.end_report = end
            if self._channel is not None and self.assignment is not None:
                self._channel.send(messages.ResultReport(self.assignment.id, self.assignment.attempt, end))
                self._forget_if_closed(self._channel)

    def push(self, timeout_s: float) -> None:
        """Write on what the supervisor has not read yet, at most *timeout_s*: a large result takes several turns."""
        channel = self._channel
        if channel is None or not channel.unsent_bytes:
            return
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):
            poll.register(channel, select.POLLOUT)
            poll.poll(timeout_s * 1000)
        with self._lock:
            channel.flush()
            self._forget_if_closed(channel)

    def become_idle(self) -> None:
        """Be idle again after the end has been recorded, and say so."""
        with self._lock:
            self.assignment = self.end_report = self.cancel_message = self.last_progress = None
            self.waiting = False
            self.acknowledged.clear()
            if self._channel is not None:
                self._channel.send(self._hello())

    def say(self, message: messages.Message) -> None:
        """Send what may be lost: nothing is sent to a peer that is away or does not read."""
        with self._lock:
            if self._channel is not None and self._channel.unsent_bytes < UNRESPONSIVE_BYTES:
                self._channel.send(message)
                self._forget_if_closed(self._channel)

    def say_from_body(self, message: messages.Message) -> None:
        """Send what may be lost, from the thread that SIGTERM interrupts: never in the middle of a frame."""
        if threading.current_thread() is not threading.main_thread():
            self.say(message)
            return
        self.main_inside = True
        try:
            self.say(message)
        finally:
            self.main_inside = False

    def notify(self, keys: Sequence[str]) -> None:
        """Ring wake-ups: at the wait manager itself; where none listens, through the supervisor. A ring may be lost."""
        if keys and not notify_waiters(self._folder, keys):
            self.say_from_body(messages.Notify(list(keys)))

    def drop(self) -> None:
        """Close the connection; the child is leaving."""
        with self._lock:
            if self._channel is not None:
                self._channel.flush()
                self._channel.close()
                self._channel = None

    # For waiting

    @contextlib.contextmanager
    def waking(self) -> Iterator[int]:
        """Yield a descriptor of the caller's own that is readable once there is news: a cancel, a slot, no connection.

        `quiet` calms it; the news stands in `cancel_message`, `slot_granted` and `disconnected`.
        """
        wake = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable at first: what has come before counts
        self._wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)
            with contextlib.suppress(OSError):  # the body may have closed all that is open
                os.close(wake)

    @staticmethod
    def quiet(wake: int) -> None:
        """Calm a descriptor, before the look at what it tells of."""
        with contextlib.suppress(OSError):
            os.eventfd_read(wake)

    @staticmethod
    def rest(wake: int, timeout_s: float) -> None:
        """Wait until a descriptor is readable, at most *timeout_s*."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def want_slot(self, id: int, attempt: int, number: int) -> None:
        """Ask for a slot after a wait, now and of every later supervisor, until `want_no_slot`."""
        with self._lock:
            self.slot_granted.clear()
            self._wanted = messages.WantSlot(id, attempt, number)
        self.say_from_body(messages.WantSlot(id, attempt, number))

    def want_no_slot(self) -> None:
        """Ask no more."""
        self._wanted = None

    def rouse(self) -> None:
        """Have whoever waits look again."""
        for wake in list(self._wakes):
            with contextlib.suppress(OSError):
                os.eventfd_write(wake, 1)

    def set_waiting(self, waiting: bool) -> None:
        """Beat slower while the body waits without a slot: hundreds may, and have little to say."""
        with self._lock:
            self.waiting = waiting
            if waiting and self._stir is None:  # only now: a body that runs may close descriptors, and reuse numbers
                self._stir = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            if self._stir is not None:
                with contextlib.suppress(OSError):
                    os.eventfd_write(self._stir, 1)  # the thread sleeps until its next beat, which may be sooner now

    # The thread

    def run(self) -> None:
        """Serve until the process ends."""
        try:
            while True:
                self._dial()
                self._serve_once()
        finally:  # a bug of ours: a body records its end itself, and an idle child has nobody to wait for
            self.drop()
            self.disconnected.set()
            self.rouse()
            self._leave_alone()

    def _serve_once(self) -> None:
        channel = self._channel
        timeout_s = self._next_look_s()
        if channel is None:
            timeout_s = min(timeout_s, self._redial.wait_s() or REDIAL_S)
        poll = select.poll()
        asked = None if self.questions is None else self.questions.fileno()
        for descriptor in (self._stir, asked):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        if channel is not None:
            events = select.POLLIN | (select.POLLOUT if channel.unsent_bytes else 0)
            with contextlib.suppress(OSError, ValueError):
                poll.register(channel, events)
        poll.poll(timeout_s * 1000)
        self._calm()
        if self.questions is not None:
            self.questions.answer()
        if channel is not None:
            self._exchange(channel)
        self._look()

    def _calm(self) -> None:
        with self._lock:
            if self._stir is not None:
                self.quiet(self._stir)
            if self._stir is not None and not self.waiting:
                with contextlib.suppress(OSError):
                    os.close(self._stir)
                self._stir = None

    def _exchange(self, channel: Channel) -> None:
        with self._lock:
            if channel is not self._channel:
                return
            channel.flush()
            try:
                received = channel.receive()
            except WireError as error:
                log.warning("the supervisor speaks another protocol: %s", error)
                channel.close()
                received = []
            for message in received:
                self._take(message)
            self._forget_if_closed(channel)

    def _forget_if_closed(self, channel: Channel) -> None:
        if channel is not self._channel or not (channel.closed or channel.broken):
            return
        if channel.broken:  # what came before the break counts: only then is it known that nothing else was ordered
            with contextlib.suppress(WireError):
                # guard: an order is read to the end before a child reports that it never began
                for message in channel.receive_all():
                    self._take(message)
        if channel is self._channel:
            channel.close()
            self._channel = None
            self._redial.lost()
            self.disconnected.set()
            self.rouse()  # nobody may ring now: a waiter has to look by itself

    def _take(self, message: messages.Message) -> None:
        self._redial.heard()
        present = self.assignment
        if isinstance(message, Run):
            self.assignment = message
            failpoints.at("child.ordered")
            self.assignments.put(message)
        elif isinstance(message, messages.Leave):
            # guard: a leaving child connects to no supervisor
            self._leaving = self.assignment is None  # a supervisor that comes now must not be told that we are idle
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
                self.rouse()

    def _take_slot(self, message: messages.SlotGranted) -> None:
        """Let the body go on; not for a word that was late, when it has taken the slot itself and waits anew."""
        wanted = self._wanted
        # guard, always: a granted slot serves the present wait only
        if wanted is not None and message.number in (None, wanted.number):
            self.slot_granted.set()
            self.rouse()

    def _dial(self) -> None:
        if self._channel is not None or self._leaving or self._redial.wait_s() > 0:
            return
        sock = None
        self._dialled = inode_of(self._folder / CONTROL)
        try:
            sock = _above_standard(connect(self._folder, CONTROL, socket.SOCK_STREAM))
        except OSError:
            return
        failpoints.at("child.dialled")
        with self._lock:
            channel = Channel(sock)
            channel.send(self._hello())
            if self._wanted is not None:
                channel.send(self._wanted)
            self._channel = channel
            self._redial.connected()
            self.disconnected.clear()

    def _hello(self) -> messages.ChildHello:
        assignment = self.assignment
        return messages.ChildHello(
            version=messages.PROTOCOL_VERSION,
            ref=self._ref,
            fork_server=self._fork_server,
            id=None if assignment is None else assignment.id,
            attempt=0 if assignment is None else assignment.attempt,
            end=self.end_report,
        )

    def _look(self) -> None:
        now = self._clock.monotonic()
        self._change_over()
        assignment = self.assignment
        if assignment is not None and now - self._last_beat >= self._beat_s():
            self._last_beat = now
            word, self.last_progress = self.last_progress, None
            if word is not None:
                self.say(word)
            self.say(messages.Beat(assignment.id, assignment.attempt))
            self._beat_alone(assignment)
        if assignment is not None:
            return
        if now - self._last_look >= PARENT_LOOK_S:
            self._last_look = now
            if os.getppid() != self._parent and self._channel is None:
                self._leave_alone()
        if self._redial.alone_s() >= LONELY_S:
            self._leave_alone()

    def _beat_alone(self, assignment: Run) -> None:
        """Write the heartbeat into the row while no supervisor accepts this child, as one of another container may not.

        The body cannot fork meanwhile, and so takes no database connection along. All else that it does goes on: a
        server that is away may be waited for.
        """
        if self.beat_alone is not None and self._redial.alone_s() >= self._heartbeat_s:
            with self._beating_alone:
                self.beat_alone(assignment)

    def _change_over(self) -> None:
        """Leave a supervisor in whose place another listens: it may be stopped, and never close the connection."""
        channel = self._channel
        if channel is not None and is_another(self._folder / CONTROL, self._dialled):
            with self._lock:
                channel.broken = True
                self._forget_if_closed(channel)

    def _beat_s(self) -> float:
        """Return the time between two heartbeats: hundreds may wait, and what they have to say can wait too."""
        return self._heartbeat_s * (WAITING_BEATS if self.waiting else 1)

    def _leave_alone(self) -> None:
        self._leaving = True  # a supervisor that comes now must not be told that we are idle
        self.assignments.put(None)

    def _next_look_s(self) -> float:
        if self.assignment is None:
            return PARENT_LOOK_S
        return max(0.0, self._last_beat + self._beat_s() - self._clock.monotonic())

    def _before_fork(self) -> None:
        self._beating_alone.acquire()
        self._lock.acquire()

    def _after_fork(self) -> None:
        self._lock.release()
        self._beating_alone.release()

    def _after_fork_in_child(self) -> None:
        # A process that the body forks is not this child: it must neither speak for it nor keep its connection open.
        # guard: a process forked by a body lets go of the connection
        if self._channel is not None:
            self._channel.forget()
            self._channel = None
        self._wakes = set()  # the body's own; a fork that reads them would take its news
        self._stir = None
        self._wanted = None
        self.disconnected.set()
        self._after_fork()


def _above_standard(sock: socket.socket) -> socket.socket:
    """Keep clear of descriptors 0 to 2: a body may have closed them, and what it prints must not reach a supervisor."""
    if sock.fileno() > 2:  # noqa: PLR2004 - standard descriptors
        return sock
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
