"""What the processes say to each other: messages, frames and connections; knows no tables.

A frame is a 4-byte big-endian length and one msgpack-encoded message. Whoever dials says hello first, with
PROTOCOL_VERSION. Nothing here is ever unpickled.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor.errors import WireError
from bgsupervisor.sizes import size
from bgsupervisor.statuses import Reason  # noqa: TC001 - msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bgsupervisor.clock import Clock

__all__ = [
    "PROTOCOL_VERSION",
    "REDIAL_MAX_S",
    "REDIAL_S",
    "Ack",
    "Beat",
    "BoardBeat",
    "BoardHello",
    "CallerHello",
    "Cancel",
    "Channel",
    "ChildHello",
    "End",
    "Ended",
    "Exited",
    "ExitsSeen",
    "KillOrder",
    "Leave",
    "LoadFailure",
    "Message",
    "NurseryHello",
    "Progress",
    "Redial",
    "Reload",
    "Reloaded",
    "Resumed",
    "Retire",
    "Ring",
    "Run",
    "SlotGranted",
    "Spawn",
    "SpawnFailed",
    "Spawned",
    "TaskOptions",
    "Waiting",
    "WantSlot",
    "Who",
]

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 80 * 1024 * 1024
"""A longer frame is a peer gone mad; data and results are limited far below (data_max_bytes)."""
RECEIVE_BYTES = 256 * 1024
"""Read at most so much of one peer before the others get their turn."""
REDIAL_S = 0.2
REDIAL_MAX_S = 5.0
"""The longest pause between two tries to reach a supervisor that refuses: another protocol, another PID namespace."""
UNRESPONSIVE_BYTES = 4 * 1024 * 1024
"""A peer that has left so much unread is unresponsive: what may be lost (beats, progress) is no longer sent."""

_LENGTH = struct.Struct(">I")


class Who(msgspec.Struct, frozen=True, array_like=True):
    """A process as messages name it: the PID never travels without its start ticks."""

    pid: int
    start_ticks: int


class End(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an attempt ended, by whoever saw it: DONE when *reason* is None, else INTERRUPTED.

    The last progress travels with it, so that the last word is never lost to a throttle.
    """

    reason: Reason | None = None
    detail: str | None = None
    result: str | None = None
    error: str | None = None
    stack: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    progress_done: float | None = None
    progress_total: float | None = None
    message: str | None = None


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a supervisor must know of a task class; it never imports the class itself."""

    timeout_s: float | None = None
    stall_s: float | None = None
    memory_limit_bytes: int | None = None
    secret: tuple[str, ...] = ()


class LoadFailure(msgspec.Struct, frozen=True):
    """What failed to load, and why.

    Attributes:
        module: The name of the module, of the `setup` callable, or of the task whose signature cannot be used.
        error: The traceback.
        kind: "module", "setup" or "task"; a nursery of an older version reports none.
    """

    module: str
    error: str
    kind: str = "module"


class ChildHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A child's first word on a connection: who it is and what it is doing.

    `id` is None for an idle child, which has read its last connection to the end and so knows that it began
    nothing it was told there. `end` is set when the attempt has ended and nobody has acknowledged it.
    """

    version: int
    who: Who
    nursery: Who
    id: int | None = None
    attempt: int = 0
    end: End | None = None


class NurseryHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A nursery's first word: its catalogue, its living children and the exits nobody has acknowledged.

    Attributes:
        dangers: Warnings about data that may be lost.
        places: The files and folders of the code that the application has imported.
    """

    version: int
    who: Who
    catalogue: dict[str, TaskOptions]
    failures: list[LoadFailure]
    warnings: list[str]
    children: list[Who]
    exits: list[Exited]
    dangers: list[str] = []
    places: list[str] = []


class Exited(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A nursery saw its child die. `ordered` is the reason of a kill that went through the nursery."""

    who: Who
    exit_code: int | None
    signal: int | None
    ordered: Reason | None = None


class ExitsSeen(msgspec.Struct, frozen=True, tag=True):
    """The supervisor has committed what these exits mean; the nursery may forget them."""

    whos: list[Who]


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Fork so many children."""

    count: int


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """A child that was ordered is there; its own hello follows."""

    who: Who


class SpawnFailed(msgspec.Struct, frozen=True, tag=True):
    """So many ordered children could not be forked, and why (usually a process limit)."""

    count: int
    error: str


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Another nursery has taken over: leave with the last child."""


class KillOrder(msgspec.Struct, frozen=True, tag=True):
    """Signal a child, and remember the reason for its exit report; used when the database is away."""

    who: Who
    signal: int
    reason: Reason


class Run(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The order to run one attempt; `data` is the JSON text of the row."""

    id: int
    attempt: int
    name: str
    data: str
    key: str | None = None
    parent_id: int | None = None

    def __repr__(self) -> str:
        """Return it without its data, which may be secret: an error tracker shows the local variables of a stack."""
        return f"Run(id={self.id}, attempt={self.attempt}, name={self.name!r})"


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What a body said of its progress."""

    id: int
    attempt: int
    done: float | None
    total: float | None
    message: str | None


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A child's sign of life."""

    id: int
    attempt: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A child reports the end of its attempt and waits for the Ack."""

    id: int
    attempt: int
    end: End


class Ack(msgspec.Struct, frozen=True, tag=True):
    """The end of this attempt is committed."""

    id: int
    attempt: int


class Cancel(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """This attempt is to end: raise Cancelled at the next chance. SIGTERM may follow."""

    id: int
    attempt: int
    reason: Reason
    why: str
    by: str | None = None


class BoardHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A board's first word."""

    version: int
    who: Who


class BoardBeat(msgspec.Struct, frozen=True, tag=True):
    """A board's sign of life."""


class Ring(msgspec.Struct, frozen=True, tag=True):
    """Something has happened to what these keys name; whoever waits for it looks at the rows."""

    keys: list[str]


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """An attempt waits, and its slot is free for others unless it is kept (committed)."""

    id: int
    attempt: int
    slot_kept: bool = False


class Resumed(msgspec.Struct, frozen=True, tag=True):
    """An attempt goes on, in a slot that it took itself (committed)."""

    id: int
    attempt: int
    slot: int


class WantSlot(msgspec.Struct, frozen=True, tag=True):
    """An attempt would go on after its wait *number*, and waits for a slot."""

    id: int
    attempt: int
    number: int


class SlotGranted(msgspec.Struct, frozen=True, tag=True):
    """The attempt has a slot again (committed), after the wait of this number; an older supervisor names none."""

    id: int
    attempt: int
    number: int | None = None


class CallerHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first word of a command, such as `bgsupervisor reload`."""

    version: int
    who: Who


class Reload(msgspec.Struct, frozen=True, tag=True):
    """Load the configuration and the code anew; with *force* even if less loads than before."""

    force: bool


class Reloaded(msgspec.Struct, frozen=True, tag=True):
    """What a reload came to; *done* is false when the old code stays in force."""

    done: bool
    detail: str
    failures: list[LoadFailure] = []


class Leave(msgspec.Struct, frozen=True, tag=True):
    """An idle child, or a nursery without children, is no longer needed."""


Message = (
    ChildHello
    | NurseryHello
    | Exited
    | ExitsSeen
    | Spawn
    | Spawned
    | SpawnFailed
    | Retire
    | KillOrder
    | Run
    | Progress
    | Beat
    | Ended
    | Ack
    | Cancel
    | BoardHello
    | BoardBeat
    | Ring
    | Waiting
    | Resumed
    | WantSlot
    | SlotGranted
    | CallerHello
    | Reload
    | Reloaded
    | Leave
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class Channel:
    """One connection: frames in, frames out, never blocking.

    What cannot be written at once is kept and written by `flush`. After the peer's end of file `closed` is true;
    messages received before that are still delivered.

    Attributes:
        closed: Nothing more will be received, nothing can be sent.
        broken: Nothing can be sent any more; what the peer has written may still be received, its last word too.
        reset: The peer closed the connection before it had read all that was written (ECONNRESET of a Unix stream
            socket: `unix_release_sock` in net/unix/af_unix.c, Linux 2.6 and later).
        queued_bytes: All that was ever handed to `send`.
        written_bytes: How much of it the kernel has taken.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._inode = os.fstat(sock.fileno()).st_ino
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self.closed = self.broken = self.reset = False
        self.queued_bytes = 0
        self.written_bytes = 0

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        """How much waits for the peer to read."""
        return self.queued_bytes - self.written_bytes

    def peer(self) -> tuple[int, int]:
        """Return (PID, user id) of the process at the other end, as the kernel knows it (SO_PEERCRED)."""
        size = struct.calcsize("3i")
        pid, uid, _ = struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return pid, uid

    def send(self, message: Message) -> int:
        """Queue one message and write what the kernel takes; return its first byte's place in `written_bytes`.

        A message whose place is not below `written_bytes` when the channel is closed has not left at all.
        """
        start = self.queued_bytes
        body = _encode(message)
        self.queued_bytes += _LENGTH.size + len(body)
        if not (self.closed or self.broken):
            self._outgoing.append(memoryview(_LENGTH.pack(len(body)) + body))
            self.flush()
        return start

    def flush(self) -> bool:
        """Write what the kernel takes; return whether everything is out."""
        while self._outgoing and not (self.closed or self.broken):
            if not self._is_ours():
                self.closed = True
                return False
            try:
                written = self._socket.send(self._outgoing[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                self.broken = True
                self._note_reset(error)
                return False
            self.written_bytes += written
            if written == len(self._outgoing[0]):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = self._outgoing[0][written:]
        return not self._outgoing

    def receive(self) -> list[Message]:
        """Return the messages that have arrived; may be empty. Sets `closed` at the end of the stream.

        Raises:
            WireError: What arrived is not our protocol; the caller closes the channel.
        """
        taken = 0
        while taken < RECEIVE_BYTES and not self.closed:
            try:
                self._check_descriptor()
                chunk = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                self.closed = True
                self._note_reset(error)
                break
            if not chunk:
                self.closed = True
            taken += len(chunk)
            self._incoming += chunk
        return list(self._frames())

    def receive_all(self) -> list[Message]:
        """Return all that a dead peer has written; a socket that has nothing more to read is at its end."""
        messages: list[Message] = []
        while not self.closed:
            before = len(messages)
            messages += self.receive()
            if len(messages) == before and not self._readable():
                break
        return messages

    def close(self) -> None:
        """Close the connection; what was not sent is lost."""
        self.closed = True
        if self._is_ours():
            self._socket.close()
        else:
            self._socket.detach()

    def forget(self) -> None:
        """Drop the descriptor in a forked copy of the process, without a word to the peer."""
        self.close()

    def _note_reset(self, error: OSError) -> None:
        self.reset = self.reset or error.errno == errno.ECONNRESET  # the kernel reports it once

    def _readable(self) -> bool:
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            self._note_reset(error)
            return False
        return True

    def _is_ours(self) -> bool:
        try:
            return os.fstat(self._socket.fileno()).st_ino == self._inode
        except OSError:
            return False

    def _check_descriptor(self) -> None:
        # A body may close all descriptors and open a file of its own under our number:
        # writing frames into that file would be worse than losing the connection.
        if not self._is_ours():
            raise OSError("the descriptor is no longer our connection")

    def _frames(self) -> Iterable[Message]:
        while len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {size(length)} was announced, at most {size(MAX_FRAME_BYTES)} are allowed")
            stop = _LENGTH.size + length
            if len(self._incoming) < stop:
                return
            body = bytes(self._incoming[_LENGTH.size : stop])
            del self._incoming[:stop]
            try:
                yield _decode(body)
            except (msgspec.MsgspecError, ValueError) as error:  # text that is no UTF-8 is a ValueError
                raise WireError(f"a message of {size(length)} cannot be read: {error}") from error


class Redial:
    """When to try again: at once, but after refusals ever later, REDIAL_S to REDIAL_MAX_S.

    A connection that brings no message and does not last REDIAL_MAX_S was a refusal.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = self._due_at = self._alone_since = clock.monotonic()
        self._pause_s = REDIAL_S
        self._is_connected = False

    def wait_s(self) -> float:
        """Return how long not to try yet."""
        return max(0.0, self._due_at - self._clock.monotonic())

    def alone_s(self) -> float:
        """Return for how long there has been nobody but who refuses; 0 while there is a connection."""
        return 0.0 if self._is_connected else self._clock.monotonic() - self._alone_since

    def connected(self) -> None:
        """Note that there is a connection."""
        self._since = self._clock.monotonic()
        self._is_connected = True

    def heard(self) -> None:
        """Note that it brought a message."""
        self._since = -math.inf

    def lost(self) -> None:
        """Note that it has ended."""
        now = self._clock.monotonic()
        self._is_connected = False
        if now - self._since >= REDIAL_MAX_S:
            self._pause_s = REDIAL_S
            self._alone_since = now
        else:
            self._due_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, REDIAL_MAX_S)
