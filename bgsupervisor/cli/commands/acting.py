"""`bgsupervisor cancel`, `suspend`, `resume` and `retry`: what people request of existing tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.display.output import by as by_user
from bgsupervisor.cli.display.output import say, warn
from bgsupervisor.cli.display.supervisors import Supervisors
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

_ids = click.argument("ids", nargs=-1, type=int, required=True, metavar="ID...")
_by = click.option("--by", help="The user to record with the request; by default this user's name.")


@click.command()
@_ids
@_by
@pass_session
def cancel(session: Session, *, ids: tuple[int, ...], by: str | None) -> None:
    """Request the end of tasks.

    A waiting task is INTERRUPTED at once. A running one is asked to end, then gets SIGTERM, then SIGKILL.
    """

    def cancel_one(service: Service, id: int) -> tuple[str, bool]:
        before = service.get(id)
        after = service.cancel(id, by=by or own_user())
        return _cancelled(before, after, service.config.grace_s), after.status is Status.START

    _for_each(session, ids, cancel_one, ", which then cancels what runs")


@click.command()
@_ids
@_by
@pass_session
def suspend(session: Session, *, ids: tuple[int, ...], by: str | None) -> None:
    """Suspend running tasks until they are resumed.

    Each is stopped with all that it started (SIGSTOP). It keeps its slot and its locks; its time limits do not run.
    """

    def suspend_one(service: Service, id: int) -> tuple[str, bool]:
        before = service.get(id)
        service.suspend(id, by=by or own_user())
        if before is not None and before.suspend_requested_at is not None:
            return f"task {id} had been suspended already{by_user(before.suspend_requested_by)}", True
        sentence = f"suspending task {id}, which keeps its slot and its locks"
        return f"{sentence}; `bgsupervisor resume {id}` continues it", True

    _for_each(session, ids, suspend_one, ", which then suspends it")


@click.command()
@_ids
@pass_session
def resume(session: Session, *, ids: tuple[int, ...]) -> None:
    """Continue suspended tasks."""

    def resume_one(service: Service, id: int) -> tuple[str, bool]:
        before = service.get(id)
        after = service.resume(id)
        if before is None or (before.suspend_requested_at is None and before.suspended_at is None):
            what = f"had ended {after.status}" if after.ended else "is not suspended"
            return f"task {id} {what}; nothing changed", False
        return f"resuming task {id}", True

    _for_each(session, ids, resume_one, ", which then resumes it")


@click.command()
@_ids
@pass_session
def retry(session: Session, *, ids: tuple[int, ...]) -> None:
    """Plan INTERRUPTED tasks again, as they were requested."""

    def retry_one(service: Service, id: int) -> tuple[str, bool]:
        return f"task {id} waits for its attempt {service.retry(id).attempt + 1}", True

    _for_each(session, ids, retry_one, "")


def _for_each(
    session: Session, ids: tuple[int, ...], act: Callable[[Service, int], tuple[str, bool]], what_then: str
) -> NoReturn:
    """Act on each task, print what became of it, and leave: with 0 if all went well.

    *act* returns a sentence, and whether the rest needs a supervisor. Where none lives a warning adds *what_then*: what
    the next one does.
    """
    service = session.service_with(ids[0])
    done, needed = True, False
    for id in dict.fromkeys(ids):
        try:
            sentence, needs = act(service, id)
        except (UnknownTask, NotRetryable, NotSuspendable, AlreadyLive) as error:
            warn(f"bgsupervisor: {error}")
            done = False
        else:
            say(sentence)
            needed |= needs
    supervisors = Supervisors.read(service) if needed else None
    if supervisors is not None and not supervisors.alive:  # one that lives and cannot write does it once it can
        warn(f"{supervisors.absence()}{what_then if supervisors.unheard is None else ''}")
    raise click.exceptions.Exit(not done)


def _cancelled(before: TaskRecord | None, after: TaskRecord, grace_s: float) -> str:
    id = after.id
    if after.status is Status.START:
        if before is not None and before.cancel_requested_at is not None:
            return f"task {id} had been cancelled already{by_user(before.cancel_requested_by)}"
        return f"cancelling task {id}; after {grace_s:g} s it gets SIGTERM, {grace_s:g} s later SIGKILL"
    if before is None or before.status is not Status.REQUEST:
        return f"task {id} had ended {after.status}; nothing changed"
    return f"task {id} was waiting; it is {after.status} now"
