"""What tests share: a small application of their own, real supervisors, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from pace import allowed_s

import bgsupervisor
from bgsupervisor import Service, processes, tasks
from bgsupervisor.models import Store
from bgsupervisor.processes import ProcessIdentity, Verdict
from bgsupervisor.statedir import StateDir, bind, open_dir
from torture.database import Database

LIMIT_S = 15.0
ADD_COLUMN = """
def up(migrator, db):
    db.execute_sql(f'ALTER TABLE "{migrator.table_prefix}task" ADD COLUMN "extra" TEXT')
    db.execute_sql(f'CREATE INDEX "{migrator.table_prefix}task_extra" ON "{migrator.table_prefix}task" ("extra")')
"""


def wait_until(condition, sentence, limit_s=LIMIT_S):
    """Return the first true value of *condition*; fail with *sentence* if there is none within *limit_s*."""
    began = time.monotonic()
    while not (value := condition()):
        # What this machine allows is measured only once the limit has passed.
        if time.monotonic() - began > limit_s and time.monotonic() - began > allowed_s(limit_s):
            pytest.fail(f"not within {limit_s:g} s: {sentence}")
        time.sleep(0.01)
    return value


class Supervising:
    """A supervisor that a test has started."""

    def __init__(self, process, output):
        self.process = process
        self.output = output

    def stop(self):
        """Have it leave in order; its children live."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_S)

    def kill(self):
        self.process.kill()
        self.process.wait(LIMIT_S)

    @property
    def log(self):
        """What it said, before and after it took up its own log file."""
        own = self.output.parent / ".bgsupervisor" / "logs" / "supervisor.log"
        return self.output.read_text() + (own.read_text() if own.exists() else "")


class App:
    """A folder with a configuration, a tasks module `appx` and whatever supervises it.

    Attributes:
        server: Of PostgreSQL, on which each application that names none gets a database; by default SQLite's file.
    """

    server = None
    own = None

    def __init__(self, folder, source, **options):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.server = App.server
        self.own = self.server and self.server.make_database()
        self.config = folder / "bgsupervisor.toml"
        self.state_dir = folder / ".bgsupervisor"
        self.configure(**options)
        self.write(source)
        self.supervisors = []
        self._service = None

    def write(self, source, module="appx"):
        """Write a module; another second than before is in its time, since Python's bytecode is checked by seconds.

        A source of the same size, written in the second of the one before, would be taken for that one.
        """
        path = self.folder / f"{module}.py"
        before = path.stat().st_mtime if path.exists() else None
        path.write_text(textwrap.dedent(source))
        if before is not None and int(before) == int(path.stat().st_mtime):
            os.utime(path, (before + 1, before + 1))

    def configure(self, **options):
        own = {"database": self.server.socket_url(self.own)} if self.own else {}
        options = {"tasks": ["appx"], "grace_s": 1.0, "heartbeat_s": 1.0, **own, **options}
        lines = [f"{key} = {_toml(value)}" for key, value in options.items()]
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def service(self):
        if self._service is None:
            self._service = Service(config=self.config)
        return self._service

    @property
    def database(self):
        """Its rows as others see them, without the product."""
        return Database(self.service.config.database)

    def environment(self, **more):
        names = ("PATH", "HOME", "LANG", "TMPDIR", "COVERAGE_PROCESS_START", "PYTHONPATH")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {**kept, **more}

    def start(self, *arguments, wait=True, environment=None):
        """Start `bgsupervisor run` and wait until it has loaded the application."""
        output = self.folder / f"run-{len(self.supervisors)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "bgsupervisor", "--config", str(self.config), "run", *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment(**(environment or {})),
            )
        started = Supervising(process, output)
        self.supervisors.append(started)
        if wait:
            wait_until(
                lambda: process.poll() is not None or self.supervisor_row(process.pid),
                "the supervisor has loaded the tasks",
            )
            assert process.poll() is None, f"the supervisor left with {process.returncode}: {started.log}"
        return started

    def stand_still(self, supervisor):
        """Stop a supervisor where it is in no transaction: within one it would hold up all others who write."""

        def is_still_and_holds_nothing():
            supervisor.process.send_signal(signal.SIGSTOP)
            status = psutil.Process(supervisor.process.pid).status
            wait_until(lambda: status() == psutil.STATUS_STOPPED, "the supervisor stands still")
            database = self.database
            with contextlib.suppress(database.error), database.connection(0.05) as connection, connection.alone():
                return True
            supervisor.process.send_signal(signal.SIGCONT)
            return False

        wait_until(is_still_and_holds_nothing, "the supervisor stands still, outside of any transaction")

    def supervisor_row(self, pid):
        with contextlib.suppress(Exception):
            return next((row for row in self.service.ledger.supervisors() if row.pid == pid), None)
        return None

    def cli(self, *arguments, **options):
        """Run one command of the command line and return the finished process, with its texts."""
        environment = self.environment(**options.pop("environment", {}))
        return subprocess.run(
            [sys.executable, "-m", "bgsupervisor", "--config", str(self.config), *arguments],
            cwd=options.pop("cwd", self.folder),
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            **options,
        )

    def wait(self, handle, limit_s=LIMIT_S):
        return self.service.wait(handle, timeout_s=limit_s)

    def started(self, handle):
        """Return the record once the task is running."""
        return wait_until(
            lambda: (record := self.service.get(handle)) and record.status == "START" and record, "the task is running"
        )

    def log_of(self, record):
        path = self.state_dir / "logs" / f"task-{record.id}-{record.attempt}.log"
        return wait_until(lambda: path.exists() and path, f"the log {path} is there").read_text(errors="replace")

    def end(self):
        """End everything that lives under this folder, by identity, and see that nothing is left."""
        for started in self.supervisors:
            if started.process.poll() is None:
                started.process.kill()
                started.process.wait(LIMIT_S)
        identities = [*self._nurseries(), *self._children()]
        for identity in identities:
            _, handle = processes.look(identity)
            if handle is not None:
                with handle:
                    processes.signal_tree(handle, signal.SIGKILL)
        for identity in identities:
            wait_until(lambda one=identity: processes.look(one)[0] is not Verdict.ALIVE, f"{identity} has ended")
        if self._service is not None:
            self._service.close()
        if self.own:
            self.server.drop(self.own)

    def _identity(self, pid, ticks):
        own = processes.own_identity("test")
        return ProcessIdentity(own.host, own.boot_id, own.pid_ns, pid, ticks)

    def _nurseries(self):
        for path in self.state_dir.glob("nursery-*-*"):
            _, pid, ticks = path.name.split("-")
            yield self._identity(int(pid), int(ticks))

    def _children(self):
        with contextlib.suppress(Exception):
            if not self.service.ledger.store.is_there():
                return
            for record in self.service.ledger.starts():
                if record.pid is not None and record.start_ticks is not None:  # else the row was written by hand
                    yield self._identity(record.pid, record.start_ticks)


def pausing_path():
    """Return the PYTHONPATH of processes that wait at armed points, with the code that this test has."""
    return os.pathsep.join([str(Path(__file__).parent / "pausing"), *filter(None, [os.environ.get("PYTHONPATH")])])


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return repr(value) if isinstance(value, int | float) else '"' + str(value).replace('"', '\\"') + '"'


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


@pytest.fixture(scope="session", autouse=True)
def _database_of_session(request):
    """Have all applications on the database that was asked for."""
    if request.config.getoption("--database") == "postgres":
        App.server = request.getfixturevalue("postgres")


@pytest.fixture(autouse=True)
def _tasks_of_one_test(tmp_path_factory):
    """Forget the tasks and modules of an application that a test has loaded in its own process: the next has others."""
    definitions, modules = dict(tasks._definitions), set(sys.modules)
    yield
    tasks._definitions.clear()
    tasks._definitions.update(definitions)
    folders = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folders):
            del sys.modules[name]


@pytest.fixture
def database_of_apps(request, monkeypatch):
    """Have the applications that this test makes on the database of its mark `on_both`."""
    monkeypatch.setattr(App, "server", None if request.param == "sqlite" else request.getfixturevalue("postgres"))


def copy_package(folder):
    """Copy this package below *folder*."""
    source = Path(bgsupervisor.__file__).parent
    shutil.copytree(source, folder / "bgsupervisor", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def newer(tmp_path):
    """Make versions of this package with more migrations; return the environment that has Python find one."""

    def make(**more):
        folder = tmp_path / f"version-{len(more)}-{'-'.join(more)}"
        copy_package(folder)
        for name, source in more.items():
            (folder / "bgsupervisor" / "migrations" / f"{name.removeprefix('_')}.py").write_text(source)
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


only_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""For tests of what SQLite alone does."""
only_postgres = pytest.mark.parametrize("store_url", ["postgres"], indirect=True)


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server for the session, started when first asked for."""
    from postgres_server import running_server

    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def own_server():
    """A PostgreSQL server of one module, whose tests may stop it."""
    from postgres_server import running_server

    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_with_tables(postgres):
    """The address of a database with our tables, for one test after the other; see that it is empty first."""
    from postgres_server import make_tables

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
    from postgres_server import empty

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
def bell(tmp_path):
    """The socket that a supervisor would hear; answers how often it was rung."""
    folder = StateDir(tmp_path / ".bgsupervisor")
    folder.create()
    directory = open_dir(folder.path)
    heard = bind(directory, "wake.sock", socket.SOCK_DGRAM, 0o600)
    os.close(directory)

    def rings():
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.recv(64)
                count += 1
        return count

    yield rings
    heard.close()
