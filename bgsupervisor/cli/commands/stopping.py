"""`bgsupervisor stop`, `start` and `reload`: whether a supervisor runs, and with which code."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.control_client import ask_to_reload, await_reload
from bgsupervisor.cli.display.output import counted, say, warn
from bgsupervisor.cli.display.text import listed
from bgsupervisor.cli.session import Finite, Session, pass_session
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.sockets import send_datagram
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.sanitize import clean
from bgsupervisor.system.users import user_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.ledger.records import TaskRecord

__all__ = ["reload", "start", "stop"]

POLL_S = 0.1
LEAVE_WAIT_S = 30.0
"""Longest wait for a supervisor to leave, which takes one pass, in seconds."""
DRAIN_WAIT_S = 3600.0
FIRST_REMINDER_S = 1.0
"""Wait before the first report of what still runs, in seconds."""
REMIND_S = 60.0
"""Interval between further reports, in seconds."""
NAMES_SHOWN = 10
"""The most tasks that one line names."""
RELOAD_WAIT_S = 120.0
"""Longest wait for a reload, in seconds; importing a large application takes less."""


@click.command()
@click.option("--drain", "mode", flag_value="drain", help="Wait for the running tasks, then stop.")
@click.option("--kill", "mode", flag_value="kill", help="End the running tasks (INTERRUPTED / STOPPED), then stop.")
@click.option("--timeout-s", type=Finite(min=0), help="How long to wait until the supervisor has gone.")
@pass_session
def stop(session: Session, *, mode: str | None, timeout_s: float | None) -> None:
    """Stop supervising, until `bgsupervisor start`; running tasks continue.

    Sets a mark that the living supervisor obeys, and every later `run` too, from cron or by systemd.
    """
    mode = mode or "leave"
    config, clock = session.config(), SystemClock()
    state_dir = StateDir(config.state_dir)
    state_dir.create()
    state_dir.check_owner("stop")
    mark = StopMark(mode, by=user_name(os.geteuid()), at=clock.now().isoformat(timespec="seconds"))
    mark.write(state_dir.stop_mark)
    send_datagram(state_dir.wake)
    longest = {"leave": LEAVE_WAIT_S, "kill": 2 * config.grace_s + LEAVE_WAIT_S, "drain": DRAIN_WAIT_S}[mode]
    limit_s = longest if timeout_s is None else timeout_s
    if not _has_gone(session, state_dir, clock, limit_s):
        warn(f"the supervisor is still running after {limit_s:g} s; the stop stands, and it will obey when it can")
        _warn_of_running(session)
        raise click.exceptions.Exit(1)
    count = len(_running(session))
    left = f"; {counted(count, 'task')} still running, for the next supervisor to adopt" if count else ""
    say(f"supervisor stopped{left}; `bgsupervisor start` allows it again")


@click.command()
@pass_session
def start(session: Session) -> None:
    """End a stop; the next `run`, by cron, systemd or you, supervises again."""
    state_dir = StateDir(session.config().state_dir)
    mark = StopMark.read(state_dir.stop_mark)
    if mark is None:
        say("there is no stop; nothing changed")
        return
    state_dir.check_owner("start")
    state_dir.stop_mark.unlink(missing_ok=True)
    send_datagram(state_dir.wake)  # one that still drains continues
    say(
        f"the stop by {mark.by} has ended; cron starts a supervisor within a minute, systemd by "
        "`systemctl start bgsupervisor`, and you by `bgsupervisor run`"
    )


@click.command()
@click.option("--force", is_flag=True, help="Even if less of the code loads than before.")
@pass_session
def reload(session: Session, *, force: bool) -> None:
    """Load code and configuration anew in the living supervisor; running tasks finish on the old code.

    Code that fails to load does not replace code that works.
    """
    clock = SystemClock()
    state_dir = StateDir(session.config().state_dir)
    if state_dir.path.exists():
        state_dir.check_owner("reload")
    try:
        channel = ask_to_reload(state_dir, force=force)
    except (FileNotFoundError, ConnectionRefusedError):
        say("no supervisor is running; the next one loads the code as it then is")
        return
    answer = await_reload(channel, timeout_s=RELOAD_WAIT_S, clock=clock)
    channel.close()
    if answer is None:
        warn(f"no answer within {RELOAD_WAIT_S:g} s; see the supervisor's log")
    elif answer.done:
        say(f"reloaded: {answer.detail}")
    else:
        warn(f"not reloaded: {answer.detail}")
    raise click.exceptions.Exit(0 if answer is not None and answer.done else 1)


def _has_gone(session: Session, state_dir: StateDir, clock: Clock, limit_s: float) -> bool:
    """Wait until the lock is free, and report what keeps it; no other supervisor takes it while the mark stands."""
    begun = clock.monotonic()
    remind_at = begun + FIRST_REMINDER_S
    lock = Lock(state_dir.lock, clock)
    while not lock.acquire():
        now = clock.monotonic()
        if now >= begun + limit_s:
            return False
        if now >= remind_at:
            remind_at = now + REMIND_S
            _warn_of_running(session)
        clock.sleep(POLL_S)
    lock.close()
    return True


def _warn_of_running(session: Session) -> None:
    """Warn of tasks that the supervisor may wait for, and of those that do not end by themselves."""
    running = [record for record in _running(session) if record.slot is not None]
    if not running:
        return
    warn(f"still running: {_named(running)}; `bgsupervisor stop --kill` ends {'them' if len(running) > 1 else 'it'}")
    suspended = [record for record in running if record.suspended_at is not None]
    if suspended:
        ids = " ".join(str(record.id) for record in suspended)
        them = "them" if len(suspended) > 1 else "it"
        warn(f"suspended, so it cannot end: {_named(suspended)}; `bgsupervisor resume {ids}` continues {them}")


def _named(records: Sequence[TaskRecord]) -> str:
    return listed([f"{record.id} ({clean(record.name)})" for record in records], most=NAMES_SHOWN)


def _running(session: Session) -> list[TaskRecord]:
    """Return the rows of running tasks; none if the database cannot be read, for a stop needs none."""
    with contextlib.suppress(DatabaseError, AccessError):
        service = session.existing_service()
        return [] if service is None else service.ledger.starts()
    return []
