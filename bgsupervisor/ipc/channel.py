"""Framed messages on a Unix stream, and when to connect again; knows no message by name.

A frame is a 4-byte big-endian length and one encoded message.
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
from bgsupervisor.ipc.messages import Message, decode, encode
from bgsupervisor.sizes import size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bgsupervisor.clock import Clock

__all__ = ["Channel", "Redial"]

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


class Channel:
    """One connection: frames in, frames out, never blocking.

    Bytes that cannot be written at once are kept and written by `flush`. After the peer's end of file `closed` is true;
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

        A message whose place is not below `written_bytes` when the channel is closed was not sent at all.
        """
        start = self.queued_bytes
        body = encode(message)
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
            WireError: The bytes that arrived are not our protocol; the caller closes the channel.
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
                yield decode(body)
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
        """Return for how long every connection was refused; 0 while there is a connection."""
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
