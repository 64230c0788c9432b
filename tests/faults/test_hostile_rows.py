"""Whatever a row holds: no listing and no question fails, and no supervisor stops for it."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from support.app import wait_until

from bgsupervisor import Service
from bgsupervisor.cli.commands import doctor
from bgsupervisor.cli.program import program
from bgsupervisor.cli.session import Session
from bgsupervisor.database.store import Store
from bgsupervisor.errors import BgSupervisorError
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger.attempts import Attempt, Batch
from bgsupervisor.ledger.records import TaskRecord
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.system import processes

pytestmark = pytest.mark.of_sqlite
"""Its columns take values of any type; tests/test_hostile_server_rows.py has what PostgreSQL lets in."""

INVALID_TEXT = object()
"""A text that is no UTF-8."""
BAD = [
    *(None, b"\xff\x00blob", INVALID_TEXT, "", "no time", "a\0b", "\u202ex\x1b[2J\n2026"),
    *(2**63 - 1, -(2**63), -1, 0, 1.5, 9e999, 1e300),
    *("9999-12-31T23:59:59-12:00", "0001-01-01 00:00:00", "2026-13-45 99:99:99"),
    *("[" * 3000, '{"a": 1e999}', '"\\ud800"', '{"x": {"secret": 5}}', '[{"a": 1}]', '{"a": ' * 500 + "1" + "}" * 500),
    "parent 99999999999999999999",
]
NOW = datetime.now(UTC)
PAST = NOW - timedelta(minutes=5)
COLUMNS_OF = {
    "task": [
        name
        for name in TaskRecord.__annotations__
        if name not in ("id", "position", "no_supervisor_since", "unreadable")
    ],
    "interruption": [
        "task_id",
        "attempt",
        "reason",
        "detail",
        "error",
        "stack",
        "exit_code",
        "signal",
        "host",
        "pid",
        "started_at",
        "ended_at",
    ],
    "supervisor": [
        "host",
        "boot_id",
        "pid_ns",
        "pid",
        "start_ticks",
        "started_at",
        "heartbeat_at",
        "slots",
        "version",
        "catalogue",
        "code_error",
        "left_at",
    ],
    "part": ["task_id", "name", "value", "reached_at"],
    "hold": ["name", "permit", "task_id", "attempt", "since", "abandoned_by"],
    "wait": ["task_id", "attempt", "number", "whole", "kind", "target_id", "target", "permits", "since"],
    "dependency": ["task_id", "on_id", "any_end"],
    "participant": ["scope", "name", "generation", "task_id", "attempt", "parties", "outcome"],
}
GROUP = 6
"""So many columns are spoilt in one database, each in rows of its own."""
GROUPS = [
    (table, columns[first : first + GROUP])
    for table, columns in COLUMNS_OF.items()
    for first in range(0, len(columns), GROUP)
]
groups = pytest.mark.parametrize(
    ("table", "columns"), GROUPS, ids=[f"{table}.{columns[0]}" for table, columns in GROUPS]
)


def text(moment):
    return moment.isoformat(sep=" ", timespec="microseconds")


class Rows:
    """The rows of a database whose tables have lost their laws."""

    def __init__(self, path):
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA ignore_check_constraints = ON")
        self.connection.execute("PRAGMA foreign_keys = OFF")

    def forget_laws(self):
        """Let NULL into every column, as a table that somebody has made anew by hand might."""
        self.connection.execute("PRAGMA writable_schema = ON")
        for kind in ("TEXT", "INTEGER"):
            self.connection.execute(
                "UPDATE sqlite_schema SET sql = replace(sql, ?, ?) WHERE type = 'table'", [f"{kind} NOT NULL", kind]
            )
        self.connection.execute("DELETE FROM sqlite_schema WHERE type = 'index' AND sql LIKE '%UNIQUE%'")
        self.connection.execute("PRAGMA writable_schema = RESET")

    def insert(self, table, **columns):
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        self.connection.execute(f"INSERT INTO bgsupervisor_{table} ({names}) VALUES ({marks})", list(columns.values()))

    def put(self, table, column, value, row):
        """Write a value into a column of the row that has this rowid."""
        held = "CAST(x'ff41c3' AS TEXT)" if value is INVALID_TEXT else "?"
        values = [row] if value is INVALID_TEXT else [value, row]
        self.connection.execute(f"UPDATE bgsupervisor_{table} SET {column} = {held} WHERE rowid = ?", values)

    def close(self):
        self.connection.close()


def fill(rows, identity, count, supervisors=30):
    """Make a row of each kind for each bad value: tasks of all statuses, and what ties them."""
    for number in range(1, count + 1):
        ids = [10 * number + place for place in range(5)]
        common = {"run_at": text(PAST), "requested_at": text(PAST), "data": '{"password": "x"}', "name": "appx:good"}
        started = {
            **common, "attempt": 1, "started_at": text(PAST), "started_mono": 1.0, "heartbeat_at": text(PAST),
            "host": identity.host, "boot_id": identity.boot_id, "pid_ns": identity.pid_ns, "pid": 4_000_000 + number,
            "start_ticks": 5,
        }  # fmt: skip
        ended = {
            **started,
            "ended_at": text(PAST),
            "result": "1",
            "error": "x",
            "progress_done": 1.0,
            "progress_total": 2.0,
        }
        rows.insert("task", id=ids[0], status="REQUEST", **common)
        rows.insert("task", id=ids[1], status="START", **started, slot=None if number % 2 else number, parent_id=ids[0])
        rows.insert("task", id=ids[2], status="DONE", **ended)
        rows.insert("task", id=ids[3], status="INTERRUPTED", **ended, reason="RAISED", detail="it raised")
        rows.insert("task", id=ids[4], status="REQUEST", **common, parent_id=ids[1])
        rows.insert("interruption", task_id=ids[3], attempt=1, reason="RAISED", ended_at=text(PAST))
        rows.insert("part", task_id=ids[1], name="loaded", value="1", reached_at=text(PAST))
        rows.insert("hold", name="lock", permit=number, task_id=ids[1], attempt=1, since=text(PAST))
        kinds = {
            "part": (ids[2], "other"),
            "end": (ids[4], None),
            "lock": (None, "lock"),
            "barrier": (None, "meet"),
            "slot": (None, None),
        }
        for kind, (target_id, target) in kinds.items():
            rows.insert(
                "wait",
                task_id=ids[1],
                attempt=1,
                number=number,
                kind=kind,
                target_id=target_id,
                target=target,
                permits=1,
                since=text(PAST),
            )
        rows.insert("dependency", task_id=ids[4], on_id=ids[1], any_end=0)
        rows.insert(
            "participant", scope=f"parent {ids[0]}", name="meet", generation=0, task_id=ids[1], attempt=1, parties=3
        )
    for number in range(1, supervisors + 1):
        rows.insert(
            "supervisor", host=f"host{number}", boot_id=identity.boot_id, pid_ns=identity.pid_ns, pid=4_000_000,
            start_ticks=1, started_at=text(PAST), heartbeat_at=text(NOW), slots=4, version="1",
            catalogue='{"appx:good": {}}',
        )  # fmt: skip


def spoil(rows, table, columns):
    """Put each bad value into each of these columns, each time into the rows of one number."""
    found = [id for (id,) in rows.connection.execute(f"SELECT rowid FROM bgsupervisor_{table} ORDER BY rowid")]
    each = len(found) // (len(BAD) * len(columns))
    for number, (column, value) in enumerate((column, value) for column in columns for value in BAD):
        for row in found[number * each : (number + 1) * each]:
            with contextlib.suppress(sqlite3.IntegrityError):  # of a primary key
                rows.put(table, column, value, row)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A database with rows of each kind."""
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "template.db"
    store = Store.open(f"sqlite:///{path}", "bgsupervisor_", busy_timeout_s=2.0, durable=False)
    with store.connected():
        pass
    store.close()
    rows = Rows(path)
    rows.forget_laws()
    rows.close()
    return path


@pytest.fixture
def service(template, tmp_path, monkeypatch):
    """A Service on a copy of the rows, with which the commands work too."""
    (tmp_path / "bgsupervisor.toml").write_text("")
    shutil.copyfile(template, tmp_path / "bgsupervisor.db")
    made = Service(config=tmp_path / "bgsupervisor.toml")
    monkeypatch.setattr(Session, "existing_service", lambda _session: made)
    monkeypatch.setattr(Session, "service", lambda _session, **_: made)
    monkeypatch.setattr(Session, "config", lambda _session, **_: made.config)
    monkeypatch.setattr(doctor, "_modules", lambda _config: ())
    yield made
    made.close()


@pytest.fixture
def rows(service, tmp_path):
    found = Rows(tmp_path / "bgsupervisor.db")
    yield found
    found.close()


def run(*arguments):
    """Run a command in this process; fail for what it does not turn into a sentence of ours."""
    done = CliRunner().invoke(program, [str(one) for one in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit | BgSupervisorError):
        raise AssertionError(f"bgsupervisor {' '.join(map(str, arguments))}") from done.exception
    return done


def ask(service, count):
    """Ask all that an application, a command and a supervisor ask of the rows."""
    ledger, now = service.ledger, service.ledger.clock.now()
    records = service.list(limit=None)
    assert len(records) == count
    for record in records:
        repr(record)
        record.public()
        assert record.fraction is None or 0 <= record.fraction <= 1
    for record in records[::4]:
        service.get(record.id)
        service.status(record.id)
        ledger.interruptions(record.id)
        with contextlib.suppress(BgSupervisorError):
            service.wait(record.id, timeout_s=0)
        with contextlib.suppress(BgSupervisorError):
            service.result(record.id)
    service.status("appx:good")
    assert service.counts().keys() == set(Status)
    for status in Status:
        service.list(status=status, limit=3)
    ledger.due(["appx:good"], limit=1000)
    ledger.starts()
    ledger.control_requests()
    ledger.next_due_at(after=PAST - timedelta(days=365))
    ledger.oldest_due_at()
    ledger.ended_since(PAST - timedelta(days=1), limit=1000)
    ledger.ended_on(processes.host_id(None), PAST - timedelta(days=1), limit=1000)
    ledger.ended_counts(PAST)
    ledger.supervisors()
    ledger.waits.rows()
    ledger.waits.find([record.id for record in records], "loaded")
    ledger.count_old(before=now, statuses=[Status.DONE], names=None)


COMMANDS = [
    *(["ps"], ["ps", "--all"], ["ps", "--all", "--json"], ["ps", "--tree"], ["health"], ["health", "--prometheus"]),
    *(["doctor"], ["prune", "--dry-run", "--older-than-days", "0"], ["ps", "--name", "good"], ["ps", "--key", "x"]),
]


def make_rows(rows, count, table=None, columns=()):
    rows.connection.execute("BEGIN")
    fill(rows, processes.own_identity(processes.host_id(None)), count, count if table == "supervisor" else 3)
    if table is not None:
        spoil(rows, table, columns)
    rows.connection.execute("COMMIT")


@groups
def test_listings_and_questions_stand_every_value(service, rows, table, columns):
    count = len(BAD) * len(columns)
    make_rows(rows, count, table, columns)
    ask(service, 5 * count)
    for arguments in COMMANDS:
        run(*arguments)
    for number in range(1, count + 1):
        place = number % 5 if table == "task" else {"interruption": 3, "dependency": 4}.get(table, 1)
        for arguments in (["show", "--full"] if number % 2 else ["show", "--json"], ["why"]):
            done = run(arguments[0], 10 * number + place, *arguments[1:])
            assert done.exit_code in (0, 1)
            assert "\x1b" not in done.output


@groups
def test_ends_of_tasks_are_recorded_beside_every_value(service, rows, table, columns):
    make_rows(rows, len(BAD) * len(columns), table, columns)
    ledger = service.ledger
    running = [Attempt(one.id, one.attempt) for one in ledger.starts() if "attempt" not in one.unreadable]
    ends = {
        attempt: AttemptResult(result="1")
        if attempt.id % 20 < 10
        else AttemptResult(reason=Reason.VANISHED, detail="gone")
        for attempt in running
    }
    outcome = ledger.apply(Batch(ends=ends, flawed=[one for one in ledger.due(["appx:good"], limit=9999) if one.flaw]))
    assert outcome.ended == set(running)
    assert {attempt for attempt in running if not ledger.status(attempt.id).ended} == set()


def test_a_flawed_request_is_interrupted_and_says_which_column(service, rows):
    make_rows(rows, 3)
    rows.put("task", "parent_id", b"x", 10)
    rows.put("task", "attempt", "many", 20)
    ledger = service.ledger
    flawed = [one for one in ledger.due(["appx:good"], limit=1000) if one.flaw]
    outcome = ledger.apply(Batch(flawed=flawed))
    assert outcome.struck == {10, 20}
    for id, told in ((10, "column parent_id holds a BLOB"), (20, "column attempt holds a text")):
        record = service.get(id)
        assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.RAISED)
        assert record.detail == f"its row cannot be read: {told}"


def test_record_of_a_spoilt_row_names_the_columns_and_what_stands_for_them(service, rows):
    make_rows(rows, 3)
    for column, value in (("pid", b"x"), ("run_at", "soon"), ("cpu_s", 9e999), ("status", "LATER"), ("name", None)):
        rows.put("task", column, value, 12)
    record = service.get(12)
    assert set(record.unreadable) == {"pid", "run_at", "cpu_s", "status", "name"}
    assert (record.pid, record.cpu_s, record.name, record.status) == (None, None, "?", Status.INTERRUPTED)
    assert "unreadable pid" not in run("show", 13).output
    assert "run_at" in next(line for line in run("show", 12).output.splitlines() if line.startswith("unreadable"))


def test_repr_of_a_record_shows_neither_data_nor_results(service, rows):
    make_rows(rows, 3)
    for column in ("data", "result", "error", "message", "stack"):
        rows.put("task", column, '"sesame"', 12)
    assert "sesame" not in repr(service.get(12))
    assert repr(service.get(12)).startswith("TaskRecord(id=12, name='appx:good', status=DONE, attempt=1")


# ---- a real supervisor ----

SOURCE = """
    from bgsupervisor import task

    @task
    def good() -> str:
        return "done"
"""


def test_a_supervisor_runs_a_good_task_beside_a_spoilt_row_for_each_column(make_app):
    app = make_app(SOURCE, slots=4)
    path = app.folder / "bgsupervisor.db"
    app.service.counts()
    app.service.close()
    for _ in range(2):
        rows = Rows(path)
        rows.forget_laws()
        rows.close()
    rows = Rows(path)
    rows.connection.execute("BEGIN")
    fill(rows, processes.own_identity(processes.host_id(None)), 29)
    columns = COLUMNS_OF["task"]
    base = 10_000
    for number, column in enumerate(columns):  # three rows for each: two that wait, one that runs
        for place, value in enumerate((b"\xff\x00blob", "no time", 9e999, -1, None)):
            id = base + 10 * number + place
            status = "START" if place == 1 else "REQUEST"
            rows.insert(
                "task", id=id, name="appx:good", data="{}", run_at=text(PAST), requested_at=text(PAST), status=status
            )
            rows.put("task", column, value, id)
    for table, others in COLUMNS_OF.items():
        for number, column in enumerate(others if table != "task" else ()):
            found = [id for (id,) in rows.connection.execute(f"SELECT rowid FROM bgsupervisor_{table} ORDER BY rowid")]
            rows.put(table, column, BAD[1 + number % 8], found[number % len(found)])
    rows.connection.execute("COMMIT")
    rows.close()
    supervisor = app.start()
    handle = app.service.request("appx:good", priority=100)
    assert app.wait(handle, 40).status is Status.DONE
    again = app.service.request("appx:good", priority=-100)
    assert app.wait(again, 40).status is Status.DONE, "the rows before it do not keep it from its turn"
    assert supervisor.process.poll() is None
    assert "Traceback" not in supervisor.log
    wait_until(lambda: "its row cannot be read: column data holds a BLOB" in supervisor.log, "the flaw is named")


def test_ids_at_the_edges_are_shown(service, rows):
    for id in (-5, 2**63 - 1):
        rows.insert(
            "task", id=id, status="REQUEST", name="appx:good", data="{}", run_at=text(PAST), requested_at=text(PAST)
        )
    for arguments in COMMANDS:
        run(*arguments)
    assert run("show", 2**63 - 1).exit_code == 0
    assert run("show", 2**70).exit_code == 1
