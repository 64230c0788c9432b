"""The attempt as its waits see it: its rows, reached with patience, and whether it should end."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, TypeVar

from bgsupervisor.errors import Cancelled, DatabaseError, NotInTask, Undecided

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import Run
    from bgsupervisor.ledger.requests import Ledger
    from bgsupervisor.ledger.waits import Waits
    from bgsupervisor.worker.mailbox import BodyConnection

__all__ = ["AWAY_S", "RunningAttempt"]

log = logging.getLogger("bgsupervisor")

T = TypeVar("T")

AWAY_S = 600.0
"""Limit of a body's wait for a database that is locked, full or away, in seconds; then its call fails."""
RETRY_S = 1.0
"""Pause between two tries to reach such a database, in seconds."""


class RunningAttempt:
    """One attempt and the rows of its parts, waits, locks and barriers."""

    def __init__(
        self,
        assignment: Run,
        connection: BodyConnection,
        open_ledger: Callable[[], Ledger],
        config: Config,
        clock: Clock,
    ) -> None:
        self.id, self.number, self.parent_id = assignment.id, assignment.attempt, assignment.parent_id
        self.connection = connection
        self.config = config
        self.clock = clock
        self._open_ledger = open_ledger
        self._ledger: Ledger | None = None
        self._closed = False

    @property
    def waits(self) -> Waits:
        """The rows; the ledger is opened at the first use."""
        if self._closed:
            raise NotInTask("the body has ended; what is left of it can neither wait nor reach anything")
        if self._ledger is None:
            self._ledger = self._open_ledger()
        return self._ledger.waits

    def patiently(self, call: Callable[[], T], *, though_cancelled: bool = False) -> T:
        """Return what *call* returns; retry for at most AWAY_S while the database is away."""
        deadline = self.clock.monotonic() + AWAY_S
        while True:
            try:
                return call()
            except Undecided:
                raise  # a second try could do it twice
            except DatabaseError as error:
                if self.clock.monotonic() >= deadline:
                    raise
                log.warning("%s; trying again", error)
            if not though_cancelled:
                self.check_cancel()
            self.clock.sleep(RETRY_S)

    def check_cancel(self) -> None:
        """Raise Cancelled if this attempt should end."""
        cancel = self.connection.mailbox.cancel_message
        if cancel is not None:
            raise Cancelled(cancel.reason, cancel.by, cancel.why)

    def close(self) -> None:
        """Close the ledger; later calls raise NotInTask."""
        self._closed = True
        if self._ledger is not None:
            with contextlib.suppress(Exception):
                self._ledger.store.close()
            self._ledger = None
