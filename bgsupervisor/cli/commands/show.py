"""`bgsupervisor show`: what is known of one task, for people; the machine's facts where they are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import msgspec

from bgsupervisor import payload
from bgsupervisor.cli.commands.log import log_path
from bgsupervisor.cli.display import waiting
from bgsupervisor.cli.display.columns import Facts, percent
from bgsupervisor.cli.display.output import print_json, say, to_json, warn
from bgsupervisor.cli.display.rows import Rows, Ties, columns_of
from bgsupervisor.cli.display.text import age, duration, local
from bgsupervisor.cli.display.traces import FULL_HINT, folded
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.errors import DataInvalid, UnknownTask
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.sanitize import clean
from bgsupervisor.sizes import number, size
from bgsupervisor.statuses import Status
from bgsupervisor.system import logs, processes
from bgsupervisor.worker.reporting import headline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from bgsupervisor.cli.display.rows import Cause
    from bgsupervisor.config import Config
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["show"]

LOG_LINES = 20
LOG_LINES_READ = 200
"""What is read to find the report of an exception, which is printed once, as the error."""
CHILDREN_SHOWN = 100
LABEL_COLUMNS = 10
FACT_COLUMNS = 20
_SECRET_NAME = re.compile(r"passw(or)?d|secret|token|authorization|api_?key", re.IGNORECASE)
"""The application's own list of secrets is in its code, which this command does not import."""
_TEXTS = {"data", "result", "error", "stack", "detail", "message"}
"""The columns that --full does not repeat."""
DELAYED_S = 1.0
"""A task that was to start so much later than it was requested was requested for later."""


@click.command()
@click.argument("id", type=int)
@click.option("--full", is_flag=True, help="The machine's facts too, and every frame of a traceback.")
@click.option("--json", "as_json", is_flag=True, help="One object with everything; times are in UTC.")
@pass_session
def show(session: Session, *, id: int, full: bool, as_json: bool) -> None:
    """Show what one task does, did and left.

    Values of data that the task's class declares as secret are masked, and those whose names look like secrets
    (password, secret, token, authorization, api_key).
    """
    service = session.existing_service()
    if service is None:
        raise UnknownTask(id)
    with service.ledger.store.looking():
        record = service.get(id)
        if record is None:
            raise UnknownTask(id)
        around = _Around.of(record, service)
        interruptions = service.ledger.interruptions(id)
    facts = Facts.gather(service, positions={}, clock=service.ledger.clock, causes=around.causes)
    path, tail = _log(service, record)
    if as_json:
        data, _ = _masked(record, facts)
        values = {"data": data, "result": _parsed(record.result), **facts.derived(record), "position": record.position}
        of_log = {
            "log": None if path is None else str(path),
            "log_tail": None if tail is None else tail[-LOG_LINES:],
        }
        ended = [_jsonable(one) for one in interruptions]
        print_json(
            _jsonable(columns_of(record, service)) | values | around.as_json() | {"interruptions": ended} | of_log
        )
        return
    for sentence in facts.watch.warnings(now=facts.now) if not record.ended else ():
        warn(sentence)
    for label, text in _facts(record, service, facts):
        _print_fact(label, text)
    if path is not None:
        _print_fact("log", str(path))
        if tail is None:
            warn(f"this user cannot read {path}")
    for title, lines in around.blocks(record, facts):
        _print_block(title, "\n".join(lines))
    _print_trace("error", record.error, service.config, full=full)
    _print_trace("stack when its time was up", record.stack, service.config, full=full)
    earlier = [one for one in interruptions if one["attempt"] != record.attempt or not record.ended]
    lines = [f"{one['attempt']}  {_when(one['ended_at'], facts.now)}  {_how(one)}" for one in earlier]
    _print_block("earlier attempts", "\n".join(map(clean, lines)))
    own = _without_report(tail or [], record)
    _print_block("log" if len(own) < LOG_LINES else f"last {LOG_LINES} lines of the log", "\n".join(own[-LOG_LINES:]))
    if full:
        _print_machine_facts(record, service, facts.now)


@dataclass(frozen=True, slots=True)
class _Around:
    """What a task has to do with others."""

    causes: dict[int, list[Cause]]
    parts: list[dict[str, Any]]
    holds: list[dict[str, Any]]
    dependencies: list[dict[str, Any]]
    children: list[TaskRecord]

    @classmethod
    def of(cls, record: TaskRecord, service: Service) -> _Around:
        store = service.ledger.store
        ties, rows = Ties(store), Rows(store=store, now=service.ledger.clock.now())
        children = rows.children(record.id, limit=CHILDREN_SHOWN + 1)
        return cls(
            causes=ties.causes([record]),
            parts=[{**one, "value": _parsed(one["value"])} for one in ties.parts(record.id)],
            holds=ties.holds(record.id),
            dependencies=ties.dependencies(record.id),
            children=children,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the keys that JSON has; at most CHILDREN_SHOWN children."""
        rows = {"parts": self.parts, "holds": self.holds, "dependencies": self.dependencies}
        told: dict[str, Any] = {
            key: [{name: to_json(value) for name, value in one.items()} for one in some] for key, some in rows.items()
        }
        shown = self.children[:CHILDREN_SHOWN]
        return {**told, "children": [{"id": one.id, "name": one.name, "status": str(one.status)} for one in shown]}

    def blocks(self, record: TaskRecord, facts: Facts) -> Iterable[tuple[str, list[str]]]:
        """Yield a title and its lines for each of them."""
        now = facts.now
        yield (
            "parts reached",
            [f"{one['name']} = {_written(one['value'])}, {_when(one['reached_at'], now)}" for one in self.parts],
        )
        yield (
            "holds",
            [f'lock "{one["name"]}", permit {one["permit"]}, {_when(one["since"], now)}' for one in self.holds],
        )
        if record.status is Status.START:
            needs = waiting.gathered(self.causes.get(record.id, ()))
            yield "waits", [f"{one.sentence()}, {one.age(now=now)}" for one in needs]
        yield (
            "comes after",
            [f"task {one['on_id']}{', however it ends' if one['any_end'] else ''}" for one in self.dependencies],
        )
        children = [f"{one.id}  {one.name}  {one.status}" for one in self.children[:CHILDREN_SHOWN]]
        yield "children", children + ["and more"] * (len(self.children) > CHILDREN_SHOWN)


def _when(moment: datetime, now: datetime) -> str:
    return f"{local(moment, now=now)} ({age(moment, now=now)})"


def _jsonable(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_json(value) for name, value in columns.items()}


def _without_report(tail: list[str], record: TaskRecord) -> list[str]:
    """Return the lines of a log before those in which the child has reported the exception: it is shown already."""
    report = headline(record.id, record.name, record.attempt)
    ends = [number for number, line in enumerate(tail) if report in line] if record.error else []
    return tail[: ends[-1]] if ends else tail


def _log(service: Service, record: TaskRecord) -> tuple[Path | None, list[str] | None]:
    """Return where the log is, and its last lines; None for what there is not, or this user may not see."""
    folder = StateDir(service.config.state_dir).logs
    try:
        path = log_path(service, record, record.attempt)
    except PermissionError:
        return folder, None
    try:
        return path, [] if path is None else logs.tail(path, lines=LOG_LINES_READ)
    except OSError:
        return path, None


def _facts(record: TaskRecord, service: Service, facts: Facts) -> Iterable[tuple[str, str]]:
    """Yield what is known, one short text each; first what people look for first."""
    yield from _heading(record)
    if record.position is not None:
        yield "starts", _why_it_waits(record, facts)
    if facts.silence(record):
        yield "heard", facts.silence(record)
    if facts.suspension(record):
        yield "suspension", facts.suspension(record)
    told = _progress(record)
    if told:
        yield "progress", told
    data, is_masked = _masked(record, facts)
    yield "data", _written(data) + (" (masked)" if is_masked else "")
    if record.result not in (None, "null"):
        yield "result", _written(_parsed(record.result))
    yield from _times(record, facts)
    if record.cancel_requested_at is not None and not record.ended:
        by = f" by {record.cancel_requested_by}" if record.cancel_requested_by else ""
        yield "cancelled", f"{_when(record.cancel_requested_at, facts.now)}{by}"
    if record.ending is not None and not record.ended:
        yield "ending", str(record.ending)
    if record.pid is not None:
        yield "where", _where(record, service)
    used = _used(record)
    if used:
        yield "used", used


def _heading(record: TaskRecord) -> Iterable[tuple[str, str]]:
    yield "task", f"{record.id}, {record.name}"
    if record.key is not None:
        yield "key", record.key + (" (unique)" if record.unique_key is not None else "")
    elif record.unique_key is not None:
        yield "unique", record.unique_key
    yield "status", f"{record.status}{f' / {record.reason}' if record.reason else ''}"
    if record.detail:
        yield "detail", record.detail
    if record.unreadable:
        yield (
            "unreadable",
            f"{', '.join(record.unreadable)}: the row was written around the API, and holds no such value",
        )


def _times(record: TaskRecord, facts: Facts) -> Iterable[tuple[str, str]]:
    now, runtime_s = facts.now, facts.runtime_s(record)
    parent = f", by task {record.parent_id}" if record.parent_id is not None else ""
    priority = f", with priority {record.priority}" if record.priority else ""
    yield "requested", f"{_when(record.requested_at, now)}{parent}{priority}"
    if (record.run_at - record.requested_at).total_seconds() > DELAYED_S:
        yield "due", _when(record.run_at, now)
    if record.started_at is not None:
        attempt = f", attempt {record.attempt}" if record.attempt > 1 else ""
        yield "started", f"{_when(record.started_at, now)}{attempt}"
    if runtime_s is not None:
        took = duration(runtime_s) if runtime_s >= 1 else f"{runtime_s * 1000:.0f} ms"
        took += f", of it {duration(record.suspended_s)} suspended" if record.suspended_s else ""
        yield ("ran", took) if record.ended else ("running", took)
    if record.ended_at is not None:
        yield "ended", _when(record.ended_at, now)


def _where(record: TaskRecord, service: Service) -> str:
    words = [f"PID {record.pid}"]
    if record.slot is not None and not record.ended:
        words.append(f"slot {record.slot}")
    if record.host is not None and record.host != processes.host_id(service.config.host):
        words.append(f"host {record.host}")
    return ", ".join(words)


def _used(record: TaskRecord) -> str:
    words = []
    if record.rss_bytes is not None and not record.ended:
        words.append(f"{size(record.rss_bytes)} of memory")
    if record.peak_rss_bytes is not None:
        words.append(f"at most {size(record.peak_rss_bytes)}" + (" of memory" if not words else ""))
    if record.cpu_s is not None:
        words.append(f"{record.cpu_s:.2f} s of CPU time")
    return ", ".join(words)


def _why_it_waits(record: TaskRecord, facts: Facts) -> str:
    if facts.watch.lacks(record.name):
        return "no supervisor has code for it; see `bgsupervisor check`"
    if record.run_at > facts.now:
        return f"due {age(record.run_at, now=facts.now)}"
    needs = waiting.gathered(facts.causes.get(record.id, ()))
    if needs:
        return ", ".join(one.what() for one in needs)
    return f"at place {record.position} in the queue"


def _progress(record: TaskRecord) -> str:
    parts = []
    if record.fraction is not None and record.progress_done is not None:
        parts.append(f"{percent(record.fraction)}%")
    if record.progress_done is not None:
        of = "" if record.progress_total is None else f" of {number(record.progress_total)}"
        parts.append(f"({number(record.progress_done)}{of})")
    return " ".join([*parts, record.message or ""]).strip()


def _readable(name: str, value: Any, now: datetime) -> str:  # noqa: ANN401 - a column's value
    if name.endswith("_at"):
        return _when(value, now)
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_percent"):
        return f"{value:.0f}%"
    if name in ("cpu_s", "suspended_s"):
        return f"{value:.2f} s"
    return str(value)


def _masked(record: TaskRecord, facts: Facts) -> tuple[Any, bool]:
    """Return data as JSON values, and whether something in it was masked; text that is no JSON as it is."""
    data = _parsed(record.data)
    declared = facts.watch.secrets.get(record.name, ())
    if not isinstance(data, dict):
        return data, False
    names = {name for name in _names(data) if name in declared or _SECRET_NAME.search(name)}
    try:
        return payload.mask(data, names), bool(names)
    except RecursionError:  # written around the API, which takes no such depth
        return "nested too deeply to be shown", bool(names)


def _names(value: object) -> Iterable[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _parsed(text: str | None) -> Any:  # noqa: ANN401 - JSON
    try:
        return payload.decode_value(text)
    except DataInvalid:
        return text  # written around the API


def _written(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _print_fact(label: str, text: str) -> None:
    say(f"{label:<{LABEL_COLUMNS}} {clean(text)}")


def _print_block(title: str, text: str | None) -> None:
    if text:
        say(f"\n{title}:")
        for line in text.splitlines():
            say(f"  {line}")


def _print_trace(title: str, text: str | None, config: Config, *, full: bool) -> None:
    shown = text if full or text is None else folded(text, config)
    is_whole = text is None or shown == "\n".join(text.splitlines()) or full
    _print_block(title if is_whole else f"{title} ({FULL_HINT})", shown)


def _how(interruption: dict[str, Any]) -> str:
    return f"{interruption['reason']}: {interruption['detail'] or ''}"


def _print_machine_facts(record: TaskRecord, service: Service, now: datetime) -> None:
    say("\nall columns:")
    for name, value in columns_of(record, service).items():
        if value is not None and name not in _TEXTS:
            say(clean(f"  {name:<{FACT_COLUMNS}} {_readable(name, value, now)}"))
