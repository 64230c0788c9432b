"""The ledger of a TaskBox: it runs or forgets requests when the application commits or rolls back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgsupervisor import __version__
from bgsupervisor.ledger.records import SupervisorRecord
from bgsupervisor.ledger.requests import Ledger
from bgsupervisor.testing.bodies import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from bgsupervisor.database.store import Store
    from bgsupervisor.ledger.external import ExternalConnection
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.ledger.requests import Request
    from bgsupervisor.statuses import Status
    from bgsupervisor.testing.box import TaskBox

__all__ = ["BoxLedger"]


class BoxLedger(Ledger):
    """The ledger of a box, which hears of what is requested; a living supervisor seems to be there.

    Args:
        box: Whose rows.
        store: Its database.
        passed: Returns the application's connection that requests belong to, None if there is none. The rows are not in
            its database, but a request counts from its commit on, and not after a rollback.
    """

    def __init__(self, box: TaskBox, store: Store, external: Callable[[], ExternalConnection | None]) -> None:
        super().__init__(store, box.clock)
        self._box = box
        self._external = external

    def request_many(self, requests: Sequence[Request]) -> list[tuple[int, bool]]:
        """Record requests; see `Ledger.request_many`."""
        if any(one.unique_key is not None or one.after for one in requests):  # of tasks that were rolled back meanwhile
            self._box._settle()  # noqa: SLF001 - a part of the box
        external = self._external()  # before anything is recorded: a connection that cannot be is refused
        found = super().request_many(requests)
        self._box._recorded([id for id, created in found if created], external, new=True)  # noqa: SLF001
        return found

    def forget(self, ids: Sequence[int]) -> None:
        """Delete requests that were rolled back where the application made them."""
        with self.store.writing():
            self._task.delete().where(self._task.id.in_(ids)).execute()

    def cancel(self, id: int, *, by: str | None, keys: list[str] | None = None) -> TaskRecord:
        """End a waiting task, ask a running one to end; see `Ledger.cancel`."""
        record = super().cancel(id, by=by, keys=keys)
        self._box._cancel_asked(record)  # noqa: SLF001
        return record

    def retry(self, id: int) -> TaskRecord:
        """Plan an interrupted task again; see `Ledger.retry`."""
        record = super().retry(id)
        self._box._recorded([id], self._external(), new=False)  # noqa: SLF001
        return self.get(id) or record

    def get(self, id: int) -> TaskRecord | None:
        """Return a task; see `Ledger.get`."""
        self._box._settle()  # noqa: SLF001
        return super().get(id)

    def find(
        self,
        *,
        names: Collection[str] | None = None,
        key: str | None = None,
        statuses: Collection[Status] | None = None,
        limit: int | None = None,
    ) -> list[TaskRecord]:
        """Return tasks, newest first; see `Ledger.find`."""
        self._box._settle()  # noqa: SLF001
        return super().find(names=names, key=key, statuses=statuses, limit=limit)

    def status(self, id: int) -> Status | None:
        """Return a task's status; see `Ledger.status`."""
        self._box._settle()  # noqa: SLF001
        return super().status(id)

    def counts(self, name: str | None = None) -> dict[Status, int]:
        """Return how many tasks have each status; see `Ledger.counts`."""
        self._box._settle()  # noqa: SLF001
        return super().counts(name)

    def supervisors(self) -> list[SupervisorRecord]:
        """Return one that was seen just now, so that nothing warns of its absence; it vouches for no task."""
        ref, now = identity(), self._box.clock.now()
        return [
            SupervisorRecord(
                host=ref.host,
                boot_id=ref.boot_id,
                pid_ns=ref.pid_ns,
                pid=ref.pid,
                start_ticks=ref.start_ticks,
                started_at=now,
                heartbeat_at=now,
                slots=16,
                version=__version__,
                catalogue="{}",
                code_error=None,
            )
        ]
