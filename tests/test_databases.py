"""A database that cannot be used: by this user, at this moment, or any more; and nothing that is lost by it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peewee
import psutil
import pytest
from as_user import NOBODY, as_nobody, needs_root, open_folder
from conftest import wait_until
from pace import allowed_s
from playhouse import migrations as _loaded_for_nobody  # noqa: F401 - another user may be unable to read it

import bgsupervisor
from bgsupervisor import Service, Status, migrations
from bgsupervisor.errors import AccessError, DatabaseError, SchemaError
from bgsupervisor.models import Store, roll_back_abandoned
from bgsupervisor.statuses import Reason

pytestmark = pytest.mark.of_sqlite  # its file; tests/test_postgres.py is the same of PostgreSQL

SOURCE = str(Path(bgsupervisor.__file__).parents[1])
APP = """
import pathlib, time
from bgsupervisor import Task, current, task

def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)

@task
def until(name: str, size: int = 1) -> str:
    pathlib.Path(f"began-{current().id}").touch()
    wait_for(name)
    return "r" * size

@task
def quick() -> int:
    return 1

@task
def ticks() -> None:
    while not pathlib.Path("last").exists():
        with open("ticks", "a") as file:
            file.write(".")
        time.sleep(0.05)

class HasALimit(Task):
    timeout_s = 1.5

    def run(self) -> None:
        time.sleep(600)
"""


def service_on(path):
    return Service(f"sqlite:///{path}")


def begun(app, **data):
    """Return the record of a task whose body has begun: one that is killed before that is started again."""
    handle = app.service.request("appx:until", data)
    wait_until((app.folder / f"began-{handle.id}").exists, "its body has begun")
    return app.service.get(handle)


def refused(path):
    """Return the error of a request in the database *path*."""
    service = service_on(path)
    with pytest.raises((AccessError, DatabaseError)) as caught:
        service.request("a:b")
    service.close()
    return caught.value


@pytest.fixture
def filled(tmp_path):
    """A database with many rows and nobody who has it open."""
    path = tmp_path / "filled.db"
    service = service_on(path)
    service.request_many("a:b", [{"x": "y" * 500}] * 300)
    service.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB that can be filled and made read-only."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# ---- rights ----


def test_a_missing_folder_is_named_and_not_made(tmp_path):
    before = time.monotonic()
    error = refused(tmp_path / "missing" / "tasks.db")
    assert time.monotonic() - before < allowed_s(4)  # nobody waits busy_timeout_s for a folder
    assert isinstance(error, AccessError)
    assert str(error).startswith(f"the folder {tmp_path}/missing of the database does not exist; create it")
    assert (error.path, error.right) == (f"{tmp_path}/missing", "create")
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_a_folder_that_the_user_may_not_write_is_named_with_the_user():
    with open_folder() as folder:
        said = as_nobody(lambda: service_on(folder / "tasks.db").request("a:b"))
        assert said.startswith(f"AccessError: the folder {folder} cannot be written by user nobody")
        assert list(folder.iterdir()) == []


@needs_root
def test_a_database_file_that_the_user_may_not_write_is_named_with_the_user():
    with open_folder() as folder:
        path = folder / "tasks.db"
        service = service_on(path)
        service.request("a:b")
        service.close()
        folder.chmod(0o777)
        path.chmod(0o644)
        said = as_nobody(lambda: service_on(path).request("a:b"))
        assert said.startswith(f"AccessError: the database file {path} cannot be written by user nobody")


@needs_root
def test_a_folder_that_the_user_may_not_enter_is_told():
    with open_folder() as folder:
        path = folder / "inner" / "tasks.db"
        path.parent.mkdir()
        folder.chmod(0o700)
        said = as_nobody(lambda: service_on(path).request("a:b"))
        assert said.startswith(f"AccessError: user nobody may not enter the folders that lead to {path}")


@needs_root
def test_two_users_of_one_group_share_a_database_whatever_the_umask():
    with open_folder() as folder:
        os.chown(folder, 0, NOBODY)
        folder.chmod(0o2770)
        before = os.umask(0o077)
        try:
            service = service_on(folder / "tasks.db")
            service.request("a:b")
        finally:
            os.umask(before)
        assert as_nobody(lambda: service_on(folder / "tasks.db").request("a:b").id) == "2"
        assert service.counts()[Status.REQUEST] == 2
        service.close()


@needs_root
def test_a_state_directory_of_another_user_is_refused_and_named(make_app):
    app = make_app(APP)
    app.state_dir.mkdir()
    os.chown(app.state_dir, NOBODY, NOBODY)
    found = app.cli("run")
    assert found.returncode == 1
    assert f"{app.state_dir} belongs to user nobody, but this is user root" in found.stderr


def test_a_state_directory_that_cannot_be_made_is_told(make_app):
    app = make_app(APP, state_dir="missing/state")
    found = app.cli("run")
    assert found.returncode == 1
    assert f"cannot create {app.folder}/missing/state" in found.stderr


def test_a_supervisor_without_a_folder_for_its_database_leaves_with_a_sentence(make_app):
    app = make_app(APP, database="sqlite:///missing/tasks.db", state_dir="state")
    found = app.cli("run")
    assert found.returncode == 1
    assert f"the folder {app.folder}/missing of the database does not exist" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_read_only_file_system_is_named(small_disk):
    path = small_disk / "tasks.db"
    service = service_on(path)
    service.request("a:b")
    service.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    error = refused(path)
    assert str(error) == f"the file system of {small_disk} is mounted read-only; SQLite needs to write there"


# ---- damage ----


def test_a_file_that_is_no_database_is_told_and_left_alone(tmp_path):
    path = tmp_path / "notes.db"
    path.write_bytes(b"These are my notes.\n" * 500)
    assert "is damaged (file is not a database); restore it from a backup" in str(refused(path))
    assert path.read_bytes() == b"These are my notes.\n" * 500


def test_overwritten_pages_are_told_and_not_hidden(filled):
    damaged = bytearray(filled.read_bytes())
    damaged[4096 : 4096 * 30] = os.urandom(4096 * 29)
    filled.write_bytes(damaged)
    assert "is damaged" in str(refused(filled))
    service = service_on(filled)
    with pytest.raises(DatabaseError, match=r"is damaged .* restore it from a backup"):
        service.list(limit=None)
    service.close()


def test_a_supervisor_does_not_start_on_a_damaged_database(make_app):
    app = make_app(APP)
    (app.folder / "bgsupervisor.db").write_bytes(b"x" * 9000)
    found = app.cli("run")
    assert found.returncode == 1
    assert "is damaged" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_database_that_was_emptied_gets_its_tables_anew(filled):
    os.truncate(filled, 0)
    service = service_on(filled)
    assert service.list() == []
    assert service.request("a:b").id == 1
    service.close()


@pytest.mark.parametrize("loss", ["deleted", "replaced", "emptied"])
def test_a_supervisor_leaves_when_its_database_is_no_longer_the_one_it_opened(make_app, loss):
    app = make_app(APP)
    started = app.start()
    path = app.folder / "bgsupervisor.db"
    app.service.close()
    if loss == "deleted":
        path.unlink()
    elif loss == "replaced":
        new = app.folder / "restored.db"
        new.write_bytes(b"another file")
        new.rename(path)
    else:
        os.truncate(path, 0)
    assert wait_until(lambda: started.process.poll() is not None, "the supervisor has left")
    assert started.process.returncode == 0
    assert "the database file was replaced under a living supervisor; the next one opens the new file" in started.log


# ---- full ----


def fill(folder):
    """Leave no byte on the disk, and return the file that takes its place."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return ballast


def test_a_full_disk_refuses_requests_with_a_clear_error_and_heals(small_disk):
    path = small_disk / "tasks.db"
    service = service_on(path)
    kept = service.request("a:b").id
    ballast = fill(small_disk)
    with pytest.raises(DatabaseError, match="cannot be written, the disk is full; free some space and try again"):
        service.request("a:b", {"x": "y" * 500_000})
    assert [record.id for record in service.list()] == [kept]
    assert service.counts()[Status.REQUEST] == 1
    ballast.unlink()
    assert service.request("a:b", {"x": "y" * 500_000}).id == kept + 1
    service.close()


def test_the_end_of_a_task_outlasts_a_full_disk(make_app, small_disk):
    app = make_app(APP, database=f"sqlite:///{small_disk}/tasks.db", state_dir="state", busy_timeout_s=1.0)
    app.state_dir = app.folder / "state"
    started = app.start()
    handle = app.service.request("appx:until", {"name": "end", "size": 300_000})
    app.started(handle)
    ballast = fill(small_disk)
    with pytest.raises(DatabaseError, match="the disk is full"):
        app.service.request("appx:quick", {"x": "y" * 500_000})
    (app.folder / "end").touch()
    log = app.state_dir / "logs" / "supervisor.log"
    wait_until(lambda: "the disk is full" in log.read_text(), "the supervisor has met the full disk")
    assert app.service.status(handle) is Status.START
    ballast.unlink()
    assert app.wait(handle).status is Status.DONE
    assert app.service.result(handle) == "r" * 300_000
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    assert started.process.poll() is None


# ---- locked ----


def test_the_end_of_a_task_outlasts_a_lock(make_app):
    app = make_app(APP)
    started = app.start()
    handle = app.service.request("appx:until", {"name": "end"})
    app.started(handle)
    other = sqlite3.connect(app.folder / "bgsupervisor.db", isolation_level=None, timeout=5)
    other.execute("BEGIN IMMEDIATE")
    (app.folder / "end").touch()
    wait_until(lambda: "is locked by another writer" in started.log, "the supervisor has met the lock")
    assert app.service.status(handle) is Status.START
    other.execute("COMMIT")
    other.close()
    record = app.wait(handle)
    assert (record.status, app.service.result(handle)) == (Status.DONE, "r")


def test_a_child_that_dies_while_the_database_is_locked_gets_its_true_reason_afterwards(make_app):
    app = make_app(APP)
    started = app.start()
    record = begun(app, name="never")
    other = sqlite3.connect(app.folder / "bgsupervisor.db", isolation_level=None, timeout=5)
    other.execute("BEGIN IMMEDIATE")
    os.kill(record.pid, 9)
    wait_until(lambda: "is locked by another writer" in started.log, "the supervisor has met the lock")
    other.execute("COMMIT")
    other.close()
    record = app.wait(record.id)
    assert (record.reason, record.signal) == (Reason.SIGNALLED, 9)


def test_a_supervisor_that_starts_while_the_database_is_locked_adopts_and_records_afterwards(make_app):
    app = make_app(APP, spares=0)
    first = app.start()
    killed, ends, lives = [begun(app, name=name) for name in ("never", "end", "last")]
    other = sqlite3.connect(app.folder / "bgsupervisor.db", isolation_level=None, timeout=5)
    with contextlib.closing(other):
        other.execute("BEGIN IMMEDIATE")
        first.kill()
        os.kill(killed.pid, 9)
        (app.folder / "end").touch()
        second = app.start(wait=False)
        wait_until(lambda: "is locked by another writer" in second.log, "the supervisor has met the lock")
        wait_until(lambda: f"is run by PID {lives.pid}; looking after it" in second.log, "it has adopted what runs")
        assert {record.status for record in app.service.list()} == {Status.START}
        other.execute("COMMIT")
    assert (app.wait(killed.id).reason, app.wait(killed.id).signal) == (Reason.SIGNALLED, 9)
    assert app.wait(ends.id).status is Status.DONE
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    assert app.service.get(lives.id).status is Status.START
    assert second.process.poll() is None


# ---- away for long ----


@pytest.fixture
def manager(tmp_path):
    """A service manager that listens, and has not been told anything yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify.sock"))
        listener.setblocking(False)
        yield listener


def said_to(manager):
    """Return what the service manager was told since it was last asked."""
    said = []
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(manager.recv(4096).decode())
    return said


class Outage:
    """An application whose database is taken away while bodies of all kinds run."""

    def __init__(self, app, manager, **environment):
        self.app = app
        self.manager = manager
        self.supervisor = app.start(environment={"NOTIFY_SOCKET": manager.getsockname(), **environment})
        bodies = {
            "ends": ("until", {"name": "end", "size": 100_000}),
            "killed": ("until", {"name": "never"}),
            "ticks": ("ticks", {}),
            "limited": ("HasALimit", {}),
        }
        self.handles = {what: app.service.request(f"appx:{body}", data) for what, (body, data) in bodies.items()}
        self.running = {what: app.started(handle) for what, handle in self.handles.items()}
        for what in ("ends", "killed"):
            began = app.folder / f"began-{self.handles[what].id}"
            wait_until(began.exists, "its body has begun")
        self.limited = psutil.Process(self.running["limited"].pid)
        said_to(manager)
        self.began_at = time.monotonic()

    @property
    def log(self):
        """What the supervisor has said."""
        return (self.app.state_dir / "logs" / "supervisor.log").read_text()

    def live_through_it(self, at_least_s, told=""):
        """Have bodies end, be killed and pass their limit, and see that loop, watchdog and bodies go on meanwhile."""
        app = self.app
        (app.folder / "end").touch()
        os.kill(self.running["killed"].pid, signal.SIGKILL)
        wait_until(lambda: told in self.log, f"its log says {told!r}")
        wait_until(lambda: not self.limited.is_running(), "the time limit is kept though nobody can record it")
        ticks = (app.folder / "ticks").stat().st_size
        words = []

        def time_has_passed():
            words.extend(said_to(self.manager))  # its queue is short
            return time.monotonic() - self.began_at >= at_least_s

        wait_until(time_has_passed, "some time passes", limit_s=2 * at_least_s)
        wait_until(lambda: (app.folder / "ticks").stat().st_size > ticks, "the body goes on")
        assert psutil.pid_exists(self.running["ends"].pid), "its process keeps the end"
        assert sum("WATCHDOG=1" in word for word in words) >= at_least_s / 3

    def assert_healed(self):
        """See that all is recorded as it was, by the same supervisor, and that new tasks run."""
        app, began = self.app, time.monotonic()
        records = {what: app.wait(handle) for what, handle in self.handles.items() if what != "ticks"}
        assert (records["ends"].status, app.service.result(records["ends"].id)) == (Status.DONE, "r" * 100_000)
        assert (records["killed"].reason, records["killed"].signal) == (Reason.SIGNALLED, signal.SIGKILL)
        assert records["limited"].reason is Reason.TIMED_OUT
        assert time.monotonic() - began < allowed_s(5.0)
        assert app.wait(app.service.request("appx:quick")).status is Status.DONE
        assert app.service.get(self.handles["ticks"]).status is Status.START
        (app.folder / "last").touch()
        assert app.wait(self.handles["ticks"]).status is Status.DONE
        assert self.supervisor.process.poll() is None
        assert "Traceback" not in self.log

    def assert_refused(self, told):
        """See that who wants to write hears why in time, and that `ps` and `health` say so."""
        app = self.app
        before = time.monotonic()
        with pytest.raises((DatabaseError, AccessError), match=told):
            app.service.request("appx:quick")
        assert time.monotonic() - before < allowed_s(app.service.config.busy_timeout_s + 2)
        for command in (["request", "appx:quick"], ["cancel", str(self.handles["ticks"].id)]):
            done = app.cli(*command)
            assert done.returncode == 1, done
            assert told in done.stderr
            assert done.stderr.startswith("bgsupervisor: ")
            assert "Traceback" not in done.stderr
        done = app.cli("health")
        assert done.returncode == 2
        assert told in done.stdout
        metrics = app.cli("health", "--prometheus").stdout
        assert re.search(r"^bgsupervisor_database_writable\{.*\} 0$", metrics, re.MULTILINE)


@pytest.mark.parametrize("lock_s", [6.0, pytest.param(61.0, marks=[pytest.mark.slow, pytest.mark.timeout(240)])])
def test_a_lock_that_is_held_for_long_delays_ends_and_loses_none(make_app, manager, lock_s):
    app = make_app(APP, busy_timeout_s=0.5, grace_s=0.3)
    outage = Outage(app, manager)
    with ThreadPoolExecutor(1) as thread:
        path = app.folder / "bgsupervisor.db"
        other = thread.submit(sqlite3.connect, path, isolation_level=None, timeout=5).result()
        thread.submit(other.execute, "BEGIN IMMEDIATE").result()
        outage.assert_refused("is locked by another writer for longer than 0.5 s; try again")
        outage.live_through_it(lock_s, "is locked by another writer")
        shown = app.cli("ps")
        assert "is locked by another writer for longer than 1 s" in shown.stderr
        assert "no supervisor" not in shown.stderr
        assert ("lives but could not write to the database since" in shown.stderr) == (lock_s > 60)
        assert {app.service.get(handle).status for handle in outage.handles.values()} == {Status.START}
        thread.submit(other.close).result()
    outage.assert_healed()
    assert "is locked" not in app.cli("ps").stderr


def test_a_disk_that_is_full_under_database_and_state_directory_delays_ends_and_loses_none(
    make_app, small_disk, manager
):
    app = make_app(
        APP,
        database=f"sqlite:///{small_disk}/tasks.db",
        state_dir=f"{small_disk}/state",
        busy_timeout_s=0.5,
        grace_s=0.3,
        spares=0,
    )
    app.state_dir = small_disk / "state"
    outage = Outage(app, manager)
    ballast = fill(small_disk)
    outage.assert_refused("the disk is full; free some space and try again")
    outage.live_through_it(3.0)  # the log is on the full disk, too
    assert "cannot be written, the disk is full" in app.cli("ps").stderr
    ballast.unlink()
    outage.assert_healed()
    assert "the database can be written again" in outage.log


@pytest.fixture
def lockable_disk(tmp_path):
    """A file system whose files can be made unchangeable under those who have them open."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder, image = tmp_path / "ext4", tmp_path / "ext4.img"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    for command in (["mkfs.ext4", "-q", "-O", "^has_journal", image], ["mount", "-o", "loop", image, folder]):
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"there is no {command[0]} here")
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_database_that_becomes_read_only_delays_ends_and_loses_none(make_app, lockable_disk, manager):
    path = lockable_disk / "tasks.db"
    app = make_app(APP, database=f"sqlite:///{path}", state_dir="state", busy_timeout_s=0.5, grace_s=0.3)
    app.state_dir = app.folder / "state"
    outage = Outage(app, manager)
    files = [path, f"{path}-wal"]
    subprocess.run(["chattr", "+i", *files], check=True)
    try:
        outage.assert_refused(f"the database file {path} cannot be written by user root")
        outage.live_through_it(3.0, f"the database file {path} cannot be written by user root")
        assert "cannot be written by user root" in app.cli("ps").stderr
    finally:
        subprocess.run(["chattr", "-i", *files], check=True)
    outage.assert_healed()


# ---- gone, and back ----


def parts_of(path):
    return [one for one in path.parent.glob(f"{path.name}*") if one.is_file()]


def test_a_database_that_is_moved_away_and_comes_back_gets_the_ends_of_that_time(make_app):
    app = make_app(APP, spares=0)
    first = app.start()
    handles = [app.service.request("appx:until", {"name": "end"}) for _ in range(2)]
    records = [app.started(handle) for handle in handles]
    app.service.close()
    path, away = app.folder / "bgsupervisor.db", app.folder / "away"
    away.mkdir()
    for one in parts_of(path):
        one.rename(away / one.name)
    assert wait_until(lambda: first.process.poll() is not None, "the supervisor has left")
    (app.folder / "end").touch()
    log = app.state_dir / "logs" / f"process-{records[0].pid}-{records[0].start_ticks}.log"
    wait_until(lambda: log.exists() and "cannot be recorded yet" in log.read_text(), "the child has tried to record")
    assert f"the database {path} is not there, or is empty" in log.read_text()
    assert not path.exists(), "it has made none"
    assert all(psutil.pid_exists(record.pid) for record in records)
    for one in parts_of(away / path.name):
        one.rename(path.parent / one.name)
    for handle in handles:  # by its child: nobody supervises
        assert app.wait(handle).status is Status.DONE
        assert app.service.result(handle) == "r"
    app.start()
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


def test_after_a_database_was_deleted_the_next_run_begins_with_an_empty_one(make_app):
    app = make_app(APP, spares=0)
    first = app.start()
    record = app.started(app.service.request("appx:until", {"name": "end"}))
    child = psutil.Process(record.pid)
    app.service.close()
    for one in parts_of(app.folder / "bgsupervisor.db"):
        one.unlink()
    assert wait_until(lambda: first.process.poll() is not None, "the supervisor has left")
    second = app.start()
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    assert [one.name for one in app.service.list()] == ["appx:quick"]
    (app.folder / "end").touch()
    wait_until(lambda: not child.is_running(), "the body of a task that no row knows has ended and left")
    assert "Traceback" not in second.log
    assert second.process.poll() is None


def test_after_a_restore_the_next_run_adopts_what_the_backup_knows_as_running(make_app):
    app = make_app(APP, spares=0)
    first = app.start()
    known = app.started(app.service.request("appx:until", {"name": "end"}))
    path = app.folder / "bgsupervisor.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM INTO ?", [str(app.folder / "backup.db")])
    unknown = app.started(app.service.request("appx:until", {"name": "end"}))
    app.service.close()
    for one in parts_of(path):
        if one != path:
            one.unlink()
    shutil.move(app.folder / "backup.db", path)
    assert wait_until(lambda: first.process.poll() is not None, "the supervisor has left")
    app.start()
    assert app.service.get(unknown.id) is None
    children = [psutil.Process(record.pid) for record in (known, unknown)]
    (app.folder / "end").touch()
    record = app.wait(known.id)
    assert (record.status, record.pid) == (Status.DONE, known.pid)
    for child in children:
        wait_until(lambda one=child: not one.is_running(), "it has left")
    assert app.service.get(unknown.id) is None


def test_a_store_that_creates_nothing_refuses_what_is_not_there_and_works_on_what_is(tmp_path, filled):
    missing, empty, foreign = (tmp_path / name for name in ("missing.db", "empty.db", "foreign.db"))
    empty.touch()
    with contextlib.closing(sqlite3.connect(foreign)) as connection, connection:
        connection.execute("CREATE TABLE theirs (id)")
    for path, told in ((missing, "is not there, or is empty"), (empty, "is empty"), (foreign, "has no tables")):
        store = Store.open(f"sqlite:///{path}", "bgsupervisor_", busy_timeout_s=1.0, creates=False)
        with pytest.raises(DatabaseError, match=told), store.connected():
            pass
        store.close()
    assert not missing.exists()
    assert empty.stat().st_size == 0
    store = Store.open(f"sqlite:///{filled}", "bgsupervisor_", busy_timeout_s=1.0, creates=False)
    with store.writing():
        assert store.tables.Task.select().count() == 300
    store.close()


def test_a_path_that_cannot_be_looked_at_is_not_taken_for_a_replaced_file(make_app):
    app = make_app(APP)
    folder = app.folder / "closed"
    folder.mkdir()
    app.configure(database="sqlite:///closed/tasks.db", state_dir="state", tasks=["appx", "hides"])
    app.state_dir = app.folder / "state"
    hides = app.folder / "sitecustomize.py"
    hides.write_text(
        "import pathlib\n"
        "from bgsupervisor.models import Store\n"
        "def inode(self, inode=Store.inode):\n"
        "    return None if pathlib.Path('hidden').exists() else inode(self)\n"
        "Store.inode = inode\n"
    )
    started = app.start(environment={"PYTHONPATH": f"{app.folder}{os.pathsep}{SOURCE}"})
    (app.folder / "hidden").touch()
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 2.0, "it has looked at its files")
    assert started.process.poll() is None
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


# ---- the schema ----


def set_history(path, *names):
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM bgsupervisor_schema_migration")
    connection.executemany(
        "INSERT INTO bgsupervisor_schema_migration (name, applied) VALUES (?, '2030-01-01')",
        [(name,) for name in names],
    )
    connection.commit()
    connection.close()


def test_a_schema_that_is_one_newer_is_usable_and_one_that_is_two_newer_is_not(filled):
    set_history(filled, *migrations.available(), "0900_next")
    assert service_on(filled).counts()[Status.REQUEST] == 300
    set_history(filled, *migrations.available(), "0900_next", "0901_after")
    service = service_on(filled)
    for _ in range(2):  # a second call is refused as the first one was
        with pytest.raises(SchemaError, match=r"of a newer version \(migrations 0900_next, 0901_after\)"):
            service.request("a:b")
    assert SchemaError("").exit_code == 3
    service.close()


def test_a_schema_that_is_one_older_is_usable_and_one_that_is_two_older_is_not(filled, monkeypatch):
    known = migrations.available()
    monkeypatch.setattr(migrations, "available", lambda: [*known, "0900_next"])
    assert service_on(filled).counts()[Status.REQUEST] == 300
    monkeypatch.setattr(migrations, "available", lambda: [*known, "0900_next", "0901_after"])
    service = service_on(filled)
    with pytest.raises(SchemaError, match=r"lack the migrations 0900_next, 0901_after; run `bgsupervisor migrate`"):
        service.counts()
    service.close()


def test_a_supervisor_on_a_newer_schema_leaves_with_3(make_app):
    app = make_app(APP)
    app.service.counts()
    app.service.close()
    set_history(app.folder / "bgsupervisor.db", *migrations.available(), "0900_next", "0901_after")
    for command in (["run"], ["ps"]):
        found = app.cli(*command)
        assert found.returncode == 3, found.stderr
        assert "the tables are of a newer version" in found.stderr
        assert "Traceback" not in found.stderr


def test_tables_that_lost_a_column_are_told_with_the_command_to_type(filled):
    connection = sqlite3.connect(filled)
    connection.execute("ALTER TABLE bgsupervisor_task DROP COLUMN message")
    connection.close()
    service = service_on(filled)
    with pytest.raises(DatabaseError, match=r"lacks tables or columns of this version .* run `bgsupervisor migrate`"):
        service.list()
    service.close()


def test_migrating_twice_does_nothing_the_second_time(store):
    with store.connected():
        assert migrations.applied(store) == migrations.available()
        assert migrations.migrate(store) == []


CREATOR = """
import sys
from bgsupervisor import Service
service = Service(sys.argv[1])
import bgsupervisor.migrations, playhouse.migrations
print("ready", flush=True)
input()
print(service.request("a:b").id, flush=True)
service.close()
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_ten_processes_that_create_the_tables_at_once_all_succeed(request, tmp_path, kind):
    url = f"sqlite:///{tmp_path}/tasks.db" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    creators = [
        subprocess.Popen(
            [sys.executable, "-c", CREATOR, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": SOURCE},
            text=True,
        )
        for _ in range(10)
    ]
    for creator in creators:
        assert creator.stdout.readline() == "ready\n"
    for creator in creators:
        creator.stdin.write("\n")
        creator.stdin.flush()
    said = [creator.communicate(timeout=40)[0] for creator in creators]
    assert [creator.returncode for creator in creators] == [0] * 10
    assert sorted(map(int, said)) == list(range(1, 11))


def test_a_new_database_that_others_turn_into_wal_mode_just_now_is_waited_for(tmp_path, monkeypatch):
    store = Store.open(f"sqlite:///{tmp_path}/tasks.db", "bgsupervisor_", busy_timeout_s=5.0)
    connect, tries = store.database.connect, []

    def locked_twice(**options):
        tries.append(options)
        if len(tries) > 2:
            return connect(**options)
        locked = sqlite3.OperationalError("database is locked")
        locked.sqlite_errorcode = 5
        raise peewee.OperationalError(locked, str(locked)) from locked

    monkeypatch.setattr(store.database, "connect", locked_twice)
    with store.connected():
        assert len(tries) == 3
    store.close()
    store.set_busy_timeout(0)
    tries.clear()
    with pytest.raises(DatabaseError, match="is locked"), store.connected():
        pass
    assert len(tries) == 1


def test_ten_threads_that_create_the_tables_at_once_all_succeed(tmp_path):
    for turn in range(5):
        services = [service_on(tmp_path / f"{turn}.db") for _ in range(10)]

        def work(service):
            id = service.request("a:b").id
            service.close()
            return id

        with ThreadPoolExecutor(10) as pool:
            assert sorted(pool.map(work, services)) == list(range(1, 11))


def test_a_service_whose_database_file_was_replaced_writes_into_the_new_one(tmp_path):
    service = Service(f"sqlite:///{tmp_path}/live.db")
    service.request("a:before")
    other = Service(f"sqlite:///{tmp_path}/backup.db")
    other.request("a:restored")
    other.close()
    for name in ("live.db-wal", "live.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "backup.db").rename(tmp_path / "live.db")

    service.request("a:after")

    fresh = Service(f"sqlite:///{tmp_path}/live.db")
    assert [record.name for record in fresh.list()] == ["a:after", "a:restored"]
    fresh.close()
    service.close()


def test_what_a_thread_is_in_the_middle_of_is_rolled_back_and_nothing_of_it_is_committed_later(tmp_path):
    path = tmp_path / "own.db"
    with contextlib.closing(sqlite3.connect(path)) as hand:
        hand.execute("CREATE TABLE own (id INTEGER)")
    half_way, rolled_back, told = threading.Event(), threading.Event(), []

    def write_two():
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO own VALUES (1)")
        half_way.set()
        rolled_back.wait(30)
        for statement in ("INSERT INTO own VALUES (2)", "COMMIT"):
            with contextlib.suppress(sqlite3.Error):
                connection.execute(statement)
                told.append(statement)
        connection.close()

    thread = threading.Thread(target=write_two)
    thread.start()
    assert half_way.wait(30)
    roll_back_abandoned(for_good=True)
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as hand, hand:
        hand.execute("INSERT INTO own VALUES (3)")  # nobody keeps it locked
    rolled_back.set()
    thread.join()
    assert told == []
    with contextlib.closing(sqlite3.connect(path)) as hand:
        assert hand.execute("SELECT id FROM own").fetchall() == [(3,)]
