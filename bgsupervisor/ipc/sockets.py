"""Unix sockets in a folder: made, dialled and checked for their owner; knows no messages.

Sockets are addressed relative to an open directory descriptor, because an address holds 107 bytes only and state
directories lie deeper.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from bgsupervisor.system.files import open_dir

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["abandon_wait", "bind", "check_peer", "connect", "notify_waiters", "send_datagram"]

_CREDENTIALS = struct.Struct("3i")
"""PID, user and group of a peer."""
LISTEN_BACKLOG = 1024
"""More than all children of the largest configuration, so that none is refused when all connect at once."""
NOTIFY_SOCKET_NAME = "notify.sock"
KEYS_AT_ONCE = 50
"""Keys in one datagram; they stay far below the limit of a socket."""
SHORT_ADDRESS_BYTES = 100
"""Longer addresses go through the directory descriptor; systems allow 104 to 108 bytes."""


def bind(dir_fd: int, name: str, kind: socket.SocketKind, mode: int) -> socket.socket:
    """Return a non-blocking Unix socket that answers as *name* in the folder *dir_fd*; streams listen.

    It is made under a temporary name and then renamed, so that no process meets it half made, and a socket of that
    name that was left behind is replaced in one step. *mode* are its rights whatever the umask. Linux only.

    Raises:
        OSError: The folder is not writable, is gone, or /proc is not mounted.
    """
    temporary = f".{name}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=dir_fd)
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        bound.settimeout(0)
        bound.bind(_address(dir_fd, temporary))
        os.chmod(temporary, mode, dir_fd=dir_fd)
        if kind == socket.SOCK_STREAM:
            bound.listen(LISTEN_BACKLOG)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        bound.close()
        with suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise
    return bound


def connect(folder: int | Path, name: str, kind: socket.SocketKind) -> socket.socket:
    """Return a non-blocking Unix socket connected to *name* in *folder*, a path or a descriptor. Never blocks.

    Raises:
        FileNotFoundError: There is no such socket.
        ConnectionRefusedError: Nobody listens there any more.
        BlockingIOError: Its queue is full; try again later.
        PermissionError: Another user's process listens there.
        OSError: Anything else, such as a folder that this user may not enter.
    """
    dialled = socket.socket(socket.AF_UNIX, kind)
    try:
        dialled.settimeout(0)
        with _reachable(folder, name) as address:
            dialled.connect(address)
        if kind == socket.SOCK_STREAM:
            check_peer(dialled)
    except BaseException:
        dialled.close()
        raise
    return dialled


def check_peer(connection: socket.socket) -> None:
    """Refuse a Unix stream whose other end is another user's; nothing where the system knows no credentials.

    Of a listening socket the credentials are those of the process that called listen() (SO_PEERCRED, unix(7)).

    Raises:
        PermissionError: The other end is another user's process.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(answer)
    if uid != os.geteuid():
        raise PermissionError(errno.EPERM, "the process at the other end is another user's")


def send_datagram(path: Path, payload: bytes = b"") -> bool:
    """Send *payload* to the datagram socket *path*; True if a process listens. Never blocks, never raises.

    False also where the listener's queue is full (it has been notified already), where this user may not send, and on
    systems without Unix sockets: a wake-up may get lost, so do not rely on it alone.
    """
    if not hasattr(socket, "AF_UNIX"):
        return False
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wake_ups,
            _reachable(path.parent, path.name) as address,
        ):
            wake_ups.settimeout(0)
            wake_ups.sendto(payload, address)
    except OSError:
        return False
    return True


def notify_waiters(folder: Path, keys: Sequence[str]) -> bool:
    """Ring wake-ups at the wait manager of a state directory; False where none listens. Never blocks, never raises."""
    some = [keys[first : first + KEYS_AT_ONCE] for first in range(0, len(keys), KEYS_AT_ONCE)]
    return all(send_datagram(folder / NOTIFY_SOCKET_NAME, json.dumps(list(these)).encode()) for these in some)


def abandon_wait(folder: Path, wait: str) -> bool:
    """End a wait at the wait manager that is no longer needed; as `notify_waiters`."""
    return send_datagram(folder / NOTIFY_SOCKET_NAME, json.dumps(wait).encode())


def _address(dir_fd: int, name: str) -> str:
    return f"/proc/self/fd/{dir_fd}/{name}"


@contextmanager
def _reachable(folder: int | Path, name: str) -> Iterator[str]:
    """Yield an address of *name* in *folder* that is short enough for a socket."""
    if isinstance(folder, int):
        yield _address(folder, name)
    elif len(os.fsencode(folder / name)) <= SHORT_ADDRESS_BYTES:
        yield str(folder / name)
    else:
        dir_fd = open_dir(folder)
        try:
            yield _address(dir_fd, name)
        finally:
            os.close(dir_fd)
