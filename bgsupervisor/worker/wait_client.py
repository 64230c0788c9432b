"""The client of the wait manager: counts of notifies, and waits for the next one. Knows no rows."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from multiprocessing import AuthenticationError
from multiprocessing import connection as connections
from typing import TYPE_CHECKING, Any

from bgsupervisor.ipc.sockets import abandon_wait
from bgsupervisor.system.files import open_own_dir
from bgsupervisor.worker.wait_manager import CALL_S, NotifyManager, read_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["WakeUps"]


class WakeUps:
    """A client of the wait manager that never hangs longer than CALL_S. For one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._directory: int | None = None
        self._proxy: Any = None
        self._name = secrets.token_hex(8)
        self._calls = itertools.count()
        self.pid = os.getpid()

    def seen(self, keys: Sequence[str]) -> list[int] | None:
        """Return the counts of *keys*; None if there is no wait manager that answers."""
        try:
            if self._proxy is None:
                self._connect()
            return list(self._proxy.seen(list(keys)))
        except (OSError, EOFError, AuthenticationError):
            self.drop()
            return None

    def wait_beyond(self, keys: Sequence[str], seen: list[int], timeout_s: float, wake_fd: int) -> list[int] | None:
        """Wait for a wake-up, for *wake_fd* to become readable, or *timeout_s*; return the counts, None if unknown."""
        wait = f"{self._name}.{next(self._calls)}"
        try:
            wire_end = self._proxy._tls.connection  # noqa: SLF001 - a proxy's own call could not be woken
            wire_end.send((self._proxy._id, "wait_beyond", (wait, list(keys), seen, timeout_s), {}))  # noqa: SLF001
            ready = connections.wait([wire_end, wake_fd], timeout_s + CALL_S)
            if wire_end not in ready and abandon_wait(self._folder, wait):  # else its thread there would wait on
                ready = connections.wait([wire_end], CALL_S)
            if wire_end in ready:
                kind, counts = wire_end.recv()
                if kind == "#RETURN":
                    return list(counts)
        except (OSError, EOFError, AttributeError, ValueError):
            pass
        self.drop()  # an answer that comes later would be taken for another call's
        return None

    def drop(self) -> None:
        """Close the connection; the next call makes another."""
        if self._proxy is not None:
            with contextlib.suppress(OSError, AttributeError):
                self._proxy._tls.connection.close()  # noqa: SLF001 - as above
                del self._proxy._tls.connection  # noqa: SLF001
        self._proxy = None
        if self._directory is not None:
            with contextlib.suppress(OSError):
                os.close(self._directory)
            self._directory = None

    def _connect(self) -> None:
        self._directory = open_own_dir(self._folder)
        address = f"/proc/self/fd/{self._directory}/manager.sock"
        manager = NotifyManager(address=address, authkey=read_key(self._directory), serializer="bounded")
        manager.connect()
        proxy: Any = manager.counts()  # type: ignore[attr-defined]
        proxy._close.cancel()  # noqa: SLF001 - the wake-ups live as long as the wait manager: nothing to give back, nor to wait for
        self._proxy = proxy
