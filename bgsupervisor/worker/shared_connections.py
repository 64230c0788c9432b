"""Connections that the import of an application opened: all forked children share each of them.

Two processes on one connection read each other's answers, share transactions and locks, and hang. SQLite forbids it
(https://www.sqlite.org/howtocorrupt.html, section 2.6). Reads descriptors only, so it covers every library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bgsupervisor.system.descriptors import STANDARD, identity_of, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.system.descriptors import Identity

__all__ = ["Imports", "close_reopening"]

log = logging.getLogger("bgsupervisor")

SHOWN = 5
"""Limit of the connections of a module that a warning names."""
SQLITE_HEADER = b"SQLite format 3\0"
ADVICE = 'open it in `child_setup`, see "Connections" in docs/frameworks.md'


class Connection(NamedTuple):
    """A descriptor that leads to a server or a database; *peer* is its address or path."""

    number: int
    identity: Identity
    peer: str
    supervised: bool = False


class Imports:
    """The connections that the import of each module opened.

    Args:
        database: The supervised SQLite file, None where the tasks are in PostgreSQL.
    """

    def __init__(self, database: Path | None) -> None:
        self._database = database
        self._known = set(_connections(database))
        self._opened: dict[str, list[Connection]] = {}

    def attribute(self, module: str) -> None:
        """Attribute the connections that were opened since the last call to the import of *module*."""
        found = [one for one in _connections(self._database) if one not in self._known]
        self._known.update(found)
        if found:
            self._opened[module] = found

    def warnings(self, *, supervised: bool) -> list[str]:
        """Return a sentence for each module that left connections open.

        Args:
            supervised: Whether to name the connections to the supervised SQLite file, or all others.
        """
        still = set(_connections(self._database))
        found = []
        for module, opened in self._opened.items():
            left = [one.peer for one in opened if one in still and one.supervised is supervised]
            if left and supervised:
                found.append(
                    f"importing {module} left the supervised database {left[0]} open: children that are forked now can "
                    f"lose committed tasks. Close it before the import ends, and {ADVICE}"
                )
            elif left:
                names = ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "")
                them = f"{len(left)} connection{'s' * (len(left) > 1)}"
                found.append(
                    f"importing {module} opened {them}: {names}. All children share it, so bodies fail, hang or mix "
                    f"their transactions; {ADVICE}"
                )
        return found


def close_reopening() -> None:
    """Close this thread's connections that reopen by themselves: those of Django, and of a `Service`."""
    if models := sys.modules.get("bgsupervisor.database.store"):  # what is not imported has opened nothing
        models.close_owned()
    conf, db = sys.modules.get("django.conf"), sys.modules.get("django.db")
    if conf is None or db is None or not conf.settings.configured:
        return
    try:
        for connection in db.connections.all(initialized_only=True):
            connection.close()
            if hasattr(connection, "close_pool"):  # Django 5.1 and later, on PostgreSQL
                connection.close_pool()
    except Exception as error:  # noqa: BLE001 - a backend of anybody's
        log.warning("cannot close the connections that Django opened at import: %s", error)


def _connections(database: Path | None) -> Iterator[Connection]:
    for number in numbers():
        identity = None if number in STANDARD else identity_of(number)
        if identity is None:
            continue
        with contextlib.suppress(OSError):  # closed by another thread meanwhile
            found = os.fstat(number)
            if stat.S_ISSOCK(found.st_mode) and (peer := _peer(number)):
                yield Connection(number, identity, peer)
            elif stat.S_ISREG(found.st_mode) and _is_sqlite(number, identity.name):
                yield Connection(number, identity, identity.name, _is_file(found, database))


def _peer(number: int) -> str:
    """Return the address of a stream's peer; "" without one, as for half of a pair."""
    blocks = os.get_blocking(number)
    try:
        with socket.socket(fileno=os.dup(number)) as copy:
            if copy.type != socket.SOCK_STREAM:
                return ""  # a datagram is whole, whichever process sends it
            peer = copy.getpeername()
    finally:
        os.set_blocking(number, blocks)  # socket.setdefaulttimeout() changes it, for the copy shares it
    if isinstance(peer, tuple):
        return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
    return peer.decode(errors="replace").replace("\0", "@") if isinstance(peer, bytes) else str(peer)


def _is_sqlite(number: int, name: str) -> bool:
    # Read by the descriptor that is there: to close another one of the file would drop the application's locks on it.
    header = os.pread(number, len(SQLITE_HEADER), 0)
    return header == SQLITE_HEADER or (not header and Path(f"{name}-wal").exists())


def _is_file(found: os.stat_result, path: Path | None) -> bool:
    with contextlib.suppress(OSError):
        return path is not None and os.path.samestat(found, path.stat())
    return False
