"""The wait manager: a multiprocessing.Manager with wake-ups, so that waiters need not poll. Holds no truth.

A wake-up has a key ("task:5", "lock:smtp") and a count of its notifies. A waiter asks for the counts, polls the rows,
and waits until a count has grown beyond what it saw. So no notify between poll and wait is lost. Notifies come as
datagrams from children, and from the supervisor over the control socket. The wait manager may die or hang at any time:
the supervisor ends and replaces it, and waiters poll the rows themselves meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import select
import signal
import socket
import struct
import threading
from multiprocessing import connection, managers
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bgsupervisor.clock import Rate, SystemClock
from bgsupervisor.errors import WireError
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.channel import REDIAL_S, Channel, Redial
from bgsupervisor.ipc.messages import ProcessRef
from bgsupervisor.ipc.sockets import NOTIFY_SOCKET_NAME, bind, check_peer, connect
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.waits import EVERYBODY
from bgsupervisor.system import processes
from bgsupervisor.system.files import inode_of, is_another, open_own_dir, read_own, replace_own
from bgsupervisor.system.titles import set_title

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bgsupervisor.clock import Clock

__all__ = ["BEAT_S", "NotifyCounts", "NotifyManager", "OwnListener", "bounded_client", "main", "make_key", "read_key"]

log = logging.getLogger("bgsupervisor")

BEAT_S = 0.25
"""Interval of heartbeats to the supervisor, in seconds."""
LONELY_S = 60.0
"""Time without a supervisor and without a waiter after which the wait manager leaves, in seconds."""
CALL_S = 0.5
"""Limit of a call that should be answered at once, in seconds."""
KEY_FILE = "authkey"
KEY_BYTES = 32
KEY_MODE = NOTIFY_MODE = MANAGER_MODE = 0o600
NOTIFY_BYTES = 256 * 1024
NOTIFIES_PER_TURN = 1000
LEFT_MAX = 1000
"""Limit of the remembered waits that were left before they arrived."""
KEY_CHARS = 8000
"""Limit of the characters of a key; the waiters of a longer one poll by themselves."""
WAKE_UPS_AT_ONCE = 10
WAKE_UPS_PER_S = 4.0
"""Rate of wake-ups for one key after WAKE_UPS_AT_ONCE of them: hundreds may wait for the same key."""
KEYS_MAX = 100_000
"""Limit of the counts; beyond it they are merged into one, and every waiter polls once in vain."""


class NotifyCounts:
    """Counts of notifies, and their waiters. Every method may be called from any thread."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._rates: dict[str, Rate] = {}
        self._put_off: dict[str, None] = {}
        self._put_off_until = 0.0
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._base = 0
        self._waiting: dict[str, set[threading.Event]] = {}  # hundreds wait: only those of a key are woken
        self._waits: dict[str, threading.Event] = {}
        self._left: dict[str, None] = {}

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._waits)

    def notify(self, keys: Sequence[str]) -> None:
        """Wake the waiters of *keys*; for a key that is notified again and again, a little later (`catch_up`)."""
        with self._lock:
            now = self._clock.monotonic()
            if len(self._rates) > KEYS_MAX:
                self._rates.clear()
            due = []
            for key in dict.fromkeys(keys):
                if self._rates.setdefault(key, Rate(WAKE_UPS_AT_ONCE, WAKE_UPS_PER_S, now)).allows(now):
                    due.append(key)
                elif len(self._put_off) < KEYS_MAX:
                    self._put_off[key] = None
            self._notify(due)

    def catch_up(self) -> None:
        """Notify the keys that were put off, at most WAKE_UPS_PER_S times a second; called more often."""
        if not self._put_off:
            return
        with self._lock:
            now = self._clock.monotonic()
            if now >= self._put_off_until:
                self._put_off_until = now + 1 / WAKE_UPS_PER_S
                keys, self._put_off = list(self._put_off), {}
                self._notify(keys)

    def _notify(self, keys: Sequence[str]) -> None:
        if keys:
            forgotten = len(self._counts) > KEYS_MAX
            if forgotten:
                self._base += max(self._counts.values()) + 1
                self._counts.clear()
            for key in keys:
                self._counts[key] = self._counts.get(key, 0) + 1
            for key in list(self._waiting) if forgotten else keys:
                for event in self._waiting.get(key, ()):
                    event.set()

    def seen(self, keys: Sequence[str]) -> list[int]:
        """Return the number of notifies of each of *keys*."""
        with self._lock:
            return self._now(keys)

    def wait_beyond(self, wait: str, keys: Sequence[str], seen: list[int], timeout_s: float) -> list[int]:
        """Block until one of *keys* has been notified since *seen*, at most *timeout_s*; return the counts of then.

        *wait* names this call, for `leave`.
        """
        notified = threading.Event()
        with self._lock:
            if wait in self._left or self._now(keys) != seen:
                self._left.pop(wait, None)
                return self._now(keys)
            self._waits[wait] = notified
            for key in keys:
                self._waiting.setdefault(key, set()).add(notified)
        notified.wait(timeout_s)
        with self._lock:
            del self._waits[wait]
            for key in set(keys):
                self._waiting[key].discard(notified)
                if not self._waiting[key]:
                    del self._waiting[key]
            return self._now(keys)

    def leave(self, wait: str) -> None:
        """End a call of `wait_beyond`, whose caller has news of another kind."""
        with self._lock:
            if wait in self._waits:
                self._waits[wait].set()
            else:  # it may be on its way
                self._left[wait] = None
                while len(self._left) > LEFT_MAX:
                    del self._left[next(iter(self._left))]

    def _now(self, keys: Sequence[str]) -> list[int]:
        return [self._base + self._counts.get(key, 0) for key in keys]


_notify_counts = NotifyCounts()


def bounded_client(address: str, authkey: bytes | None = None) -> connection.Connection:
    """Connect as multiprocessing.connection.Client does, for at most CALL_S: a wait manager may be stopped.

    Raises:
        OSError, EOFError, multiprocessing.AuthenticationError: There is no wait manager that answers, or it is another
            user's, whose pickles would be run here.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CALL_S)
        sock.connect(address)
        sock.setblocking(True)
        limit = struct.pack("@ll", int(CALL_S), int(CALL_S % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, limit)
        check_peer(sock)
        made = connection.Connection(sock.detach())
    except BaseException:
        sock.close()
        raise
    try:
        if authkey is not None:
            connection.answer_challenge(made, authkey)
            connection.deliver_challenge(made, authkey)
    except BaseException:
        made.close()
        raise
    return made


class OwnListener:
    """The listener of a manager: a socket of mode 0600 from the first moment, for processes of this user only.

    The manager unpickles what they send. So neither a changed mode nor a key that was read may let others in.
    """

    def __init__(self, address: Path, backlog: int) -> None:
        del backlog  # a manager asks for fewer than there are children
        self.address = str(address)
        dir_fd = open_own_dir(address.parent)
        try:
            self._socket = bind(dir_fd, address.name, socket.SOCK_STREAM, MANAGER_MODE)
        finally:
            os.close(dir_fd)
        self._socket.setblocking(True)

    def accept(self) -> connection.Connection:
        """Return the next connection of a process of this user; blocks.

        Raises:
            OSError: There are no descriptors left.
        """
        while True:
            accepted, _ = self._socket.accept()
            try:
                check_peer(accepted)
            except PermissionError:
                accepted.close()
                continue
            accepted.setblocking(True)
            return connection.Connection(accepted.detach())

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


# The documented way to another connection is a serializer of one's own; managers keep their serializers here.
managers.listener_client["bounded"] = (OwnListener, bounded_client)  # type: ignore[attr-defined]


class NotifyManager(managers.SyncManager):
    """The manager that serves the wake-ups of one state directory."""


NotifyManager.register("counts", callable=lambda: _notify_counts, exposed=("seen", "wait_beyond"))


def read_key(dir_fd: int) -> bytes:
    """Return the key that a client must know, from the open state directory.

    Raises:
        OSError: There is no wait manager yet, the key is another user's or not whole, or this user may not wait here.
    """
    key = read_own(KEY_FILE, KEY_MODE, dir_fd=dir_fd)
    if len(key) != KEY_BYTES:  # an empty one, of a full disk, would let all in
        raise OSError(errno.EINVAL, "it holds no whole key", KEY_FILE)
    return key


def main(folder: Path) -> NoReturn:
    """Run as the wait manager of a state directory; never return."""
    os.setsid()
    set_title("wait manager")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    key = make_key(folder)
    address = Path(f"/proc/self/fd/{open_own_dir(folder)}/manager.sock")
    server = NotifyManager(address=address, authkey=key, serializer="bounded").get_server()  # type: ignore[arg-type]
    threading.Thread(target=_Caretaker(folder).run, daemon=True).start()
    with contextlib.suppress(BaseException):
        server.serve_forever()
    os._exit(0)


def make_key(folder: Path) -> bytes:
    """Write a new key in the place of an older one, and return it.

    Raises:
        OSError: The folder is not writable, or the disk is full.
    """
    key = secrets.token_bytes(KEY_BYTES)
    replace_own(folder / KEY_FILE, key, KEY_MODE)
    return key


class _Caretaker:
    """The thread for the supervisor: takes notifies, and sends heartbeats."""

    def __init__(self, folder: Path) -> None:
        self._folder = StateDir(folder)
        self._clock = SystemClock()
        self._channel: Channel | None = None
        self._redial = Redial(self._clock)
        self._dialled: int | None = None
        self._used_at = self._clock.monotonic()
        self._beat_at = -BEAT_S
        dir_fd = open_own_dir(folder)
        self._notifies = bind(dir_fd, NOTIFY_SOCKET_NAME, socket.SOCK_DGRAM, NOTIFY_MODE)
        os.close(dir_fd)

    def run(self) -> None:
        """Serve until the wait manager leaves."""
        try:
            while self._clock.monotonic() - self._used_at <= LONELY_S:
                if self._channel is None:
                    self._dial()
                self._serve(self._channel)
                if self._channel is not None or _notify_counts.waiting:
                    self._used_at = self._clock.monotonic()
        except BaseException:
            log.exception("the wait manager ends: its thread for the supervisor has failed")
        finally:
            os._exit(0)  # without this thread no notify would arrive, and nothing would end the process

    def _dial(self) -> None:
        if self._redial.wait_s() > 0:
            return
        self._dialled = inode_of(self._folder.control)
        with contextlib.suppress(OSError):
            self._channel = Channel(connect(self._folder.path, "control.sock", socket.SOCK_STREAM))
            self._redial.connected()
            pid = os.getpid()
            ref = ProcessRef(pid, processes.start_ticks(pid) or 0)
            self._channel.send(messages.WaitManagerHello(version=messages.PROTOCOL_VERSION, ref=ref))

    def _serve(self, channel: Channel | None) -> None:
        poll = select.poll()
        poll.register(self._notifies, select.POLLIN)
        if channel is not None:
            poll.register(channel, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll((REDIAL_S if channel is None else BEAT_S) * 1000)}
        if self._notifies.fileno() in ready:
            self._take_notifies()
        _notify_counts.catch_up()
        if channel is not None:
            self._exchange(channel, is_readable=channel.fileno() in ready)

    def _take_notifies(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(NOTIFIES_PER_TURN):
                datagram = self._notifies.recv(NOTIFY_BYTES)
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # the sender is no child of ours
                    message = json.loads(datagram)
                    if isinstance(message, str):
                        _notify_counts.leave(message[:KEY_CHARS])
                    elif isinstance(message, list):
                        _notify_counts.notify(
                            [key for key in message if isinstance(key, str) and len(key) <= KEY_CHARS]
                        )

    def _exchange(self, channel: Channel, *, is_readable: bool) -> None:
        with contextlib.suppress(WireError):
            for message in channel.receive() if is_readable else []:
                self._redial.heard()
                if isinstance(message, messages.Notify):
                    _notify_counts.notify(message.keys)
                elif isinstance(message, messages.Leave):
                    os._exit(0)
        now = self._clock.monotonic()
        if now - self._beat_at >= BEAT_S and not channel.unsent_bytes:
            self._beat_at = now
            channel.send(messages.WaitManagerBeat())
        if channel.closed or is_another(self._folder.control, self._dialled):  # a stopped supervisor notifies no waiter
            channel.close()
            self._channel = None
            self._redial.lost()
            _notify_counts.notify([EVERYBODY])
