"""Whatever PostgreSQL lets into a row: no listing and no question fails, and ends are recorded beside it."""

from __future__ import annotations

import contextlib

import psycopg
import pytest
from support.postgres_server import empty
from test_hostile_rows import COLUMNS_OF, COMMANDS, ask, fill, run

from bgsupervisor import Service
from bgsupervisor.cli.commands import doctor
from bgsupervisor.cli.session import Session
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger.attempts import Attempt, Batch
from bgsupervisor.system import processes

TEXTS = [
    "",
    "no time",
    "\u202ex\x1b[2J\n2026",
    "[" * 3000,
    '{"a": 1e999}',
    '{"x": {"secret": 5}}',
    "parent 99999999999",
]
WHOLES = [-1, 0, 2**31 - 1, -(2**31)]
BAD = {
    "text": TEXTS,
    "character varying": TEXTS,
    "integer": WHOLES,
    "bigint": [*WHOLES, 2**63 - 1, -(2**63)],
    "smallint": [-1, 0, 2**15 - 1],
    "boolean": [True],
    "double precision": [float("nan"), float("inf"), float("-inf"), -1.0, 1e300],
    "real": [float("nan"), float("inf"), -1.0],
    "timestamp with time zone": [
        "infinity",
        "-infinity",
        "0044-03-15 12:00:00 BC",
        "294276-01-01",
        "9999-12-31 23:59:59-12",
    ],
}
"""What each type of a column holds that no program of ours writes; NULL besides, where the law lets it."""


class Rows:
    """The rows of a server's database, with all its laws."""

    def __init__(self, url):
        self.connection = psycopg.connect(url, autocommit=True)

    def insert(self, table, **columns):
        names, marks = ", ".join(f'"{name}"' for name in columns), ", ".join(["%s"] * len(columns))
        values = [bool(value) if name == "any_end" else value for name, value in columns.items()]
        self.connection.execute(f"INSERT INTO bgsupervisor_{table} ({names}) VALUES ({marks})", values)

    def types(self, table):
        query = "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = %s"
        return dict(self.connection.execute(query, [f"bgsupervisor_{table}"]).fetchall())

    def places(self, table):
        return [
            place for (place,) in self.connection.execute(f"SELECT ctid::text FROM bgsupervisor_{table}").fetchall()
        ]

    def put(self, table, column, value, place):
        """Write a value into a column of one row; tell whether the laws of the table let it."""
        with contextlib.suppress(psycopg.errors.IntegrityError), self.connection.transaction():
            self.connection.execute(
                f'UPDATE bgsupervisor_{table} SET "{column}" = %s WHERE ctid = %s::tid', [value, place]
            )
            return True
        return False


@pytest.fixture
def service(postgres_with_tables, tmp_path, monkeypatch):
    """A Service on an empty database, with which the commands work too."""
    empty(postgres_with_tables)
    (tmp_path / "bgsupervisor.toml").write_text(f'database = "{postgres_with_tables}"\n')
    made = Service(config=tmp_path / "bgsupervisor.toml")
    monkeypatch.setattr(Session, "existing_service", lambda _session: made)
    monkeypatch.setattr(Session, "service", lambda _session, **_: made)
    monkeypatch.setattr(Session, "config", lambda _session, **_: made.config)
    monkeypatch.setattr(doctor, "_modules", lambda _config: ())
    yield made
    made.close()
    empty(postgres_with_tables)


@pytest.fixture
def rows(service):
    found = Rows(service.config.database)
    yield found
    found.connection.close()


def spoilt(rows, table):
    """Fill the tables, and put each bad value of its type into each column of *table*; return how many there are."""
    types = rows.types(table)
    cells = [(column, value) for column in COLUMNS_OF[table] for value in [*BAD[types[column]], None]]
    with rows.connection.transaction():
        identity = processes.own_identity(processes.host_id(None))
        fill(rows, identity, len(cells), len(cells) if table == "supervisor" else 3)
    places = rows.places(table)
    step = len(places) // len(cells)
    put = [rows.put(table, *cell, places[step * number]) for number, cell in enumerate(cells)]
    assert any(put), "the laws let nothing in, so nothing is tried"
    return len(cells)


@pytest.mark.parametrize("table", COLUMNS_OF)
def test_listings_and_ends_stand_every_value_of_a_server(service, rows, table):
    count = spoilt(rows, table)
    total = len(service.list(limit=None))
    assert total == 5 * count
    ask(service, total)
    for arguments in COMMANDS:
        run(*arguments)
    for number in range(1, count + 1, 3):
        place = number % 5 if table == "task" else {"interruption": 3, "dependency": 4}.get(table, 1)
        for arguments in (["show", "--full"], ["show", "--json"], ["why"]):
            assert run(arguments[0], 10 * number + place, *arguments[1:]).exit_code in (0, 1)
    running = {Attempt(one.id, one.attempt) for one in service.ledger.starts()}
    outcome = service.ledger.apply(Batch(ends={attempt: AttemptResult(result="1") for attempt in running}))
    assert outcome.ended == running, "ends are recorded beside what nobody can read"
