"""A request beside the caller's own transaction on the same SQLite file, and beside that of others."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import peewee
import pytest
from pace import allowed_s

from bgsupervisor import DatabaseError, LockedByCaller, Service
from bgsupervisor.models import OWN_LOCK_S, Store

pytestmark = pytest.mark.of_sqlite

PRELUDE = """
    import sqlite3, sys, threading, time
    from pathlib import Path
    from bgsupervisor import LockedByCaller, Service

    path = sys.argv[1]
    service = Service(config=Path(path).with_name("bgsupervisor.toml"))
    service.request("a:b")

    def attempt():
        began = time.monotonic()
        try:
            service.request("a:b")
        except LockedByCaller as error:
            print(f"{time.monotonic() - began:.2f} {error}")
        else:
            print(f"{time.monotonic() - began:.2f} recorded")
"""
DJANGO = """
    import django
    from django.conf import settings
    settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": path}})
    django.setup()
    from django.db import connection, transaction
"""
SQLALCHEMY = """
    from sqlalchemy import create_engine, text
    from sqlalchemy.orm import Session, scoped_session, sessionmaker
    engine = create_engine(f"sqlite:///{path}")
"""
CALLERS = {
    "sqlite3": """
        held = sqlite3.connect(path)
        held.execute("INSERT INTO own VALUES (1)")
        attempt()
        held.rollback()
        attempt()
    """,
    "sqlite3 for any thread": """
        def view():
            held = sqlite3.connect(path, check_same_thread=False)
            held.execute("INSERT INTO own VALUES (1)")
            attempt()
            held.rollback()
            attempt()
        view()
    """,
    "sqlite3 with its own rows and texts": """
        held = sqlite3.connect(path)
        held.row_factory, held.text_factory = sqlite3.Row, bytes
        held.execute("INSERT INTO own VALUES (1)")
        attempt()
        assert held.execute("PRAGMA busy_timeout").fetchone()[0] == 5000
        held.rollback()
        attempt()
    """,
    "Django's": DJANGO
    + """
    with transaction.atomic():
        connection.cursor().execute("INSERT INTO own VALUES (1)")
        attempt()
    attempt()
    """,
    "Peewee": """
        import peewee
        database = peewee.SqliteDatabase(path, check_same_thread=False)
        with database.atomic():
            database.execute_sql("INSERT INTO own VALUES (1)")
            attempt()
        attempt()
    """,
    "SQLAlchemy's Session": SQLALCHEMY
    + """
    def view(session):
        session.execute(text("INSERT INTO own VALUES (1)"))
        attempt()
        session.commit()
        attempt()
    with Session(engine) as session:
        view(session)
    """,
    "SQLAlchemy's Session of an object": SQLALCHEMY
    + """
    class Unit:
        def __init__(self):
            self.session = Session(engine)
        def work(self):
            self.session.execute(text("INSERT INTO own VALUES (1)"))
            attempt()
            self.session.commit()
            attempt()
    Unit().work()
    """,
    "SQLAlchemy's Session of a scope": SQLALCHEMY
    + """
    class Holder:
        pass
    Holder.db = scoped_session(sessionmaker(engine))
    def view():
        Holder.db.execute(text("INSERT INTO own VALUES (1)"))
        attempt()
        Holder.db.commit()
        attempt()
    view()
    """,
    "SQLAlchemy's Connection": SQLALCHEMY
    + """
    with engine.connect() as connected:
        connected.execute(text("INSERT INTO own VALUES (1)"))
        attempt()
        connected.rollback()
        attempt()
    """,
}


@pytest.fixture
def app(make_app):
    app = make_app("", tasks=[], busy_timeout_s=5)
    with Store.open(f"sqlite:///{app.folder}/bgsupervisor.db", "bgsupervisor_", busy_timeout_s=5).writing():
        pass
    _execute(app, "CREATE TABLE own (number INTEGER)")
    return app


def _path(app):
    return app.folder / "bgsupervisor.db"


def _execute(app, statement):
    connection = sqlite3.connect(_path(app), isolation_level=None)
    connection.execute(statement)
    connection.close()


class Holder:
    """Another process that keeps the file locked for a while."""

    def __init__(self, app, seconds):
        code = (
            "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
            "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(float(sys.argv[2])); c.close()"
        )
        arguments = [sys.executable, "-c", code, str(_path(app)), str(seconds)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("caller", CALLERS)
def test_request_while_the_caller_holds_the_lock_fails_at_once(app, caller):
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(CALLERS[caller])
    done = subprocess.run(
        [sys.executable, "-c", code, str(_path(app))], capture_output=True, text=True, timeout=30, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    waited_s, sentence = first.split(" ", 1)
    assert float(waited_s) < allowed_s(2.5)
    assert sentence.startswith(f"cannot write to the database {_path(app)}: it is kept locked by a transaction of ")
    assert caller.partition(" ")[0].partition("'")[0] in sentence
    assert "have the request join it, connection=" in sentence
    assert second.endswith(" recorded")
    assert len(app.service.list()) == 2


@pytest.mark.parametrize("reads", [False, True])
def test_request_beside_another_process_waits_and_succeeds(app, reads):
    app.service.request("a:b")
    own = sqlite3.connect(_path(app), isolation_level=None)
    if reads:  # a transaction that has read keeps nobody away
        own.execute("BEGIN")
        own.execute("SELECT * FROM own").fetchall()
    with Holder(app, 1.0):
        began = time.monotonic()
        assert app.service.request("a:b").id == 2
        assert time.monotonic() - began > OWN_LOCK_S
    assert own.in_transaction is reads
    own.close()


def test_request_beside_another_thread_waits_and_succeeds(app):
    app.service.request("a:b")
    held, let_go = threading.Event(), threading.Event()
    database = peewee.SqliteDatabase(_path(app), check_same_thread=False)

    def write():
        with database.atomic("IMMEDIATE"):
            held.set()
            let_go.wait(1.0)
        database.close()

    thread = threading.Thread(target=write)
    thread.start()
    held.wait(10)
    with database.connection_context(), database.atomic():
        database.execute_sql("SELECT * FROM own").fetchall()
        assert app.service.request("a:b").id == 2
    thread.join()


def test_request_beside_a_lock_that_stays_says_so_after_the_timeout(make_app):
    app = make_app("", tasks=[], busy_timeout_s=0.5)
    app.service.request("a:b")
    with (
        Holder(app, 30),
        pytest.raises(DatabaseError, match=r"locked by another writer for longer than 0\.5 s") as raised,
    ):
        app.service.request("a:b")

    assert not isinstance(raised.value, LockedByCaller)


def test_request_after_a_refusal_waits_as_long_as_configured(app):
    app.service.request("a:b")
    own = sqlite3.connect(_path(app), isolation_level=None)
    own.execute("BEGIN IMMEDIATE")
    with pytest.raises(LockedByCaller):
        app.service.request("a:b")
    own.close()

    limit_ms = app.service.ledger.store.database.execute_sql("PRAGMA busy_timeout").fetchone()[0]
    assert limit_ms == 5000


def test_other_writes_while_the_caller_holds_the_lock_fail_at_once(app):
    waiting = app.service.request("a:b")
    own = sqlite3.connect(_path(app), isolation_level=None)
    own.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    for call in (
        lambda: app.service.cancel(waiting),
        lambda: app.service.request("a:b", unique=True),
        lambda: app.service.request("a:b", after=waiting),
        lambda: app.service.request_many("a:b", [{}, {}]),
    ):
        with pytest.raises(LockedByCaller):
            call()
    assert time.monotonic() - began < allowed_s(4 * 5)
    assert app.service.status(waiting) == "REQUEST"
    own.close()


def test_a_request_joins_the_transaction_it_is_told_to(app):
    app.service.request("a:b")
    own = sqlite3.connect(_path(app))
    own.execute("INSERT INTO own VALUES (1)")
    with pytest.raises(LockedByCaller):
        app.service.request("a:b")
    assert app.service.request("a:b", connection=own).id == 2
    own.commit()
    own.close()

    assert len(app.service.list()) == 2


def test_a_second_service_in_a_shared_transaction_is_refused(app):
    app.service.request("a:b")
    database = peewee.SqliteDatabase(_path(app))
    shared = Service(database, config=app.config)
    with database.atomic():
        shared.request("a:b")
        with pytest.raises(LockedByCaller, match="a transaction of a Peewee database"):
            app.service.request("a:b")
    database.close()

    assert len(app.service.list()) == 2
