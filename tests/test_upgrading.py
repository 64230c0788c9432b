"""Versions side by side: new code on old tables, old code and old children on new ones. The new version is a copy of
this package with one more migration."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from conftest import wait_until

import bgsupervisor
from bgsupervisor import migrations
from bgsupervisor.statuses import Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

TASKS = """
    import pathlib, time
    from bgsupervisor import task

    @task
    def quick() -> int:
        return 1

    @task
    def until(name: str) -> str:
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
        return "its end"
"""
ADD_COLUMN = """
def up(migrator, db):
    db.execute_sql(f'ALTER TABLE "{migrator.table_prefix}task" ADD COLUMN "extra" TEXT')
    db.execute_sql(f'CREATE INDEX "{migrator.table_prefix}task_extra" ON "{migrator.table_prefix}task" ("extra")')
"""
REFUSE_TWINS = """
def up(migrator, db):
    db.execute_sql(f'ALTER TABLE "{migrator.table_prefix}task" ADD COLUMN "extra" TEXT')
    db.execute_sql(f'CREATE UNIQUE INDEX "one_name" ON "{migrator.table_prefix}task" ("name")')
"""


@pytest.fixture
def app(make_app):
    app = make_app(TASKS)
    app.service.counts()
    return app


@pytest.fixture
def newer(tmp_path):
    """Make versions of this package with more migrations; return the environment that has Python find one."""

    def make(**more):
        folder = tmp_path / f"version-{len(more)}-{'-'.join(more)}"
        shutil.copytree(
            Path(bgsupervisor.__file__).parent, folder / "bgsupervisor", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name, source in more.items():
            (folder / "bgsupervisor" / "migrations" / f"{name.removeprefix('_')}.py").write_text(source)
        return {"PYTHONPATH": str(folder)}

    return make


def columns(app):
    with contextlib.closing(sqlite3.connect(app.folder / "bgsupervisor.db")) as connection:
        return {row[1] for row in connection.execute("PRAGMA table_info(bgsupervisor_task)")}


def applied(app):
    with app.service.ledger.store.connected():
        return migrations.applied(app.service.ledger.store)


def test_new_code_supervises_and_requests_on_the_tables_of_the_version_before(app, newer):
    new = newer(_0900_next=ADD_COLUMN)
    app.start(environment=new)
    done = app.cli("request", "appx:quick", "--wait", environment=new)
    assert done.returncode == 0, done.stderr
    assert applied(app) == migrations.available()
    assert "extra" not in columns(app)


def test_migrate_brings_the_tables_to_the_new_version_once(app, newer):
    new = newer(_0900_next=ADD_COLUMN)
    assert app.cli("migrate", environment=new).stdout == "applied 0900_next\n"
    assert "extra" in columns(app)
    assert app.cli("migrate", environment=new).stdout == "nothing to do: the tables are this version's\n"
    done = app.cli("migrate")
    assert done.returncode == 3
    assert "the tables are of a newer version (0900_next); upgrade bgsupervisor here" in done.stderr


def test_a_child_that_was_started_before_records_its_end_through_the_old_supervisor(app, newer):
    app.start()
    record = app.started(app.service.request("appx:until", {"name": "end"}))
    assert app.cli("migrate", environment=newer(_0900_next=ADD_COLUMN)).returncode == 0
    (app.folder / "end").touch()
    assert app.wait(record.id).status is Status.DONE
    assert app.service.result(record.id) == "its end"
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


def test_a_child_that_was_started_before_records_its_end_by_itself(app, newer):
    old = app.start()
    record = app.started(app.service.request("appx:until", {"name": "end"}))
    old.kill()
    assert app.cli("migrate", environment=newer(_0900_next=ADD_COLUMN)).returncode == 0
    (app.folder / "end").touch()
    assert app.wait(record.id).status is Status.DONE
    assert app.service.result(record.id) == "its end"


def test_a_child_of_the_old_version_is_adopted_by_the_new_one(app, newer):
    new = newer(_0900_next=ADD_COLUMN)
    old = app.start()
    record = app.started(app.service.request("appx:until", {"name": "end"}))
    old.kill()
    assert app.cli("migrate", environment=new).returncode == 0
    app.start(environment=new)
    (app.folder / "end").touch()
    assert app.wait(record.id).status is Status.DONE
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


def test_code_that_is_two_versions_ahead_says_what_to_type(app, newer):
    new = newer(_0900_next=ADD_COLUMN, _0901_after="def up(migrator, db):\n    pass\n")
    for command in (["run"], ["ps"], ["health"]):
        done = app.cli(*command, environment=new)
        told = done.stdout + done.stderr
        assert "lack the migrations 0900_next, 0901_after; run `bgsupervisor migrate`" in told, command
        assert done.returncode == {"health": 2}.get(command[0], 3)
    assert app.cli("migrate", environment=new).stdout == "applied 0900_next\napplied 0901_after\n"
    assert app.cli("ps", environment=new).returncode == 0


def test_a_migration_that_a_row_does_not_fit_changes_nothing(app, newer):
    new = newer(_0900_next=REFUSE_TWINS)
    app.service.request_many("appx:quick", [{}, {}])
    before = columns(app)
    done = app.cli("migrate", environment=new)
    assert done.returncode == 3
    assert "a row does not fit the new tables, nothing was changed" in done.stderr
    assert (columns(app), applied(app)) == (before, migrations.available())
    app.start()
    wait_until(lambda: app.service.counts()[Status.DONE] == 2, "both tasks have run")
