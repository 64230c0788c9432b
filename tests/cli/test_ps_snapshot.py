"""`ps` and `why` show all rows as of one moment, while a supervisor claims tasks between two of their queries."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from bgsupervisor.cli.display import rows
from bgsupervisor.cli.program import program
from bgsupervisor.ledger.attempts import Batch
from bgsupervisor.ledger.records import SupervisorRecord
from bgsupervisor.statuses import Status
from bgsupervisor.system import processes

pytestmark = pytest.mark.on_both


@pytest.fixture
def claimed_between(make_app, monkeypatch):
    """An application, of whose three tasks another connection claims the first once the tasks have been listed."""
    app = make_app("")
    first, *_ = (app.service.request("appx:add") for _ in range(3))
    look, claims = rows.Rows.positions, []

    def positions(self):
        claims.append(_claim(app, first))
        return look(self)

    monkeypatch.setattr(rows.Rows, "positions", positions)
    yield app
    assert claims == [1], "the task was claimed in between, and nothing else"
    assert app.service.get(first).status is Status.START


def test_ps_shows_places_of_the_moment_of_its_rows(claimed_between, capsys):
    shown = _call(claimed_between, capsys, "ps")

    assert [line.rpartition("  ")[2].strip() for line in shown.out.splitlines()[1:]] == [
        *("REQUEST position 1", "REQUEST position 2", "REQUEST position 3")
    ]
    assert shown.err.splitlines()[-1].startswith("REQUEST 3 · START 0; "), "and counts of that moment too"


def test_ps_as_a_tree_shows_places_of_the_moment_of_its_rows(claimed_between, capsys):
    shown = _call(claimed_between, capsys, "ps", "--tree").out
    assert [f"position {place}" in shown for place in (1, 2, 3)] == [True] * 3
    assert "over" not in shown


def test_why_speaks_of_the_moment_of_its_task(claimed_between, capsys):
    running = claimed_between.service.request("appx:add", priority=9)
    _claim(claimed_between, running, slot=1)
    _supervise(claimed_between, slots=1)
    found = json.loads(_call(claimed_between, capsys, "why", "1", "--json").out)

    told = "the slots are full, 1 of 1; it has place 1 in the queue"
    assert (found["status"], found["because"][0]["sentence"]) == ("REQUEST", told)


def _supervise(app, slots):
    """Have a row of a supervisor that lives: this process."""
    own, now = processes.own_identity("here"), datetime.now(UTC)
    known = {"host": own.host, "boot_id": own.boot_id, "pid_ns": own.pid_ns, "pid": own.pid}
    row = SupervisorRecord(
        **known,
        start_ticks=own.start_ticks,
        started_at=now,
        heartbeat_at=now,
        slots=slots,
        version="0.1.0",
        catalogue='{"appx:add":{}}',
        code_error=None,
    )
    app.service.ledger.apply(Batch(supervisor=row))


def _claim(app, handle, slot=0):
    task = app.service.ledger.store.tables.Task
    with app.service.ledger.store.writing():
        return (
            task.update(status="START", attempt=1, slot=slot, pid=4711, start_ticks=1)
            .where(task.id == handle.id)
            .execute()
        )


def _call(app, capsys, *arguments):
    """Run a command in this process, so that the test reaches into it."""
    capsys.readouterr()
    program.main(["--config", str(app.config), *arguments], standalone_mode=False)
    return capsys.readouterr()
