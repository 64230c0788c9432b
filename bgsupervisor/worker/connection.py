"""The child's connection to the present supervisor: dials, redials, listens, sends heartbeats. Knows no body.

One daemon thread, started before the body, which imports nothing after that. Its state is in the mailbox, so that a
hello can always report it anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import threading
from typing import TYPE_CHECKING

from bgsupervisor import failpoints
from bgsupervisor.errors import WireError
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.channel import REDIAL_S, UNRESPONSIVE_BYTES, Channel, Redial
from bgsupervisor.ipc.sockets import connect, notify_waiters
from bgsupervisor.system.files import inode_of, is_another
from bgsupervisor.worker.mailbox import BodyConnection

if sys.platform != "win32":  # a body on Windows loads this module too
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.messages import AttemptResult, ProcessRef, Run
    from bgsupervisor.system.stacks import Answering

__all__ = ["Connection"]

log = logging.getLogger("bgsupervisor")

CONTROL = "control.sock"
LONELY_S = 10.0
"""Time without a supervisor after which an idle child leaves, in seconds: the next one starts its own children."""
WAITING_BEATS = 12
"""Factor of the heartbeat's interval while a body waits; `ps` does not expect more of it."""
PARENT_CHECK_S = 10.0
"""Interval of an idle child's checks that its fork server lives, in seconds."""


class DescriptorWakes:
    """Wakes that are descriptors: a thread can wait for one of them and for an answer of the wait manager at once."""

    def __init__(self) -> None:
        self._wakes: set[int] = set()

    @contextlib.contextmanager
    def waking(self) -> Iterator[int]:
        """Yield a descriptor of the caller's own that is readable once there is news; see `Wakes.waking`."""
        wake = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable at first: what has come before counts
        self._wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)
            with contextlib.suppress(OSError):  # the body may have closed all that is open
                os.close(wake)

    def quiet(self, wake: int) -> None:
        """Make a descriptor unreadable again."""
        _drain(wake)

    def rest(self, wake: int, timeout_s: float) -> None:
        """Wait until a descriptor is readable, at most *timeout_s*."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def rouse(self) -> None:
        """Make all descriptors readable."""
        for wake in list(self._wakes):
            _ring(wake)

    def forget(self) -> None:
        """Forget the descriptors, in a fork: to read them would take the news of the original."""
        self._wakes = set()


class Connection(BodyConnection):
    """The thread for the supervisor, and what the main thread may ask of it.

    Attributes:
        beat_alone: Writes a heartbeat where no supervisor does; the body cannot fork meanwhile.
        questions: Where others ask for the stacks of this process; the thread answers.
    """

    def __init__(
        self, state_dir: Path, ref: ProcessRef, fork_server: ProcessRef, *, heartbeat_s: float, clock: Clock
    ) -> None:
        self._wakes = DescriptorWakes()
        super().__init__(self._wakes)
        self._heartbeat_s = heartbeat_s
        self._fork_server = fork_server
        self._ref = ref
        self._clock = clock
        self._folder = state_dir
        self._dialled: int | None = None
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._parent = os.getppid()
        self._stir: int | None = None
        self.questions: Answering | None = None
        self.beat_alone: Callable[[Run], None] | None = None
        self._redial = Redial(clock)
        self._leaving = False
        self._last_beat = 0.0
        self._last_check = clock.monotonic()
        self._beating_alone = threading.Lock()
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
        )

    # For the main thread

    def report(self, end: AttemptResult) -> None:
        """Report the end of the present attempt, now and in every later hello, until it is acknowledged."""
        with self._lock:
            self.mailbox.end_report = end
            assignment = self.mailbox.assignment
            if self._channel is not None and assignment is not None:
                self._channel.send(messages.ResultReport(assignment.id, assignment.attempt, end))
                self._forget_if_closed(self._channel)

    def push(self, timeout_s: float) -> None:
        """Continue to write a large result, of which the supervisor has read a part, for at most *timeout_s*."""
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
        """Become idle again after the end has been recorded, and report it."""
        with self._lock:
            self.mailbox.become_idle()
            if self._channel is not None:
                self._channel.send(self._hello())

    def send(self, message: messages.Message) -> None:
        """Send what may be lost: nothing is sent to a peer that is away or does not read."""
        with self._lock:
            if self._channel is not None and self._channel.unsent_bytes < UNRESPONSIVE_BYTES:
                self._channel.send(message)
                self._forget_if_closed(self._channel)

    def notify(self, keys: Sequence[str]) -> None:
        """Notify waiters: through the wait manager, or through the supervisor if none listens. May be lost."""
        if keys and not notify_waiters(self._folder, keys):
            self.send_from_body(messages.Notify(list(keys)))

    def drop(self) -> None:
        """Close the connection; the child is leaving."""
        with self._lock:
            if self._channel is not None:
                self._channel.flush()
                self._channel.close()
                self._channel = None

    def set_waiting(self, waiting: bool) -> None:
        """Send fewer heartbeats while the body waits without a slot: hundreds may wait, and have little to report."""
        with self._lock:
            self.mailbox.waiting = waiting
            if waiting and self._stir is None:  # only now: a body that runs may close descriptors, and reuse numbers
                self._stir = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            if self._stir is not None:
                _ring(self._stir)  # the thread sleeps until its next heartbeat, which may be sooner now

    # The thread

    def run(self) -> None:
        """Serve until the process ends."""
        try:
            while True:
                self._dial()
                self._serve_once()
        finally:  # a bug of ours: a body records its end itself, and an idle child has nothing to wait for
            self.drop()
            self._note_disconnected()
            self._leave_alone()

    def _serve_once(self) -> None:
        channel = self._channel
        timeout_s = self._next_check_s()
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
        self._check()

    def _calm(self) -> None:
        with self._lock:
            if self._stir is not None:
                _drain(self._stir)
            if self._stir is not None and not self.mailbox.waiting:
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
        if channel.broken:  # what came before the break counts: only then is it certain that there was no assignment
            with contextlib.suppress(WireError):
                # guard: an order is read to the end before a child reports that it never began
                for message in channel.receive_all():
                    self._take(message)
        if channel is self._channel:
            channel.close()
            self._channel = None
            self._redial.lost()
            self._note_disconnected()

    def _note_disconnected(self) -> None:
        self.mailbox.disconnected.set()
        self._wakes.rouse()  # no notify may come now: a waiter has to poll by itself

    def _take(self, message: messages.Message) -> None:
        self._redial.heard()
        if isinstance(message, messages.Leave):
            # guard: a leaving child connects to no supervisor
            self._leaving = self.mailbox.assignment is None  # a later supervisor must not hear that it is idle
        self.mailbox.take(message)

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
            if self.mailbox.wanted is not None:
                channel.send(self.mailbox.wanted)
            self._channel = channel
            self._redial.connected()
            self.mailbox.disconnected.clear()

    def _hello(self) -> messages.ChildHello:
        assignment = self.mailbox.assignment
        return messages.ChildHello(
            version=messages.PROTOCOL_VERSION,
            ref=self._ref,
            fork_server=self._fork_server,
            id=None if assignment is None else assignment.id,
            attempt=0 if assignment is None else assignment.attempt,
            end=self.mailbox.end_report,
        )

    def _check(self) -> None:
        now = self._clock.monotonic()
        self._change_over()
        assignment = self.mailbox.assignment
        if assignment is not None and now - self._last_beat >= self._beat_s():
            self._last_beat = now
            progress, self.mailbox.last_progress = self.mailbox.last_progress, None
            if progress is not None:
                self.send(progress)
            self.send(messages.Beat(assignment.id, assignment.attempt))
            self._beat_alone(assignment)
        if assignment is not None:
            return
        if now - self._last_check >= PARENT_CHECK_S:
            self._last_check = now
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
        """Disconnect from a supervisor that another has replaced: it may be stopped, and never close the connection."""
        channel = self._channel
        if channel is not None and is_another(self._folder / CONTROL, self._dialled):
            with self._lock:
                channel.broken = True
                self._forget_if_closed(channel)

    def _beat_s(self) -> float:
        """Return the time between two heartbeats; hundreds may wait, and their heartbeats are not urgent."""
        return self._heartbeat_s * (WAITING_BEATS if self.mailbox.waiting else 1)

    def _leave_alone(self) -> None:
        self._leaving = True  # a later supervisor must not hear that it is idle
        self.mailbox.assignments.put(None)

    def _next_check_s(self) -> float:
        if self.mailbox.assignment is None:
            return PARENT_CHECK_S
        return max(0.0, self._last_beat + self._beat_s() - self._clock.monotonic())

    def _before_fork(self) -> None:
        self._beating_alone.acquire()
        self._lock.acquire()

    def _after_fork(self) -> None:
        self._lock.release()
        self._beating_alone.release()

    def _after_fork_in_child(self) -> None:
        # A process that the body forks is not this child: it must neither report for it nor keep its connection open.
        # guard: a process forked by a body lets go of the connection
        if self._channel is not None:
            self._channel.forget()
            self._channel = None
        self._wakes.forget()
        self._stir = None
        self.mailbox.wanted = None
        self.mailbox.disconnected.set()
        self._after_fork()


def _ring(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.eventfd_write(descriptor, 1)


def _drain(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.eventfd_read(descriptor)


def _above_standard(sock: socket.socket) -> socket.socket:
    """Keep clear of descriptors 0 to 2: a body may have closed them, and what it prints must not reach a supervisor."""
    if sock.fileno() > 2:  # noqa: PLR2004 - standard descriptors
        return sock
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
