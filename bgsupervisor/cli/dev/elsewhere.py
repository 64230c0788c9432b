"""`bgsupervisor dev` where supervising is not possible: runs the tasks itself, and prints what they do."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.dev.code_changes import Changes
from bgsupervisor.cli.dev.following import Following, echo, echo_failures, echo_start
from bgsupervisor.cli.display.output import counted, stopped_by, warn
from bgsupervisor.cli.session import own_state_dir
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.ipc.statedir import StopMark
from bgsupervisor.supervisor.portable import PROMISES, Runner, other_runner

if TYPE_CHECKING:
    from bgsupervisor.cli.commands.dev import Interrupts
    from bgsupervisor.cli.session import Session
    from bgsupervisor.config import Config
    from bgsupervisor.worker.spawned import Ready

__all__ = ["develop_elsewhere"]

AWAY_S = 1.0
"""Pause before a database that is away is read again, in seconds."""


def develop_elsewhere(session: Session, slots: int | None, interrupts: Interrupts) -> int:
    """Run tasks until Ctrl-C; return the exit code."""
    config = session.config(slots=slots)
    mark = StopMark.read(own_state_dir(config).stop_mark)
    if mark is not None:
        warn(f"bgsupervisor: cannot run tasks: {stopped_by(mark)}")
        return 1
    with contextlib.closing(session.service()) as service:
        other = other_runner(service.ledger.supervisors())
        if other is not None:
            warn(f"bgsupervisor: cannot run tasks: another `bgsupervisor dev` runs them, PID {other}; end it first")
            return 1
        echo_start(config)
        echo(f"this is {sys.platform}, not Linux; what `bgsupervisor run` promises there is not promised here:")
        for promise in PROMISES:
            echo(f"  - {promise}")
        following, runner = Following(service, echo), Runner(config, lambda ready: _echo_loaded(ready, config))
        changes = Changes(config, SystemClock())
        try:
            _run(runner, following, changes, interrupts, config)
        finally:
            changes.close()
            runner.close()
        with contextlib.suppress(DatabaseError, AccessError):
            following.print_new()
        following.close()
    return 0


def _run(runner: Runner, following: Following, changes: Changes, interrupts: Interrupts, config: Config) -> None:
    """Run tasks until Ctrl-C has come and none runs any more; print each error of the database once."""
    complaint, seen = "", 0
    while not (seen and runner.is_over()):
        count = interrupts.count  # read once: another may come at any moment
        if count > seen:
            seen = count
            echo("ending the running tasks; Ctrl-C again kills" if count == 1 else "killing the running tasks")
            runner.end(kill=count > 1)
        elif changes.found(config):
            echo("the code has changed; loading it")
            runner.reload()
        try:
            runner.tick()
            following.print_new()
            complaint = ""
        except (DatabaseError, AccessError) as error:
            if str(error) != complaint:
                echo(f"{click.style('dev |', dim=True)} {error}; trying again")
            complaint = str(error)
            SystemClock().sleep(AWAY_S)


def _echo_loaded(ready: Ready, config: Config) -> None:
    echo_failures(ready.failures, config)
    loaded = f"loaded {counted(len(ready.catalogue), 'task')}"
    echo(click.style(loaded, fg="yellow" if ready.failures else "green"))
    if ready.failures:
        echo("tasks of what failed to load wait until it loads")
