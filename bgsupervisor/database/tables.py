"""The tables of one installation, as Peewee classes made per database and prefix."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import peewee

from bgsupervisor.database.values import read_real, read_text, read_time, read_whole

__all__ = ["IS_LIVE", "IS_REQUEST", "IS_START", "Tables", "UtcField"]

# Literals, not parameters: SQLite uses a partial index only where it can see that the query implies its condition.
IS_REQUEST = peewee.SQL("\"status\" = 'REQUEST'")
IS_START = peewee.SQL("\"status\" = 'START'")
IS_LIVE = peewee.SQL("\"status\" IN ('REQUEST', 'START')")


class _Text(peewee.TextField):
    def python_value(self, value: object) -> str | None:
        return None if value is None else read_text(value)

    def adapt(self, value: Any) -> Any:  # noqa: ANN401 - as a StrEnum, or what a row holds
        return str(value) if isinstance(value, str) else value


class _Whole(peewee.IntegerField):
    def python_value(self, value: object) -> int | None:
        return read_whole(value)

    def adapt(self, value: Any) -> Any:  # noqa: ANN401 - a compare-and-set names what a row holds, whatever that is
        return value


class _BigWhole(_Whole, peewee.BigIntegerField):
    pass


class _Real(peewee.DoubleField):
    def python_value(self, value: object) -> float | None:
        return read_real(value)


class UtcField(peewee.DateTimeField):
    """An aware datetime; in SQLite text that sorts: YYYY-MM-DD HH:MM:SS.ffffff+00:00."""

    def db_value(self, value: datetime | str | None) -> str | None:
        """Convert to UTC before storing; a naive datetime is an error of ours."""
        if value is None or isinstance(value, str):
            return value
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        return value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")

    def python_value(self, value: object) -> datetime | None:
        """Return an aware datetime, None for what is none."""
        return read_time(value)


class Tables:
    """The Peewee classes of one installation: one database, one prefix."""

    def __init__(self, database: peewee.Database, prefix: str) -> None:
        self.prefix = prefix

        class Base(peewee.Model):
            class Meta:
                legacy_table_names = False

        class Task(Base):
            id = peewee.AutoField()
            name = _Text()
            data = _Text()
            queue = _Text()
            priority = _Whole()
            status = _Text()
            reason = _Text(null=True)
            detail = _Text(null=True)
            key = _Text(null=True)
            unique_key = _Text(null=True)
            serial = _Text(null=True)
            run_at = UtcField()
            expires_at = UtcField(null=True)
            requested_at = UtcField()
            started_at = UtcField(null=True)
            started_mono = _Real(null=True)
            ended_at = UtcField(null=True)
            heartbeat_at = UtcField(null=True)
            attempt = _Whole()
            tries = _Whole()
            max_attempts = _Whole()
            ending = _Text(null=True)
            host = _Text(null=True)
            boot_id = _Text(null=True)
            pid_ns = _BigWhole(null=True)
            pid = _Whole(null=True)
            start_ticks = _BigWhole(null=True)
            slot = _Whole(null=True)
            progress_done = _Real(null=True)
            progress_total = _Real(null=True)
            message = _Text(null=True)
            result = _Text(null=True)
            error = _Text(null=True)
            exit_code = _Whole(null=True)
            signal = _Whole(null=True)
            cpu_s = _Real(null=True)
            cpu_percent = _Real(null=True)
            rss_bytes = _BigWhole(null=True)
            peak_rss_bytes = _BigWhole(null=True)
            cancel_requested_at = UtcField(null=True)
            cancel_requested_by = _Text(null=True)
            suspend_requested_at = UtcField(null=True)
            suspend_requested_by = _Text(null=True)
            suspended_at = UtcField(null=True)
            suspended_mono = _Real(null=True)
            suspended_s = _Real(null=True)
            stack = _Text(null=True)
            parent_id = _Whole(null=True)

        class Interruption(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            attempt = _Whole()
            reason = _Text()
            detail = _Text(null=True)
            error = _Text(null=True)
            stack = _Text(null=True)
            exit_code = _Whole(null=True)
            signal = _Whole(null=True)
            host = _Text(null=True)
            pid = _Whole(null=True)
            started_at = UtcField(null=True)
            ended_at = UtcField()

        class Supervisor(Base):
            host = _Text(primary_key=True)
            boot_id = _Text()
            pid_ns = _BigWhole()
            pid = _Whole()
            start_ticks = _BigWhole()
            started_at = UtcField()
            heartbeat_at = UtcField()
            slots = _Whole()
            version = _Text()
            catalogue = _Text()
            code_error = _Text(null=True)
            left_at = UtcField(null=True)

        class Part(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            name = _Text()
            value = _Text()
            reached_at = UtcField()

        class Hold(Base):
            id = peewee.AutoField()
            name = _Text()
            permit = _Whole()
            task_id = _Whole(null=True)
            attempt = _Whole(null=True)
            since = UtcField()
            abandoned_by = _Whole(null=True)

        class Wait(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            attempt = _Whole()
            number = _Whole(default=0)
            whole = peewee.BooleanField(default=True)
            kind = _Text()
            target_id = _Whole(null=True)
            target = _Text(null=True)
            permits = _Whole(null=True)
            since = UtcField()

        class Dependency(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            on_id = _Whole()
            any_end = peewee.BooleanField()

        class Participant(Base):
            id = peewee.AutoField()
            scope = _Text()
            name = _Text()
            generation = _Whole()
            task_id = _Whole()
            attempt = _Whole()
            parties = _Whole()
            outcome = _Text(null=True)

        self.Task: Any = Task
        self.Interruption: Any = Interruption
        self.Supervisor: Any = Supervisor
        self.Part: Any = Part
        self.Hold: Any = Hold
        self.Wait: Any = Wait
        self.Dependency: Any = Dependency
        self.Participant: Any = Participant
        for model in (Task, Interruption, Supervisor, Part, Hold, Wait, Dependency, Participant):
            meta: Any = model._meta  # noqa: SLF001 - Peewee's documented place for table options
            meta.set_database(database)
            meta.set_table_name(prefix + model.__name__.lower())
