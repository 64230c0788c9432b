"""`migrate`: any number at once, on either database; and `migrate --check`, which changes nothing."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

import psycopg
import pytest
from conftest import ADD_COLUMN

from bgsupervisor import migrations
from bgsupervisor.config import sqlite_path
from bgsupervisor.models import Store

SLOWLY = "import time\n" + ADD_COLUMN + "    time.sleep(0.7)\n"
DO_NOTHING = "def up(migrator, db):\n    pass\n"
# Has loaded all that it needs before it is told to go, so that all go at once.
MIGRATE = """
import sys, playhouse.migrations
from bgsupervisor.cli import migrate, program
print("ready", flush=True)
input()
sys.argv = ["bgsupervisor", "--config", sys.argv[1], "migrate"]
program.main()
"""


@pytest.fixture
def app(make_app, url):
    return make_app("", database=url, busy_timeout_s=0.2)


def ask(url, query):
    """Return the rows of a query, without the product."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(sqlite_path(url))) as connection:
            return connection.execute(query).fetchall()
    with contextlib.closing(psycopg.connect(url, autocommit=True)) as connection:
        return connection.execute(query).fetchall()


def history(url):
    return [name for (name,) in ask(url, "SELECT name FROM bgsupervisor_schema_migration ORDER BY id")]


def tables(url):
    if url.startswith("sqlite"):
        return [name for (name,) in ask(url, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return [name for (name,) in ask(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]


def migrate_ten_times_at_once(app, environment):
    """Return what each of ten processes said and left with."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATE, str(app.config)],
            cwd=app.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=app.environment(**environment),
            text=True,
        )
        for _ in range(10)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [(process.communicate(timeout=50)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("behind", [False, True], ids=["empty", "a-version-behind"])
def test_of_ten_that_migrate_at_once_one_does_it_and_the_others_wait_for_it(app, url, newer, behind):
    if behind:
        assert app.cli("migrate").returncode == 0
    # It takes longer than busy_timeout_s.
    said = migrate_ten_times_at_once(app, newer(_0900_next=SLOWLY))

    wanted = [*migrations.available(), "0900_next"]
    did = "".join(f"applied {name}\n" for name in (wanted[-1:] if behind else wanted))
    assert sorted(said) == sorted([(did, 0)] + [("nothing to do: the tables are this version's\n", 0)] * 9)
    assert history(url) == wanted
    assert ask(url, "SELECT extra FROM bgsupervisor_task") == []


def test_tasks_are_requested_while_ten_migrate(app, url, newer):
    first = app.service.request("appx:any").id
    assert [code for _, code in migrate_ten_times_at_once(app, newer(_0900_next=ADD_COLUMN))] == [0] * 10
    assert app.service.request("appx:any").id == first + 1
    assert ask(url, "SELECT COUNT(*) FROM bgsupervisor_task") == [(2,)]


def test_a_migration_may_take_longer_than_a_statement_may(make_app, postgres_url, newer):
    app = make_app("", database=f"{postgres_url}?options=-c%20statement_timeout%3D100ms")
    slow = DO_NOTHING.replace("pass", "db.execute_sql('SELECT pg_sleep(0.3)')")
    done = app.cli("migrate", environment=newer(_0900_next=slow))
    assert (done.returncode, done.stderr) == (0, "")
    assert history(postgres_url)[-1] == "0900_next"


# ---- --check ----


def check(app, environment=None):
    done = app.cli("migrate", "--check", environment=environment or {})
    return done.returncode, done.stdout, done.stderr


def test_where_there_is_no_database_yet_check_says_so_and_makes_none(app, url):
    before = sorted(app.folder.iterdir())
    code, said, advice = check(app)
    assert (code, said.splitlines()) == (1, [f"missing {name}" for name in migrations.available()])
    assert advice.endswith("are not this version's; run `bgsupervisor migrate`\n")
    assert "ge heim" not in advice
    assert sorted(app.folder.iterdir()) == before
    if url.startswith("sqlite"):
        assert not sqlite_path(url).exists()
    else:
        assert tables(url) == []


def test_check_agrees_with_tables_of_this_version(app):
    assert app.cli("migrate").returncode == 0
    assert check(app) == (0, "up to date: the tables are this version's\n", "")


def test_check_names_what_an_older_database_lacks_and_what_a_later_one_has(app, url, newer):
    assert app.cli("migrate").returncode == 0
    new = newer(_0900_next=ADD_COLUMN, _0901_after=DO_NOTHING)
    code, said, advice = check(app, new)
    assert (code, said) == (1, "missing 0900_next\nmissing 0901_after\n")
    assert "run `bgsupervisor migrate`" in advice
    assert history(url) == migrations.available()

    assert app.cli("migrate", environment=new).returncode == 0
    assert check(app, new)[0] == 0
    told = "the tables are of a newer version (0900_next, 0901_after); upgrade bgsupervisor here\n"
    assert check(app) == (1, "", told)


def test_check_asks_a_database_that_is_in_use(app, url):
    with_an_open_connection = Store.open(url, "bgsupervisor_", busy_timeout_s=5.0)
    with with_an_open_connection.writing():
        pass
    with with_an_open_connection.writing():
        assert check(app)[0] == 0
    with_an_open_connection.close()


def test_check_leaves_the_file_of_sqlite_as_it_is(make_app, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    path = folder / "rows.db"
    app = make_app("", database=f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE invoice (id INTEGER)")

    def state():
        return [(one.name, one.read_bytes(), one.stat().st_mtime_ns) for one in folder.iterdir()]

    before = state()
    assert check(app)[0] == 1
    assert state() == before  # its journal mode too, which stands in the file
    assert app.cli("migrate").returncode == 0
    before = state()
    assert check(app)[0] == 0
    assert state() == before


def test_check_writes_nothing_in_postgresql(make_app, postgres, postgres_url):
    app = make_app("", database=postgres_url)
    assert app.cli("migrate").returncode == 0
    postgres.execute(f"ALTER DATABASE {postgres_url.rpartition('/')[2]} SET default_transaction_read_only = on")
    assert check(app) == (0, "up to date: the tables are this version's\n", "")


def test_check_does_not_take_a_server_that_is_away_for_tables_that_are_up_to_date(make_app):
    app = make_app("", database="postgresql://nobody@127.0.0.1:1/none")
    code, said, advice = check(app)
    assert (code, said) == (1, "")
    assert "is away or has given up" in advice
