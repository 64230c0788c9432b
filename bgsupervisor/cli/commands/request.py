"""`bgsupervisor request`: requests a task from a shell."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import msgspec

from bgsupervisor import tasks
from bgsupervisor.catalogue import Catalogue, Known
from bgsupervisor.cli.display.output import print_json, say, warn
from bgsupervisor.cli.display.supervisors import Supervisors, stale_code
from bgsupervisor.cli.display.traces import folded
from bgsupervisor.cli.session import Finite, Session, json_option, pass_session
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import apply_env_file
from bgsupervisor.errors import Interrupted, UnknownTaskName, WaitTimeout
from bgsupervisor.sanitize import clean, escaped
from bgsupervisor.sizes import size
from bgsupervisor.statuses import Status
from bgsupervisor.system import descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bgsupervisor.config import Config
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service
    from bgsupervisor.task_context import Handle

__all__ = ["request"]

WAIT_S = 600.0
"""Default limit of --wait, in seconds."""
REMIND_S = 60.0
"""Interval between two warnings, during --wait, that nothing can run the task, in seconds."""


@click.command()
@click.argument("name")
@click.argument("data", required=False, metavar="[JSON | -]")
@click.option("--key", help="Your own name for it; any number of tasks may share one.")
@click.option(
    "--unique",
    is_flag=False,
    flag_value="",
    metavar="[VALUE]",
    help="Only one live task of this name may hold VALUE; without VALUE the key, or else one per name.",
)
@click.option("--priority", type=int, default=0, help="Larger is sooner.")
@click.option("--at", metavar="TIME", help="Not before 14:30, 2027-01-31 14:30 (local time) or an ISO time with zone.")
@click.option("--delay-s", type=Finite(min=0), help="Not before so many seconds from now.")
@click.option("--force", is_flag=True, help="Record it even if no supervisor or task module has NAME.")
@click.option("--wait", is_flag=True, help="Wait for the end and print the result as JSON; 1 if it was interrupted.")
@click.option("--timeout-s", type=Finite(min=0), default=WAIT_S, show_default=True, help="How long --wait waits.")
@json_option("Print id and created as JSON.")
@pass_session
def request(
    session: Session,
    /,
    *,
    name: str,
    data: str | None,
    unique: str | None,
    at: str | None,
    force: bool,
    wait: bool,
    timeout_s: float,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - key, priority and delay_s, which click has checked
) -> None:
    """Request a task.

    NAME is written as "myapp.tasks:ImportInvoices"; the part after the colon is enough where it means one task. JSON
    is an object of its body's arguments.

    With - the JSON comes from stdin, where other users of this machine cannot see it.
    """
    if unique is not None and unique.lstrip().startswith("{"):
        raise click.UsageError("--unique took the data for its VALUE; write --unique last, or --unique=VALUE")
    service = session.service(unknown_names="accept" if force else "refuse")
    values = _decoded(data, service.config)
    run_at = None if at is None else _moment(at)
    _load(name, service)
    try:
        handle = service.request(name, values, run_at=run_at, unique=True if unique == "" else unique, **options)
    except UnknownTaskName as error:
        sentence = f"cannot request this: {error}{'' if str(error).endswith('?') else '.'} --force records it anyway"
        raise UnknownTaskName(sentence, name=error.name, candidates=error.candidates) from None
    _report(handle, service, quietly=wait, as_json=as_json and not wait)
    if wait:
        _wait(handle, service, timeout_s)


def _decoded(text: str | None, config: Config) -> Any:  # noqa: ANN401 - JSON; the service refuses what is no object
    if text is None:
        return None
    given = text.encode("utf-8", "surrogateescape")
    if text == "-":
        given = sys.stdin.buffer.read(config.data_max_bytes + 1)
        if len(given) > config.data_max_bytes:
            raise click.UsageError(f"stdin holds more than data_max_bytes allows, {size(config.data_max_bytes)}")
    try:
        return msgspec.json.decode(given)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.UsageError(
            f"the data is not JSON: {_fault(given, error)}; it must be an object as '{{\"ids\": [1, 2]}}'"
        ) from None


def _fault(given: bytes, error: Exception) -> str:
    """Return what is wrong with *given* and where, without a piece of it, which may be secret."""
    try:
        json.loads(given)
    except json.JSONDecodeError as found:
        return f"{found.msg}, line {found.lineno}, column {found.colno}"
    except UnicodeDecodeError as found:
        return f"byte {found.start} is not UTF-8"
    except RecursionError:
        return "it is nested too deeply"
    return str(error).removeprefix("JSON is malformed: ")  # the standard library accepts more, as NaN


def _moment(text: str) -> datetime:
    """Return the moment that *text* names: in local time without a zone, the next such time without a date."""
    now = SystemClock().now().astimezone()
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.fromisoformat(text).astimezone()
    try:
        clock_time = datetime.strptime(text, "%H:%M").time()  # noqa: DTZ007 - local time is meant
    except ValueError:
        raise click.UsageError(
            f"--at {text!r} is not a time; write 14:30, 2027-01-31 14:30 or 2027-01-31T14:30:00+01:00"
        ) from None
    today = datetime.combine(now.date(), clock_time).astimezone()
    return today if today > now else datetime.combine(now.date() + timedelta(days=1), clock_time).astimezone()


def _load(name: str, service: Service) -> None:
    """Import the configured modules that *name* needs, so that name and data are checked now.

    First the module that the name begins with; the others only if neither that one nor a supervisor has the name.
    Their output goes to stderr. A module that cannot be imported here is not an error: less is checked then.
    """
    config = service.config
    own = name.partition(":")[0]
    _import([module for module in config.tasks if module == own], service)
    if tasks.definition_of(name) is None:
        supervisors = service.ledger.supervisors()
        living = Catalogue.of(supervisors, now=service.ledger.clock.now()).living
        if name not in (living or ()):
            _import(config.tasks, service)


def _import(modules: Iterable[str], service: Service) -> None:
    config = service.config
    apply_env_file(config)
    sys.path[:0] = [one for one in (str(config.base_dir), *config.python_path) if one not in sys.path]
    # An import may close what is open, as daemons do, and its own file then gets the number.
    service.close()
    with descriptors.keeping_output(), contextlib.redirect_stdout(sys.stderr):
        for module in modules:
            try:
                importlib.import_module(module)
            except KeyboardInterrupt:
                raise
            except BaseException:  # noqa: BLE001, S110 - a module may raise anything, sys.exit included
                pass


def _report(handle: Handle, service: Service, *, quietly: bool, as_json: bool) -> None:
    record = service.ledger.get(handle.id)
    name = "pruned" if record is None else clean(record.name)
    if as_json:
        print_json({"id": handle.id, "created": handle.created})
    else:
        message = f"requested task {handle.id} ({name})"
        if not handle.created:
            message = f"task {handle.id} ({name}) is live and holds the unique key; nothing new was requested"
        if not quietly or sys.stderr.isatty():  # cron mails all output, and success is no news
            say(message, err=quietly)
    _warn_if_nothing_runs(record, service)


def _warn_if_nothing_runs(record: TaskRecord | None, service: Service) -> None:
    """Warn if no supervisor lives, or none has the code of a task that has yet to start, or its code is stale."""
    if record is None:
        return
    supervisors = Supervisors.read(service)
    waits = record.status is Status.REQUEST
    if waits and not supervisors.alive:
        warn(supervisors.absence())
        return
    stale, lacks = stale_code(service), waits and supervisors.lacks(record.name)
    if stale is not None:
        warn(f"no supervisor has loaded {record.name} yet; {stale}" if lacks else stale)
    elif lacks:
        nearest = Known(Catalogue(supervisors.catalogue), ()).nearest(record.name)
        hint = f"did you mean {nearest}?" if nearest else "see `bgsupervisor check`"
        warn(f"no supervisor has code for {record.name}, so it waits until one has; {hint}")


def _wait(handle: Handle, service: Service, timeout_s: float) -> None:
    clock = service.ledger.clock
    deadline = clock.monotonic() + timeout_s
    record = None
    try:
        while record is None:
            left_s = max(deadline - clock.monotonic(), 0.0)
            try:
                record = service.wait(handle, timeout_s=min(left_s, REMIND_S))
            except WaitTimeout:
                _remind(handle, service, timeout_s, is_over=left_s <= REMIND_S)
    except KeyboardInterrupt:
        warn(f"task {handle.id} continues; `bgsupervisor show {handle.id}` shows it")
        raise
    if record.error is not None:
        for line in folded(record.error, service.config).splitlines():
            warn(f"  {line}")  # its text may have lines like those of a log
    if record.reason is not None:
        raise Interrupted(record.id, record.reason, record.detail or "")
    click.echo(escaped(record.result or "null"))


def _remind(handle: Handle, service: Service, timeout_s: float, *, is_over: bool) -> None:
    """Warn if nothing can run the task. Raises WaitTimeout when the limit is reached."""
    record = service.ledger.get(handle.id)
    if record is not None and record.status is Status.REQUEST:
        _warn_if_nothing_runs(record, service)
    if is_over:
        state = "still waits to start" if record and record.status is Status.REQUEST else "continues"
        raise WaitTimeout(
            f"task {handle.id} has not ended within {timeout_s:g} s and {state}; `bgsupervisor show {handle.id}` "
            f"shows it, `bgsupervisor why {handle.id}` explains what delays it, and --timeout-s waits longer"
        )
