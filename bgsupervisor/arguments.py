"""Arguments of requests and questions, checked and in the form that rows have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from bgsupervisor import task_context, tasks
from bgsupervisor.errors import RequestRefused
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.task_context import Handle

    TaskLike = type[tasks.Task] | tasks.FunctionTask[..., Any] | str
    Key = str | int | UUID

__all__ = [
    "RequestOptions",
    "after_ids",
    "check_bytes",
    "checked_text",
    "is_storable",
    "key_text",
    "limit_of",
    "status_of",
    "task_id",
]

PRIORITY_LIMIT = 2**31 - 1
KEY_CHARS = 1000
KEY_BYTES_ON_SERVER = 2600
"""Limit of the bytes of a key, and of name and unique key together: a row of a PostgreSQL index has 2,704."""
LIMIT_MAX = 2**31 - 1
"""Largest limit of a list that a database takes."""


def after_ids(after: Sequence[Handle | int] | Handle | int | None) -> tuple[int, ...]:
    """Return the ids of *after*, which may be one task or several."""
    if after is None:
        return ()
    several = isinstance(after, Iterable) and not isinstance(after, str | bytes)
    awaited: Iterable[object] = after if several else [after]  # type: ignore[assignment]
    try:
        return tuple(task_context.checked_ids(awaited))
    except ValueError:
        raise RequestRefused(f"after is {after!r}; it must be a handle or an id, or a list of them") from None


def task_id(task: object) -> int:
    """Return the id of a task that is given by handle or id."""
    try:
        return task_context.checked_ids([task])[0]
    except ValueError:
        raise RequestRefused(f"the task is {repr(task)[:60]}; give a handle or an id, a whole number") from None


def limit_of(limit: object) -> int | None:
    """Return a limit of a list as the ledger takes it; None is no limit."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise RequestRefused(f"limit is {repr(limit)[:60]}; it must be a whole number, 0 or more, or None")
    return min(limit, LIMIT_MAX)


def status_of(status: object) -> Status:
    """Return the Status of a name."""
    try:
        return Status(str(status))
    except ValueError:
        words = ", ".join(Status)
        raise RequestRefused(f"status is {repr(status)[:60]}; it must be one of {words}") from None


def is_storable(text: str) -> bool:
    """Return whether a text can be encoded: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """The arguments that all requests of one call share; each is checked when it is read."""

    run_at: datetime | None = None
    delay_s: float | None = None
    priority: int = 0
    key: Key | None = None
    unique: Key | bool | None = None
    after: tuple[int, ...] = ()
    after_any_end: bool = False

    def when(self, clock: Clock) -> datetime | None:
        """Return the moment before which the task does not start, in UTC; None is at once."""
        if self.run_at is not None and self.delay_s is not None:
            raise RequestRefused("run_at and delay_s were both given; give one of them")
        if self.run_at is not None:
            if not isinstance(self.run_at, datetime):
                raise RequestRefused(f"run_at is {self.run_at!r}; it must be a datetime with a time zone")
            if self.run_at.utcoffset() is None:
                raise RequestRefused(
                    f"run_at {self.run_at.isoformat()} has no time zone, so the moment is not known; "
                    "give an aware datetime, as datetime.now(timezone.utc)"
                )
            try:
                return self.run_at.astimezone(UTC)
            except OverflowError:
                raise RequestRefused(f"run_at {self.run_at.isoformat()} lies beyond the calendar") from None
        if self.delay_s is None:
            return None
        if isinstance(self.delay_s, bool) or not isinstance(self.delay_s, int | float) or not self.delay_s >= 0:
            raise RequestRefused(f"delay_s is {self.delay_s!r}; it must be a number of seconds, 0 or more")
        try:
            return clock.now() + timedelta(seconds=self.delay_s)
        except OverflowError:
            raise RequestRefused(f"delay_s is {self.delay_s!r}; that moment lies beyond the calendar") from None

    def checked_priority(self) -> int:
        """Return the priority."""
        priority = self.priority
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > PRIORITY_LIMIT:
            raise RequestRefused(f"priority is {priority!r}; it must be a whole number, larger is sooner")
        return priority

    def checked_key(self) -> str | None:
        """Return the key as rows have it."""
        return checked_text("key", self.key)

    def unique_key(self) -> str | None:
        """Return the key that one live task of the class may hold, None if any number may."""
        if self.unique is None or self.unique is False:
            return None
        if self.unique is True:
            return self.checked_key() or ""
        return checked_text("unique", self.unique)


def _as_text(what: str, key: object) -> str:
    """Return a key as rows hold it, a text: the id of a user may be a number or a UUID."""
    if isinstance(key, str):
        return key
    if isinstance(key, bool) or not isinstance(key, int | UUID):
        raise RequestRefused(f"{what} is {repr(key)[:60]}; it must be a text, a whole number or a UUID")
    return str(int(key) if isinstance(key, int) else key)  # the text of an IntEnum is that of its number


def key_text(key: Key | None) -> str | None:
    """Return a key that is searched for, as rows have it."""
    return checked_text("key", key)


def checked_text(what: str, given: object) -> str | None:
    """Return a key as rows have it, None if none is given."""
    if given is None:
        return None
    text = _as_text(what, given)
    if not text or len(text) > KEY_CHARS:
        raise RequestRefused(f"{what} is {text[:60]!r}; it must be a text of 1 to {KEY_CHARS} characters")
    if not is_storable(text):
        raise RequestRefused(f"{what} is {text[:60]!r}; it holds half a surrogate pair, which no database stores")
    if "\0" in text:
        raise RequestRefused(f"{what} is {text[:60]!r}; it holds a NUL character, which PostgreSQL does not store")
    return text


def check_bytes(name: str, key: str | None, unique_key: str | None) -> None:
    """Check that name and keys fit into an index of PostgreSQL."""
    named = "name" if unique_key is None else "name and unique together"
    for what, text in (("key", key or ""), (named, name + (unique_key or ""))):
        size_bytes = len(text.encode("utf-8", "surrogatepass"))
        if size_bytes > KEY_BYTES_ON_SERVER:
            raise RequestRefused(
                f"{what}: {size_bytes} bytes, and PostgreSQL takes at most {KEY_BYTES_ON_SERVER}; choose shorter ones"
            )
