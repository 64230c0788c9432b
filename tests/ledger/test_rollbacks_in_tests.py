"""Under the plugin a request with `connection=` counts as part of the application's transaction, as it does outside."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

import peewee
import pytest

from bgsupervisor import DatabaseError, RequestRefused, Service, Status, task

ran = []


@pytest.fixture(autouse=True)
def _nothing_ran():
    ran.clear()


@task
def note(text: str = "") -> str:
    ran.append(text)
    return text


class Sqlite3:
    """An application on a connection of sqlite3; what a test does with any kind of connection, it does through this."""

    takes_savepoints = True

    def __init__(self, url):
        self.path = url.removeprefix("sqlite:///")
        self.raw = self.open()
        self.execute("CREATE TABLE orders (id INTEGER)")
        self.raw.commit()

    def open(self):
        return sqlite3.connect(self.path)

    @property
    def connection(self):
        return self.raw

    def execute(self, sql):
        self.raw.execute(sql)

    def insert(self):
        self.execute("INSERT INTO orders VALUES (1)")

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
        self.execute("SAVEPOINT one")
        try:
            yield
        except BaseException:
            self.execute("ROLLBACK TO one")
            raise
        finally:
            self.execute("RELEASE one")

    def close(self):
        self.raw.close()


class Psycopg(Sqlite3):
    def open(self):
        import psycopg

        return psycopg.connect(self.path)


class Psycopg2(Sqlite3):
    def open(self):
        import psycopg2

        return psycopg2.connect(self.path)

    def execute(self, sql):
        with self.raw.cursor() as cursor:
            cursor.execute(sql)


class Peewee(Sqlite3):
    def __init__(self, url):
        from playhouse.db_url import connect

        self.database = connect(url, unquote_password=True)
        self.execute("CREATE TABLE orders (id INTEGER)")

    @property
    def connection(self):
        return self.database

    def execute(self, sql):
        self.database.execute_sql(sql)

    def transaction(self):
        return self.database.atomic()

    savepoint = transaction

    def close(self):
        self.database.close()


class SqlAlchemy(Sqlite3):
    def __init__(self, url):
        import sqlalchemy.orm

        self.engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        self.session = sqlalchemy.orm.Session(self.engine)
        with self.transaction():
            self.execute("CREATE TABLE orders (id INTEGER)")

    @property
    def connection(self):
        return self.session

    def execute(self, sql):
        import sqlalchemy

        self.session.execute(sqlalchemy.text(sql))

    def transaction(self):
        return self.session.begin()

    def savepoint(self):
        return self.session.begin_nested()

    def close(self):
        self.session.close()
        self.engine.dispose()


class Django(Sqlite3):
    def __init__(self, url):
        import django
        from django.conf import settings
        from django.db import connections

        if not settings.configured:
            settings.configure(USE_TZ=True, TIME_ZONE="Europe/Berlin")
            django.setup()
        if url.startswith("sqlite"):
            given = {"ENGINE": "django.db.backends.sqlite3", "NAME": url.removeprefix("sqlite:///")}
        else:
            import psycopg

            parts = psycopg.conninfo.conninfo_to_dict(url)
            keys = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
            given = {"ENGINE": "django.db.backends.postgresql", **{keys[key]: value for key, value in parts.items()}}
        both = {"default": {"ENGINE": "django.db.backends.dummy"}, "orders": given}
        connections.settings.update(connections.configure_settings(both))
        self.django = connections["orders"]
        self.execute("CREATE TABLE orders (id INTEGER)")

    @property
    def connection(self):
        return self.django

    def execute(self, sql):
        with self.django.cursor() as cursor:
            cursor.execute(sql)

    def transaction(self):
        from django.db import transaction

        return transaction.atomic(using="orders")

    savepoint = transaction

    def close(self):
        from django.db import connections

        self.django.close()
        if "orders" in connections.settings:
            del connections["orders"]
            del connections.settings["orders"]


ON_SQLITE = (Sqlite3, Peewee, SqlAlchemy, Django)
ON_POSTGRES = (Psycopg, Psycopg2, Peewee, SqlAlchemy, Django)


@pytest.fixture(
    params=[*(("sqlite", kind) for kind in ON_SQLITE), *(("postgres", kind) for kind in ON_POSTGRES)],
    ids=lambda param: f"{param[1].__name__}-{param[0]}",
)
def application(request, tmp_path):
    """An application of each kind, with one table, in which the Service has no tables."""
    name, kind = request.param
    url = f"sqlite:///{tmp_path}/app.db" if name == "sqlite" else request.getfixturevalue("postgres_url")
    made = kind(url)
    yield made
    made.close()


@pytest.fixture
def service(bgsupervisor):
    return Service("sqlite:////nowhere/supervised.db")


def test_a_rollback_leaves_no_request(bgsupervisor, service, application):
    with contextlib.suppress(ZeroDivisionError), application.transaction():
        application.insert()
        lost = service.request(note, unique=True, connection=application.connection)
        bgsupervisor.assert_requested(note, times=1)
        raise ZeroDivisionError

    bgsupervisor.assert_nothing_requested()
    assert service.get(lost) is None
    assert service.request(note, unique=True).created


def test_a_request_that_begins_the_transaction_is_rolled_back(bgsupervisor, service, application):
    with contextlib.suppress(ZeroDivisionError), application.transaction():
        service.request_many(note, [{}, {}], connection=application.connection)
        raise ZeroDivisionError
    bgsupervisor.assert_nothing_requested()


def test_a_commit_keeps_the_request(bgsupervisor, service, application):
    with application.transaction():
        application.insert()
        handle = service.request(note, connection=application.connection)
    assert service.status(handle) is Status.REQUEST
    with contextlib.suppress(ZeroDivisionError), application.transaction():
        application.insert()
        raise ZeroDivisionError
    bgsupervisor.assert_requested(note, times=1)


def test_a_savepoint_rolled_back_leaves_only_its_own_requests_out(bgsupervisor, service, application):
    def request(text):
        service.request(note, {"text": text}, connection=application.connection)

    with application.transaction():
        application.insert()
        request("outer")
        with contextlib.suppress(ZeroDivisionError), application.savepoint():
            request("lost")
            with application.savepoint():
                request("lost with it")
            raise ZeroDivisionError
        assert [one.data for one in bgsupervisor.requested] == ['{"text":"outer"}']
        with application.savepoint():
            request("inner")
    assert [one.data for one in bgsupervisor.requested] == ['{"text":"outer"}', '{"text":"inner"}']


@pytest.mark.parametrize("commits", [True, False])
def test_the_outcome_is_known_after_the_connection_was_closed(bgsupervisor, service, application, commits):
    with contextlib.suppress(ZeroDivisionError), application.transaction():
        application.insert()
        with contextlib.suppress(LookupError), application.savepoint():
            service.request(note, connection=application.connection)
            raise LookupError
        service.request(note, connection=application.connection)
        assert commits or 1 / 0
    application.close()
    bgsupervisor.assert_requested(note, times=int(commits))


def test_the_outcome_is_known_in_another_thread(bgsupervisor, service, application):
    counts = []

    def look():
        thread = threading.Thread(target=lambda: counts.append(len(bgsupervisor.requested)))
        thread.start()
        thread.join(20)

    with contextlib.suppress(ZeroDivisionError), application.transaction():
        application.insert()
        service.request(note, connection=application.connection)
        look()
        raise ZeroDivisionError
    look()
    assert counts == [1, 0]


def test_inline_a_task_runs_after_the_commit(bgsupervisor, service, application):
    with bgsupervisor.inline():
        with application.transaction():
            application.insert()
            handle = service.request(note, {"text": "kept"}, connection=application.connection)
            assert service.status(handle) is Status.REQUEST
        assert service.status(handle) is Status.DONE
        with contextlib.suppress(ZeroDivisionError), application.transaction():
            application.insert()
            service.request(note, {"text": "lost"}, connection=application.connection)
            raise ZeroDivisionError
    assert ran == ["kept"]


def test_inline_a_task_has_run_when_the_block_ends(bgsupervisor, service, application):
    with bgsupervisor.inline(), application.transaction():
        application.insert()
        service.request(note, {"text": "kept"}, connection=application.connection)
    assert ran == ["kept"]


def test_the_applications_own_rows_are_as_they_would_be(bgsupervisor, service, application):
    with application.transaction():
        application.insert()
        service.request(note, connection=application.connection)
    with contextlib.suppress(ZeroDivisionError), application.transaction():
        application.insert()
        service.request(note, connection=application.connection)
        raise ZeroDivisionError
    with application.transaction():
        application.execute("CREATE UNIQUE INDEX once ON orders (id)")  # fails if both rows are there


def test_a_connection_that_commits_each_statement_keeps_the_request(bgsupervisor, service, tmp_path):
    connection = sqlite3.connect(tmp_path / "app.db", isolation_level=None)
    with bgsupervisor.inline():
        service.request(note, connection=connection)
        bgsupervisor.assert_requested(note, times=1)
    connection.close()
    assert ran == [""]
    bgsupervisor.assert_requested(note, times=1)


def test_an_autocommit_connection_to_a_server_keeps_the_request(bgsupervisor, service, postgres_url):
    import psycopg

    with bgsupervisor.inline(), psycopg.connect(postgres_url, autocommit=True) as connection:
        service.request(note, connection=connection)
        assert ran == [""]
    bgsupervisor.assert_requested(note, times=1)


def test_a_database_in_memory_takes_requests_and_gets_no_tables(bgsupervisor, service):
    url = "file:shop?mode=memory&cache=shared"
    connection = sqlite3.connect(url, uri=True)
    connection.execute("CREATE TABLE orders (id INTEGER)")
    with contextlib.suppress(ZeroDivisionError), connection:
        connection.execute("INSERT INTO orders VALUES (1)")
        service.request(note, connection=connection)
        raise ZeroDivisionError
    bgsupervisor.assert_nothing_requested()
    with connection:
        service.request(note, connection=connection)
    bgsupervisor.assert_requested(note, times=1)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("orders",)]
    connection.close()


@pytest.mark.parametrize("number", range(3))
def test_a_transaction_that_spans_tests_serves_each_of_them(bgsupervisor, service, number, lasting):
    lasting.execute(f"SAVEPOINT test{number}")
    service.request(note, connection=lasting)
    bgsupervisor.assert_requested(note, times=1)
    lasting.execute(f"ROLLBACK TO test{number}")
    bgsupervisor.assert_nothing_requested()


@pytest.fixture(scope="module")
def lasting():
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("BEGIN")
    yield connection
    connection.rollback()
    connection.close()


def test_a_connection_that_would_be_refused_is_refused_in_tests(bgsupervisor, service):
    closed = sqlite3.connect(":memory:")
    closed.close()
    with pytest.raises(DatabaseError, match="cannot be used"):
        service.request(note, connection=closed)
    with pytest.raises(RequestRefused, match="cannot record a request"):
        service.request(note, connection=object())
    bgsupervisor.assert_nothing_requested()


def test_a_rollback_takes_nothing_back_that_ran_before(bgsupervisor, service, tmp_path):
    database = peewee.SqliteDatabase(tmp_path / "app.db")
    with database.connection_context(), database.atomic() as transaction:
        service.request(note, {"text": "a"}, connection=database)
        assert len(bgsupervisor.run_pending()) == 1
        transaction.rollback()
    assert ran == ["a"]


def test_many_requests_of_a_transaction_are_asked_for_together(bgsupervisor, service, postgres_url, monkeypatch):
    import psycopg

    with psycopg.connect(postgres_url) as connection:
        connects = []
        connect = psycopg.connect
        monkeypatch.setattr(psycopg, "connect", lambda **named: connects.append(named) or connect(**named))
        for _ in range(10):
            with connection.transaction():
                service.request_many(note, [{}, {}], connection=connection)
        bgsupervisor.assert_requested(note, times=20)
        connection.rollback()
    assert len(connects) == 1
