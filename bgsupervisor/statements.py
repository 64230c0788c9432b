"""The statements that are run most often, as text; knows what both databases call things, and no row.

What is written out here is built once. Peewee would put it together anew each time, which takes longer than SQLite
needs to run it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Statements"]

CLAIMED = ("host", "boot_id", "pid_ns", "pid", "start_ticks", "slot", "started_mono")
"""What each claim brings along, after id and attempt."""


class Statements:
    """The texts for one installation.

    Args:
        prefix: Of its tables.
        mark: What stands for a value.
        locks_rows: Whether others can have locked a single row; else nobody writes beside us.
        cleared: The columns that an earlier attempt may have left something in.
    """

    def __init__(self, prefix: str, *, mark: str, locks_rows: bool, cleared: Sequence[str]) -> None:
        self._task = f'"{prefix}task"'
        self._mark = mark
        self._cleared = cleared
        self._passing_over = "FOR UPDATE OF waiting SKIP LOCKED" if locks_rows else ""

    @functools.lru_cache(maxsize=100)  # noqa: B019 - as many as there are slots, for one object per process
    def claim(self, count: int) -> str:
        """Return the statement that begins attempts of *count* tasks that still wait, as a row of values for each says.

        Values: per row id, attempt and CLAIMED; then started_at and heartbeat_at. Returns the ids of those that were
        claimed. A row that somebody has locked just now is passed over, not waited for.
        """
        row = f"({', '.join([self._mark] * (2 + len(CLAIMED)))})"
        names = ", ".join(f'"{name}"' for name in ("id", "attempt", *CLAIMED))
        sets = [f'"{name}" = NULL' for name in self._cleared if name not in {*CLAIMED, "started_at", "heartbeat_at"}]
        sets += [f'"{name}" = claim."{name}"' for name in CLAIMED]
        sets += [f'"started_at" = {self._mark}', f'"heartbeat_at" = {self._mark}']
        return f"""
            WITH claim ({names}) AS (VALUES {", ".join([row] * count)})
            UPDATE {self._task} SET "status" = 'START', "attempt" = claim."attempt" + 1, {", ".join(sets)}
            FROM (
                SELECT claim.* FROM claim JOIN {self._task} AS waiting ON waiting."id" = claim."id"
                    AND waiting."attempt" = claim."attempt" AND waiting."status" = 'REQUEST'
                {self._passing_over}
            ) AS claim
            WHERE {self._task}."id" = claim."id" AND {self._task}."attempt" = claim."attempt"
                AND {self._task}."status" = 'REQUEST'
            RETURNING {self._task}."id"
        """  # noqa: S608 - our own names
