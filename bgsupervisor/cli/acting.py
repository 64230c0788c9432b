"""`bgsupervisor cancel`, `suspend`, `resume` and `retry`: what people ask of tasks that are there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.output import warn
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.cli.watch import watch
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import AlreadyLive, NotRetryable, NotSuspendable, UnknownTask
from bgsupervisor.statedir import user_name
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.models import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["cancel", "resume", "retry", "suspend"]


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@click.option("--by", help="Who asks, recorded with it; by default the name of this user.")
@pass_session
def cancel(session: Session, *, ids: tuple[int, ...], by: str | None) -> None:
    """Ask for the end of tasks.

    A waiting task is INTERRUPTED at once. A running one is asked, then gets SIGTERM, then SIGKILL.
    """
    service = _service(session, ids)
    asked = 0

    def cancel_one(id: int) -> str:
        nonlocal asked
        before = service.get(id)
        after = service.cancel(id, by=by or user_name(os.geteuid()))
        asked += after.status is Status.START
        return _told(before, after, service.config.grace_s)

    done = _for_each(ids, cancel_one)
    if asked:
        _warn_if_unsupervised(service, ", which then asks for the end of what runs")
    raise click.exceptions.Exit(not done)


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@click.option("--by", help="Who asks, recorded with it; by default the name of this user.")
@pass_session
def suspend(session: Session, *, ids: tuple[int, ...], by: str | None) -> None:
    """Have running tasks stand still until they are resumed.

    Each is stopped with all that it started (SIGSTOP). It keeps its slot and its locks; its time limits do not run.
    """
    service = _service(session, ids)
    asked = 0

    def suspend_one(id: int) -> str:
        nonlocal asked
        before = service.get(id)
        service.suspend(id, by=by or user_name(os.geteuid()))
        asked += 1
        if before is not None and before.suspend_requested_at is not None:
            who = f" by {before.suspend_requested_by}" if before.suspend_requested_by else ""
            return f"task {id} had been suspended already{who}"
        return f"task {id} is to stand still until `bgsupervisor resume {id}`; it keeps its slot and its locks"

    done = _for_each(ids, suspend_one)
    if asked:
        _warn_if_unsupervised(service, ", which then stops it")
    raise click.exceptions.Exit(not done)


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@pass_session
def resume(session: Session, *, ids: tuple[int, ...]) -> None:
    """Have suspended tasks go on."""
    service = _service(session, ids)
    asked = 0

    def resume_one(id: int) -> str:
        nonlocal asked
        before = service.get(id)
        after = service.resume(id)
        if before is None or (before.suspend_requested_at is None and before.suspended_at is None):
            what = f"had ended {after.status}" if after.ended else "is not suspended"
            return f"task {id} {what}; nothing changed"
        asked += 1
        return f"task {id} is to go on"

    done = _for_each(ids, resume_one)
    if asked:
        _warn_if_unsupervised(service, ", which then lets it go on")
    raise click.exceptions.Exit(not done)


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@pass_session
def retry(session: Session, *, ids: tuple[int, ...]) -> None:
    """Plan INTERRUPTED tasks again, as they were requested."""
    service = _service(session, ids)

    def retry_one(id: int) -> str:
        return f"task {id} waits for its attempt {service.retry(id).attempt + 1}"

    done = _for_each(ids, retry_one)
    if done:
        _warn_if_unsupervised(service)
    raise click.exceptions.Exit(not done)


def _service(session: Session, ids: tuple[int, ...]) -> Service:
    service = session.existing_service()
    if service is None:
        raise UnknownTask(ids[0])
    return service


def _warn_if_unsupervised(service: Service, what_then: str = "") -> None:
    now = SystemClock().now()
    seen = watch(service, now=now)
    if not seen.alive:  # one that lives and cannot write does it once it can
        warn(f"{seen.absence(now=now)}{what_then if seen.unheard is None else ''}")


def _for_each(ids: tuple[int, ...], act: Callable[[int], str]) -> bool:
    """Act on each task, and say what became of it; tell whether all went well."""
    done = True
    for id in dict.fromkeys(ids):
        try:
            click.echo(act(id))
        except (UnknownTask, NotRetryable, NotSuspendable, AlreadyLive) as error:
            warn(f"bgsupervisor: {error}")
            done = False
    return done


def _told(before: TaskRecord | None, after: TaskRecord, grace_s: float) -> str:
    id = after.id
    if after.status is Status.START:
        if before is not None and before.cancel_requested_at is not None:
            by = f" by {before.cancel_requested_by}" if before.cancel_requested_by else ""
            return f"task {id} had been asked to end already{by}"
        return f"task {id} is asked to end; after {grace_s:g} s it gets SIGTERM, {grace_s:g} s later SIGKILL"
    if before is None or before.status is not Status.REQUEST:
        return f"task {id} had ended {after.status}; nothing changed"
    return f"task {id} was waiting; it is {after.status} now"
