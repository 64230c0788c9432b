"""Whom the supervisor hears: connections, deaths, wake-ups and signals, in one selector. Decides nothing.

Nobody is ever waited for: sockets do not block, a peer that does not read is only marked, and every pass takes a
bounded amount from each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import socket
from typing import TYPE_CHECKING, Protocol

from bgsupervisor.clock import Rate
from bgsupervisor.errors import WireError
from bgsupervisor.ipc.channel import Channel
from bgsupervisor.ipc.messages import (
    PROTOCOL_VERSION,
    Beat,
    CallerHello,
    ChildHello,
    ForkServerHello,
    Message,
    ProcessRef,
    WaitManagerBeat,
    WaitManagerHello,
)
from bgsupervisor.ipc.sockets import bind
from bgsupervisor.system.files import open_own_dir
from bgsupervisor.system.syscalls import FileWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.system.processes import ProcessHandle

__all__ = ["EventSources", "Events", "Peer"]

log = logging.getLogger("bgsupervisor")

CONTROL_MODE = 0o600
WAKE_MODE = 0o660
HELLO_S = 10.0
"""Limit of the time between a connection and its hello, in seconds; then it is closed."""
ACCEPTS_PER_PASS = 256
WAKE_UPS_PER_PASS = 1000
REFUSALS_KEPT = 1000
"""Limit of the refused connections that are remembered: a refused peer dials again and again, and is logged once."""
WAKE_UPS_AT_ONCE = 50
WAKE_UPS_PER_S = 20.0
"""After WAKE_UPS_AT_ONCE passes for notifies there are at most so many a second: each looks at the rows."""
KEYS_PER_PASS = 10_000
NOTIFY_BYTES = 4096
"""A ring may name the wake-ups that it is for, one a line; what does not fit is found by looking."""


@dataclasses.dataclass(eq=False, slots=True)
class Peer:
    """One connection; `ref` is None until its hello has been heard."""

    channel: Channel
    pid: int
    since: float
    ref: ProcessRef | None = None


@dataclasses.dataclass(slots=True)
class Events:
    """What came in since the last pass."""

    messages: list[tuple[Peer, Message]] = dataclasses.field(default_factory=list)
    deaths: list[ProcessRef] = dataclasses.field(default_factory=list)
    signals: list[int] = dataclasses.field(default_factory=list)
    woken: bool = False
    keys: list[str] = dataclasses.field(default_factory=list)
    database_touched: bool = False
    a_peer_left: bool = False

    @property
    def matters(self) -> bool:
        """Whether there is more than signs of life in it; a write to the database file is none until it is seen."""
        if self.deaths or self.signals or self.woken or self.a_peer_left:
            return True
        return not all(isinstance(message, Beat | WaitManagerBeat) for _, message in self.messages)


class Watch(Protocol):
    """What becomes readable when the database was written; `drain` raises OSError once nothing more can come."""

    def fileno(self) -> int:
        """Return the descriptor to poll."""

    def drain(self) -> bool:
        """Take in all that has come, without blocking; return whether anything had."""

    def close(self) -> None:
        """Give the descriptor back."""


class EventSources:
    """The sockets of the state directory and everything else that can wake the supervisor."""

    def __init__(self, state_dir: StateDir, clock: Clock) -> None:
        self._state_dir = state_dir
        self._clock = clock
        self._dir_fd = open_own_dir(state_dir.path)
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, Peer] = {}
        self._handles: dict[ProcessRef, ProcessHandle] = {}
        self._watch: Watch | None = None
        self._refused: set[tuple[int, str]] = set()
        self._deaf = False
        self._control: socket.socket | None = None
        self._wake: socket.socket | None = None
        self._inodes: dict[Path, int] = {}
        self._notify_rate = Rate(WAKE_UPS_AT_ONCE, WAKE_UPS_PER_S, clock.monotonic())
        self._notifies_again_at: float | None = None
        self._signals, self._signal_write = socket.socketpair()
        for end in (self._signals, self._signal_write):
            end.setblocking(False)
        self._listens_to_signals = False
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        self.bind()

    def bind(self) -> None:
        """Bind control.sock and wake.sock, replacing what may stand under their names."""
        control = bind(self._dir_fd, "control.sock", socket.SOCK_STREAM, CONTROL_MODE)
        wake = bind(self._dir_fd, "wake.sock", socket.SOCK_DGRAM, WAKE_MODE)
        for old in (self._control, self._wake):
            if old is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(old)
                old.close()
        self._deaf, self._notifies_again_at = False, None
        self._control, self._wake = control, wake
        self._selector.register(self._control, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake_up)
        self._inodes = {path: path.stat().st_ino for path in (self._state_dir.control, self._state_dir.wake)}

    def sockets_stand(self) -> bool:
        """Whether the names in the state directory still lead to our sockets."""
        try:
            return all(path.stat().st_ino == inode for path, inode in self._inodes.items())
        except OSError:
            return False

    def tidy(self) -> None:
        """Accept again after a shortage of descriptors, and close connections without a hello; once a second."""
        if self._deaf and self._control is not None:
            self._selector.register(self._control, selectors.EVENT_READ, self._accept)
            self._deaf = False
        now = self._clock.monotonic()
        for peer in [peer for peer in self._peers.values() if peer.ref is None and now - peer.since > HELLO_S]:
            self.disconnect(peer)

    def listen_to_signals(self, numbers: tuple[int, ...]) -> None:
        """Let these signals end the rest; their handler does nothing else."""
        signal.set_wakeup_fd(self._signal_write.fileno(), warn_on_full_buffer=False)
        self._listens_to_signals = True
        for number in numbers:
            signal.signal(number, _note)

    def watch_file(self, path: Path) -> None:
        """Hear of every write to *path* (the -wal file), for writers who cannot ring; nothing if it is watched."""
        self.watch(lambda: FileWatch(path))

    def watch(self, make: Callable[[], Watch]) -> None:
        """Hear of what is written by what *make* returns; nothing if something is watched, or it raises OSError."""
        if self._watch is not None:
            return
        with contextlib.suppress(OSError):
            self._watch = make()
            self._selector.register(self._watch.fileno(), selectors.EVENT_READ, self._on_database_write)

    def watch_process(self, ref: ProcessRef, handle: ProcessHandle) -> None:
        """Report the death of the process of *handle*."""
        if ref not in self._handles:
            self._handles[ref] = handle
            self._selector.register(handle, selectors.EVENT_READ, lambda events, _mask: self._on_death(events, ref))

    def unwatch_process(self, ref: ProcessRef) -> None:
        """Watch that process no more; its handle stays the caller's."""
        handle = self._handles.pop(ref, None)
        if handle is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(handle)

    def rest(self, timeout_s: float) -> list[tuple[Callable[[Events, int], None], int]]:
        """Block until something is to be heard, at most *timeout_s*."""
        if self._notifies_again_at is not None and self._wake is not None:
            left_s = self._notifies_again_at - self._clock.monotonic()
            if left_s <= 0:
                self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake_up)
                self._notifies_again_at = None
            else:
                timeout_s = min(timeout_s, left_s)
        # Who was stopped and goes on past its time comes back empty-handed, though there may be much to hear.
        ready = self._selector.select(timeout_s) or self._selector.select(0)
        return [(key.data, mask) for key, mask in ready]

    def hear(self, ready: list[tuple[Callable[[Events, int], None], int]]) -> Events:
        """Take in what `rest` found."""
        events = Events()
        for take, mask in ready:
            take(events, mask)
        return events

    def send(self, peer: Peer, message: Message) -> int:
        """Send without blocking; what the peer does not read now is written when it does."""
        place = peer.channel.send(message)
        self._want(peer)
        return place

    def last_messages(self, peer: Peer) -> list[Message]:
        """Return all that a peer whose process is dead has written, and close its connection."""
        messages: list[Message] = []
        with contextlib.suppress(WireError):
            # guard: the last messages of a dead child are read
            messages = peer.channel.receive_all()
        self.disconnect(peer)
        return messages

    def disconnect(self, peer: Peer) -> None:
        """Close a connection."""
        descriptor = next((number for number, one in self._peers.items() if one is peer), None)
        if descriptor is not None:
            del self._peers[descriptor]
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._selector.unregister(descriptor)
        peer.channel.close()

    def close(self) -> None:
        """Close everything; the names in the state directory stay, for the next supervisor to replace."""
        for peer in list(self._peers.values()):
            peer.channel.flush()
            peer.channel.close()
        if self._listens_to_signals:
            signal.set_wakeup_fd(-1)  # else a late signal would write into whatever takes over the number
        for one in (self._control, self._wake, self._watch, self._signals, self._signal_write, self._selector):
            if one is not None:
                one.close()
        os.close(self._dir_fd)

    def _want(self, peer: Peer) -> None:
        if peer.channel.closed:
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.channel.unsent_bytes else 0)
        descriptor = peer.channel.fileno()
        key = self._selector.get_map().get(descriptor)
        if key is not None and key.events != events:
            self._selector.modify(descriptor, events, key.data)

    def _accept(self, events: Events, mask: int) -> None:
        del mask
        assert self._control is not None  # noqa: S101 - registered only while it is bound
        for _ in range(ACCEPTS_PER_PASS):
            try:
                sock, _ = self._control.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the caller stays in the queue, and we must not spin on it
                log.error("cannot accept a connection: %s", error)  # noqa: TRY400 - the sentence says it
                self._selector.unregister(self._control)
                self._deaf = True
                return
            channel = Channel(sock)
            pid, uid = channel.peer()
            if uid != os.geteuid():
                log.warning("a process of user id %d dialled the control socket; only our own user may", uid)
                channel.close()
                continue
            peer = Peer(channel, pid, self._clock.monotonic())
            self._peers[channel.fileno()] = peer
            self._selector.register(
                channel.fileno(),
                selectors.EVENT_READ,
                lambda events, mask, peer=peer: self._on_readable(events, mask, peer),
            )
            # Its hello may be there already, and its death may be reported in this same pass: the hello comes first.
            self._on_readable(events, selectors.EVENT_READ, peer)

    def _on_readable(self, events: Events, mask: int, peer: Peer) -> None:
        del mask
        peer.channel.flush()
        try:
            for message in peer.channel.receive():
                self._check(peer, message)
                events.messages.append((peer, message))
        except WireError as error:
            self._log_refusal(peer.pid, str(error))
            peer.channel.closed = True
        if peer.channel.closed:
            events.a_peer_left = True
            self.disconnect(peer)
        else:
            self._want(peer)

    def _log_refusal(self, pid: int, why: str) -> None:
        if (pid, why) not in self._refused:
            if len(self._refused) >= REFUSALS_KEPT:
                self._refused.clear()
            self._refused.add((pid, why))
            log.warning("the connection of PID %d is closed: %s", pid, why)

    def _check(self, peer: Peer, message: Message) -> None:
        """See that a hello comes first, of our version, from the process that the kernel names."""
        if not isinstance(message, ChildHello | ForkServerHello | CallerHello | WaitManagerHello):
            if peer.ref is None:
                raise WireError("it did not say hello first")
            return
        if message.version != PROTOCOL_VERSION:
            raise WireError(f"it speaks protocol {message.version}, this supervisor speaks {PROTOCOL_VERSION}")
        if message.ref.pid != peer.pid:
            raise WireError(f"it says that it is PID {message.ref.pid}")
        peer.ref = message.ref

    def _on_death(self, events: Events, ref: ProcessRef) -> None:
        self.unwatch_process(ref)
        events.deaths.append(ref)

    def _on_wake_up(self, events: Events, mask: int) -> None:
        del mask
        assert self._wake is not None  # noqa: S101 - registered only while it is bound
        found: dict[str, None] = {}
        with contextlib.suppress(OSError):
            for _ in range(WAKE_UPS_PER_PASS):
                keys = self._wake.recv(NOTIFY_BYTES).decode("utf-8", "replace")
                events.woken = True
                if len(found) < KEYS_PER_PASS:
                    found |= dict.fromkeys(key for key in keys.split("\n") if key)
        events.keys += found
        now = self._clock.monotonic()
        if events.woken and not self._notify_rate.allows(now):  # the rest waits in the socket, and fills it
            self._selector.unregister(self._wake)
            self._notifies_again_at = now + 1 / WAKE_UPS_PER_S

    def _on_database_write(self, events: Events, mask: int) -> None:
        del mask
        if self._watch is None:
            return
        descriptor = self._watch.fileno()
        try:
            events.database_touched = self._watch.drain()
        except OSError:  # the server has hung up; `watch` is asked for another
            self._selector.unregister(descriptor)
            self._watch.close()
            self._watch = None

    def _on_signals(self, events: Events, mask: int) -> None:
        del mask
        with contextlib.suppress(OSError):
            events.signals += self._signals.recv(4096)


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has already taken the number."""
