"""`bgsupervisor dev` where supervising is not possible: runs the tasks itself, and prints what they do."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.code_changes import Changes
from bgsupervisor.cli.display.following import Following, echo, tell_failures
from bgsupervisor.cli.display.output import warn
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import shown
from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.supervisor.portable import PROMISES, Runner, other_runner

if TYPE_CHECKING:
    from bgsupervisor.cli.commands.dev import Interrupts
    from bgsupervisor.cli.session import Session
    from bgsupervisor.config import Config
    from bgsupervisor.worker.spawned import Ready

__all__ = ["develop_elsewhere"]

AWAY_S = 1.0
"""Pause after a look at a database that is away, in seconds."""


def develop_elsewhere(session: Session, slots: int | None, interrupts: Interrupts) -> int:
    """Run tasks until Ctrl-C; return the exit code."""
    config = session.config(slots=slots)
    state_dir = StateDir(config.state_dir)
    state_dir.create()
    state_dir.check_owner()
    state_dir.check_private()
    mark = StopMark.read(state_dir.stop_mark)
    if mark is not None:
        warn(f"bgsupervisor: cannot run tasks: stopped by {mark.by} at {mark.at}; `bgsupervisor start` allows it again")
        return 1
    with contextlib.closing(session.service()) as service:
        other = other_runner(service.ledger.supervisors())
        if other is not None:
            warn(f"bgsupervisor: cannot run tasks: another `bgsupervisor dev` runs them, PID {other}; end it first")
            return 1
        modules = ", ".join(config.tasks) or "no modules (name them in `tasks`)"
        echo(f"developing {modules} on {shown(config.database)}, {config.slots} slots; Ctrl-C ends it, with the tasks")
        echo(f"this is {sys.platform}, not Linux; what `bgsupervisor run` promises there is not promised here:")
        for promise in PROMISES:
            echo(f"  - {promise}")
        following, runner = Following(service, echo), Runner(config, lambda ready: _tell_loaded(ready, config))
        changes = Changes(config, SystemClock())
        try:
            _run(runner, following, changes, interrupts, config)
        finally:
            changes.close()
            runner.close()
        with contextlib.suppress(DatabaseError, AccessError):
            following.look()
        following.close()
    return 0


def _run(runner: Runner, following: Following, changes: Changes, interrupts: Interrupts, config: Config) -> None:
    """Run tasks until Ctrl-C has come and none runs any more; each error of the database is printed once."""
    complaint, seen = "", 0
    while not (seen and runner.is_over()):
        count = interrupts.count  # once: another may come at any moment, and should count then
        if count > seen:
            seen = count
            echo("ending the running tasks; Ctrl-C again kills" if count == 1 else "killing the running tasks")
            runner.end(kill=count > 1)
        elif changes.found(config):
            echo("the code has changed; loading it")
            runner.reload()
        try:
            runner.tick()
            following.look()
            complaint = ""
        except (DatabaseError, AccessError) as error:
            if str(error) != complaint:
                echo(f"{click.style('dev |', dim=True)} {error}; trying again")
            complaint = str(error)
            SystemClock().sleep(AWAY_S)


def _tell_loaded(ready: Ready, config: Config) -> None:
    tell_failures(ready.failures, config)
    count = len(ready.catalogue)
    echo(click.style(f"loaded {count} task{'s' * (count != 1)}", fg="yellow" if ready.failures else "green"))
    if ready.failures:
        echo("tasks of what failed to load wait until it loads")
