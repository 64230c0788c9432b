"""What a web application calls: requests, questions, answers, and what it may be sure of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import peewee
import pytest
from conftest import wait_until
from pace import allowed_s

import bgsupervisor
from bgsupervisor import Handle, Service, Status, Task, task
from bgsupervisor.errors import (
    AlreadyLive,
    ConfigError,
    DatabaseError,
    DataInvalid,
    DataTooLarge,
    Interrupted,
    NotEnded,
    NotRetryable,
    RequestRefused,
    TaskDefinitionError,
    TaskNotConfigured,
    UnknownTask,
    WaitTimeout,
)
from bgsupervisor.ledger import Attempt, Batch, Claim, Due, Note
from bgsupervisor.models import SupervisorRecord, TaskRecord
from bgsupervisor.processes import ProcessIdentity
from bgsupervisor.statuses import Reason
from bgsupervisor.wire import End

SOURCE = str(Path(bgsupervisor.__file__).parents[1])


class Add(Task):
    secret = ("password",)

    def run(self, a: int, b: int = 0, password: str = "") -> int:
        return a + b + len(password)


class Other(Task):
    def run(self) -> None: ...


@task(name="greet")
def greet(name: str) -> str:
    return f"Hello {name}"


@pytest.fixture
def database(tmp_path):
    return tmp_path / "service.db"


@pytest.fixture
def service(database):
    service = Service(f"sqlite:///{database}")
    yield service
    service.close()


def begin(service, handle, slot=0):
    """Claim a task as a supervisor does, and return its attempt."""
    record = service.ledger.get(int(handle))
    due = Due(record.id, record.attempt, record.name, record.data, record.key)
    claim = Claim(due, ProcessIdentity("here", "boot", 1, 1, 1), slot, 0.0)
    assert service.ledger.apply(Batch(claims=[claim])).claimed
    return Attempt(record.id, record.attempt + 1)


def end(service, handle, **end):
    assert service.ledger.end(begin(service, handle), End(**end))


# ---- request ----


def test_a_request_is_a_row_with_all_that_was_asked(service):
    before = datetime.now(UTC)
    handle = service.request(Add, {"a": 1}, key="invoice-7", priority=5)
    assert handle == Handle(1, created=True)
    assert int(handle) == 1
    record = service.get(handle)
    assert (record.name, json.loads(record.data)) == ("test_service:Add", {"a": 1})
    assert (record.key, record.priority, record.status, record.attempt) == ("invoice-7", 5, Status.REQUEST, 0)
    assert before <= record.run_at == record.requested_at <= datetime.now(UTC)


def test_a_task_is_requested_by_class_by_function_or_by_name(service):
    names = [service.request(what, data) for what, data in [(Add, {"a": 1}), (greet, {"name": "Jana"})]]
    names += [service.request("test_service:Add", {"a": 1}), service.request("greet", {"name": "Jana"})]
    assert [service.get(handle).name for handle in names] == ["test_service:Add", "greet"] * 2


def test_a_name_that_this_process_has_not_loaded_is_recorded(service):
    handle = service.request("elsewhere.tasks:Send", {"anything": [1, {"x": None}]})
    assert json.loads(service.get(handle).data) == {"anything": [1, {"x": None}]}


def test_a_task_can_be_planned_for_later(service):
    moment = datetime(2031, 1, 1, 9, 30, tzinfo=timezone(timedelta(hours=2)))
    assert service.get(service.request(Other, run_at=moment)).run_at == moment
    before = datetime.now(UTC)
    run_at = service.get(service.request(Other, delay_s=90)).run_at
    assert timedelta(seconds=90) <= run_at - before < timedelta(seconds=100)
    assert service.get(service.request(Other, delay_s=0)).run_at <= datetime.now(UTC)


NAIVE = datetime(2031, 1, 1, 9, 30)  # noqa: DTZ001 - the error that is tested


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"run_at": NAIVE}, "2031-01-01T09:30:00 has no time zone.*give an aware datetime"),
        ({"run_at": "tomorrow"}, "run_at is 'tomorrow'"),
        ({"run_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))}, "run_at .* lies beyond the calendar"),
        ({"run_at": datetime(2031, 1, 1, tzinfo=UTC), "delay_s": 1}, "run_at and delay_s were both given"),
        ({"delay_s": -1}, "delay_s is -1; it must be a number of seconds, 0 or more"),
        ({"delay_s": float("nan")}, "delay_s is nan"),
        ({"delay_s": "5"}, "delay_s is '5'"),
        ({"delay_s": True}, "delay_s is True"),
        ({"delay_s": 1e300}, "lies beyond the calendar"),
        ({"delay_s": float("inf")}, "lies beyond the calendar"),
        ({"priority": "high"}, "priority is 'high'; it must be a whole number, larger is sooner"),
        ({"priority": 1.5}, "priority is 1.5"),
        ({"priority": 2**31}, "priority is 2147483648"),
        ({"priority": True}, "priority is True"),
        ({"key": ""}, "key is ''; it must be a text of 1 to 1000 characters"),
        ({"key": 7.5}, "key is 7.5; it must be a text, a whole number or a UUID"),
        ({"key": True}, "key is True; it must be a text"),
        ({"key": "k" * 1001}, "key is 'kkk"),
        ({"key": "\ud800"}, "half a surrogate pair"),
        ({"key": "a\0b"}, "key is .*; it holds a NUL character"),
        ({"unique": "a\0b"}, "unique is .*; it holds a NUL character"),
        ({"unique": ""}, "unique is ''"),
        ({"unique": 7.5}, "unique is 7.5"),
        ({"unique": "\udfff"}, "half a surrogate pair"),
        ({"unique": True, "key": ""}, "key is ''"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_is_refused_with_a_sentence(service, options, says):
    with pytest.raises(RequestRefused, match=says):
        service.request(Other, **options)
    assert service.list() == []


@pytest.mark.parametrize("name", ["", "   ", "x" * 1001, "a:b\0"])
def test_a_name_that_cannot_be_is_refused(service, name):
    with pytest.raises(RequestRefused, match=r"the task name .* cannot be"):
        service.request(name)


@pytest.mark.parametrize("what", [None, 7, print, Task, object()])
def test_what_is_no_task_is_refused(service, what):
    with pytest.raises(TaskDefinitionError):
        service.request(what)


def test_data_that_does_not_fit_the_body_is_refused_and_its_secrets_stay_secret(service):
    with pytest.raises(DataInvalid, match=r"\$\.a must be int") as caught:
        service.request(Add, {"a": "one"})
    assert caught.value.field == "$.a"
    with pytest.raises(DataInvalid, match=r"\$\.c"):
        service.request("test_service:Add", {"a": 1, "c": 2})  # a name that is loaded is checked too
    with pytest.raises(DataInvalid) as caught:
        service.request(Add, {"a": 1, "password": ["hunter2"]})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DataInvalid, match="must be a mapping"):
        service.request("not:loaded", [1, 2])
    with pytest.raises(DataTooLarge, match="data_max_bytes"):
        service.request("not:loaded", {"x": "y" * 2**20})
    assert service.list() == []


def test_a_class_that_no_supervisor_could_load_is_refused_with_the_list(make_app, monkeypatch):
    configured = types.ModuleType("appx")
    monkeypatch.setitem(sys.modules, "appx", configured)
    app = make_app(tasks=["appx", "appx.more"])
    monkeypatch.setitem(sys.modules, "appx.more", types.ModuleType("appx.more"))
    with pytest.raises(TaskNotConfigured, match=r"Add is defined in test_service.*modules are: appx, appx\.more"):
        app.service.request(Add, {"a": 1})
    assert app.service.request("test_service:Add", {"a": 1}).created  # whoever names it knows better
    assert app.service.status(Add) is Status.REQUEST


def test_a_class_of_main_is_refused_even_if_nothing_is_configured(service, monkeypatch):
    definition = dataclasses.replace(Other.definition(), module="__main__")
    monkeypatch.setattr(Other, "_Task__definition", definition)
    with pytest.raises(TaskNotConfigured, match=r"__main__, which no supervisor would load.*modules are: none"):
        service.request(Other)


def test_a_class_that_a_configured_module_imports_is_accepted(make_app, monkeypatch):
    configured = types.ModuleType("appx")
    configured.Add = Add
    monkeypatch.setitem(sys.modules, "appx", configured)
    assert make_app().service.request(Add, {"a": 1}).created


def test_a_class_in_a_module_that_a_configured_one_imports_is_accepted(make_app, monkeypatch):
    configured, package, inner = (types.ModuleType(name) for name in ("appx", "shop", "shop.tasks"))
    configured.shop, package.tasks = package, inner
    for module in (configured, package, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Other, "_Task__definition", dataclasses.replace(Other.definition(), module="shop.tasks"))
    assert make_app().service.request(Other).created


def test_a_configured_module_that_is_not_loaded_here_is_given_the_benefit(make_app, monkeypatch):
    monkeypatch.delitem(sys.modules, "appx", raising=False)
    assert make_app().service.request(Other).created


# ---- unique ----


def test_a_second_request_with_the_same_unique_key_gets_the_first(service):
    first = service.request(Other, unique="invoice-7", key="a")
    second = service.request(Other, unique="invoice-7", key="b", priority=9)
    assert second == Handle(first.id, created=False)
    assert service.get(first).key == "a"
    assert service.request(Other, unique="invoice-8").created
    assert service.request("another:Task", unique="invoice-7").created
    end(service, first, result="1")
    assert service.request(Other, unique="invoice-7").created


def test_unique_true_means_the_key_or_else_one_per_class(service):
    assert service.request(Other, unique=True).created
    assert not service.request(Other, unique=True).created
    assert service.request(Other, unique=True, key="a").created
    assert not service.request(Other, unique=True, key="a").created
    assert not service.request(Other, unique="a").created
    assert service.request(Other, unique=False).created
    assert service.request(Other, key="a").created


RACER = """
import sys
from bgsupervisor import Service
service = Service(sys.argv[1])
print("ready", flush=True)
input()
handle = service.request("shop.tasks:Import", unique="invoice-7")
print(handle.id, handle.created)
"""


def test_of_twenty_processes_that_race_for_a_unique_key_exactly_one_creates(service, database):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, f"sqlite:///{database}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": SOURCE},
            text=True,
        )
        for _ in range(20)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=40)[0].split() for racer in racers]
    assert {id for id, _ in said} == {"1"}
    assert sorted(created for _, created in said) == ["False"] * 19 + ["True"]
    assert service.counts()[Status.REQUEST] == 1


def test_of_twenty_threads_that_race_for_a_unique_key_exactly_one_creates(service):
    with ThreadPoolExecutor(20) as pool:
        handles = list(pool.map(lambda _: service.request(Other, unique=True), range(20)))
    assert [handle.created for handle in handles].count(True) == 1
    assert len({handle.id for handle in handles}) == 1


def test_threads_that_race_on_a_database_of_the_application_wait_for_each_other(database):
    shared = peewee.SqliteDatabase(database, pragmas={"journal_mode": "wal", "synchronous": 2})
    service = Service(shared)

    def work(number):
        return [service.request(Other, unique=f"{number}-{turn}").created for turn in range(20)]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(created) for created in pool.map(work, range(8)))
    assert service.counts()[Status.REQUEST] == 160
    assert shared.is_closed()


# ---- request_many ----


def test_many_requests_are_recorded_in_order_with_the_same_options(service):
    handles = service.request_many(Add, ({"a": n} for n in range(5)), key="k", priority=2, delay_s=60)
    assert [json.loads(service.get(handle).data)["a"] for handle in handles] == [0, 1, 2, 3, 4]
    assert {(one.key, one.priority, one.run_at > datetime.now(UTC)) for one in service.list()} == {("k", 2, True)}
    assert service.request_many(Add, []) == []


def test_many_requests_are_recorded_all_or_none(service):
    with pytest.raises(DataInvalid):
        service.request_many(Add, [{"a": 1}, {"a": 2}, {"a": "three"}])
    assert service.list() == []


# ---- asking ----


def test_status_is_that_of_the_newest_or_of_the_one_asked_for(service):
    assert service.status(Add) is None
    assert service.status("nobody:Knows") is None
    assert service.status(4711) is None
    first = service.request(Add, {"a": 1}, key="a")
    second = service.request(Add, {"a": 2}, key="b")
    end(service, second, result="2")
    assert service.status(Add) is service.status("test_service:Add") is Status.DONE
    assert service.status(Add, key="a") is service.status(first) is service.status(first.id) is Status.REQUEST
    assert service.status(Add, key="c") is None
    assert service.status(Other) is None


def test_get_of_an_unknown_task_is_none_and_the_other_questions_raise(service):
    assert service.get(4711) is None
    assert service.get(Handle(2**70)) is None
    for ask in (service.result, service.cancel, service.retry, lambda one: service.wait(one, timeout_s=0)):
        with pytest.raises(UnknownTask, match="no task has the id 4711"):
            ask(4711)


def test_a_list_is_filtered_by_all_that_is_given_newest_first(service):
    ids = [service.request(Add, {"a": n}, key="ab"[n % 2]).id for n in range(4)]
    ids.append(service.request(Other, key="a").id)
    service.cancel(ids[0])

    def listed(**asked):
        return [ids.index(record.id) for record in service.list(**asked)]

    assert listed() == [4, 3, 2, 1, 0]
    assert listed(name=Add) == listed(name="test_service:Add") == [3, 2, 1, 0]
    assert listed(key="a") == [4, 2, 0]
    assert listed(name=Add, key="a", status="REQUEST") == [2]
    assert listed(status=Status.INTERRUPTED) == [0]
    assert listed(limit=2) == [4, 3]
    assert len(service.list(limit=None)) == 5
    with pytest.raises(ValueError, match="status is 'RUNNING'; it must be one of REQUEST"):
        service.list(status="RUNNING")


def test_a_list_is_of_a_hundred_unless_more_are_asked_for(service):
    service.request_many(Other, [None] * 101)
    assert len(service.list()) == 100
    assert len(service.list(limit=None)) == 101


def test_counts_are_of_all_or_of_one_class(service):
    service.request(Add, {"a": 1})
    end(service, service.request(Other), result="1")
    assert service.counts() == {"REQUEST": 1, "START": 0, "DONE": 1, "INTERRUPTED": 0}
    assert service.counts(Add) == {"REQUEST": 1, "START": 0, "DONE": 0, "INTERRUPTED": 0}


def test_wait_returns_the_record_of_the_end(service):
    handle = service.request(Other)
    attempt = begin(service, handle)
    timer = threading.Timer(0.05, lambda: (service.ledger.end(attempt, End(result="1")), service.close()))
    timer.start()
    assert service.wait(handle, timeout_s=20).status is Status.DONE
    timer.join()
    assert service.wait(handle.id, timeout_s=0).status is Status.DONE


def test_wait_gives_up_at_its_limit_and_the_task_goes_on(service):
    handle = service.request(Other)
    before = time.monotonic()
    with pytest.raises(WaitTimeout, match=r"task 1 has not ended within 0\.1 s; it is REQUEST and goes on"):
        service.wait(handle, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - before < allowed_s(5)
    assert service.status(handle) is Status.REQUEST


@pytest.mark.parametrize("value", [None, 5, 1.5, "text ž", [1, [2]], {"a": {"b": None}}, True])
def test_a_result_is_what_the_body_returned(service, value):
    handle = service.request(Other)
    end(service, handle, result=json.dumps(value))
    assert service.result(handle) == value
    assert type(service.result(handle.id)) is type(value)


def test_a_result_that_is_not_there_says_why(service):
    handle = service.request(Other)
    with pytest.raises(NotEnded, match="its status is REQUEST; use wait") as caught:
        service.result(handle)
    assert caught.value.status is Status.REQUEST
    end(service, handle, reason=Reason.SIGNALLED, detail="killed by SIGKILL")
    with pytest.raises(Interrupted, match="task 1 was interrupted: SIGNALLED: killed by SIGKILL") as caught:
        service.result(handle)
    assert (caught.value.id, caught.value.reason, caught.value.detail) == (1, Reason.SIGNALLED, "killed by SIGKILL")


def test_an_id_that_came_from_a_browser_can_be_held_to_its_class_and_key(service):
    handle = service.request(Add, {"a": 1}, key="jana")
    assert service.get(handle, name=Add, key="jana") == service.get(handle)
    assert service.get(handle, name="test_service:Add") is not None
    assert service.get(handle, name=Other) is None
    assert service.get(handle, key="petr") is None
    end(service, handle, result="1")
    assert service.get(handle, name=Other) is service.get(handle, key="petr") is None


# ---- acting ----


def test_cancel_ends_a_waiting_task_at_once_and_asks_a_running_one(service):
    waiting, running = service.request(Other), service.request(Other)
    begin(service, running)
    record = service.cancel(waiting, by="jana")
    assert (record.status, record.reason, record.cancel_requested_by) == (Status.INTERRUPTED, Reason.CANCELLED, "jana")
    record = service.cancel(running.id, by="petr")
    assert (record.status, record.cancel_requested_by) == (Status.START, "petr")
    assert record.public()["cancel_requested"]


def test_cancel_returns_an_ended_task_unchanged(service):
    handle = service.request(Other)
    end(service, handle, result="1")
    before = service.get(handle)
    assert service.cancel(handle, by="jana") == before == service.get(handle)


def test_cancel_says_when_the_name_of_who_asks_cannot_be_stored(service):
    with pytest.raises(RequestRefused, match=r"by is .* half a surrogate pair"):
        service.cancel(service.request(Other), by="\ud800")
    assert service.cancel(1, by="").cancel_requested_by is None


def test_retry_plans_an_interrupted_task_again(service):
    handle = service.request(Add, {"a": 1}, key="k", unique=True)
    with pytest.raises(NotRetryable, match="its status is REQUEST"):
        service.retry(handle)
    end(service, handle, reason=Reason.RAISED)
    record = service.retry(handle)
    assert (record.status, record.reason, record.attempt, record.tries) == (Status.REQUEST, None, 1, 1)
    service.cancel(handle)
    twin = service.request(Add, {"a": 1}, key="k", unique=True)
    with pytest.raises(AlreadyLive, match=f"task {twin.id} is live") as caught:
        service.retry(handle)
    assert caught.value.id == twin.id


# ---- the record ----


def test_a_record_has_every_column_and_cannot_be_changed(service):
    record = service.get(service.request(Other))
    columns = [field.column_name for field in service.ledger.store.tables.Task._meta.sorted_fields]
    names = [field.name for field in dataclasses.fields(TaskRecord)]
    assert names == [*columns, "position", "no_supervisor_since", "unreadable"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.status = Status.DONE


def test_a_record_knows_whether_it_ended_and_how_far_it_is(service):
    handle = service.request(Other)
    assert not service.get(handle).ended
    attempt = begin(service, handle)
    assert service.get(handle).fraction is None
    for done, total, fraction in [(1, 4, 0.25), (5, 4, 1.0), (-1, 4, 0.0), (1, 0, None)]:
        service.ledger.apply(Batch(notes={attempt: Note(progress_done=done, progress_total=total)}))
        assert service.get(handle).fraction == fraction
    service.ledger.end(attempt, End(result="1"))
    assert service.get(handle).ended
    assert service.get(handle).fraction == 1.0


def test_what_a_browser_may_see_holds_nothing_secret(service):
    handle = service.request(Add, {"a": 1, "password": "hunter2"}, key="secret-key", unique="secret-unique")
    attempt = begin(service, handle)
    service.ledger.apply(Batch(notes={attempt: Note(progress_done=1.0, progress_total=2.0, message="half")}))
    record = service.get(handle)
    assert record.public() == {
        "id": 1,
        "status": "START",
        "requested_at": record.requested_at.isoformat(),
        "started_at": record.started_at.isoformat(),
        "ended_at": None,
        "reason": None,
        "ended": False,
        "fraction": 0.5,
        "message": "half",
        "cancel_requested": False,
        "suspended": False,
        "position": None,
        "no_supervisor_since": None,
    }
    service.ledger.end(
        attempt, End(reason=Reason.RAISED, detail="secret-detail", error="secret-trace", result="secret-r")
    )
    public = json.dumps(service.get(handle).public())
    assert "hunter2" not in public
    assert "secret" not in public
    assert json.loads(public)["reason"] == "RAISED"


def test_a_waiting_task_knows_its_place_and_how_long_nobody_has_supervised(service):
    first, second = service.request(Other), service.request(Other)
    assert (service.get(first).position, service.get(second).position) == (1, 2)
    assert service.get(second).no_supervisor_since is None
    old = datetime.now(UTC) - timedelta(hours=1)
    service.ledger.store.database.execute_sql("UPDATE bgsupervisor_task SET requested_at = ?", (str(old),))
    record = service.get(second)
    assert record.no_supervisor_since == old
    assert record.public()["no_supervisor_since"] == old.isoformat()
    record = SupervisorRecord(
        host="here",
        boot_id="boot",
        pid_ns=1,
        pid=1,
        start_ticks=1,
        slots=1,
        version="1",
        catalogue="{}",
        code_error=None,
        started_at=old,
        heartbeat_at=datetime.now(UTC),
    )
    service.ledger.apply(Batch(supervisor=record))
    assert service.get(second).no_supervisor_since is None
    left_at = datetime.now(UTC)
    service.ledger.apply(Batch(supervisor=dataclasses.replace(record, left_at=left_at)))
    assert service.get(second).no_supervisor_since == left_at  # it has said so itself: nobody needs to wait
    end(service, second, result="1")
    assert service.get(second).position is service.get(second).no_supervisor_since is None


# ---- connections ----


def test_a_service_opens_nothing_before_its_first_call(tmp_path):
    service = Service(f"sqlite:///{tmp_path}/later.db")
    assert service.config.table_prefix == "bgsupervisor_"
    service.close()
    assert list(tmp_path.iterdir()) == []
    service.counts()
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"later.db"}
    service.close()


def test_a_service_without_configuration_and_database_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Service()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("database", "says"),
    [
        (peewee.SqliteDatabase(":memory:"), "cannot be in memory"),
        (peewee.SqliteDatabase(None), r"names no file or database yet; call its init\(\) first"),
        (peewee.MySQLDatabase("app"), "is a MySQLDatabase; only peewee.SqliteDatabase and PostgresqlDatabase are"),
        ("mysql://localhost/app", "only sqlite and postgresql are"),
    ],
    ids=["memory", "deferred", "mysql object", "mysql url"],
)
def test_a_database_that_cannot_be_supervised_is_refused_with_a_sentence(tmp_path, monkeypatch, database, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        Service(database)


def connections_to(path):
    """Return how many descriptors of this process lead to *path*."""
    found = 0
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += number.readlink() == path
    return found


def test_fifty_threads_use_one_service_and_their_connections_end_with_them(service, database):
    service.counts()
    assert connections_to(database) == 1
    gate = threading.Barrier(50)

    def work(number):
        gate.wait(20)
        handle = service.request(Add, {"a": number}, key=str(number))
        assert json.loads(service.get(handle).data) == {"a": number}
        assert service.status(Add, key=str(number)) is Status.REQUEST
        return handle.id

    ids = []
    for _ in range(3):
        with ThreadPoolExecutor(50) as pool:
            ids += pool.map(work, range(50))
    assert sorted(ids) == list(range(1, 151))
    # SQLite keeps descriptors of closed connections while another is open, and gives them to the next ones.
    assert connections_to(database) <= 51


def test_two_services_on_two_databases_never_mix_their_rows(tmp_path):
    services = [Service(f"sqlite:///{tmp_path}/{name}/tasks.db") for name in ("here", "there")]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()

    def work(number):
        which = number % 2
        for turn in range(10):
            handle = services[which].request("a:b", {"db": which}, key=str(number))
            assert json.loads(services[which].get(handle).data) == {"db": which}, turn
            services[1 - which].counts()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    for which, service in enumerate(services):
        found = service.list(limit=None)
        assert len(found) == 80
        assert {json.loads(record.data)["db"] for record in found} == {which}
        service.close()


def test_two_prefixes_in_one_database_never_see_each_other(tmp_path, make_app):
    production = make_app(name="production", database=f"sqlite:///{tmp_path}/shared.db")
    staging = make_app(name="staging", database=f"sqlite:///{tmp_path}/shared.db", table_prefix="staging_")
    handle = production.service.request("a:b", unique=True)
    assert staging.service.get(handle) is None
    assert staging.service.list() == []
    assert staging.service.request("a:b", unique=True).created
    staging.service.cancel(1)
    assert production.service.status(1) is Status.REQUEST


def test_a_service_that_was_used_before_a_fork_works_on_both_sides(service, database):
    service.request(Other)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "it raised"
        try:
            handles = [service.request(Other, key="child") for _ in range(3)]
            said = f"{handles[-1].id} {service.counts()[Status.REQUEST]} {connections_to(database)}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said == "4 4 2"  # the inherited connection is neither used nor closed
    assert service.request(Other).id == 5
    assert len(service.list(key="child")) == 3
    assert service.ledger.store.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)


THREADS = """
import sys, threading
from bgsupervisor import Service
service = Service(sys.argv[1])
def work():
    service.request("a:b")
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(service.counts())
service.close()
del service
"""


def test_a_thread_that_ends_leaves_no_connection_to_warn_about(database):
    found = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", THREADS, f"sqlite:///{database}"],
        env={"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert "'REQUEST'>: 3" in found.stdout


# ---- a database of the application ----


@pytest.fixture
def shared(database):
    shared = peewee.SqliteDatabase(database, pragmas={"journal_mode": "wal", "synchronous": 2}, timeout=5)
    yield shared
    shared.close()


@contextlib.contextmanager
def rolled_back(database):
    """Have a transaction of the application that fails at its end."""
    with contextlib.suppress(ZeroDivisionError), database.atomic():
        yield
        raise ZeroDivisionError


def test_a_rollback_of_the_caller_leaves_no_row_and_rings_nothing(shared, bell):
    service = Service(shared)
    service.counts()
    with rolled_back(shared):
        service.request(Other)
    assert service.list() == []
    assert bell() == 0


def test_the_supervisor_is_woken_after_the_commit_of_the_caller_and_not_before(shared, bell):
    service = Service(shared)
    with shared.atomic():
        handle = service.request(Other)
        with shared.atomic():
            service.cancel(handle)
        assert bell() == 0
    assert bell() == 2
    assert service.status(handle) is Status.INTERRUPTED
    service.retry(handle)
    service.request_many(Other, [None, None])
    assert bell() == 2


def test_an_inner_transaction_that_rolls_back_takes_only_its_own_requests(shared):
    service = Service(shared)
    with shared.atomic():
        service.request(Other, key="outer")
        with rolled_back(shared):
            service.request(Other, key="inner")
    assert [record.key for record in service.list()] == ["outer"]


def test_a_request_is_in_the_same_transaction_as_the_rows_of_the_application(shared):
    class Invoice(shared.Model):
        number = peewee.IntegerField()

    service = Service(shared)
    shared.create_tables([Invoice])
    with contextlib.suppress(peewee.IntegrityError), shared.atomic():
        service.request(Other)
        Invoice.create(number=None)
    assert service.counts()[Status.REQUEST] == 0
    with shared.atomic():
        Invoice.create(number=7)
        service.request(Other)
    assert service.counts()[Status.REQUEST] == Invoice.select().count() == 1


def test_a_database_that_the_application_has_open_gets_its_tables(shared):
    shared.connect()
    service = Service(shared)
    assert service.request(Other).created
    assert not shared.is_closed()


def test_tables_that_went_with_the_transaction_of_the_caller_are_made_again(shared):
    service = Service(shared)
    with rolled_back(shared):
        service.request(Other)
    assert service.request(Other).id == 1


def test_a_closed_database_of_the_application_is_opened_and_closed_again(database):
    shared = peewee.SqliteDatabase(database, autoconnect=False, pragmas={"journal_mode": "wal"})
    service = Service(shared)
    service.request(Other)
    assert shared.is_closed()
    with pytest.raises(UnknownTask):
        service.cancel(99)
    assert shared.is_closed()
    with shared.connection_context():
        service.request(Other)
        assert not shared.is_closed()
        service.close()
        assert not shared.is_closed()
    assert service.counts()[Status.REQUEST] == 2


def test_weak_settings_of_the_application_are_warned_about_once_and_left_alone(database, caplog):
    shared = peewee.SqliteDatabase(database, pragmas={"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1})
    service = Service(shared)
    with caplog.at_level(logging.WARNING, "bgsupervisor"), shared.connection_context():
        for _ in range(3):
            service.request(Other)
        found = [shared.pragma(name) for name in ("journal_mode", "synchronous", "foreign_keys", "wal_autocheckpoint")]
    (record,) = caplog.records
    assert "journal_mode=wal and synchronous=1" in record.getMessage()
    assert found == ["wal", 1, 1, 1000]


def test_strong_settings_of_the_application_are_not_warned_about(shared, caplog):
    Service(shared).request(Other)
    assert caplog.records == []


# ---- the database is away ----


def test_a_locked_database_is_told_after_the_busy_timeout(make_app):
    service = make_app(busy_timeout_s=0.2).service
    service.request("a:b")
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(sqlite3.connect, service.ledger.store.path, isolation_level=None).result()
        thread.submit(other.execute, "BEGIN IMMEDIATE").result()
        before = time.monotonic()
        with pytest.raises(DatabaseError, match=r"is locked by another writer for longer than 0\.2 s"):
            service.request("a:b")
        assert 0.2 <= time.monotonic() - before < allowed_s(5)
        assert service.counts()[Status.REQUEST] == 1  # reading goes on
        thread.submit(other.close).result()
    assert service.request("a:b").id == 2


def test_a_request_that_was_recorded_never_says_otherwise(service, monkeypatch):
    def away():
        raise DatabaseError("away")

    monkeypatch.setattr(service.ledger, "supervisors", away)
    assert service.request(Other) == Handle(1)


def test_a_request_warns_once_a_minute_when_nobody_supervises(database, caplog):
    now = datetime.now(UTC)

    class Clock:
        passed_s = 1000.0

        def now(self):
            return now + timedelta(seconds=self.passed_s)

        def monotonic(self):
            return self.passed_s

    clock = Clock()
    service = Service(f"sqlite:///{database}", clock=clock)

    def warnings():
        service.request(Other)
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    assert warnings() == []  # this one has only just been requested
    clock.passed_s += 59
    assert warnings() == []
    clock.passed_s += 200
    (warning,) = warnings()
    assert "no supervisor has been seen" in warning
    assert warnings() == []
    clock.passed_s += 60
    assert len(warnings()) == 1
    service.close()


# ---- with a real supervisor ----

APP = """
from bgsupervisor import Service, Task, task

class Add(Task):
    def run(self, a: int, b: int = 0) -> int:
        return a + b

@task
def parent(config: str) -> list[int]:
    handle = Service(config=config).request(Add, {"a": 20, "b": 22})
    return [handle.id, Service(config=config).wait(handle, timeout_s=20).attempt]

@task
def fail(why: str) -> None:
    raise ValueError(why)
"""


def test_a_supervisor_runs_what_is_requested_and_the_service_tells_what_became_of_it(make_app):
    app = make_app(APP)
    app.start()
    added = app.service.request("appx:Add", {"a": 1, "b": 2})
    failed = app.service.request("appx:fail", {"why": "no such file"})
    parent = app.service.request("appx:parent", {"config": str(app.config)})
    assert app.wait(added).status is Status.DONE
    assert app.service.result(added) == 3
    app.wait(failed)
    with pytest.raises(Interrupted, match="RAISED: ValueError: no such file"):
        app.service.result(failed)
    app.wait(parent)
    child, attempt = app.service.result(parent)  # a body uses a Service of its own
    assert (app.service.result(child), attempt) == (42, 1)


WSGI = """
import json
from pathlib import Path
from bgsupervisor import Service

service = Service(config=Path(__file__).with_name("bgsupervisor.toml"))
service.request("appx:Add", {"a": 0}, key="preload")  # used before the fork

def app(environ, start_response):
    number = int(environ["QUERY_STRING"])
    handle = service.request("appx:Add", {"a": number}, key="view")
    found = service.get(handle)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([handle.id, json.loads(found.data)["a"], str(found.status)]).encode()]
"""


def test_views_in_preloaded_and_forked_web_workers_request_tasks(make_app):
    app = make_app(APP)
    app.write(WSGI, "wsgi")
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    output = (app.folder / "gunicorn.log").open("wb")
    options = ["--preload", "-w", "2", "--threads", "4", "-b", f"fd://{listening.fileno()}"]
    gunicorn = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, "wsgi:app"],
        cwd=app.folder,
        env=app.environment(PYTHONPATH=SOURCE, HOME=str(app.folder)),  # it keeps a socket there
        pass_fds=[listening.fileno()],
        stdout=output,
        stderr=output,
    )
    listening.close()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def view(number):
        with opener.open(f"{url}?{number}", timeout=30) as answer:
            return json.loads(answer.read())

    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(view, range(200)))
    finally:
        gunicorn.terminate()
        gunicorn.wait(20)
        output.close()
    assert [(number, status) for _, number, status in answers] == [(n, "REQUEST") for n in range(200)]
    assert len({id for id, _, _ in answers}) == 200
    assert len(app.service.list(key="view", limit=None)) == 200
    log = (app.folder / "gunicorn.log").read_text()
    assert log.count("Booting worker") == 2, log
    assert "Traceback" not in log


def test_a_running_task_is_seen_cancelled_by_the_service(make_app):
    app = make_app("""
        import time
        from bgsupervisor import task, current
        @task
        def long() -> None:
            while True:
                current().progress(1, 4, "at work")
                time.sleep(0.01)
    """)
    app.start()
    handle = app.service.request("appx:long")
    app.started(handle)
    record = wait_until(lambda: (r := app.service.get(handle)).message == "at work" and r, "progress is seen")
    assert record.fraction == 0.25
    assert app.service.cancel(handle, by="jana").status is Status.START
    record = app.wait(handle)
    assert (record.status, record.reason, record.cancel_requested_by) == (Status.INTERRUPTED, Reason.CANCELLED, "jana")


def test_a_class_that_a_configured_module_reaches_through_another_package_is_accepted(tmp_path, monkeypatch):
    (tmp_path / "app_entry.py").write_text("import app_helpers\n")
    (tmp_path / "app_helpers.py").write_text("import app_jobs\n")
    (tmp_path / "app_jobs.py").write_text("from bgsupervisor import task\n@task\ndef work(): pass\n")
    (tmp_path / "bgsupervisor.toml").write_text('tasks = ["app_entry"]\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    import app_entry  # noqa: F401 - as an application does
    from app_jobs import work

    service = Service(config=tmp_path / "bgsupervisor.toml")

    assert service.request(work).created
    service.close()
