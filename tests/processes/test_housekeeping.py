"""What must not grow for ever: rows and logs of ended tasks, by hand and by itself, and the supervisor's own log."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from support.app import wait_until
from torture.database import Database

from bgsupervisor.clock import SystemClock
from bgsupervisor.database.store import Store
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger import Ledger
from bgsupervisor.statuses import Status
from bgsupervisor.supervisor import housekeeping
from bgsupervisor.supervisor.housekeeping import LOG_ROTATED_BYTES, PRUNE_ROWS, Housekeeping, rotate
from bgsupervisor.system import logs

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"),
]

DAY_S = 86400.0
ENDED = (Status.DONE, Status.INTERRUPTED)
TASKS = """
    import pathlib, time
    from bgsupervisor import task

    print("loaded", pathlib.Path("version").read_text() if pathlib.Path("version").exists() else "first", flush=True)

    @task
    def quick() -> int:
        print("a line in the log")
        return 1

    @task
    def until(name: str) -> None:
        print("a line before the silence", flush=True)
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
"""


def ago(seconds):
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(sep=" ", timespec="microseconds")


class Rows:
    """Rows that a test has written by hand, with a log and an interruption each."""

    def __init__(self, database, folder):
        self.database = database
        self.logs = folder
        folder.mkdir(parents=True, exist_ok=True)

    def sql(self, statement, values=()):
        return self.database.rows(statement, *values)

    def add(self, status, days, *, name="a:b", attempt=1, count=1):
        """Add tasks that ended so many days ago, or that began then and are live; return their ids."""
        at, ids = ago(days * DAY_S), []
        ended = status in ENDED
        values = {
            "name": name,
            "status": str(status),
            "reason": "RAISED" if status is Status.INTERRUPTED else None,
            "requested_at": at,
            "run_at": at,
            "ended_at": at if ended else None,
            "attempt": attempt,
            "pid": 4_999_999 if status is Status.START else None,
            "start_ticks": 1 if status is Status.START else None,
        }
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        with self.database.connection() as connection, connection.at_once():
            for _ in range(count):
                insert = f"INSERT INTO bgsupervisor_task ({columns}) VALUES ({marks}) RETURNING id"
                ids += connection.rows(insert, *values.values())[0]
                connection.rows(
                    "INSERT INTO bgsupervisor_interruption (task_id, attempt, reason, ended_at) VALUES (?, ?, ?, ?)",
                    *(ids[-1], attempt, "RAISED", at),
                )
        for id in ids if count < 10 else ():
            for number in range(1, attempt + 1):
                logs.task_log(self.logs, id, number).write_text("a line\n")
        return ids

    def left(self):
        """Return the ids of the tasks that are there, after a look that interruptions and logs are theirs alone."""
        ids = [id for (id,) in self.sql("SELECT id FROM bgsupervisor_task ORDER BY id")]
        told = {id for (id,) in self.sql("SELECT task_id FROM bgsupervisor_interruption")}
        assert told <= set(ids)
        assert {int(path.stem.split("-")[1]) for path in self.logs.glob("task-*.log")} <= set(ids)
        return ids


@pytest.fixture
def app(make_app):
    return make_app(TASKS)


@pytest.fixture
def rows(app):
    app.service.counts()
    return Rows(app.database, app.state_dir / "logs")


# ---- bgsupervisor prune ----


def test_prune_deletes_what_ended_before_keep_days_with_interruptions_and_logs(app, rows):
    old = rows.add(Status.DONE, 15) + rows.add(Status.INTERRUPTED, 15, attempt=3)
    kept = rows.add(Status.DONE, 13) + rows.add(Status.INTERRUPTED, 0)
    done = app.cli("prune")
    assert done.stdout == "DONE: 1 task(s) deleted\nINTERRUPTED: 1 task(s) deleted\n"
    assert rows.left() == kept
    assert sorted(path.name for path in rows.logs.iterdir()) == sorted(f"task-{id}-1.log" for id in kept)
    assert rows.sql("SELECT count(*) FROM bgsupervisor_interruption") == [(2,)]
    assert not {logs.task_log(rows.logs, id, number) for id in old for number in (1, 2, 3)} & set(rows.logs.iterdir())


def test_prune_by_age_status_and_name_deletes_only_what_fits_all(app, rows):
    kept = rows.add(Status.DONE, 1, name="a:b") + rows.add(Status.DONE, 3, name="a:c")
    kept += rows.add(Status.INTERRUPTED, 3, name="a:b")
    rows.add(Status.DONE, 3, name="a:b", count=2)
    done = app.cli("prune", "--older-than-days", "2", "--status", "done", "--name", "a:b")
    assert done.stdout == "DONE: 2 task(s) deleted\n"
    assert rows.left() == sorted(kept)


def test_prune_of_several_names_and_of_part_of_a_day(app, rows):
    kept = rows.add(Status.DONE, 0.2, name="a:b") + rows.add(Status.DONE, 0.6, name="a:d")
    rows.add(Status.DONE, 0.6, name="a:b")
    rows.add(Status.INTERRUPTED, 0.6, name="a:c")
    app.cli("prune", "--older-than-days", "0.5", "--name", "a:b", "--name", "a:c")
    assert rows.left() == sorted(kept)


def test_a_dry_run_counts_and_deletes_nothing(app, rows):
    ids = rows.add(Status.DONE, 20, count=3) + rows.add(Status.INTERRUPTED, 20)
    done = app.cli("prune", "--dry-run")
    assert done.stdout == "DONE: 3 task(s) would be deleted\nINTERRUPTED: 1 task(s) would be deleted\n"
    assert rows.left() == ids
    assert len(list(rows.logs.iterdir())) == 4


def test_live_tasks_are_never_pruned_however_old(app, rows):
    live = rows.add(Status.REQUEST, 400) + rows.add(Status.START, 400)
    rows.add(Status.DONE, 400)
    assert app.cli("prune", "--older-than-days", "0").returncode == 0
    assert rows.left() == live
    for status in ("REQUEST", "START"):
        assert app.cli("prune", "--status", status).returncode == 2
    assert Ledger(app.service.ledger.store, SystemClock()).prune(
        before=datetime.now(UTC), statuses=[Status.REQUEST, Status.START], names=None, limit=10
    ) == []  # fmt: skip
    assert rows.left() == live


def test_where_keep_days_keeps_all_prune_wants_to_be_told_how_old(make_app):
    app = make_app(TASKS, keep_days=0)
    app.service.counts()
    rows = Rows(app.database, app.state_dir / "logs")
    ids = rows.add(Status.DONE, 1000)
    done = app.cli("prune")
    assert done.returncode == 2
    assert "keep_days is 0, which keeps all; give --older-than-days" in done.stderr
    assert rows.left() == ids
    assert app.cli("prune", "--older-than-days", "999").stdout.startswith("DONE: 1 task(s) deleted")


def test_prune_without_a_database_says_so_and_makes_none(app):
    assert app.cli("prune").stdout == "there are no tasks\n"
    assert not (app.folder / "bgsupervisor.db").exists()


def test_a_running_task_does_not_hinder_prune_and_prune_does_not_hinder_it(app, rows):
    app.start()
    handle = app.service.request("appx:until", {"name": "end"})
    app.started(handle)
    rows.add(Status.DONE, 1, count=300)
    assert app.cli("prune", "--older-than-days", "0.5").stdout.startswith("DONE: 300 task(s) deleted")
    (app.folder / "end").touch()
    assert app.wait(handle).status is Status.DONE


def test_no_transaction_deletes_more_rows_than_the_limit(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/tasks.db", "bgsupervisor_", busy_timeout_s=5.0)
    with store.connected():
        pass
    rows = Rows(Database(f"sqlite:///{tmp_path}/tasks.db"), tmp_path / "logs")
    rows.add(Status.DONE, 20, count=1050)
    ledger = Ledger(store, SystemClock())
    said = []
    with store.connected():
        store.database.connection().set_trace_callback(said.append)
        pruned = [
            housekeeping.prune(ledger, rows.logs, before=datetime.now(UTC), statuses=ENDED)
            for _ in range(6)
        ]  # fmt: skip
        store.database.connection().set_trace_callback(None)
    store.close()
    assert pruned == [PRUNE_ROWS] * 5 + [50]
    assert sum(line.startswith("BEGIN") for line in said) == sum(line.startswith("COMMIT") for line in said) == 6
    assert rows.left() == []


# ---- by itself ----


def test_a_supervisor_deletes_what_is_older_than_keep_days_step_by_step(app, rows):
    kept = rows.add(Status.DONE, 13) + rows.add(Status.REQUEST, -1)
    rows.add(Status.DONE, 15, count=2 * PRUNE_ROWS + 50)
    rows.add(Status.INTERRUPTED, 15)
    started = app.start()
    wait_until(lambda: rows.left() == kept, "all old rows are gone")
    said = [line for line in started.log.splitlines() if "tasks that ended before" in line]
    assert [int(line.split("deleted ")[1].split()[0]) for line in said] == [PRUNE_ROWS, PRUNE_ROWS, 51]


def test_a_supervisor_with_keep_days_0_keeps_all(make_app):
    app = make_app(TASKS, keep_days=0)
    app.service.counts()
    rows = Rows(app.database, app.state_dir / "logs")
    ids = rows.add(Status.DONE, 30_000)
    age(logs.task_log(rows.logs, 77, 1), days=4000)
    app.start()
    for _ in range(2):  # after the second rotation, what else it does once a second has been done
        fill(app.state_dir / "logs" / "supervisor.log")
        wait_until(lambda: size(app.state_dir / "logs" / "supervisor.log") < LOG_ROTATED_BYTES, "the log was rotated")
    assert [id for (id,) in rows.sql("SELECT id FROM bgsupervisor_task")] == ids
    assert logs.task_log(rows.logs, 77, 1).exists()


def test_a_changed_keep_days_takes_force_with_a_reload(make_app):
    app = make_app(TASKS, keep_days=0)
    app.start()
    rows = Rows(app.database, app.state_dir / "logs")
    rows.add(Status.DONE, 20)
    app.configure(keep_days=14)
    assert app.cli("reload").returncode == 0
    wait_until(lambda: rows.left() == [], "the old row is gone")


def age(path, *, days):
    """Have a log that was last written so many days ago; make it where it is missing."""
    if not path.exists():
        path.write_text("a line\n")
    at = datetime.now(UTC).timestamp() - days * DAY_S
    os.utime(path, (at, at))
    return path


def test_orphaned_logs_go_and_those_of_a_silent_child_and_of_kept_rows_stay(app, rows):
    app.start()
    record = app.started(app.service.request("appx:until", {"name": "end"}))
    written = logs.process_log(rows.logs, record.pid, record.start_ticks)
    wait_until(lambda: written.exists() and written.stat().st_size, "the child has printed")
    kept = rows.add(Status.DONE, 1)
    staying = [
        age(written, days=30),
        age(logs.task_log(rows.logs, kept[0], 1), days=30),
        age(logs.task_log(rows.logs, 5000, 1), days=13),
        age(rows.logs / "notes.log", days=30),
    ]
    going = [
        age(logs.task_log(rows.logs, 5001, 1), days=15),
        age(logs.process_log(rows.logs, record.pid, record.start_ticks + 1), days=15),
        age(logs.process_log(rows.logs, 4_999_999, 1), days=15),
    ]
    clock = Moving()
    keeper = Housekeeping(app.service.ledger, StateDir(app.state_dir), clock)
    clock.at = housekeeping.SWEEP_EVERY_S
    keeper.keep(14)
    assert not any(path.exists() for path in going)
    assert all(path.exists() for path in staying)
    (app.folder / "end").touch()
    assert app.wait(record.id).status is Status.DONE
    assert "a line before the silence" in app.log_of(record)


class Moving:
    """A clock that a test moves."""

    def __init__(self):
        self.at = 0.0

    def monotonic(self):
        return self.at

    def now(self):
        return datetime.now(UTC) + timedelta(seconds=self.at)


def test_old_rows_are_looked_for_every_ten_minutes_and_logs_every_hour(tmp_path):
    state_dir, clock = StateDir(tmp_path / "state"), Moving()
    state_dir.create()
    store = Store.open(f"sqlite:///{tmp_path}/tasks.db", "bgsupervisor_", busy_timeout_s=5.0)
    with store.connected():
        pass
    rows = Rows(Database(f"sqlite:///{tmp_path}/tasks.db"), state_dir.logs)
    keeper = Housekeeping(Ledger(store, clock), state_dir, clock)
    numbers = count(6000)

    def kept():
        """Add an old row and an orphaned log, keep house, and tell which of both were left."""
        rows.sql("DELETE FROM bgsupervisor_task")
        rows.sql("DELETE FROM bgsupervisor_interruption")
        rows.add(Status.DONE, 20, count=10)
        orphan = age(logs.task_log(state_dir.logs, next(numbers), 1), days=20)
        keeper.keep(14)
        return bool(rows.sql("SELECT id FROM bgsupervisor_task")), orphan.exists()

    assert kept() == (False, True)
    assert kept() == (True, True)
    clock.at = housekeeping.PRUNE_EVERY_S
    assert kept() == (False, True)
    clock.at = housekeeping.SWEEP_EVERY_S
    assert kept() == (False, False)
    clock.at += housekeeping.PRUNE_EVERY_S
    assert kept() == (False, True)
    clock.at = 2 * housekeeping.SWEEP_EVERY_S
    assert kept() == (False, False)
    store.close()


def test_a_few_logs_are_looked_at_at_a_time_and_all_in_the_end(tmp_path):
    state_dir, clock = StateDir(tmp_path / "state"), Moving()
    state_dir.create()
    store = Store.open(f"sqlite:///{tmp_path}/tasks.db", "bgsupervisor_", busy_timeout_s=5.0)
    with store.connected():
        pass
    keeper = Housekeeping(Ledger(store, clock), state_dir, clock)
    clock.at = housekeeping.SWEEP_EVERY_S
    for number in range(2 * housekeeping.SWEEP_FILES + 1):
        age(logs.process_log(state_dir.logs, 5_000_000 + number, 1), days=20)
    left = []
    for _ in range(3):
        clock.at += 1
        keeper.keep(14)
        left.append(len(list(state_dir.logs.iterdir())))
    assert left == [housekeeping.SWEEP_FILES + 1, 1, 0]
    store.close()


def test_a_locked_database_puts_pruning_off_and_nothing_else(tmp_path, caplog):
    state_dir, clock = StateDir(tmp_path / "state"), Moving()
    state_dir.create()
    store = Store.open(f"sqlite:///{tmp_path}/tasks.db", "bgsupervisor_", busy_timeout_s=0.1)
    with store.connected():
        pass
    rows = Rows(Database(f"sqlite:///{tmp_path}/tasks.db"), state_dir.logs)
    rows.add(Status.DONE, 20)
    keeper = Housekeeping(Ledger(store, clock), state_dir, clock)
    with rows.database.locked():
        keeper.keep(14)
    assert "old tasks are not deleted yet" in caplog.text
    assert "is locked by another writer" in caplog.text
    clock.at = housekeeping.PRUNE_EVERY_S
    keeper.keep(14)
    assert rows.left() == []
    store.close()


# ---- the supervisor's own log ----


def size(path):
    return path.stat().st_size if path.exists() else 0


def fill(path):
    """Write more into a log than it may hold, as its writers do: at the end."""
    with path.open("ab") as file:
        file.write(b"a long story\n" * (LOG_ROTATED_BYTES // 13 + 1))


def test_the_log_is_rotated_while_supervisor_and_fork_server_write_on(app):
    started = app.start()
    path = app.state_dir / "logs" / "supervisor.log"
    wait_until(lambda: "loaded first" in path.read_text(), "the fork server has printed")
    for turn in ("second", "third"):
        fill(path)
        wait_until(lambda: size(path) < LOG_ROTATED_BYTES, "the log was rotated")
        assert size(path.with_name("supervisor.log.1")) > LOG_ROTATED_BYTES
        record = app.wait(app.service.request("appx:quick"))
        ended = f"task {record.id} (appx:quick) ended: DONE"
        wait_until(lambda ended=ended: ended in path.read_text(), "the supervisor writes on")
        (app.folder / "version").write_text(turn)
        assert app.cli("reload").returncode == 0
        wait_until(lambda turn=turn: f"loaded {turn}" in path.read_text(), "the fork server writes on")
        assert b"\0" not in path.read_bytes(), "nobody writes where the end once was"
    assert sorted(one.name for one in path.parent.glob("supervisor*")) == ["supervisor.log", "supervisor.log.1"]
    assert "loaded second" in path.with_name("supervisor.log.1").read_text()
    assert started.process.poll() is None


def test_a_small_or_missing_log_is_left_alone(tmp_path):
    path = tmp_path / "supervisor.log"
    rotate(path)
    path.write_bytes(b"x" * LOG_ROTATED_BYTES)
    rotate(path)
    assert [one.name for one in tmp_path.iterdir()] == ["supervisor.log"]
    assert size(path) == LOG_ROTATED_BYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_on_a_full_disk_old_lines_give_way(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        fill(disk / "supervisor.log")
        rotate(disk / "supervisor.log")
        assert [(one.name, size(one)) for one in disk.iterdir()] == [("supervisor.log", 0)]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
