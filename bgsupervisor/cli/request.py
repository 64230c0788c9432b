"""`bgsupervisor request`: request a task from a shell."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import msgspec

from bgsupervisor.cli.output import print_json, warn
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.cli.watch import stale_code, watch
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import apply_env_file
from bgsupervisor.errors import Interrupted

if TYPE_CHECKING:
    from bgsupervisor.config import Config
    from bgsupervisor.service import Handle, Service

__all__ = ["request"]

WAIT_S = 3600.0
"""How long --wait waits if nothing else is said."""


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
@click.option("--delay-s", type=click.FloatRange(min=0), help="Not before so many seconds from now.")
@click.option("--wait", is_flag=True, help="Wait for the end and print the result as JSON; 1 if it was interrupted.")
@click.option(
    "--timeout-s", type=click.FloatRange(min=0), default=WAIT_S, show_default=True, help="How long --wait waits."
)
@click.option("--json", "as_json", is_flag=True, help="Print id and created as JSON.")
@pass_session
def request(
    session: Session,
    /,
    *,
    name: str,
    data: str | None,
    unique: str | None,
    at: str | None,
    wait: bool,
    timeout_s: float,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - key, priority and delay_s, which click has checked
) -> None:
    """Request a task.

    NAME is as "myapp.tasks:ImportInvoices"; JSON is an object of its body's arguments.

    With - the JSON comes from stdin, where other users of this machine cannot see it.
    """
    if unique is not None and unique.lstrip().startswith("{"):
        raise click.UsageError("--unique took the data for its VALUE; write --unique last, or --unique=VALUE")
    service = session.service()
    values = _decoded(data, service.config)
    run_at = None if at is None else _moment(at)
    _load_signature(name, service.config)
    handle = service.request(name, values, run_at=run_at, unique=True if unique == "" else unique, **options)
    _tell(handle, name, service, quietly=wait, as_json=as_json and not wait)
    if wait:
        _wait(handle, service, timeout_s)


def _decoded(text: str | None, config: Config) -> Any:  # noqa: ANN401 - JSON; the service refuses what is no object
    if text is None:
        return None
    if text == "-":
        text = sys.stdin.read(config.data_max_bytes + 1)
        if len(text) > config.data_max_bytes:
            raise click.UsageError(f"stdin holds more than data_max_bytes allows, {config.data_max_bytes:,} bytes")
    try:
        return msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise click.UsageError(
            f"the data is not JSON: {_fault(text, error)}; it must be an object as '{{\"ids\": [1, 2]}}'"
        ) from None


def _fault(text: str, error: Exception) -> str:
    """Return what is wrong with *text* and where, without a piece of it, which may be secret."""
    try:
        json.loads(text)
    except json.JSONDecodeError as found:
        return f"{found.msg}, line {found.lineno}, column {found.colno}"
    return str(error).removeprefix("JSON is malformed: ")  # the standard library accepts more, as NaN


def _moment(text: str) -> datetime:
    """Return the moment that *text* means; without a zone it is local time, without a date the next such time."""
    now = SystemClock().now().astimezone()
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.fromisoformat(text).astimezone()
    try:
        clock_time = datetime.strptime(text, "%H:%M").time()  # noqa: DTZ007 - local time is meant
    except ValueError:
        raise click.UsageError(
            f"--at {text!r} is no time; write 14:30, 2027-01-31 14:30 or 2027-01-31T14:30:00+01:00"
        ) from None
    today = datetime.combine(now.date(), clock_time).astimezone()
    return today if today > now else datetime.combine(now.date() + timedelta(days=1), clock_time).astimezone()


def _load_signature(name: str, config: Config) -> None:
    """Import the configured module that *name* starts with, so that the data is checked now; the child checks again.

    What the module prints goes to stderr. If it cannot be imported here, nothing is known, and that is no error.
    """
    module = name.partition(":")[0]
    if module not in config.tasks:
        return
    apply_env_file(config)
    sys.path[:0] = [str(config.base_dir), *config.python_path]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            importlib.import_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001, S110 - a module may raise anything, sys.exit included
            pass


def _tell(handle: Handle, name: str, service: Service, *, quietly: bool, as_json: bool) -> None:
    if as_json:
        print_json({"id": handle.id, "created": handle.created})
    else:
        told = f"requested task {handle.id} ({name})"
        if not handle.created:
            told = f"task {handle.id} ({name}) is live and holds the unique key; nothing new was requested"
        if not quietly or sys.stderr.isatty():  # what cron prints it mails, and success is no news
            click.echo(told, err=quietly)
    now = service.ledger.clock.now()
    seen = watch(service, now=now)
    if not seen.alive:
        warn(seen.absence(now=now))
        return
    stale = stale_code(service)
    if stale is not None:
        warn(f"no supervisor has loaded {name} yet; {stale}" if seen.lacks(name) else stale)
    elif seen.lacks(name):
        near = difflib.get_close_matches(name, seen.catalogue or (), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see `bgsupervisor check`"
        warn(f"no supervisor has code for {name}, so it waits until one has{hint}")


def _wait(handle: Handle, service: Service, timeout_s: float) -> None:
    try:
        record = service.wait(handle, timeout_s=timeout_s)
    except KeyboardInterrupt:
        warn(f"task {handle.id} goes on; `bgsupervisor show {handle.id}` tells about it")
        raise
    if record.reason is not None:
        raise Interrupted(record.id, record.reason, record.detail or "")
    click.echo(record.result)
