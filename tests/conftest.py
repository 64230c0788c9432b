"""What tests share: a small application of their own, real supervisors, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

import pytest
from support.app import (
    App,
    copy_package,
    forking_servers,
)

from bgsupervisor import registry
from bgsupervisor.database.store import Store
from bgsupervisor.ipc.sockets import bind
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.system.files import open_dir

pytest_plugins = ["support.left_behind"]


def pytest_addoption(parser):
    text = "on which database the applications of the tests have their rows"
    parser.addoption("--database", choices=("sqlite", "postgres"), default="sqlite", help=text)


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("on_both"):
        metafunc.fixturenames.insert(0, "database_of_apps")
        both = metafunc.config.getoption("--database") == "sqlite"  # else one at a time
        metafunc.parametrize("database_of_apps", ["sqlite", "postgres"] if both else ["postgres"], indirect=True)


def pytest_collection_modifyitems(config, items):
    """With --database postgres leave out what is about SQLite, or runs on both of itself."""
    if config.getoption("--database") == "sqlite":
        return
    left_out = [item for item in items if item.get_closest_marker("of_sqlite")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item):
    App.forks = item.get_closest_marker("real_starts") is None


@pytest.fixture(scope="session", autouse=True)
def _database_of_session(request):
    """Have all applications on the database that was asked for."""
    if request.config.getoption("--database") == "postgres":
        App.server = request.getfixturevalue("postgres")


@pytest.fixture(scope="session", autouse=True)
def _forking_server_of_session():
    """End the interpreter that forks, if there is one."""
    yield
    while forking_servers:
        forking_servers.pop().close()


@pytest.fixture(autouse=True)
def _tasks_of_one_test(tmp_path_factory):
    """Forget the tasks and modules of an application that a test has loaded in its own process: the next has others."""
    definitions, modules = dict(registry._definitions), set(sys.modules)
    yield
    registry._definitions.clear()
    registry._definitions.update(definitions)
    folders = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folders):
            del sys.modules[name]


@pytest.fixture
def database_of_apps(request, monkeypatch):
    """Have the applications that this test makes on the database of its mark `on_both`."""
    monkeypatch.setattr(App, "server", None if request.param == "sqlite" else request.getfixturevalue("postgres"))


@pytest.fixture
def newer(tmp_path):
    """Make versions of this package with more migrations; return the environment that has Python find one."""

    def make(**more):
        folder = tmp_path / f"version-{len(more)}-{'-'.join(more)}"
        copy_package(folder)
        for name, source in more.items():
            (folder / "bgsupervisor" / "database" / "migrations" / f"{name.removeprefix('_')}.py").write_text(source)
        return {"PYTHONPATH": str(folder)}

    return make


@pytest.fixture
def make_app(tmp_path):
    """Make applications; each gets a folder of its own, and is ended after the test."""
    made = []

    def make(source="", *, name="app", **options):
        app = App(tmp_path / name, source, **options)
        made.append(app)
        return app

    yield make
    for app in made:
        app.end()


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server for the session, started when first asked for."""
    from support.postgres_server import running_server

    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def own_server():
    """A PostgreSQL server of one module, whose tests may stop it."""
    from support.postgres_server import running_server

    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_with_tables(postgres):
    """The address of a database with our tables, for one test after the other; see that it is empty first."""
    from support.postgres_server import make_tables

    url = postgres.socket_url(postgres.make_database())
    make_tables(url)
    return url


@pytest.fixture
def postgres_url(postgres):
    """The address of a PostgreSQL database of the test's own, without our tables, with a password."""
    name = postgres.make_database()
    yield postgres.url(name)
    postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """The address of a database of the test's own without our tables, of each kind; the file of SQLite is not there."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/own.db"
    return request.getfixturevalue("postgres_url")


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request, tmp_path):
    """The address of an empty database, of each kind; in PostgreSQL our tables are there already."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    from support.postgres_server import empty

    url = request.getfixturevalue("postgres_with_tables")
    empty(url)
    return url


@pytest.fixture
def store(store_url):
    """An empty database with our tables."""
    store = Store.open(store_url, "bgsupervisor_", busy_timeout_s=2.0)
    yield store
    store.close()


@pytest.fixture
def wake_ups(tmp_path):
    """The socket that a supervisor would hear; answers how often it was notified."""
    folder = StateDir(tmp_path / ".bgsupervisor")
    folder.create()
    directory = open_dir(folder.path)
    heard = bind(directory, "wake.sock", socket.SOCK_DGRAM, 0o600)
    os.close(directory)

    def notifies():
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.recv(64)
                count += 1
        return count

    yield notifies
    heard.close()
