"""The words that systemd wants to hear: READY, WATCHDOG, STOPPING. Knows nothing else."""

from __future__ import annotations

import contextlib
import socket

from bgsupervisor.sanitize import clean

__all__ = ["Notifier"]


class Notifier:
    """Speaks to the socket of NOTIFY_SOCKET; silent without one. Never blocks, never fails.

    Args:
        address: A path, or a name that begins with "@" (abstract); None is no manager.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address

    @property
    def listened_to(self) -> bool:
        """Whether a service manager started this process."""
        return self._address is not None

    def ready(self, status: str) -> None:
        """Say that the start is over."""
        self._say(f"READY=1\nSTATUS={clean(status)}")

    def alive(self) -> None:
        """Feed the watchdog; called from the loop that does the work, so that a stuck loop is noticed."""
        self._say("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        """Say that the end has begun."""
        self._say(f"STOPPING=1\nSTATUS={clean(status)}")

    def _say(self, text: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.settimeout(0)
            speaker.sendto(text.encode(), address)
