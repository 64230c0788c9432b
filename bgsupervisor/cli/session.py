"""What the commands share: the configuration that was named, the service on its database, common options."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bgsupervisor.addresses import is_postgres, shown
from bgsupervisor.config import load
from bgsupervisor.errors import UnknownTask
from bgsupervisor.ipc.statedir import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.config import Config
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["Finite", "Session", "config_option", "json_option", "own_state_dir", "pass_session", "task_of"]


class Finite(click.FloatRange):
    """A number within limits; Python reads "nan" and "inf" as numbers, and no limit excludes "nan"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return the number. Raises click.BadParameter if it is none."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number of seconds or days.", param, ctx)
        return number


@dataclass(slots=True)
class Session:
    """One call of the program; reads nothing before a method is called."""

    config_path: Path | None = None

    def config(self, **flags: object) -> Config:
        """Load the configuration; *flags* win over all else, None is a flag that was not given.

        A command that a test calls within its own process gets the database and the state directory of that test.

        Raises:
            ConfigError: There is none, or it is wrong.
            AccessError: It may not be read.
        """
        config = load(self.config_path, flags=flags)
        test = self.test_config()
        return config if test is None else replace(config, database=test.database, state_dir=test.state_dir)

    def test_config(self) -> Config | None:
        """Return what Services of this process work with while it runs tests, None outside tests."""
        if not sys.modules.keys() & {"bgsupervisor.service", "django.test.utils"}:
            return None  # `run` beside a living supervisor does without
        from bgsupervisor.backings import Origin, isolated  # noqa: PLC0415 - as above

        backing = isolated(Origin(None, self.config_path, None))
        return None if backing is None else backing.config

    def service(self, *, unknown_names: Literal["warn", "refuse", "accept"] | None = None) -> Service:
        """Return the service, whose first call creates the database where there is none.

        Raises what `config` raises: a Service alone would trust the files of any user.
        """
        from bgsupervisor.service import Service  # noqa: PLC0415 - `run` beside a living supervisor does without

        load(self.config_path)
        return Service(config=self.config_path, unknown_names=unknown_names)

    def existing_service(self) -> Service | None:
        """Return the service if there is a database: a command that only reads must create nothing."""
        service = self.service()
        return service if service.ledger.store.is_there() else None

    def service_with(self, id: int) -> Service:
        """Return the service of a database that may hold a task. Raises UnknownTask where there is no database."""
        service = self.existing_service()
        if service is None:
            raise UnknownTask(id)
        return service

    def nothing_yet(self) -> str:
        """Describe what is missing where `Store.is_there` finds no database of ours."""
        database = self.config().database
        if is_postgres(database):
            return f"{shown(database)} has none of our tables yet"
        return f"there is no database yet, {shown(database)} is missing"


pass_session = click.make_pass_decorator(Session, ensure=True)


def own_state_dir(config: Config) -> StateDir:
    """Return the state directory for a process that is about to run tasks, created if necessary.

    Raises:
        AccessError: It is another user's, or other users may write it.
    """
    state_dir = StateDir(config.state_dir)
    state_dir.create()
    state_dir.check_owner()
    state_dir.check_private()
    return state_dir


def task_of(service: Service, id: int) -> TaskRecord:
    """Return a task. Raises UnknownTask if there is none with this id."""
    record = service.get(id)
    if record is None:
        raise UnknownTask(id)
    return record


def json_option(help: str = "One object; times are in UTC.") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option --json."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def config_option() -> click.Option:
    """Return the option --config, for the program and for each command."""
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path, readable=False),  # loading it reports a missing right better
        metavar="PATH",
        expose_value=False,
        callback=_remember,
        help="The configuration file; else BGSUPERVISOR_CONFIG, else the nearest one upwards from here.",
    )


def _remember(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:  # noqa: ARG001 - click's
    session = ctx.ensure_object(Session)
    if value is not None:
        session.config_path = value
