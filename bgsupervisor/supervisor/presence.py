"""The row by which others see that a supervisor lives, and what its fork server has loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor.ipc import messages
from bgsupervisor.ledger.records import SupervisorRecord

if TYPE_CHECKING:
    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.config import Config
    from bgsupervisor.supervisor.children import Children
    from bgsupervisor.supervisor.forkservers import ForkServers
    from bgsupervisor.system.processes import ProcessIdentity

__all__ = ["Presence"]

BEAT_EVERY_S = 15.0
"""Longest interval between two renewals of the supervisor's row, in seconds.

While something runs it is renewed with each round of heartbeats (`heartbeat_s`). So a silent body differs from one
whose heartbeats could not be written.
"""


class Presence:
    """Says when the supervisor's row is due, and what it contains; writes nothing."""

    def __init__(
        self, config: Config, own: ProcessIdentity, children: Children, fork_servers: ForkServers, clock: AttendedClock
    ) -> None:
        self.config = config
        self._own = own
        self._children = children
        self._fork_servers = fork_servers
        self._clock = clock
        self._started_at = clock.now()
        self._row_at = clock.monotonic() + BEAT_EVERY_S
        self._beat_at = -math.inf
        self._catalogue: str | None = None

    def renew(self) -> None:
        """Make the row due in the next write."""
        self._beat_at = -math.inf

    def is_due(self, now: float) -> bool:
        """Whether the row should be written; *now* is monotonic."""
        return now >= self._beat_at + self._beat_every_s() and self.is_worth_a_row()

    def written(self, now: float) -> None:
        """Note that the row was committed; *now* is monotonic."""
        self._beat_at = now

    def _beat_every_s(self) -> float:
        is_compared = any(child.slot is not None for child in self._children.running())
        return min(BEAT_EVERY_S, self.config.heartbeat_s) if is_compared else BEAT_EVERY_S

    def is_worth_a_row(self) -> bool:
        """Whether to write the row: once tasks are loaded, or after BEAT_EVERY_S even if they are still loading."""
        known = self._fork_servers.ours() is not None or self._catalogue is not None
        return known or self._clock.monotonic() >= self._row_at

    def record(self) -> SupervisorRecord:
        """Return the row as it should be now."""
        fork_server = self._fork_servers.ours()
        if fork_server is not None:
            self._catalogue = msgspec.json.encode(fork_server.hello.catalogue).decode()
        dangers = [messages.LoadFailure("", danger) for danger in self._fork_servers.dangers()]
        failures = [*dangers, *self._fork_servers.failures()]
        return SupervisorRecord(
            host=self._own.host,
            boot_id=self._own.boot_id,
            pid_ns=self._own.pid_ns,
            pid=self._own.pid,
            start_ticks=self._own.start_ticks,
            started_at=self._started_at,
            heartbeat_at=self._clock.now(),
            slots=self.config.slots,
            version=_version(),
            catalogue="{}" if self._catalogue is None else self._catalogue,
            code_error=msgspec.json.encode(failures).decode() if failures else None,
        )


def _version() -> str:
    from bgsupervisor import __version__  # noqa: PLC0415 - the package names its version last

    return __version__
