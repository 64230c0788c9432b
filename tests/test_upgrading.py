"""Versions side by side: new code on old tables, old code and old children on new ones, children of another protocol,
and children whose files are gone. The other version is a copy of this package that was changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import ADD_COLUMN, copy_package, wait_until
from pace import allowed_s

from bgsupervisor import linux, migrations
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.wire import REDIAL_MAX_S, Redial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

TASKS = """
    import os, pathlib, time
    from bgsupervisor import Task, current, task

    @task
    def quick() -> int:
        return 1

    @task
    def until(name: str) -> str:
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
        return "its end"

    @task
    def stays() -> None:
        time.sleep(600)

    @task
    def fails(name: str) -> None:
        until(name)
        raise LookupError("of its own")

    @task
    def reaches(name: str) -> None:
        until(name)
        current().reach("loaded", value=5)

    @task
    def waits(id: int) -> int:
        return current().wait_for(id, part="loaded")

    class HasALimit(Task):
        timeout_s = 4

        def run(self) -> None:
            time.sleep(600)
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


def columns(app):
    store = app.service.ledger.store
    with store.connected():
        return {column.name for column in store.database.get_columns("bgsupervisor_task")}


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


@pytest.mark.on_both
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


def test_sixteen_that_run_while_the_tables_change_record_their_ends_through_either_supervisor(make_app, newer):
    app = make_app(TASKS, slots=16)
    new = newer(_0900_next=ADD_COLUMN)
    old = app.start()
    handles = [app.service.request("appx:until", {"name": f"end-{number}"}) for number in range(16)]
    records = [app.started(handle) for handle in handles]
    assert {record.slot for record in records} == set(range(16))

    assert app.cli("migrate", environment=new).stdout == "applied 0900_next\n"
    for number in range(6):
        (app.folder / f"end-{number}").touch()
    assert {app.wait(handle).status for handle in handles[:6]} == {Status.DONE}
    assert old.process.poll() is None
    old.kill()
    for number in range(6, 11):
        (app.folder / f"end-{number}").touch()
    assert {app.wait(handle).status for handle in handles[6:11]} == {Status.DONE}
    app.start(environment=new)
    for number in range(11, 16):
        (app.folder / f"end-{number}").touch()

    assert {app.wait(handle).status for handle in handles[11:]} == {Status.DONE}
    assert {app.service.result(handle) for handle in handles} == {"its end"}
    assert {app.service.get(handle).attempt for handle in handles} == {1}
    assert "extra" in columns(app)
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


# ---- another protocol ----


@pytest.fixture
def other_protocol(tmp_path):
    """The environment that has Python find a version of this package whose processes speak another protocol."""
    copy_package(tmp_path / "other-protocol")
    wire = tmp_path / "other-protocol" / "bgsupervisor" / "wire.py"
    told, count = re.subn(r"^PROTOCOL_VERSION = \d+$", "PROTOCOL_VERSION = 999", wire.read_text(), flags=re.MULTILINE)
    assert count == 1
    wire.write_text(told)
    return {"PYTHONPATH": str(tmp_path / "other-protocol")}


def kernel_tells_exits():
    """Whether this kernel keeps the exit of a reaped process for who holds a pidfd of it (6.15 and later)."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    told = linux.pidfd_exit(pidfd)
    os.close(pidfd)
    return told is not None


@pytest.fixture
def adopted(make_app, other_protocol):
    """Running tasks of all kinds whose children speak another protocol than the supervisor that looks after them."""
    app = make_app(TASKS, slots=8, spares=0)
    old = app.start(environment=other_protocol)
    bodies = {
        "returns": ("until", {"name": "end"}),
        "fails": ("fails", {"name": "end"}),
        "killed": ("stays", {}),
        "cancelled": ("stays", {}),
        "limited": ("HasALimit", {}),
        "alone": ("until", {"name": "alone"}),
        "stays": ("until", {"name": "last"}),
    }
    handles = {what: app.service.request(f"appx:{body}", data) for what, (body, data) in bodies.items()}
    running = {what: app.started(handle) for what, handle in handles.items()}
    for record in running.values():  # an order to run that has not left is another's to give
        wait_until(lambda one=record: app.service.get(one.id).rss_bytes, "its body is looked after")
    old.kill()
    yield app, app.start(), handles, running
    (app.folder / "last").touch()


def test_children_of_another_protocol_are_followed_by_pidfd_and_row(adopted):
    app, new, handles, running = adopted
    more = [app.service.request("appx:until", {"name": "end"}) for _ in range(2)]
    assert app.started(more[0]).slot == 7
    assert app.service.get(more[1]).status is Status.REQUEST, "the slots of those that it cannot speak to are taken"
    (app.folder / "alone").touch()
    assert app.wait(handles["alone"]).status is Status.DONE
    assert app.started(more[1]).slot == running["alone"].slot

    os.kill(running["killed"].pid, signal.SIGKILL)
    app.service.cancel(handles["cancelled"], by="jana")
    (app.folder / "end").touch()
    records = {what: app.wait(handle) for what, handle in handles.items() if what != "stays"}

    assert (records["returns"].status, app.service.result(handles["returns"])) == (Status.DONE, "its end")
    assert (records["fails"].reason, records["fails"].detail) == (Reason.RAISED, "LookupError: of its own")
    assert "of its own" in records["fails"].error
    if kernel_tells_exits():
        assert (records["killed"].reason, records["killed"].signal) == (Reason.SIGNALLED, signal.SIGKILL)
    else:
        assert records["killed"].reason is Reason.VANISHED
    assert records["cancelled"].reason is Reason.CANCELLED
    assert records["cancelled"].detail == "cancelled by jana; the body did not end when asked, SIGTERM was sent"
    assert records["limited"].reason is Reason.TIMED_OUT
    assert records["limited"].detail.startswith("ran past its timeout_s of 4 s; ")
    assert app.service.get(handles["stays"]).status is Status.START
    assert [app.wait(one).status for one in more] == [Status.DONE] * 2
    assert new.process.poll() is None


def test_who_speaks_another_protocol_is_told_of_once(adopted):
    app, new, _, running = adopted
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 2.0, "everybody has dialled several times")
    refused = re.findall(r"the connection of PID (\d+) is closed: it speaks protocol 999", new.log)
    assert len(refused) == len(set(refused))
    assert {int(pid) for pid in refused} >= {record.pid for record in running.values()}
    started = {record.id for record in app.service.list(status=Status.START)}
    limited = running["limited"].id  # its timeout_s may be over by now
    assert started | {limited} == {record.id for record in running.values()}


def test_who_waits_and_a_board_of_another_protocol_go_on_without_a_storm(make_app, other_protocol):
    app = make_app(TASKS, slots=2, spares=0)
    old = app.start(environment=other_protocol)
    reached = app.service.request("appx:reaches", {"name": "end"})
    waiter = app.service.request("appx:waits", {"id": reached.id})
    app.started(waiter)
    wait_until(lambda: app.service.get(waiter).slot is None, "the waiter has given its slot")
    wait_until((app.state_dir / "board.sock").exists, "the board is there")
    [board] = [one for one in psutil.Process(old.process.pid).children() if _has_bound(one, "board.sock")]
    old.kill()
    app.start()
    other = app.service.request("appx:until", {"name": "last"})
    assert app.started(other).slot == 1
    used, began = sum(board.cpu_times()[:2]), time.monotonic()
    wait_until(lambda: time.monotonic() - began > 1.5, "it has dialled some times")
    assert sum(board.cpu_times()[:2]) - used < allowed_s(0.3), "it does not dial in a storm"
    (app.folder / "end").touch()
    assert app.wait(reached).status is Status.DONE
    assert app.wait(waiter).status is Status.DONE
    assert app.service.result(waiter) == 5
    (app.folder / "last").touch()
    assert app.wait(other).status is Status.DONE
    board.kill()  # it would leave after a minute


def _has_bound(process, name):
    return any(name in one.laddr for one in process.net_connections("unix"))


@pytest.mark.slow
def test_spares_and_nursery_of_another_protocol_leave(make_app, other_protocol):
    app = make_app(TASKS, spares=2)
    old = app.start(environment=other_protocol)
    [path] = app.state_dir.glob("nursery-*-*")
    nursery = psutil.Process(int(path.name.split("-")[1]))
    children = wait_until(lambda: len(found := nursery.children()) == 2 and found, "the spares are there")
    old.kill()
    app.start()
    for process in (*children, nursery):
        wait_until(lambda one=process: not one.is_running(), f"PID {process.pid} has left", limit_s=30)
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


class Moving:
    """A clock that a test moves."""

    at = 100.0

    def monotonic(self):
        return self.at


def test_a_supervisor_that_refuses_is_no_company_and_one_that_is_silent_is():
    clock = Moving()
    redial = Redial(clock)
    for _ in range(5):
        clock.at += REDIAL_MAX_S
        redial.connected()
        assert redial.alone_s() == 0
        redial.lost()
    assert redial.alone_s() == 5 * REDIAL_MAX_S
    redial.connected()
    clock.at += REDIAL_MAX_S
    redial.lost()
    assert redial.alone_s() == 0
    clock.at += 3
    redial.connected()
    redial.heard()
    redial.lost()
    assert redial.alone_s() == 0


# ---- files that are replaced under running children ----

OUTLIVING = """
    import atexit, json, pathlib, sys, time
    from bgsupervisor import Task, task

    def packages():
        # all modules that are loaded and not of the standard library
        found = {name: getattr(one, "__file__", None) or "" for name, one in list(sys.modules.items())}
        return sorted(name for name, file in found.items() if "/site/" in file)

    def note(name, before):
        new = sorted(set(packages()) - set(before))
        pathlib.Path(name + ".part").write_text(json.dumps([len(before), new]))
        pathlib.Path(name + ".part").rename(name)

    @task
    def quick() -> int:
        return 1

    class Outlives(Task):
        secret = ("word",)

        def run(self, word: str, fails: bool = False) -> dict[str, int]:
            atexit.register(note, f"imports-{self.id}", packages())
            pathlib.Path(f"began-{self.id}").touch()
            while not pathlib.Path("end").exists():
                time.sleep(0.01)
            self.progress(1, 2, "the files are gone")
            self.reach("a part", value=[1, 2])
            with self.lock("a lock"):
                other = self.request("appx:quick")
            print("printed at the end")
            if fails:
                raise LookupError("of its own")
            return {"other": other.id}
"""
SITE_PACKAGES = ("bgsupervisor", "click", "msgspec", "peewee", "playhouse", "psutil")
DRIVER = ("psycopg", "psycopg_binary", "typing_extensions")


@pytest.fixture
def site(tmp_path):
    """Copies of all that the package needs, in a folder of their own."""
    folder = tmp_path / "site"
    for name in (*SITE_PACKAGES, *DRIVER):
        origin = Path(find_spec(name).origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, folder / name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
        else:
            shutil.copy2(origin, folder / origin.name)
    libraries = Path(find_spec("psycopg_binary").origin).parent.with_name("psycopg_binary.libs")
    shutil.copytree(libraries, folder / libraries.name)
    return folder


def run_from(site, app):
    """Start a supervisor whose packages all come from *site*: -S leaves the virtual environment out."""
    with (app.folder / "run-from-site.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "bgsupervisor", "--config", str(app.config), "run"],
            cwd=app.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=app.environment(PYTHONPATH=str(site)),
        )
    wait_until(lambda: app.supervisor_row(process.pid), "the supervisor has loaded the tasks")
    return process


@pytest.mark.parametrize(("start_method", "how"), [("fork", "deleted"), ("fork", "replaced"), ("spawn", "deleted")])
def test_bodies_outlive_the_files_that_they_were_loaded_from(make_app, site, start_method, how):
    app = make_app(OUTLIVING, start_method=start_method, spares=0)
    old = run_from(site, app)
    handles = [app.service.request("appx:Outlives", {"word": "w", "fails": fails}) for fails in (False, True)]
    for handle in handles:
        wait_until((app.folder / f"began-{handle.id}").exists, "the body has begun")
    old.kill()
    old.wait()
    shutil.rmtree(site)
    if how == "replaced":
        for name in SITE_PACKAGES:
            (site / name).mkdir(parents=True)
            (site / name / "__init__.py").write_text("raise ImportError('this version is not meant for you')")
    (app.folder / "end").touch()

    done, failed = [app.wait(handle) for handle in handles]  # by their own hand: nobody supervises

    assert (done.status, done.message, done.progress_done) == (Status.DONE, "the files are gone", 1)
    assert (failed.reason, failed.detail) == (Reason.RAISED, "LookupError: of its own")
    for record in (done, failed):
        assert app.log_of(record).startswith("printed at the end\n")
        path = app.folder / f"imports-{record.id}"
        wait_until(path.exists, "the child leaves")
        before, new = json.loads(path.read_text())
        assert before > 20
        assert new == [], "what a child needs was imported before its body began"
    app.start()
    assert app.wait(app.service.result(done.id)["other"]).status is Status.DONE


@pytest.mark.on_both
def test_a_new_version_adopts_bodies_whose_files_are_gone(make_app, site):
    app = make_app(OUTLIVING, spares=0)
    old = run_from(site, app)
    handles = [app.service.request("appx:Outlives", {"word": "w"}) for _ in range(2)]
    for handle in handles:
        wait_until((app.folder / f"began-{handle.id}").exists, "the body has begun")
    shutil.rmtree(site)
    old.kill()
    old.wait()
    started = app.start()
    killed = app.service.get(handles[1])
    os.kill(killed.pid, signal.SIGKILL)
    assert (app.wait(killed.id).reason, app.wait(killed.id).signal) == (Reason.SIGNALLED, signal.SIGKILL)
    (app.folder / "end").touch()
    record = app.wait(handles[0])
    assert (record.status, record.message) == (Status.DONE, "the files are gone")
    wait_until(lambda: f"task {record.id} (appx:Outlives) ended: DONE" in started.log, "it came by the connection")
