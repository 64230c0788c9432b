"""`bgsupervisor stop`, `start` and `reload`: whether anybody supervises, and with which code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.calling import ask_to_reload, await_reload
from bgsupervisor.cli.output import say, warn
from bgsupervisor.cli.session import Finite, Session, pass_session
from bgsupervisor.clock import SystemClock
from bgsupervisor.statedir import Lock, StateDir, StopMark, send_datagram, user_name
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from bgsupervisor.clock import Clock

__all__ = ["reload", "start", "stop"]

LOOK_S = 0.1
LEAVE_WAIT_S = 30.0
"""A supervisor leaves within one pass; this much later it hangs."""
DRAIN_WAIT_S = 3600.0
RELOAD_WAIT_S = 120.0
"""Importing a large application takes seconds, not minutes."""


@click.command()
@click.option("--drain", "mode", flag_value="drain", help="Wait for the running tasks, then stop.")
@click.option("--kill", "mode", flag_value="kill", help="End the running tasks (INTERRUPTED / STOPPED), then stop.")
@click.option("--timeout-s", type=Finite(min=0), help="How long to wait until the supervisor has gone.")
@pass_session
def stop(session: Session, *, mode: str | None, timeout_s: float | None) -> None:
    """Stop supervising, until `bgsupervisor start`; running tasks go on.

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
    if not _has_gone(state_dir, clock, limit_s):
        warn(f"the supervisor is still there after {limit_s:g} s; the stop stands, and it will obey when it can")
        raise click.exceptions.Exit(1)
    running = _running(session)
    lives = f"; {running} task(s) still run, the next supervisor looks after them" if running else ""
    say(f"nobody supervises now{lives}. `bgsupervisor start` lifts the stop")


@click.command()
@pass_session
def start(session: Session) -> None:
    """Lift a stop; the next `run`, by cron, systemd or you, supervises again."""
    state_dir = StateDir(session.config().state_dir)
    mark = StopMark.read(state_dir.stop_mark)
    if mark is None:
        say("nothing was stopped")
        return
    state_dir.check_owner("start")
    state_dir.stop_mark.unlink(missing_ok=True)
    send_datagram(state_dir.wake)  # one that still drains goes on
    say(
        f"the stop by {mark.by} is lifted; cron starts a supervisor within a minute, systemd by "
        "`systemctl start bgsupervisor`, and you by `bgsupervisor run`"
    )


@click.command()
@click.option("--force", is_flag=True, help="Even if less of the code loads than before.")
@pass_session
def reload(session: Session, *, force: bool) -> None:
    """Have the living supervisor load code and configuration anew; running tasks finish on the old code.

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


def _has_gone(state_dir: StateDir, clock: Clock, limit_s: float) -> bool:
    """Wait until the lock is free; nobody new takes it while the mark stands."""
    deadline = clock.monotonic() + limit_s
    lock = Lock(state_dir.lock, clock)
    while not lock.acquire():
        if clock.monotonic() >= deadline:
            return False
        clock.sleep(LOOK_S)
    lock.close()
    return True


def _running(session: Session) -> int:
    service = session.existing_service()
    return 0 if service is None else service.counts()[Status.START]
