"""`bgsupervisor cancel`, `suspend`, `resume` and `retry`: what people ask of tasks that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.display.output import say, warn
from bgsupervisor.cli.display.supervisors import watch
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.errors import AlreadyLive, NotRetryable, NotSuspendable, UnknownTask
from bgsupervisor.statuses import Status
from bgsupervisor.system.users import own_user

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from bgsupervisor.ledger.records import TaskRecord
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

    def cancel_one(service: Service, id: int) -> tuple[str, bool]:
        before = service.get(id)
        after = service.cancel(id, by=by or own_user())
        return _told(before, after, service.config.grace_s), after.status is Status.START

    _for_each(session, ids, cancel_one, ", which then asks for the end of what runs")


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@click.option("--by", help="Who asks, recorded with it; by default the name of this user.")
@pass_session
def suspend(session: Session, *, ids: tuple[int, ...], by: str | None) -> None:
    """Have running tasks stand still until they are resumed.

    Each is stopped with all that it started (SIGSTOP). It keeps its slot and its locks; its time limits do not run.
    """

    def suspend_one(service: Service, id: int) -> tuple[str, bool]:
        before = service.get(id)
        service.suspend(id, by=by or own_user())
        if before is not None and before.suspend_requested_at is not None:
            ref = f" by {before.suspend_requested_by}" if before.suspend_requested_by else ""
            return f"task {id} had been suspended already{ref}", True
        return f"task {id} is to stand still until `bgsupervisor resume {id}`; it keeps its slot and its locks", True

    _for_each(session, ids, suspend_one, ", which then stops it")


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@pass_session
def resume(session: Session, *, ids: tuple[int, ...]) -> None:
    """Have suspended tasks go on."""

    def resume_one(service: Service, id: int) -> tuple[str, bool]:
        before = service.get(id)
        after = service.resume(id)
        if before is None or (before.suspend_requested_at is None and before.suspended_at is None):
            what = f"had ended {after.status}" if after.ended else "is not suspended"
            return f"task {id} {what}; nothing changed", False
        return f"task {id} is to go on", True

    _for_each(session, ids, resume_one, ", which then lets it go on")


@click.command()
@click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
@pass_session
def retry(session: Session, *, ids: tuple[int, ...]) -> None:
    """Plan INTERRUPTED tasks again, as they were requested."""

    def retry_one(service: Service, id: int) -> tuple[str, bool]:
        return f"task {id} waits for its attempt {service.retry(id).attempt + 1}", True

    _for_each(session, ids, retry_one, "")


def _for_each(
    session: Session, ids: tuple[int, ...], act: Callable[[Service, int], tuple[str, bool]], what_then: str
) -> NoReturn:
    """Act on each task, say what became of it, and leave: with 0 if all went well.

    *act* returns a sentence, and whether a supervisor is needed for the rest; where none lives that is said, with
    *what_then* the next one does.
    """
    service = session.existing_service()
    if service is None:
        raise UnknownTask(ids[0])
    done, needed = True, False
    for id in dict.fromkeys(ids):
        try:
            told, needs = act(service, id)
        except (UnknownTask, NotRetryable, NotSuspendable, AlreadyLive) as error:
            warn(f"bgsupervisor: {error}")
            done = False
        else:
            say(told)
            needed |= needs
    now = service.ledger.clock.now()
    seen = watch(service, now=now) if needed else None
    if seen is not None and not seen.alive:  # one that lives and cannot write does it once it can
        warn(f"{seen.absence(now=now)}{what_then if seen.unheard is None else ''}")
    raise click.exceptions.Exit(not done)


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
