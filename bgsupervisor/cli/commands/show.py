"""`bgsupervisor show`: what is known of one task; the machine's facts with --full."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import msgspec

from bgsupervisor import mismatch, payload
from bgsupervisor.cli.commands.log import log_path
from bgsupervisor.cli.display.explain import waits_to_start
from bgsupervisor.cli.display.output import by, jsonable, print_json, say, warn
from bgsupervisor.cli.display.rows import Rows, Ties, columns_of
from bgsupervisor.cli.display.snapshot import Snapshot, percent
from bgsupervisor.cli.display.text import age, duration, local
from bgsupervisor.cli.display.traces import FULL_HINT, folded
from bgsupervisor.cli.session import Session, json_option, pass_session, task_of
from bgsupervisor.errors import DataInvalid
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.sanitize import clean
from bgsupervisor.sizes import number, size
from bgsupervisor.statuses import Status
from bgsupervisor.system import logs, processes
from bgsupervisor.worker.reporting import headline

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from pathlib import Path

    from bgsupervisor.config import Config
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["show"]

LOG_LINES = 20
LOG_LINES_READ = 200
"""Lines that are searched for the report of an exception, which is printed once, as the error."""
CHILDREN_SHOWN = 100
LABEL_COLUMNS = 10
FACT_COLUMNS = 20
_SECRET_NAME = re.compile(r"passw(or)?d|secret|token|authorization|api_?key", re.IGNORECASE)
"""Names that look secret; the application's own list is in its code, which this command does not import."""
_TEXTS = {"data", "result", "error", "stack", "detail", "message"}
"""The columns that --full does not repeat."""
DELAYED_S = 1.0
"""Delay between request and start from which a task was requested for later, in seconds."""


@click.command()
@click.argument("id", type=int)
@click.option("--full", is_flag=True, help="The machine's facts too, and every frame of a traceback.")
@json_option("One object with everything; times are in UTC.")
@pass_session
def show(session: Session, *, id: int, full: bool, as_json: bool) -> None:
    """Show what one task does, did and left.

    Values of data that the task's class declares as secret are masked, and those whose names look like secrets
    (password, secret, token, authorization, api_key).
    """
    service = session.service_with(id)
    with service.ledger.store.looking():
        record = task_of(service, id)
        snapshot = Snapshot.around(record, service)
        around = _Around.of(record, service)
        interruptions = service.ledger.interruptions(id)
    path, tail = _log(service, record)
    if as_json:
        print_json(
            jsonable(columns_of(record, service))
            | {"data": _masked(record, snapshot)[0], "result": _parsed(record.result), "position": record.position}
            | snapshot.derived(record)
            | around.as_json()
            | {"interruptions": list(map(jsonable, interruptions))}
            | {"log": None if path is None else str(path), "log_tail": None if tail is None else tail[-LOG_LINES:]}
        )
        return
    for sentence in snapshot.supervisors.warnings() if not record.ended else ():
        warn(sentence)
    for label, text in _facts(record, service, snapshot):
        _print_fact(label, text)
    if path is not None:
        _print_fact("log", str(path))
        if tail is None:
            warn(f"this user cannot read {path}")
    for title, lines in around.blocks(record, snapshot):
        _print_block(title, "\n".join(lines))
    _print_trace("error", record.error, service.config, full=full)
    _print_trace("stack when its time was up", record.stack, service.config, full=full)
    earlier = [one for one in interruptions if one["attempt"] != record.attempt or not record.ended]
    lines = [
        f"{one['attempt']}  {_when(one['ended_at'], snapshot.now)}  {one['reason']}: {one['detail'] or ''}"
        for one in earlier
    ]
    _print_block("earlier attempts", "\n".join(map(clean, lines)))
    own = _without_report(tail or [], record)
    _print_block("log" if len(own) < LOG_LINES else f"last {LOG_LINES} lines of the log", "\n".join(own[-LOG_LINES:]))
    if full:
        _print_machine_facts(record, service, snapshot.now)


@dataclass(frozen=True, slots=True)
class _Around:
    """What a task has reached, holds, comes after and has requested."""

    parts: list[dict[str, Any]]
    holds: list[dict[str, Any]]
    dependencies: list[dict[str, Any]]
    children: list[TaskRecord]

    @classmethod
    def of(cls, record: TaskRecord, service: Service) -> _Around:
        store = service.ledger.store
        ties, rows = Ties(store), Rows(store=store, now=service.ledger.clock.now())
        return cls(
            parts=[{**one, "value": _parsed(one["value"])} for one in ties.parts(record.id)],
            holds=ties.holds(record.id),
            dependencies=ties.dependencies(record.id),
            children=rows.children(record.id, limit=CHILDREN_SHOWN + 1),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the keys of JSON; at most CHILDREN_SHOWN children."""
        children = [{"id": one.id, "name": one.name, "status": str(one.status)} for one in self.children]
        return {
            "parts": list(map(jsonable, self.parts)),
            "holds": list(map(jsonable, self.holds)),
            "dependencies": list(map(jsonable, self.dependencies)),
            "children": children[:CHILDREN_SHOWN],
        }

    def blocks(self, record: TaskRecord, snapshot: Snapshot) -> Iterable[tuple[str, list[str]]]:
        """Yield a title and its lines for each of them, and for what a running task waits for."""
        now = snapshot.now
        parts = [f"{one['name']} = {_written(one['value'])}, {_when(one['reached_at'], now)}" for one in self.parts]
        yield "parts reached", parts
        holds = [f'lock "{one["name"]}", permit {one["permit"]}, {_when(one["since"], now)}' for one in self.holds]
        yield "holds", holds
        if record.status is Status.START:
            yield "waits", [f"{wait.sentence()}, {wait.age(now=now)}" for wait in snapshot.waits(record)]
        after = [f"task {one['on_id']}{', however it ends' * bool(one['any_end'])}" for one in self.dependencies]
        yield "comes after", after
        children = [f"{one.id}  {one.name}  {one.status}" for one in self.children[:CHILDREN_SHOWN]]
        yield "children", children + ["and more"] * (len(self.children) > CHILDREN_SHOWN)


def _when(moment: datetime, now: datetime) -> str:
    return f"{local(moment, now=now)} ({age(moment, now=now)})"


def _without_report(tail: list[str], record: TaskRecord) -> list[str]:
    """Return the lines of a log before the child's report of the exception, which is shown already."""
    report = headline(record.id, record.name, record.attempt)
    ends = [number for number, line in enumerate(tail) if report in line] if record.error else []
    return tail[: ends[-1]] if ends else tail


def _log(service: Service, record: TaskRecord) -> tuple[Path | None, list[str] | None]:
    """Return where the log is, and its last lines; None for what does not exist, or this user may not read."""
    path: Path | None = StateDir(service.config.state_dir).logs
    with contextlib.suppress(OSError):
        path = log_path(service, record, record.attempt)
        return path, [] if path is None else logs.tail(path, lines=LOG_LINES_READ)
    return path, None


def _facts(record: TaskRecord, service: Service, snapshot: Snapshot) -> Iterable[tuple[str, str]]:
    """Yield a label and a short text for each fact that is known, what people look for first."""
    data, is_masked = _masked(record, snapshot)
    facts: list[tuple[str, str | None]] = [
        *_heading(record),
        ("starts", _starts(record, snapshot)),
        ("heard", snapshot.silence(record) or None),
        ("suspension", snapshot.suspension(record) or None),
        ("progress", _progress(record) or None),
        ("data", _written(data) + (" (masked)" if is_masked else "")),
        ("result", None if record.result in (None, "null") else _written(_parsed(record.result))),
        *_times(record, snapshot),
        ("where", None if record.pid is None else _where(record, service)),
        ("used", _used(record) or None),
    ]
    return ((label, text) for label, text in facts if text is not None)


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
        columns = ", ".join(record.unreadable)
        yield "unreadable", f"{columns}: the row was written around the API, and holds no such value"


def _times(record: TaskRecord, snapshot: Snapshot) -> Iterable[tuple[str, str]]:
    now, runtime_s = snapshot.now, snapshot.runtime_s(record)
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
        yield "ran" if record.ended else "running", took
    if record.ended_at is not None:
        yield "ended", _when(record.ended_at, now)
    if record.cancel_requested_at is not None and not record.ended:
        yield "cancelled", f"{_when(record.cancel_requested_at, now)}{by(record.cancel_requested_by)}"
    if record.ending is not None and not record.ended:
        yield "ending", str(record.ending)


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


def _starts(record: TaskRecord, snapshot: Snapshot) -> str | None:
    if record.position is None:
        return None
    return waits_to_start(record, snapshot) or f"at place {record.position} in the queue"


def _progress(record: TaskRecord) -> str:
    words = []
    if record.progress_done is not None:
        words += [] if record.fraction is None else [f"{percent(record.fraction)}%"]
        of = "" if record.progress_total is None else f" of {number(record.progress_total)}"
        words.append(f"({number(record.progress_done)}{of})")
    return " ".join([*words, record.message or ""]).strip()


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


def _masked(record: TaskRecord, snapshot: Snapshot) -> tuple[Any, bool]:
    """Return data as JSON values, and whether something in it was masked; text that is not JSON stays as it is."""
    data = _parsed(record.data)
    declared = snapshot.supervisors.secrets.get(record.name, ())
    if not isinstance(data, dict):
        return data, False
    names = {name for name in _names(data) if name in declared or _SECRET_NAME.search(name)}
    try:
        return mismatch.mask(data, names), bool(names)
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


def _print_machine_facts(record: TaskRecord, service: Service, now: datetime) -> None:
    say("\nall columns:")
    for name, value in columns_of(record, service).items():
        if value is not None and name not in _TEXTS:
            say(clean(f"  {name:<{FACT_COLUMNS}} {_readable(name, value, now)}"))
