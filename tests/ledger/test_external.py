"""Requests on a connection of the application: its transaction, its savepoints, its settings, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import select
import sqlite3
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import peewee
import psycopg
import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy
from psycopg.rows import dict_row
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support.app import only_postgres, only_sqlite, wait_until
from support.postgres_server import make_tables

from bgsupervisor import Service, Status, Task, clock
from bgsupervisor.database.store import Store
from bgsupervisor.errors import DatabaseError, RequestRefused, UnknownTask

WAIT_S = 20


class Work(Task):
    def run(self, n: int = 0) -> int:
        return n


# ---- applications: a connection, a transaction, a savepoint, a row of their own ----


class Raw:
    """A plain DB-API connection, whose transactions the driver opens by itself."""

    def __init__(self, raw):
        self.raw = self.connection = raw

    @contextlib.contextmanager
    def transaction(self):
        try:
            yield
        except BaseException:
            self.raw.rollback()
            raise
        self.raw.commit()

    @contextlib.contextmanager
    def savepoint(self):
        self.execute("SAVEPOINT here")
        try:
            yield
        except BaseException:
            self.execute("ROLLBACK TO SAVEPOINT here")
            raise
        self.execute("RELEASE SAVEPOINT here")

    def execute(self, statement):
        with contextlib.closing(self.raw.cursor()) as cursor:
            cursor.execute(statement)

    def write(self):
        self.execute("INSERT INTO orders (name) VALUES ('Ada')")

    def close(self):
        self.raw.close()


class ByHand(Raw):
    """One that commits each statement by itself, unless BEGIN was written."""

    @contextlib.contextmanager
    def transaction(self):
        self.execute("BEGIN")
        try:
            yield
        except BaseException:
            self.execute("ROLLBACK")
            raise
        self.execute("COMMIT")


class Psycopg(Raw):
    def transaction(self):
        return self.raw.transaction()

    savepoint = transaction


class Peewee(Raw):
    def __init__(self, database):
        self.connection = database
        database.connect()

    def transaction(self):
        return self.connection.atomic()

    savepoint = transaction

    def execute(self, statement):
        self.connection.execute_sql(statement)

    def close(self):
        self.connection.close()


class Alchemy(Raw):
    def __init__(self, connection, engine):
        self.connection = connection
        self.engine = engine

    def transaction(self):
        return self.connection.begin()

    def savepoint(self):
        return self.connection.begin_nested()

    def execute(self, statement):
        self.connection.execute(sqlalchemy.text(statement))

    def close(self):
        self.connection.close()
        self.engine.dispose()


class AsYouGo(Alchemy):
    """One that begins by itself with the first statement."""

    @contextlib.contextmanager
    def transaction(self):
        try:
            yield
        except BaseException:
            self.connection.rollback()
            raise
        self.connection.commit()


class Django(Raw):
    """The connection of another alias than `default`."""

    def __init__(self, settings):
        import django
        from django.conf import settings as project
        from django.db import connections

        if not project.configured:
            project.configure(USE_TZ=True, TIME_ZONE="Europe/Berlin")
            django.setup()
        both = {"default": {"ENGINE": "django.db.backends.dummy"}, "orders": settings}
        connections.settings.update(connections.configure_settings(both))
        self.connection = connections["orders"]

    def transaction(self):
        from django.db import transaction

        return transaction.atomic(using="orders")

    savepoint = transaction

    def execute(self, statement):
        with self.connection.cursor() as cursor:
            cursor.execute(statement)

    def close(self):
        from django.db import connections

        self.connection.close()
        del connections["orders"]
        del connections.settings["orders"]


def info(url):
    return {key: str(value) for key, value in psycopg.conninfo.conninfo_to_dict(url).items()}


def engine_of(url, driver="psycopg", **options):
    if url.startswith("sqlite"):
        return sqlalchemy.create_engine(url, **options)
    return sqlalchemy.create_engine(url.replace("postgresql:", f"postgresql+{driver}:"), **options)


def session(url, **options):
    engine = engine_of(url, **options)
    return Alchemy(Session(engine), engine)


def session_as_you_go(url):
    engine = engine_of(url)
    return AsYouGo(Session(engine), engine)


def connection_as_you_go(url):
    engine = engine_of(url)
    return AsYouGo(engine.connect(), engine)


def scoped(url):
    engine = engine_of(url)
    return Alchemy(scoped_session(sessionmaker(engine)), engine)


def connection(url, **options):
    engine = engine_of(url, **options)
    return Alchemy(engine.connect(), engine)


def sqlite(url, **options):
    return sqlite3.connect(url.removeprefix("sqlite:///"), **options)


def peewee_postgres(url, **options):
    given = info(url)
    return peewee.PostgresqlDatabase(given.pop("dbname"), **given, **options)


def django(url):
    if url.startswith("sqlite"):
        return Django({"ENGINE": "django.db.backends.sqlite3", "NAME": url.removeprefix("sqlite:///")})
    given = info(url)
    named = {"NAME": given["dbname"], "USER": given["user"], "HOST": given["host"], "PORT": given["port"]}
    named["PASSWORD"] = given.get("password", "")
    return Django({"ENGINE": "django.db.backends.postgresql", **named})


ON_SQLITE = {
    "sqlite3": lambda url: Raw(sqlite(url)),
    "sqlite3 without isolation": lambda url: ByHand(sqlite(url, isolation_level=None)),
    "peewee": lambda url: Peewee(peewee.SqliteDatabase(url.removeprefix("sqlite:///"), pragmas={"synchronous": 2})),
    "django": django,
    "session": session,
    "scoped_session": scoped,
    "connection": connection,
    "session as you go": session_as_you_go,
    "connection as you go": connection_as_you_go,
}
if sys.version_info >= (3, 12):
    ON_SQLITE["sqlite3 of PEP 249"] = lambda url: Raw(sqlite(url, autocommit=False))
    ON_SQLITE["sqlite3 with autocommit"] = lambda url: ByHand(sqlite(url, autocommit=True))
ON_POSTGRES = {
    "psycopg": lambda url: Raw(psycopg.connect(url)),
    "psycopg with autocommit": lambda url: Psycopg(psycopg.connect(url, autocommit=True)),
    "psycopg2": lambda url: Raw(psycopg2.connect(url)),
    "peewee": lambda url: Peewee(peewee_postgres(url, prefer_psycopg3=True)),
    "peewee on psycopg2": lambda url: Peewee(peewee_postgres(url)),
    "django": django,
    "session": session,
    "scoped_session": scoped,
    "connection": connection,
    "session as you go": session_as_you_go,
    "connection as you go": connection_as_you_go,
    "session on psycopg2": lambda url: session(url, driver="psycopg2"),
}
KINDS = [("sqlite", name) for name in ON_SQLITE] + [("postgres", name) for name in ON_POSTGRES]
every_kind = pytest.mark.parametrize(
    ("store_url", "kind"), KINDS, indirect=["store_url"], ids=[f"{name}-{database}" for database, name in KINDS]
)


def kinds(*names, on=("sqlite", "postgres")):
    chosen = [(database, name) for database, name in KINDS if name in names and database in on]
    ids = [f"{name}-{database}" for database, name in chosen]
    return pytest.mark.parametrize(("store_url", "kind"), chosen, indirect=["store_url"], ids=ids)


@pytest.fixture
def url(store_url):
    """A database with our tables and one of the application."""
    store = Store.open(store_url, "bgsupervisor_", busy_timeout_s=5.0)
    with store.connected():
        store.database.execute_sql("DROP TABLE IF EXISTS orders")
        store.database.execute_sql("CREATE TABLE orders (name TEXT UNIQUE)")
    yield store_url
    with store.connected():
        store.database.execute_sql("DROP TABLE IF EXISTS orders")
    store.close()


@pytest.fixture
def service(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    service = Service(url)
    yield service
    service.close()


@pytest.fixture
def application(url, kind):
    application = (ON_SQLITE if url.startswith("sqlite") else ON_POSTGRES)[kind](url)
    yield application
    application.close()


@contextlib.contextmanager
def rolled_back(context):
    with contextlib.suppress(ZeroDivisionError), context:
        yield
        raise ZeroDivisionError


def seen(service):
    """Return how many orders and tasks others see."""
    with service.ledger.store.connected():
        orders = service.ledger.store.database.execute_sql("SELECT count(*) FROM orders").fetchone()[0]
    return orders, len(service.list())


# ---- one transaction ----


@every_kind
def test_a_commit_of_the_application_makes_row_and_task_visible_and_not_before(service, application):
    with application.transaction():
        application.write()
        handle = service.request(Work, {"n": 1}, key="k", connection=application.connection)
        assert seen(service) == (0, 0)
        assert service.get(handle) is None
    assert seen(service) == (1, 1)
    assert (service.get(handle).data, service.status(Work, key="k")) == ('{"n":1}', Status.REQUEST)


@every_kind
def test_a_request_before_the_first_statement_of_the_application_is_in_its_transaction(service, application):
    with application.transaction():
        service.request_many(Work, [{"n": 1}, {"n": 2}], connection=application.connection)
        application.write()
        assert seen(service) == (0, 0)
    assert seen(service) == (1, 2)


@every_kind
def test_a_rollback_of_the_application_leaves_nothing(service, application):
    with rolled_back(application.transaction()):
        service.request(Work, connection=application.connection)
        application.write()
    with rolled_back(application.transaction()):
        application.write()
        service.request(Work, unique=True, connection=application.connection)
    assert seen(service) == (0, 0)


@every_kind
def test_a_savepoint_that_is_rolled_back_takes_only_its_own_requests(service, application):
    with application.transaction():
        application.write()
        service.request(Work, key="outer", connection=application.connection)
        with rolled_back(application.savepoint()):
            service.request(Work, key="inner", connection=application.connection)
    assert [record.key for record in service.list()] == ["outer"]


@kinds(
    "sqlite3 without isolation", "sqlite3 with autocommit", "psycopg with autocommit", "peewee", "django",
    "peewee on psycopg2",
)  # fmt: skip
def test_on_a_connection_that_commits_by_itself_a_request_is_a_transaction_of_its_own(service, application):
    first = service.request(Work, connection=application.connection)
    service.request(Work, unique=True, after=[first], connection=application.connection)
    application.write()
    assert seen(service) == (1, 2)
    assert service.ledger.store.database.execute_sql("SELECT count(*) FROM bgsupervisor_dependency").fetchone() == (1,)


@pytest.mark.parametrize("make", [session, connection])
def test_on_an_engine_that_commits_by_itself_too(service, url, make):
    application = make(url, isolation_level="AUTOCOMMIT")
    service.request(Work, connection=application.connection)
    assert seen(service) == (0, 1)
    application.close()


@every_kind
def test_the_second_of_two_requests_with_one_unique_key_gets_the_first_and_the_transaction_goes_on(
    service, application
):
    before = service.request(Work, unique="before")
    with application.transaction():
        application.write()
        twin = service.request(Work, unique="before", connection=application.connection)
        first = service.request(Work, unique="k", connection=application.connection)
        second = service.request(Work, unique="k", connection=application.connection)
        application.execute("UPDATE orders SET name = 'Jana'")
    assert (twin.id, twin.created) == (before.id, False)
    assert (first.created, second.id, second.created) == (True, first.id, False)
    assert seen(service) == (1, 2)


@every_kind
def test_a_request_that_is_refused_leaves_the_transaction_as_it_was(service, application):
    with application.transaction():
        application.write()
        with pytest.raises(UnknownTask):
            service.request(Work, after=[99], connection=application.connection)
        done = service.request(Work, connection=application.connection)
        service.request(Work, after=[done], after_any_end=True, connection=application.connection)
    assert seen(service) == (1, 2)


@kinds("sqlite3", "psycopg", "psycopg2")
def test_a_refused_request_alone_leaves_no_transaction_open(service, application):
    with pytest.raises(UnknownTask):
        service.request(Work, after=[99], connection=application.connection)
    raw = application.raw
    assert not (raw.in_transaction if isinstance(raw, sqlite3.Connection) else raw.info.transaction_status)


# ---- waking ----


@pytest.fixture
def wake_ups(wake_ups, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return wake_ups


@kinds("peewee", "django")
def test_the_supervisor_is_notified_after_the_commit_and_not_before_and_for_a_rollback_never(
    service, application, wake_ups
):
    with application.transaction():
        with application.savepoint():
            service.request(Work, connection=application.connection)
        assert wake_ups() == 0
    assert wake_ups() == 1
    with rolled_back(application.transaction()):
        service.request(Work, connection=application.connection)
    assert wake_ups() == 0
    service.request(Work, connection=application.connection)
    assert wake_ups() == 1


@kinds(*ON_POSTGRES, on=["postgres"])
def test_the_server_tells_of_the_commit_and_not_before(service, application, url):
    store = Store.open(url, "bgsupervisor_", busy_timeout_s=5.0)
    with store.connected():
        pass  # nobody listens to a server that is away
    with contextlib.closing(store.listener()) as listener:
        with application.transaction():
            service.request(Work, connection=application.connection)
            assert select.select([listener], [], [], 0.2)[0] == []
        assert select.select([listener], [], [], WAIT_S)[0]
        assert listener.drain()


# ---- the settings of the application ----


class Rows(sqlite3.Cursor):
    """A cursor of the application, whose rows are its own."""

    def fetchone(self):
        raise AssertionError

    fetchall = fetchone


class Cursors(sqlite3.Connection):
    def cursor(self, *_):
        return super().cursor(Rows)


def sqlite_of_taste(url):
    raw = sqlite(url, factory=Cursors, detect_types=sqlite3.PARSE_DECLTYPES)
    raw.row_factory, raw.text_factory = lambda _, row: {"row": row}, bytes
    return raw


def psycopg2_of_taste(url):
    return psycopg2.connect(url, cursor_factory=psycopg2.extras.RealDictCursor)


@pytest.mark.parametrize(
    ("store_url", "make", "settings"),
    [
        ("sqlite", sqlite_of_taste, ("row_factory", "text_factory", "isolation_level")),
        ("postgres", lambda url: psycopg.connect(url, row_factory=dict_row), ("row_factory", "autocommit")),
        ("postgres", psycopg2_of_taste, ("cursor_factory", "autocommit")),
    ],
    ids=["sqlite3", "psycopg", "psycopg2"],
    indirect=["store_url"],
)
def test_factories_of_the_application_neither_disturb_nor_are_changed(service, url, make, settings):
    raw = make(url)
    before = [getattr(raw, name) for name in settings]
    first = service.request(Work, unique="k", connection=raw)
    assert service.request(Work, unique="k", connection=raw).id == first.id
    assert service.request(Work, after=[first], connection=raw).created
    assert [getattr(raw, name) for name in settings] == before
    raw.commit()
    raw.close()
    assert seen(service) == (0, 2)


@pytest.mark.parametrize(
    ("store_url", "make"),
    [
        ("sqlite", sqlite_of_taste),
        ("sqlite", lambda url: Session(engine_of(url))),
        ("postgres", psycopg.connect),
        ("postgres", psycopg2.connect),
        ("postgres", peewee_postgres),
    ],
    ids=["sqlite3", "session", "psycopg", "psycopg2", "peewee"],
    indirect=["store_url"],
)
def test_no_connection_is_kept_alive(service, url, make):
    connection = make(url)
    service.request(Work, connection=connection)
    connection.close()
    held = weakref.ref(connection)
    del connection
    gc.collect()
    assert held() is None


@kinds("sqlite3", "psycopg")
def test_threads_request_on_connections_of_their_own_at_once(service, url, kind):
    def work(number):
        application = (ON_SQLITE if url.startswith("sqlite") else ON_POSTGRES)[kind](url)
        with contextlib.closing(application):
            for _ in range(5):
                with application.transaction():
                    service.request(Work, {"n": number}, unique=str(number), connection=application.connection)
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    assert seen(service) == (0, 8)


@only_sqlite
def test_weak_settings_of_the_application_are_warned_about_once_and_left_alone(service, url, caplog):
    raw = sqlite(url)
    raw.execute("PRAGMA synchronous = 1")
    for _ in range(3):
        service.request(Work, connection=raw)
    raw.commit()
    (record,) = caplog.records
    assert "journal_mode=wal and synchronous=1" in record.getMessage()
    names = ("synchronous", "wal_autocheckpoint", "busy_timeout", "foreign_keys")
    assert [raw.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == [1, 1000, 5000, 0]
    raw.close()


@only_postgres
def test_a_weak_setting_of_the_applications_session_is_warned_about_once(service, url, caplog):
    for setting in ("on", "off", "off"):
        with contextlib.closing(psycopg.connect(url, options=f"-c synchronous_commit={setting}")) as raw:
            Service(url).request(Work, connection=raw)
            Service(url).request(Work, connection=raw)
    assert len([one for one in caplog.records if "synchronous_commit=off" in one.getMessage()]) == 4


@only_sqlite
def test_a_plain_request_costs_four_statements_beside_the_begin_of_the_driver(service, url):
    said = []
    with contextlib.closing(sqlite(url)) as raw:
        service.request(Work, connection=raw)
        raw.commit()
        raw.set_trace_callback(said.append)
        service.request(Work, connection=raw)
        raw.set_trace_callback(None)
    found = [statement.split()[0] for statement in said if not statement.startswith("PRAGMA")]
    assert found == ["BEGIN", "DELETE", "SAVEPOINT", "INSERT", "RELEASE"]


def test_in_a_test_of_an_application_the_request_is_in_the_tests_own_database(bgsupervisor):
    with contextlib.closing(sqlite3.connect(":memory:")) as elsewhere, elsewhere:
        Service("sqlite:////nowhere/tasks.db").request(Work, {"n": 1}, connection=elsewhere)
    bgsupervisor.assert_requested(Work, data={"n": 1})


# ---- others write as well ----


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def blocked(service):
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with service.ledger.store.connected():
        return service.ledger.store.database.execute_sql(query).fetchone()[0]


@kinds("psycopg", "django", "session", on=["postgres"])
def test_a_unique_key_that_another_takes_meanwhile_gives_its_task_and_spoils_no_transaction(
    service, application, url, pool
):
    other = psycopg.connect(url)
    theirs = service.request(Work, unique="k", connection=other)

    def commit():
        wait_until(lambda: blocked(service), "the request waits for the other's commit")
        other.commit()
        service.close()

    with application.transaction():
        application.write()
        committing = pool.submit(commit)
        mine = service.request(Work, unique="k", connection=application.connection)
        committing.result(WAIT_S)
        application.execute("UPDATE orders SET name = 'Jana'")
    other.close()
    assert (mine.id, mine.created) == (theirs.id, False)
    assert seen(service) == (1, 1)


@only_sqlite
def test_a_request_as_the_first_statement_waits_for_another_writer(service, url, pool):
    raw, other = sqlite(url, isolation_level=None), sqlite(url, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    raw.execute("BEGIN")
    threading.Timer(0.3, other.execute, ["COMMIT"]).start()
    service.request(Work, unique="k", connection=raw)
    raw.execute("COMMIT")
    assert seen(service) == (0, 1)
    raw.close()
    other.close()


@only_sqlite
def test_a_transaction_that_has_read_before_another_wrote_is_told_how_to_begin(service, url):
    raw = sqlite(url, isolation_level=None)
    raw.execute("BEGIN")
    raw.execute("SELECT count(*) FROM orders").fetchone()
    service.request(Work)
    with pytest.raises(DatabaseError, match=r"written since your transaction began.* BEGIN IMMEDIATE"):
        service.request(Work, connection=raw)
    raw.execute("ROLLBACK")
    raw.close()


@only_sqlite
def test_a_lock_of_another_writer_is_told_with_the_time_limit_of_the_connection(service, url):
    raw, other = sqlite(url, timeout=0.2), sqlite(url, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match=r"locked by another writer for longer than 0\.2 s"):
        service.request(Work, connection=raw)
    assert not raw.in_transaction
    other.close()
    raw.close()


@only_postgres
@pytest.mark.parametrize("driver", [psycopg, psycopg2], ids=["psycopg", "psycopg2"])
def test_a_lock_of_another_writer_is_waited_for_as_long_as_the_connection_says(service, url, driver):
    handle = service.request(Work)
    raw = driver.connect(url, options="-c lock_timeout=200")
    with service.ledger.store.writing():
        with pytest.raises(DatabaseError, match="locked by another writer for longer than its lock_timeout"):
            service.request(Work, after=[handle], connection=raw)
        service.request(Work, connection=raw)
    raw.commit()
    raw.close()
    assert seen(service) == (0, 2)


@only_postgres
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_after_is_refused_where_the_transaction_could_not_see_an_end(service, url, level):
    handle = service.request(Work)
    engine = engine_of(url, isolation_level=level)
    with Session(engine) as session:
        with pytest.raises(DatabaseError, match=f"open transaction is {level} and sees nothing"):
            service.request(Work, after=[handle], connection=session)
        service.request(Work, connection=session)
        session.commit()
    engine.dispose()
    assert seen(service) == (0, 2)


@only_postgres
def test_a_unique_key_whose_holder_the_transaction_cannot_see_is_told(service, url):
    engine = engine_of(url, isolation_level="REPEATABLE READ")
    with Session(engine) as session:
        session.execute(sqlalchemy.text("SELECT count(*) FROM orders"))
        service.request(Work, unique="k")
        with pytest.raises(DatabaseError, match=r"unique key .* which this transaction does not see"):
            service.request(Work, unique="k", connection=session)
        session.execute(sqlalchemy.text("SELECT 1"))
    engine.dispose()


# ---- what is refused ----


@kinds("sqlite3", "peewee", "django", "session", "psycopg", "psycopg2")
def test_a_connection_to_another_database_is_refused(service, url, kind, tmp_path, request):
    if url.startswith("sqlite"):
        elsewhere = f"sqlite:///{tmp_path}/other.db"
    else:
        elsewhere = request.getfixturevalue("postgres_url")
        make_tables(elsewhere)
    application = (ON_SQLITE if url.startswith("sqlite") else ON_POSTGRES)[kind](elsewhere)
    with contextlib.closing(application), pytest.raises(RequestRefused, match="leads to another database"):
        service.request(Work, connection=application.connection)
    assert seen(service) == (0, 0)


@only_postgres
def test_another_schema_of_the_same_database_is_another_place(service, url):
    raw = psycopg.connect(url)
    raw.execute("CREATE SCHEMA elsewhere")
    raw.execute("SET search_path = elsewhere")
    with pytest.raises(DatabaseError, match=r"sees no table bgsupervisor_task .* correct its search_path"):
        service.request(Work, connection=raw)
    raw.execute("CREATE TABLE bgsupervisor_task (LIKE public.bgsupervisor_task INCLUDING ALL)")
    with pytest.raises(RequestRefused, match="its table bgsupervisor_task is another one"):
        service.request(Work, connection=raw)
    raw.rollback()
    raw.close()


@only_postgres
def test_a_connection_of_sqlite_where_a_server_is_supervised_is_refused(service):
    raw = sqlite3.connect(":memory:")
    with contextlib.closing(raw), pytest.raises(RequestRefused, match="leads to another database, SQLite"):
        service.request(Work, connection=raw)


@only_sqlite
def test_a_database_in_memory_is_refused(service):
    raw = sqlite3.connect(":memory:")
    with contextlib.closing(raw), pytest.raises(RequestRefused, match="another database, a database in memory"):
        service.request(Work, connection=raw)


@only_sqlite
def test_a_symlink_to_the_file_is_the_file(service, url, tmp_path):
    (tmp_path / "link.db").symlink_to(url.removeprefix("sqlite:///"))
    with contextlib.closing(sqlite3.connect(tmp_path / "link.db")) as raw:
        service.request(Work, connection=raw)
        raw.commit()
    assert seen(service) == (0, 1)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_missing_tables_are_not_made_in_the_transaction_of_the_application(database, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/new.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    raw = sqlite(url) if database == "sqlite" else psycopg.connect(url)
    raw.execute("CREATE TABLE orders (name TEXT)")
    raw.commit()
    raw.execute("INSERT INTO orders VALUES ('Ada')")
    service = Service(url)
    with pytest.raises(DatabaseError, match="run `bgsupervisor migrate`"):
        service.request(Work, connection=raw)
    raw.commit()
    assert raw.execute("SELECT count(*) FROM orders").fetchone()[0] == 1
    raw.close()
    service.close()


def closed(application):
    application.close()
    return application.connection


@kinds("sqlite3", "psycopg", "psycopg2", "connection")
def test_a_closed_connection_is_told(service, application):
    with pytest.raises(DatabaseError, match=r"connection cannot be used: .*closed.*; nothing was recorded"):
        service.request(Work, connection=closed(application))


@kinds("peewee", "peewee on psycopg2")
def test_a_peewee_database_opens_by_itself_only_if_it_would_for_the_application(service, application):
    application.close()
    application.connection.autoconnect = False
    with pytest.raises(DatabaseError, match="cannot be used: it is closed"):
        service.request(Work, connection=application.connection)
    application.connection.autoconnect = True
    service.request(Work, connection=application.connection)
    assert seen(service) == (0, 1)


@kinds("psycopg", "psycopg2", "session", "connection", "django", "peewee", on=["postgres"])
def test_a_transaction_that_has_failed_is_told(service, application):
    driver_errors = (psycopg.Error, psycopg2.Error, sqlalchemy.exc.DBAPIError, peewee.PeeweeException)
    from django.db import DatabaseError as DjangoError

    with rolled_back(application.transaction()):
        with pytest.raises((*driver_errors, DjangoError)):
            application.execute("SELECT nonsense")
        with pytest.raises(DatabaseError, match="transaction has failed, and is to be rolled back"):
            service.request(Work, connection=application.connection)
    with application.transaction():
        service.request(Work, connection=application.connection)
    assert seen(service) == (0, 1)


@kinds("django")
def test_a_transaction_that_django_will_roll_back_is_told(service, application):
    from django.db import transaction

    with application.transaction():
        transaction.set_rollback(True, using="orders")
        with pytest.raises(DatabaseError, match="transaction has failed, and is to be rolled back"):
            service.request(Work, connection=application.connection)


@kinds("session")
def test_a_session_whose_flush_has_failed_is_told_in_the_words_of_sqlalchemy(service, application):
    orders = sqlalchemy.orm.registry().generate_base()

    class Order(orders):
        __tablename__ = "orders"
        name = sqlalchemy.Column(sqlalchemy.String, primary_key=True)

    application.connection.add_all([Order(name="Ada")])
    application.connection.commit()
    application.connection.expunge_all()
    application.connection.add(Order(name="Ada"))
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        application.connection.flush()
    with pytest.raises(DatabaseError, match=r"rolled back due to a previous exception.*Session\.rollback"):
        service.request(Work, connection=application.connection)


@only_sqlite
def test_a_connection_of_another_thread_is_told(service, url, pool):
    raw = pool.submit(sqlite, url).result(WAIT_S)
    with pytest.raises(DatabaseError, match="can only be used in that same thread"):
        service.request(Work, connection=raw)
    pool.submit(raw.close).result(WAIT_S)


@kinds("django", "peewee")
def test_a_connection_that_a_framework_keeps_for_each_thread_is_told_or_another(service, application, kind, pool):
    def ask():
        try:
            return service.request(Work, connection=application.connection).created
        except DatabaseError as error:
            return str(error)
        finally:
            if kind == "peewee":
                application.connection.close()

    told = pool.submit(ask).result(WAIT_S)
    assert told is True if kind == "peewee" else "can only be used in that same thread" in told


def end_session(service, raw):
    with service.ledger.store.connected():
        query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE pid = %s"
        service.ledger.store.database.execute_sql(query, (raw.info.backend_pid,))


@kinds("django", on=["postgres"])
@pytest.mark.parametrize("checks", [True, False])
def test_a_connection_that_django_keeps_and_the_server_has_closed_is_replaced(service, application, checks):
    connection = application.connection
    connection.settings_dict |= {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": checks}
    service.request(Work, connection=connection)
    end_session(service, connection.connection)
    connection.close_if_unusable_or_obsolete()  # between two requests of the web
    if not checks:
        with pytest.raises(DatabaseError, match="is away or has given up"):
            service.request(Work, connection=connection)
        connection.close_if_unusable_or_obsolete()
    service.request(Work, connection=connection)
    assert seen(service) == (0, 2)


@only_postgres
@pytest.mark.parametrize("driver", [psycopg, psycopg2], ids=["psycopg", "psycopg2"])
def test_a_server_that_is_away_is_told(service, url, driver):
    raw = driver.connect(url)
    service.request(Work, connection=raw)
    raw.commit()
    end_session(service, raw)
    with pytest.raises(DatabaseError, match="is away or has given up"):
        service.request(Work, connection=raw)
    with pytest.raises(DatabaseError, match="cannot be used: it is closed"):
        service.request(Work, connection=raw)
    raw.close()


@pytest.mark.parametrize(
    "nothing",
    [object(), "sqlite:///x.db", sqlalchemy.create_engine("sqlite://"), mock.Mock(), 7],
    ids=["object", "address", "engine", "mock", "number"],
)
@only_sqlite
def test_what_is_no_connection_is_refused_with_what_would_be_one(service, nothing):
    with pytest.raises(RequestRefused, match="cannot record a request; give a Peewee database, Django's connection"):
        service.request(Work, connection=nothing)


@only_postgres
def test_an_asynchronous_connection_is_refused(service, url):
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def ask():
        raw = await psycopg.AsyncConnection.connect(url)
        engine = create_async_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        async with AsyncSession(engine) as session:
            for connection in (raw, session, await session.connection()):
                with pytest.raises(RequestRefused, match="connection is asynchronous"):
                    service.request(Work, connection=connection)
            with pytest.raises(RequestRefused, match="connection is asynchronous"):
                await session.run_sync(lambda sync: service.request(Work, connection=sync))
        await raw.close()
        await engine.dispose()

    asyncio.run(ask())
    assert seen(service) == (0, 0)


# ---- a Service on a Peewee database of PostgreSQL ----


@pytest.fixture
def shared(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = peewee_postgres(url)
    yield shared
    shared.close()


@only_postgres
@pytest.mark.parametrize("options", [{}, {"prefer_psycopg3": True}, {"isolation_level": "SERIALIZABLE"}])
def test_a_service_on_a_peewee_database_of_postgresql_joins_its_transaction(url, service, wake_ups, options):
    database = peewee_postgres(url, **options)
    mine = Service(database)
    with rolled_back(database.atomic()):
        mine.request(Work)
    with database.atomic():
        handle = mine.request(Work, unique="k")
        assert mine.request(Work, unique="k").id == handle.id
        assert seen(service) == (0, 0)
        assert wake_ups() == 0
    assert wake_ups() == 2
    assert seen(service) == (0, 1)
    assert mine.cancel(handle).status is Status.INTERRUPTED
    assert mine.status(handle) is Status.INTERRUPTED
    database.close()


@only_postgres
def test_the_address_of_a_peewee_database_may_be_a_whole_one(url, service, tmp_path):
    for database in (peewee.PostgresqlDatabase(url), peewee.DatabaseProxy()):
        if isinstance(database, peewee.Proxy):
            database.initialize(peewee.PostgresqlDatabase(url))
        service.request(Work, connection=database)
        database.close()
    assert seen(service) == (0, 2)


@only_postgres
def test_a_process_that_requests_on_the_applications_connection_alone_asks_the_servers_time_again(
    service, url, monkeypatch
):
    with contextlib.closing(psycopg.connect(url)) as raw:
        service.request(Work, connection=raw)
        tell = clock._since_boot_s
        monkeypatch.setattr(clock, "_since_boot_s", lambda: tell() + 3600)
        assert service.ledger.clock.is_old()
        service.request(Work, connection=raw)
        assert not service.ledger.clock.is_old()


@only_postgres
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("what", ["key", "unique"])
def test_a_key_of_more_bytes_than_a_server_takes_is_refused_and_a_shorter_one_is_not(service, url, what, external):
    dice = random.Random(1)
    text = "".join(chr(dice.randrange(0x4E00, 0x9FFF)) for _ in range(1000))  # nothing to compress
    short = text[: (2600 - len(f"{Work.__module__}:Work")) // 3]
    with contextlib.closing(psycopg.connect(url)) as raw:
        given = {"connection": raw} if external else {}
        service.request(Work, **{what: short}, **given)
        with pytest.raises(RequestRefused, match=f"{what}.*: 30.. bytes, and PostgreSQL takes at most 2600"):
            service.request(Work, **{what: text}, **given)
        raw.commit()
    assert seen(service) == (0, 1)


@only_postgres
def test_a_server_that_has_started_anew_is_still_the_same_place(service, url):
    with contextlib.closing(psycopg.connect(url)) as raw:
        service.request(Work, connection=raw)
        table, name, _ = service._external_connections._whereabouts
        service._external_connections._whereabouts = (table, name, 0)
        service.request(Work, connection=raw)
        raw.commit()
    assert seen(service) == (0, 2)
