"""The statements that are run most often, as text; knows what both databases call things, and no row.

What is written out here is built once. Peewee would put it together anew each time, which takes longer than SQLite
needs to run it; and many rows that are written by one statement cost a server one round trip.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CLAIM", "FINISH", "NOTE", "REQUEST", "Statements"]

REQUEST = ("name", "data", "priority", "key", "unique_key", "run_at", "requested_at", "parent_id")

CLAIM = ("id", "attempt", "host", "boot_id", "pid_ns", "pid", "start_ticks", "slot", "started_mono")
FINISH = (
    "id", "attempt", "result", "exit_code", "signal", "cpu_s", "progress_done", "progress_total", "message",
    "peak_rss_bytes",
)  # fmt: skip
NOTE = (
    "id", "attempt", "heartbeat_at", "progress_done", "progress_total", "message", "cpu_s", "cpu_percent", "rss_bytes",
    "peak_rss_bytes", "stack",
)  # fmt: skip
"""What each row of values says, in this order."""
_FLOATS = {"progress_done", "progress_total", "cpu_s", "cpu_percent"}
_TEXTS = {"result", "message", "stack"}


class Statements:
    """The texts for one installation.

    Args:
        prefix: Of its tables.
        mark: What stands for a value.
        locks_rows: Whether it is a server, where others can have locked a single row; else nobody writes beside us.
        cleared: The columns in which an attempt leaves something that the next one begins without.
    """

    def __init__(self, prefix: str, *, mark: str, locks_rows: bool, cleared: Sequence[str]) -> None:
        self._prefix = prefix
        self._task = f'"{prefix}task"'
        self._mark = mark
        self._passing_over = "FOR UPDATE OF waiting SKIP LOCKED" if locks_rows else ""
        self._time = "TIMESTAMPTZ" if locks_rows else "TEXT"
        self._cleared = cleared

        names, marks = ", ".join(f'"{name}"' for name in REQUEST), ", ".join([mark] * len(REQUEST))
        self.request = f'INSERT INTO {self._task} ({names}) VALUES ({marks}) RETURNING "id"'  # noqa: S608 - our own names
        """Records a request; values: a REQUEST. Returns its id; what it does not name has a default in the tables."""
        self.request_as = f'INSERT INTO {self._task} ("id", {names}) VALUES ({mark}, {marks}) RETURNING "id"'  # noqa: S608 - as above
        """Records a request by an id that was drawn for it; values: that and a REQUEST."""
        self.any_due = f'SELECT 1 FROM {self._task} WHERE "status" = \'REQUEST\' AND "run_at" <= {mark} LIMIT 1'  # noqa: S608 - as above
        """Finds whether any task's time has come; value: now."""
        self.priority = f'SELECT MAX("priority") FROM {self._task} WHERE "status" = \'REQUEST\''  # noqa: S608 - as above
        """Finds the highest priority of those that wait."""
        self.priority_below = f'{self.priority} AND "priority" < {mark}'
        """Finds the next one; value: the one before."""
        self.control_requests = f"""
            SELECT "id", "attempt", "cancel_requested_at" IS NOT NULL, "cancel_requested_by",
                "suspend_requested_at" IS NOT NULL
            FROM {self._task} WHERE "status" = 'START'
                AND ("cancel_requested_at" IS NOT NULL OR "suspend_requested_at" IS NOT NULL)
        """.strip()  # noqa: S608 - as above
        """Finds the running attempts that somebody wants something of."""
        self.next_due_at = f"""
            SELECT "run_at" FROM {self._task} WHERE "status" = 'REQUEST' AND "run_at" > {mark} ORDER BY "run_at" LIMIT 1
        """.strip()  # noqa: S608 - as above
        """Finds when the next task's time comes; value: now."""

    @functools.lru_cache(maxsize=100)  # noqa: B019 - as many as there are slots, for one object per process
    def due(self, names: int, compared: str, *, unlocked: bool) -> str:
        """Return what finds tasks whose time has come; values: now, the names, a priority, the limit.

        Args:
            names: How many names.
            compared: How the tasks' priority compares with the one given.
            unlocked: Only rows that nobody has locked.
        """
        task = self._task
        skipping = f"FOR UPDATE OF {task} SKIP LOCKED" if unlocked and self._passing_over else ""
        return f"""
            SELECT "id", "attempt", "name", "data", "key", "parent_id" FROM {task}
            WHERE "status" = 'REQUEST' AND "run_at" <= {self._mark} AND "name" IN ({", ".join([self._mark] * names)})
                AND "priority" {compared} {self._mark}
                AND NOT EXISTS (SELECT 1 FROM "{self._prefix}dependency" AS before WHERE before."task_id" = {task}."id")
            ORDER BY "priority" DESC, "run_at", "id" LIMIT {self._mark} {skipping}
        """.strip()  # noqa: S608 - our own names

    @functools.lru_cache(maxsize=100)  # noqa: B019 - as above
    def claim(self, count: int) -> str:
        """Return what begins attempts of *count* tasks that still wait; values: a CLAIM for each, and twice the time.

        Returns id and attempt of those that were claimed. A row that somebody has locked just now is passed over, not
        waited for. Which rows are free is asked once: as part of the join a server may ask it anew for each row that
        waits.
        """
        mine, times = CLAIM[2:], ("started_at", "heartbeat_at")
        # guard, claim."attempt" + 1 -> MAX(1, claim."attempt"): each claim raises the attempt
        sets = ['"attempt" = claim."attempt" + 1']
        sets += [f'"{name}" = NULL' for name in self._cleared if name not in {*mine, *times}]
        sets += [f'"{name}" = claim."{name}"' for name in mine]
        sets += [f'"{name}" = {self._mark}' for name in times]
        return f"""
            {self._rows("claim", CLAIM, count)},
            free AS (
                SELECT claim.* FROM claim JOIN {self._task} AS waiting ON waiting."id" = claim."id"
                    AND waiting."attempt" = claim."attempt" AND waiting."status" = 'REQUEST'
                {self._passing_over}
            )
            UPDATE {self._task} SET "status" = 'START', {", ".join(sets)}
            FROM free AS claim
            {self._where("claim", "REQUEST")}
        """  # noqa: S608 - our own names

    @functools.lru_cache(maxsize=100)  # noqa: B019 - as above
    def finish(self, count: int, emptied: tuple[str, ...]) -> str:
        """Return what ends *count* attempts as DONE and empties columns; values: a FINISH for each, then the time.

        Returns id and attempt of those that ran. A peak is the largest that is known.
        """
        peak = f'{self._task}."peak_rss_bytes"'
        told = f"{self._cast('finish', 'peak_rss_bytes')}"
        sets = [f'"{name}" = NULL' for name in emptied]
        sets += [self._known("finish", name) for name in FINISH[3:-1]]
        sets += [f'"peak_rss_bytes" = CASE WHEN {peak} > {told} THEN {peak} ELSE COALESCE({told}, {peak}) END']
        sets += [f'"result" = {self._cast("finish", "result")}', f'"ended_at" = {self._mark}']
        return f"""
            {self._rows("finish", FINISH, count)}
            UPDATE {self._task} SET "status" = 'DONE', {", ".join(sets)}
            FROM finish
            {self._where("finish", "START")}
        """  # noqa: S608 - as above

    @functools.lru_cache(maxsize=100)  # noqa: B019 - as above
    def note(self, count: int) -> str:
        """Return what writes down what is known of *count* running attempts; values: a NOTE for each."""
        return f"""
            {self._rows("note", NOTE, count)}
            UPDATE {self._task} SET {", ".join(self._known("note", name) for name in NOTE[2:])}
            FROM note
            {self._where("note", "START")}
        """  # noqa: S608 - as above

    @functools.lru_cache(maxsize=100)  # noqa: B019 - as above
    def concerned(self, count: int) -> str:
        """Return what finds which of *count* tasks hold or wait for something, or are waited for.

        Values: the ids, thrice.
        0 is among what it returns if some barrier is in use: then any of them may be missed there.
        """
        ids = ", ".join([self._mark] * count)
        where = {"wait": "task_id", "hold": "task_id", "dependency": "on_id"}
        found = [f'SELECT "{id}" FROM "{self._prefix}{name}" WHERE "{id}" IN ({ids})' for name, id in where.items()]  # noqa: S608 - as above
        return " UNION ".join([*found, f'SELECT 0 WHERE EXISTS (SELECT 1 FROM "{self._prefix}participant")'])  # noqa: S608 - as above

    def _rows(self, name: str, columns: Sequence[str], count: int) -> str:
        row = f"({', '.join([self._mark] * len(columns))})"
        names = ", ".join(f'"{column}"' for column in columns)
        return f"WITH {name} ({names}) AS (VALUES {', '.join([row] * count)})"

    def _where(self, name: str, status: str) -> str:
        task = self._task
        conditions = (
            f'{task}."id" = {name}."id"',
            # guard: the batch statements name the attempt
            f'{task}."attempt" = {name}."attempt"',
            # guard: the batch statements name the status
            f"{task}.\"status\" = '{status}'",
        )
        return f'WHERE {" AND ".join(conditions)} RETURNING {task}."id", {task}."attempt"'

    def _known(self, name: str, column: str) -> str:
        """Return the assignment of a value that is NULL where the column is to stay as it is."""
        return f'"{column}" = COALESCE({self._cast(name, column)}, {self._task}."{column}")'

    def _cast(self, name: str, column: str) -> str:
        """Return a value with its type: a server does not know that of a column which is NULL in every row."""
        kind = "DOUBLE PRECISION" if column in _FLOATS else "TEXT" if column in _TEXTS else "BIGINT"
        return f'CAST({name}."{column}" AS {self._time if column == "heartbeat_at" else kind})'
