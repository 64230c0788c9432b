"""An application in a folder of its own, its supervisors, and waiting for conditions."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from torture.database import Database

import bgsupervisor
from bgsupervisor import Service
from bgsupervisor.system import process_tree, processes
from bgsupervisor.system.processes import ProcessIdentity, Verdict
from support.forked_commands import ForkedCommand, Server
from support.pace import allowed_s

LIMIT_S = 45.0
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


def kept_environment():
    """Return what processes of the tests take over from this one's environment."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "COVERAGE_PROCESS_START", "PYTHONPATH")
    return {name: os.environ[name] for name in names if name in os.environ}


forking_servers = []


def forking_server():
    """Return the interpreter that forks for this test process; it is started when first asked for."""
    if not forking_servers:
        forking_servers.append(Server(kept_environment()))
    return forking_servers[0]


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
        forks: Commands are forks of an interpreter, which saves most of their time; else each is started.
    """

    forks = True
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
        return {**kept_environment(), **more}

    def start(self, *arguments, wait=True, environment=None, as_child=False):
        """Start `bgsupervisor run` and wait until it has loaded the application.

        Args:
            arguments: More of the command line.
            wait: Return only when the application is loaded.
            environment: More variables.
            as_child: Start an interpreter as a child of this process, which reaps it; else whoever forks it does.
        """
        output = self.folder / f"run-{len(self.supervisors)}.log"
        command = [sys.executable, "-m", "bgsupervisor", "--config", str(self.config), "run", *map(str, arguments)]
        how = {"cwd": self.folder, "env": self.environment(**(environment or {}))}
        with output.open("wb") as file, Path(os.devnull).open() as nothing:
            if App.forks and not as_child and (server := forking_server()).can_run(how["env"]):
                process = ForkedCommand(server, command, streams=[nothing, file, file], supervises=True, **how)
            else:
                process = subprocess.Popen(command, stdin=nothing, stdout=file, stderr=file, **how)
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
            wait_until(lambda: status() == psutil.STATUS_STOPPED, "the supervisor is stopped")
            database = self.database
            with contextlib.suppress(database.error), database.connection(0.05) as connection, connection.alone():
                return True
            supervisor.process.send_signal(signal.SIGCONT)
            return False

        wait_until(is_still_and_holds_nothing, "the supervisor is stopped, outside of any transaction")

    def supervisor_row(self, pid):
        with contextlib.suppress(Exception):
            return next((row for row in self.service.ledger.supervisors() if row.pid == pid), None)
        return None

    def cli(self, *arguments, **options):
        """Run one command of the command line and return the finished process, with its texts."""
        command = [sys.executable, "-m", "bgsupervisor", "--config", str(self.config), *map(str, arguments)]
        environment = self.environment(**options.pop("environment", {}))
        how = {"cwd": options.pop("cwd", self.folder), "env": environment, "timeout": 30}
        if App.forks and options.keys() <= {"input"} and (server := forking_server()).can_run(environment):
            return server.run(command, **how, **options)
        return subprocess.run(command, capture_output=True, text=True, check=False, **how, **options)

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
        identities = [*self._fork_servers(), *self._children()]
        for identity in identities:
            _, handle = processes.open_process(identity)
            if handle is not None:
                with handle:
                    process_tree.signal_tree(handle, signal.SIGKILL)
        for identity in identities:
            wait_until(
                lambda one=identity: processes.open_process(one)[0] is not Verdict.ALIVE, f"{identity} has ended"
            )
        if self._service is not None:
            self._service.close()
        if self.own:
            self.server.drop(self.own)

    def _identity(self, pid, ticks):
        own = processes.own_identity("test")
        return ProcessIdentity(own.host, own.boot_id, own.pid_ns, pid, ticks)

    def _fork_servers(self):
        for path in self.state_dir.glob("forkserver-*-*"):
            _, pid, ticks = path.name.split("-")
            yield self._identity(int(pid), int(ticks))

    def _children(self):
        with contextlib.suppress(Exception):
            if not self.service.ledger.store.is_there():
                return
            for record in self.service.ledger.starts():
                if record.pid is not None and record.start_ticks is not None:  # else the row was written by hand
                    yield self._identity(record.pid, record.start_ticks)


def processes_marked(name, value):
    """Return the living processes that were started with this variable in their environment; zombies have none."""
    mark = b"\0" + os.fsencode(f"{name}={value}") + b"\0"
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                found.append(psutil.Process(pid))
    return found


def pausing_path():
    """Return the PYTHONPATH of processes that wait at armed points, with the code that this test has."""
    return os.pathsep.join([str(Path(__file__).parent / "pausing"), *filter(None, [os.environ.get("PYTHONPATH")])])


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return repr(value) if isinstance(value, int | float) else '"' + str(value).replace('"', '\\"') + '"'


def copy_package(folder):
    """Copy this package below *folder*."""
    source = Path(bgsupervisor.__file__).parent
    shutil.copytree(source, folder / "bgsupervisor", ignore=shutil.ignore_patterns("__pycache__"))


only_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
"""For tests of what SQLite alone does."""
only_postgres = pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
