"""Rows that a child writes where no supervisor does: its end, its heartbeat, a claim that never began."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from bgsupervisor import failpoints
from bgsupervisor.clock import repeat_last
from bgsupervisor.database.store import Store
from bgsupervisor.errors import BgSupervisorError
from bgsupervisor.ledger.attempts import Attempt, Batch, Telemetry
from bgsupervisor.ledger.requests import Ledger

if TYPE_CHECKING:
    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import AttemptResult, Run
    from bgsupervisor.system.processes import ProcessIdentity
    from bgsupervisor.worker.connection import Connection

__all__ = ["RECORD_RETRY_S", "Recorder", "open_ledger"]

log = logging.getLogger("bgsupervisor")

GIVE_BACK_S = 3600.0
"""Limit of the wait of a leaving idle child for a database that is away, in seconds: a claim may stand there."""
RECORD_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between two tries to record an end, in seconds; the last one repeats."""
BEAT_WAIT_S = 0.2
"""Limit of the wait of a heartbeat without a supervisor for a locked database, in seconds."""
DELETED_S = 86_400.0
"""Limit of the time to record an end where the database file was deleted, in seconds: it may be restored.

Where the database is away the limit is `keep_days`, after which the task would be deleted anyway.
"""


def open_ledger(
    config: Config, *, patience_s: float = 0.0, busy_timeout_s: float | None = None, limits_connections: bool = True
) -> Ledger:
    """Return the ledger of a child; nothing is connected yet.

    A database that is away may come back, or be restored. An empty one in its place would know no attempt, so none is
    created.
    """
    store = Store.open(
        config.database,
        config.table_prefix,
        busy_timeout_s=config.busy_timeout_s if busy_timeout_s is None else busy_timeout_s,
        creates=False,
        patience_s=patience_s,
    )
    if limits_connections:
        store.limit_connections(config.state_dir)
    return Ledger(store)


class Recorder:
    """Writes of one child that no supervisor acknowledges.

    Attributes:
        is_unrecorded: An end was given up, so the exit of this process must be reported.
    """

    def __init__(self, config: Config, identity: ProcessIdentity, connection: Connection, clock: Clock) -> None:
        self._config = config
        self._identity = identity
        self._connection = connection
        self._clock = clock
        self.is_unrecorded = False

    def record(self, attempt: Attempt, end: AttemptResult) -> None:
        """Record an end; retry until it is in, acknowledged by a supervisor, or given up."""
        failpoints.at("child.recording")
        ledger, reported, keys = self._ledger(), "", list[str]()
        began = there_at = self._clock.monotonic()
        for pause in repeat_last(RECORD_RETRY_S):
            now = self._clock.monotonic()
            there_at = there_at if ledger.store.inode() == 0 else now  # 0: the file is gone
            if now - there_at >= DELETED_S or 0 < self._config.keep_days * 86_400 <= now - began:
                log.error(
                    "the end of task %d (%s) was not recorded, giving up: %s",
                    attempt.id,
                    end.reason or "DONE",
                    reported,
                )
                self.is_unrecorded = True
                return
            try:
                ledger.end(attempt, end, keys)
            except (BgSupervisorError, OSError) as error:
                if str(error) != reported:
                    reported = str(error)
                    log.warning("the end of task %d cannot be recorded yet: %s", attempt.id, error)
                _close(ledger)
            else:
                failpoints.at("child.recorded")
                self._connection.notify(keys)
                return
            if self._connection.mailbox.acknowledged.wait(pause):
                return

    def beat(self, assignment: Run) -> None:
        """Write a heartbeat, from the connection's thread; skip it where the database is away or locked."""
        with contextlib.suppress(BgSupervisorError, OSError):
            ledger = self._ledger(busy_timeout_s=BEAT_WAIT_S)
            telemetry = Telemetry(heartbeat_at=ledger.clock.now())
            with contextlib.suppress(BgSupervisorError, OSError):
                ledger.apply(Batch(telemetry={Attempt(assignment.id, assignment.attempt): telemetry}))
            ledger.store.close()

    def give_back_not_started(self) -> None:
        """Give back what was claimed for this child and never came; retry while the database is away."""
        if not self._connection.mailbox.disconnected.is_set():
            return
        failpoints.at("child.unclaiming")
        ledger, keys = self._ledger(), list[str]()
        until = self._clock.monotonic() + GIVE_BACK_S
        for pause in repeat_last(RECORD_RETRY_S):
            try:
                ledger.unclaim_not_started(self._identity, keys)
                break
            except (BgSupervisorError, OSError):
                _close(ledger)
                if ledger.store.inode() == 0 or self._clock.monotonic() >= until:  # 0: the file is gone
                    break
            self._clock.sleep(pause)
        self._connection.notify(keys)

    def _ledger(self, busy_timeout_s: float | None = None) -> Ledger:
        return open_ledger(self._config, busy_timeout_s=busy_timeout_s)


def _close(ledger: Ledger) -> None:
    """Close a connection that failed; the next call opens another."""
    with contextlib.suppress(Exception):
        ledger.store.close()
