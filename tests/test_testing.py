"""The plugin for applications' tests: what they request is recorded or run here, and no supervisor hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import peewee
import pytest
from pace import allowed_s

from bgsupervisor import (
    Interrupted,
    NotEnded,
    Reason,
    RequestRefused,
    Service,
    Status,
    Task,
    TaskNotConfigured,
    UnknownTask,
    WaitTimeout,
    current,
    statedir,
    task,
)
from bgsupervisor.testing import FakeClock, TaskBox, box
from bgsupervisor.testing.box import DEPTH_MAX
from bgsupervisor.testing.isolation import in_use

ROOT = Path(__file__).parent.parent
ran = []


@pytest.fixture(autouse=True)
def _nothing_ran():
    ran.clear()


@dataclasses.dataclass
class Address:
    street: str


@task
def note(text: str = "") -> str:
    ran.append(text)
    return text.upper()


@task(secret=("password",))
def log_in(user: str, password: str) -> None:
    raise LookupError(f"no user {user}")


@task
def note_delivery(to: Address, on: date) -> int:
    ran.append((to, on))
    return 1


@task
def call(what: str) -> object:
    return calls[what]()


calls = {}


class Imports(Task):
    def run(self, ids: list[int]) -> int:
        ran.extend((id, service().get(self.id)) for id in self.track(ids))
        return len(ids)


def service():
    return Service()


def shared(tmp_path):
    database = peewee.SqliteDatabase(tmp_path / "shop.db", pragmas={"journal_mode": "wal", "synchronous": "full"})
    database.connect()
    return database, Service(database)


# What was requested


def test_a_request_is_recorded_and_not_run(bgsupervisor):
    handle = service().request(note, {"text": "a"}, key="k")

    assert ran == []
    assert service().status(note) is Status.REQUEST
    assert [(one.id, one.name, one.key) for one in bgsupervisor.requested] == [(handle.id, "test_testing:note", "k")]
    with pytest.raises(NotEnded):
        service().result(handle)


def test_what_was_requested_is_found_by_task_name_data_and_key(bgsupervisor):
    first = service().request(note, {"text": "a"}, key="k")
    service().request(note, {"text": "b"})
    service().request(note, {"text": "b"})
    service().request(note_delivery, {"to": Address("Elm"), "on": date(2030, 1, 2)})

    assert [one.id for one in bgsupervisor.assert_requested(note, key="k")] == [first.id]
    assert len(bgsupervisor.assert_requested("test_testing:note", times=3)) == 3
    bgsupervisor.assert_requested(note, data={"text": "b"}, times=2)
    bgsupervisor.assert_requested(note, data={"text": "c"}, times=0)
    bgsupervisor.assert_requested(note_delivery, data={"to": Address("Elm"), "on": date(2030, 1, 2)})
    for wrong in ({"times": 1}, {"data": {"text": "c"}}, {"key": "other"}, {"data": {}}, {"key": "k", "times": 0}):
        with pytest.raises(AssertionError):
            bgsupervisor.assert_requested(note, **wrong)


def test_a_failed_assertion_tells_what_was_requested_but_no_secrets(bgsupervisor):
    with pytest.raises(AssertionError, match=r"note at least once, not 0 times; nothing was requested"):
        bgsupervisor.assert_requested(note)
    service().request(log_in, {"user": "eve", "password": "hunter2"}, key="k")
    bgsupervisor.run_pending()
    service().request(note, {"text": "a"})

    with pytest.raises(AssertionError) as caught:
        bgsupervisor.assert_requested(log_in, data={"user": "bob", "password": "hunter3"}, times=2)
    text = str(caught.value)
    assert 'expected test_testing:log_in with data {"user":"bob","password":"***"} 2 times, not 0 times' in text
    assert '1. test_testing:log_in {"user":"eve","password":"***"} key=\'k\' INTERRUPTED RAISED: LookupError' in text
    assert '2. test_testing:note {"text":"a"} REQUEST' in text
    assert "hunter" not in text


def test_a_failed_assertion_lists_twenty_tasks(bgsupervisor):
    service().request_many(note, [{"text": str(number)} for number in range(25)])

    with pytest.raises(AssertionError) as caught:
        bgsupervisor.assert_nothing_requested()
    lines = str(caught.value).splitlines()
    assert lines[:3] == [
        "expected no task; requested were 25:",
        "  ... 5 older ones ...",
        '  6. test_testing:note {"text":"5"} REQUEST',
    ]
    assert len(lines) == 22


def test_nothing_requested_is_no_failure(bgsupervisor):
    service().counts()
    bgsupervisor.assert_nothing_requested()


# Running it


def test_what_is_due_runs_in_the_order_of_a_supervisor(bgsupervisor):
    now = datetime.now(UTC)
    service().request(note, {"text": "third"})
    service().request(note, {"text": "second"}, run_at=now - timedelta(hours=1))
    service().request(note, {"text": "first"}, priority=1)
    service().request(note, {"text": "later"}, delay_s=60)

    records = bgsupervisor.run_pending()

    assert ran == ["first", "second", "third"]
    assert [service().result(one.id) for one in records] == ["FIRST", "SECOND", "THIRD"]
    assert {one.status for one in records} == {Status.DONE}
    assert bgsupervisor.run_pending() == []


def test_a_run_at_of_now_is_due_now(bgsupervisor):
    service().request(note, run_at=datetime.now(UTC))
    assert len(bgsupervisor.run_pending()) == 1


def test_a_limit_leaves_the_others(bgsupervisor):
    service().request_many(note, [{"text": "a"}, {"text": "b"}, {"text": "c"}])

    assert len(bgsupervisor.run_pending(limit=2)) == 2
    assert ran == ["a", "b"]
    assert bgsupervisor.run_pending(limit=0) == []
    assert service().counts(note) == {"REQUEST": 1, "START": 0, "DONE": 2, "INTERRUPTED": 0}


def test_tasks_that_a_task_requests_run_as_well(bgsupervisor):
    calls["parent"] = lambda: service().request(note, {"text": "child"}).id
    service().request(call, {"what": "parent"})

    records = bgsupervisor.run_pending()

    assert [one.name for one in records] == ["test_testing:call", "test_testing:note"]
    assert service().result(records[0].id) == records[1].id


def test_tasks_that_request_each_other_without_end_are_stopped(bgsupervisor, monkeypatch):
    monkeypatch.setattr(box, "RUNS_MAX", 20)
    calls["again"] = lambda: service().request(call, {"what": "again"}) and None
    service().request(call, {"what": "again"})

    with pytest.raises(AssertionError, match="20 tasks have run and test_testing:call is due again"):
        bgsupervisor.run_pending()
    assert len(bgsupervisor.run_pending(limit=3)) == 3


def test_time_passes_when_the_test_says_so(bgsupervisor):
    began = time.monotonic()
    handle = service().request(note, delay_s=3600)
    planned = service().request(note, run_at=datetime.now(UTC) + timedelta(days=7))

    assert bgsupervisor.run_pending() == []
    bgsupervisor.clock.advance(3590)
    assert bgsupervisor.run_pending() == []
    bgsupervisor.clock.advance(10)
    assert [one.id for one in bgsupervisor.run_pending()] == [handle.id]
    bgsupervisor.clock.advance(7 * 86_400)
    [record] = bgsupervisor.run_pending()
    assert record.id == planned.id
    assert record.ended_at - datetime.now(UTC) > timedelta(days=7, minutes=59)
    assert time.monotonic() - began < allowed_s(5)


def test_the_clock_goes_forward_only():
    clock = FakeClock()
    for seconds in (-1, float("nan")):
        with pytest.raises(ValueError, match="give 0 or more"):
            clock.advance(seconds)
    before = clock.monotonic()
    clock.sleep(100)
    assert 100 <= clock.monotonic() - before < 110


def test_waiting_for_what_nobody_runs_ends_at_once(bgsupervisor):
    began = time.monotonic()
    handle = service().request(note)

    with pytest.raises(WaitTimeout):
        service().wait(handle, timeout_s=60)
    assert time.monotonic() - began < allowed_s(5)


def test_a_living_supervisor_seems_to_be_there(bgsupervisor, caplog):
    handle = service().request(note)
    bgsupervisor.clock.advance(3600)
    service().request(note)

    assert service().get(handle).public()["no_supervisor_since"] is None
    assert caplog.records == []


def test_data_reaches_the_body_as_its_signature_says(bgsupervisor):
    handle = service().request(note_delivery, {"to": {"street": "Elm"}, "on": "2030-01-02"})
    bgsupervisor.run_pending()

    assert ran == [(Address("Elm"), date(2030, 1, 2))]
    assert service().result(handle) == 1
    with pytest.raises(RequestRefused):
        service().request(note_delivery, {"to": 1})


def test_a_body_that_raises_is_interrupted_with_its_traceback(bgsupervisor):
    handle = service().request(log_in, {"user": "eve", "password": "x"})
    [record] = bgsupervisor.run_pending()

    assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.RAISED)
    assert record.detail == "LookupError: no user eve"
    assert "in log_in" in record.error
    assert record.tries == 1
    assert [one["reason"] for one in service().ledger.interruptions(handle.id)] == ["RAISED"]
    with pytest.raises(Interrupted, match="no user eve"):
        service().result(handle)


def test_errors_can_be_raised_in_the_test_after_they_were_recorded(bgsupervisor):
    service().request_many(log_in, [{"user": "a", "password": ""}, {"user": "b", "password": ""}])

    with pytest.raises(LookupError, match="no user a"):
        bgsupervisor.run_pending(raise_errors=True)
    assert [one.status for one in bgsupervisor.requested] == [Status.INTERRUPTED, Status.REQUEST]
    bgsupervisor.raise_errors = True
    with pytest.raises(LookupError, match="no user b"):
        bgsupervisor.run_pending()
    assert [one.reason for one in bgsupervisor.requested] == [Reason.RAISED, Reason.RAISED]


def test_sys_exit_in_a_body_ends_the_task_and_not_the_test(bgsupervisor):
    calls["exit"] = lambda: sys.exit(3)
    service().request(call, {"what": "exit"})
    [record] = bgsupervisor.run_pending()

    assert (record.reason, record.exit_code) == (Reason.EXITED, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.fail.Exception])
def test_what_is_meant_for_the_test_run_goes_through(bgsupervisor, error):
    def fail():
        raise error

    calls["fail"] = fail
    service().request(call, {"what": "fail"})

    with pytest.raises(error):
        bgsupervisor.run_pending()
    assert bgsupervisor.requested[0].status is Status.INTERRUPTED


def test_a_result_that_is_not_json_is_the_bodys_error(bgsupervisor):
    calls["object"] = object
    service().request(call, {"what": "object"})
    [record] = bgsupervisor.run_pending()

    assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.RAISED)
    assert "the result is invalid" in record.detail


def test_data_written_around_the_api_is_checked_before_the_body(bgsupervisor):
    store = service().ledger.store
    with store.writing():
        store.database.execute_sql(
            """INSERT INTO bgsupervisor_task (name, data) VALUES ('test_testing:note', '{"txt": 1}')"""
        )
    bgsupervisor.clock.advance(1)
    [record] = bgsupervisor.run_pending()

    assert record.reason is Reason.RAISED
    assert "txt" in record.detail
    assert ran == []


def test_inside_the_body_the_task_runs_in_this_process(bgsupervisor):
    seen = []
    calls["look"] = lambda: seen.append((current().id, current().attempt, current().key, service().get(current().id)))
    handle = service().request(call, {"what": "look"}, key="k")
    [record] = bgsupervisor.run_pending()

    [(id, attempt, key, inside)] = seen
    assert (id, attempt, key) == (handle.id, 1, "k")
    assert inside.status is Status.START
    assert (inside.pid, inside.slot) == (os.getpid(), 0)
    assert inside.host
    assert inside.started_at <= record.ended_at
    assert (record.slot, record.result) == (None, "null")
    assert current().id is None


def test_progress_is_in_the_record_meanwhile_and_afterwards(bgsupervisor):
    service().request(Imports, {"ids": [7, 8]})
    [record] = bgsupervisor.run_pending()

    assert [(id, inside.progress_done, inside.progress_total) for id, inside in ran] == [(7, 0, 2), (8, 1, 2)]
    assert (record.progress_done, record.progress_total) == (2, 2)
    calls["tell"] = lambda: current().progress(1, 4, "a\0b")
    service().request(call, {"what": "tell"})
    [record] = bgsupervisor.run_pending()
    assert (record.progress_done, record.progress_total, record.message) == (1, 4, "a\\x00b")


def test_a_task_that_is_cancelled_before_it_runs_does_not_run(bgsupervisor):
    handle = service().request(note)
    service().cancel(handle, by="jana")

    assert bgsupervisor.run_pending() == []
    assert ran == []
    assert service().get(handle).reason is Reason.CANCELLED


def test_a_task_that_is_cancelled_while_it_runs_ends_at_its_next_progress(bgsupervisor):
    def cancels_itself():
        assert not current().cancel_requested
        service().cancel(current().id, by="jana")
        assert current().cancel_requested
        current().progress(1, 2)
        ran.append("too far")

    calls["cancel"] = cancels_itself
    service().request(call, {"what": "cancel"})
    [record] = bgsupervisor.run_pending(raise_errors=True)

    assert (record.reason, record.detail) == (Reason.CANCELLED, "cancelled by jana; the body ended when it was asked")
    assert ran == []


def test_a_retried_task_runs_again(bgsupervisor):
    handle = service().request(log_in, {"user": "eve", "password": ""})
    bgsupervisor.run_pending()
    service().retry(handle)
    [record] = bgsupervisor.run_pending()

    assert (record.attempt, record.tries) == (2, 2)
    with bgsupervisor.inline():
        assert service().retry(handle).attempt == 3


def test_a_coroutine_runs_in_a_loop_of_its_own_also_beside_the_tests(bgsupervisor):
    async def body():
        await asyncio.sleep(0)
        return service().get(current().id).status

    async def asynchronous_test():
        service().request(call, {"what": "async"})
        return bgsupervisor.run_pending()

    calls["async"] = body
    service().request(call, {"what": "async"})
    records = bgsupervisor.run_pending() + asyncio.run(asynchronous_test())

    assert [one.result for one in records] == ['"START"', '"START"']


def test_a_task_that_is_not_loaded_stays_requested(bgsupervisor, caplog):
    handle = service().request("nowhere:Task", {"x": 1})
    service().request(note)

    assert [one.name for one in bgsupervisor.run_pending()] == ["test_testing:note"]
    assert service().status(handle) is Status.REQUEST
    assert "not loaded in this test, so not run: nowhere:Task" in caplog.text


def test_configured_modules_are_imported_for_a_task_that_is_requested_by_name(bgsupervisor, tmp_path, monkeypatch):
    (tmp_path / "bgsupervisor.toml").write_text('tasks = ["warehouse", "gone"]\n')
    (tmp_path / "warehouse.py").write_text("from bgsupervisor import task\n@task\ndef pack() -> int:\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    handle = service().request("warehouse:pack")

    assert len(bgsupervisor.run_pending()) == 1
    assert service().result(handle) == 7


# Inline


def test_inline_a_task_has_run_when_the_request_returns(bgsupervisor):
    with bgsupervisor.inline():
        handle = service().request(note, {"text": "a"})
        assert service().result(handle) == "A"
        service().request_many(note, [{"text": "b"}, {"text": "c"}])
    service().request(note, {"text": "not yet"})

    assert ran == ["a", "b", "c"]
    bgsupervisor.mode = "inline"
    service().request(note, {"text": "d"})
    assert ran == ["a", "b", "c", "d"]


def test_inline_leaves_what_is_due_later_and_what_was_requested_before(bgsupervisor):
    service().request(note, {"text": "before"})
    with bgsupervisor.inline():
        service().request(note, {"text": "later"}, delay_s=10)
        service().request(note, {"text": "now"})
        assert ran == ["now"]
        bgsupervisor.clock.advance(10)
        bgsupervisor.run_pending()
    assert ran == ["now", "before", "later"]


def test_inline_an_error_is_recorded_and_raised_only_if_asked(bgsupervisor):
    with bgsupervisor.inline():
        handle = service().request(log_in, {"user": "eve", "password": ""})
    assert service().get(handle).reason is Reason.RAISED
    with bgsupervisor.inline(raise_errors=True), pytest.raises(LookupError):
        service().request(log_in, {"user": "eve", "password": ""})
    assert [one.reason for one in bgsupervisor.requested] == [Reason.RAISED, Reason.RAISED]
    assert not bgsupervisor.raise_errors
    assert bgsupervisor.mode == "record"


def test_inline_a_task_that_a_task_requests_runs_within_it(bgsupervisor):
    def parent():
        before = current().id
        service().request(note, {"text": "child"})
        current().progress(1, 1)
        return [before, current().id]

    calls["parent"] = parent
    with bgsupervisor.inline():
        handle = service().request(call, {"what": "parent"})

    assert service().result(handle) == [handle.id, handle.id]
    assert service().get(handle).progress_done == 1
    assert ran == ["child"]


def test_inline_tasks_that_request_each_other_without_end_are_stopped(bgsupervisor):
    calls["again"] = lambda: service().request(call, {"what": "again"}) and None
    with bgsupervisor.inline():
        service().request(call, {"what": "again"})

    assert len(bgsupervisor.requested) == DEPTH_MAX + 1
    assert f"more than {DEPTH_MAX} deep" in bgsupervisor.requested[DEPTH_MAX - 1].error


def test_inline_a_second_request_of_a_unique_task_runs_nothing(bgsupervisor):
    first = service().request(note, unique=True)
    with bgsupervisor.inline():
        second = service().request(note, unique=True)

    assert (second.id, second.created) == (first.id, False)
    assert ran == []


# Inside a transaction of the application


def test_inside_a_transaction_tasks_run_inline_after_its_commit(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)
    with bgsupervisor.inline():
        with database.atomic():
            handle = shop.request(note, {"text": "a"})
            with database.atomic():
                shop.request(note, {"text": "b"})
            assert ran == []
            assert shop.status(handle) is Status.REQUEST
        assert ran == ["a", "b"]
        shop.request(note, {"text": "c"})
        assert ran == ["a", "b", "c"]
    database.close()


def test_a_rollback_takes_the_request_back(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)
    with bgsupervisor.inline():
        with contextlib.suppress(ZeroDivisionError), database.atomic():
            lost = shop.request(note, {"text": "lost"}, unique=True)
            assert len(bgsupervisor.requested) == 1
            raise ZeroDivisionError
        bgsupervisor.assert_nothing_requested()
        assert shop.get(lost) is None
        with contextlib.suppress(ZeroDivisionError), database.atomic():
            shop.request(note, {"text": "lost"}, unique=True)
            raise ZeroDivisionError
        assert shop.request(note, {"text": "kept"}, unique=True).created
    assert ran == ["kept"]
    with pytest.raises(UnknownTask):
        shop.result(lost)
    database.close()


def test_the_rollback_of_a_savepoint_takes_its_requests_back(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)
    with bgsupervisor.inline():
        with database.atomic():
            with contextlib.suppress(ZeroDivisionError), database.atomic():
                shop.request(note, {"text": "lost"})
                raise ZeroDivisionError
            shop.request(note, {"text": "kept"})
            with contextlib.suppress(ZeroDivisionError), database.atomic():
                shop.request(note, {"text": "lost too"})
                raise ZeroDivisionError
        bgsupervisor.assert_requested(note, times=1)
    assert ran == ["kept"]
    database.close()


def test_a_rollback_in_another_thread_is_heard_of(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)
    requested, go_on, done, leave = (threading.Event() for _ in range(4))

    def request_and_roll_back():
        with database.connection_context():
            with contextlib.suppress(ZeroDivisionError), database.atomic():
                shop.request(note)
                requested.set()
                assert go_on.wait(10)
                raise ZeroDivisionError
            done.set()
            assert leave.wait(10)
        shop.close()

    thread = threading.Thread(target=request_and_roll_back)
    thread.start()
    assert requested.wait(10)
    bgsupervisor.assert_requested(note, times=1)
    go_on.set()
    assert done.wait(10)
    bgsupervisor.assert_nothing_requested()
    leave.set()
    thread.join(10)
    database.close()


def test_an_error_after_a_commit_is_raised_at_the_end_of_the_block(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)

    def request():
        with bgsupervisor.inline(raise_errors=True):
            with database.atomic():
                shop.request(log_in, {"user": "a", "password": ""})
                shop.request(note, {"text": "committed too"})
            ran.append("after the commit")

    with pytest.raises(LookupError, match="no user a"):
        request()
    assert ran == ["committed too", "after the commit"]
    assert [one.status for one in bgsupervisor.requested] == [Status.INTERRUPTED, Status.DONE]
    database.close()


def test_an_error_of_the_applications_own_after_a_commit_takes_nothing_back(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)
    with contextlib.suppress(ZeroDivisionError, peewee.OperationalError), database.atomic():
        database.after_commit(lambda: 1 / 0)
        shop.request(note)

    bgsupervisor.assert_requested(note, times=1)
    database.close()


def test_what_is_requested_in_a_transaction_that_stays_open_can_be_run(bgsupervisor, tmp_path):
    database, shop = shared(tmp_path)
    with database.atomic() as transaction:
        shop.request(note, {"text": "a"})
        assert len(bgsupervisor.run_pending()) == 1
        transaction.rollback()
    assert ran == ["a"]
    database.close()


def test_a_database_in_memory_is_shared_too_and_gets_no_tables(bgsupervisor):
    database = peewee.SqliteDatabase(":memory:")
    with database.connection_context():
        shop = Service(database)
        with bgsupervisor.inline(), database.atomic():
            shop.request(note, {"text": "a"})
        assert ran == ["a"]
        assert database.get_tables() == []


# What Services work with


def test_whatever_a_service_is_made_with_it_writes_to_the_database_of_the_test(bgsupervisor, tmp_path):
    config = tmp_path / "bgsupervisor.toml"
    config.write_text('database = "sqlite:///dev.db"\nstate_dir = "state"\ndata_max_bytes = 1024\n')
    database, shop = shared(tmp_path)
    made = [Service(), Service(f"sqlite:///{tmp_path}/url.db"), Service(config=config), shop]
    for one in made:
        one.request(note)

    assert {one.config.database for one in made} == {service().config.database}
    assert {len(one.list()) for one in made} == {4}
    assert made[2].config.data_max_bytes == 1024
    assert not (tmp_path / "url.db").exists()
    assert not (tmp_path / "dev.db").exists()
    assert database.get_tables() == []
    database.close()


def test_no_real_supervisor_is_rung(bgsupervisor, tmp_path):
    config = tmp_path / "bgsupervisor.toml"
    config.write_text('state_dir = "state"\n')
    (tmp_path / "state").mkdir()
    directory = statedir.open_dir(tmp_path / "state")
    bell = statedir.bind(directory, "wake.sock", socket.SOCK_DGRAM, 0o600)
    assert statedir.send_datagram(tmp_path / "state" / "wake.sock", b"!")
    assert bell.recv(10) == b"!"
    one = Service(config=config)
    one.cancel(one.request(note))
    with pytest.raises(BlockingIOError):
        bell.recv(10)
    bell.close()
    os.close(directory)


def test_a_class_that_no_supervisor_would_load_is_refused_as_ever(bgsupervisor, tmp_path):
    (tmp_path / "bgsupervisor.toml").write_text('tasks = ["json"]\n')
    with pytest.raises(TaskNotConfigured):
        Service(config=tmp_path / "bgsupervisor.toml").request(note)


def test_a_configuration_that_cannot_be_read_here_is_replaced_by_the_defaults(bgsupervisor, tmp_path, caplog):
    for name, text in (("a.toml", 'env_file = ".env"\n'), ("b.toml", "slots = 0\n")):
        (tmp_path / name).write_text(text)
    for name in ("a.toml", "b.toml", "missing.toml"):
        Service(config=tmp_path / name).request(note)

    assert len(bgsupervisor.requested) == 3
    assert caplog.text.count("tests go on with the defaults") == 3


def test_the_configuration_is_the_one_that_was_found_when_the_service_was_made(tmp_path, monkeypatch):
    (tmp_path / "bgsupervisor.toml").write_text("data_max_bytes = 1024\n")
    monkeypatch.chdir(tmp_path)
    with in_use(TaskBox()):
        made = Service()
    monkeypatch.chdir("/")
    with in_use(TaskBox()):
        assert made.config.data_max_bytes == 1024


def test_a_box_that_outlives_its_test_says_so():
    with in_use(TaskBox()) as ended:
        folder = Path(service().config.database.removeprefix("sqlite:///")).parent
        service().request(note)
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="has ended"):
        TaskBox.requested.fget(ended)


def test_bgsupervisor_itself_imports_no_pytest():
    code = "import sys, bgsupervisor, bgsupervisor.supervisor, bgsupervisor.child; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


# The plugin in projects of others


class Project:
    """A folder with tests of its own, run by a pytest of its own."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, **files):
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(text))

    def pytest(self, *arguments, passed, failed=0, errors=0, **environment):
        names = ("PATH", "HOME", "LANG", "TMPDIR", "COVERAGE_PROCESS_START")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "error", *arguments],
            cwd=self.folder,
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        told = {
            word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)
        }
        found = tuple(told.get(word, 0) for word in ("passed", "failed", "error"))
        assert found == (passed, failed, errors), done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def test_no_configuration_is_needed_and_every_test_begins_with_nothing(project):
    project.write(
        shop="""
        from bgsupervisor import Service, task
        service = Service()

        @task
        def mail(to: str) -> None: ...
        """,
        test_shop="""
        import pytest
        from shop import mail, service

        @pytest.mark.parametrize("number", range(3))
        def test_one(number, bgsupervisor):
            assert service.request(mail, {"to": "a"}, unique=True).created
            assert service.counts()["REQUEST"] == 1
            bgsupervisor.assert_requested(mail, times=1)

        @pytest.mark.parametrize("number", range(2))
        def test_isolated_without_asking(number):
            assert service.list() == []
            service.request(mail, {"to": "a"})
        """,
    )
    project.pytest(passed=5)
    assert sorted(path.name for path in project.folder.iterdir() if path.suffix) == ["shop.py", "test_shop.py"]


def test_unittest_cases_are_isolated_and_can_have_the_box(project):
    project.write(
        test_cases="""
        import unittest
        import pytest
        from bgsupervisor import Service, task

        service = Service()

        @task
        def mail(to: str) -> str:
            return to

        class Cases(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def _take_box(self, bgsupervisor):
                self.box = bgsupervisor

            def setUp(self):
                service.request(mail, {"to": "setUp"})

            def test_one(self):
                self.box.assert_requested(mail, times=1)
                self.assertEqual(service.result(self.box.run_pending()[0].id), "setUp")

            def test_two(self):
                self.box.assert_requested(mail, times=1)

        class Plain(unittest.TestCase):
            def test_three(self):
                self.assertEqual(service.list(), [])
        """
    )
    project.pytest(passed=3)


def test_isolation_can_be_off_for_a_test_or_on_for_one(project):
    project.write(
        test_states="""
        import pytest
        from pathlib import Path
        from bgsupervisor import Service, task

        service = Service()
        dev = Path(__file__).parent / "bgsupervisor.db"

        @task
        def mail() -> None: ...

        def rows():
            return len(service.list())

        @pytest.fixture(scope="module")
        def before():
            service.request(mail)

        def test_default(DEFAULT):
            service.request(mail)
            assert dev.exists() == DEFAULT

        @pytest.mark.bgsupervisor_isolation("off")
        def test_off(before):
            service.request(mail)
            assert dev.exists()
            assert rows() >= 2
            assert service.config.database.endswith("/bgsupervisor.db")

        @pytest.mark.bgsupervisor_isolation("on")
        def test_on():
            assert rows() == 0

        def test_asked(bgsupervisor):
            assert rows() == 0

        @pytest.mark.bgsupervisor_isolation("perhaps")
        def test_wrong(): ...
        """,
        conftest="""
        import pytest

        @pytest.fixture
        def DEFAULT(pytestconfig):
            return not pytestconfig.getini("bgsupervisor_isolation")
        """,
    )
    (project.folder / "bgsupervisor.toml").write_text("")
    text = project.pytest(passed=4, errors=1)
    assert 'the marker bgsupervisor_isolation takes "on" or "off"; it was given (\'perhaps\',)' in text
    (project.folder / "bgsupervisor.db").unlink()
    (project.folder / "pytest.ini").write_text("[pytest]\nbgsupervisor_isolation = off\n")
    project.pytest(passed=4, errors=1)


def test_an_error_after_a_commit_that_no_block_raised_is_raised_at_the_end_of_the_test(project):
    project.write(
        test_held="""
        import peewee
        from bgsupervisor import Service, task

        @task
        def fail() -> None:
            raise LookupError("held until now")

        def test_held(bgsupervisor):
            bgsupervisor.mode, bgsupervisor.raise_errors = "inline", True
            database = peewee.SqliteDatabase(":memory:")
            with database.connection_context(), database.atomic():
                Service(database).request(fail)
        """
    )
    assert "LookupError: held until now" in project.pytest(passed=1, errors=1)


def test_what_is_requested_outside_tests_goes_nowhere(project):
    project.write(
        test_outside="""
        import pytest
        from bgsupervisor import Service, task

        @task
        def mail() -> None: ...

        service = Service("sqlite:///dev.db")
        service.request(mail)

        @pytest.fixture(scope="session", autouse=True)
        def wider():
            service.request(mail)

        def test_nothing(bgsupervisor):
            bgsupervisor.assert_nothing_requested()
        """
    )
    project.pytest(passed=1)
    assert not (project.folder / "dev.db").exists()


def test_tests_can_run_in_parallel_processes(project):
    pytest.importorskip("xdist")
    project.write(
        test_many="""
        import pytest
        from bgsupervisor import Service, task

        service = Service()

        @task
        def mail(number: int) -> int:
            return number

        @pytest.mark.parametrize("number", range(20))
        def test_one(number, bgsupervisor):
            handle = service.request(mail, {"number": number}, unique=True)
            service.request(mail, {"number": number})
            assert [one.id for one in bgsupervisor.run_pending()] == [1, 2]
            assert service.result(handle) == number
        """
    )
    project.pytest("-n", "2", passed=20)


def test_a_live_supervisor_on_the_configured_database_gets_nothing(make_app):
    app = make_app(
        """
        from pathlib import Path
        from bgsupervisor import task

        @task
        def mail(to: str) -> str:
            with Path("mailed").open("a") as file:
                file.write(to + "\\n")
            return to
        """
    )
    app.start()
    Project(app.folder).write(
        test_app=f"""
        import peewee, pytest
        from appx import mail
        from bgsupervisor import Service

        database = peewee.SqliteDatabase({str(app.folder / "bgsupervisor.db")!r}, pragmas={{"synchronous": 2}})
        services = [
            Service(),
            Service(config={str(app.config)!r}),
            Service("sqlite:///{app.folder}/bgsupervisor.db"),
            Service(database),
        ]

        @pytest.mark.parametrize("service", services)
        @pytest.mark.parametrize("mode", ["record", "inline"])
        def test_isolated(bgsupervisor, service, mode, monkeypatch, tmp_path):
            monkeypatch.chdir(tmp_path)
            bgsupervisor.mode = mode
            with database.connection_context(), database.atomic():
                handle = service.request(mail, {{"to": "customer"}})
            bgsupervisor.run_pending()
            assert service.result(handle) == "customer"

        def test_isolated_without_asking():
            for service in services:
                service.request(mail, {{"to": "customer"}})

        @pytest.mark.bgsupervisor_isolation("off")
        def test_not_isolated():
            for service in services:
                assert service.wait(service.request(mail, {{"to": "me"}}), timeout_s=15).status == "DONE"
            database.close()
        """
    )
    Project(app.folder).pytest(passed=10)

    assert (app.folder / "mailed").read_text() == "me\n" * 4
    assert len(app.service.list()) == 4


def test_it_works_on_systems_that_cannot_supervise(project):
    project.write(
        elsewhere="""
        import os, signal, socket, sys
        for name in ("fcntl", "resource", "pwd", "grp"):
            sys.modules[name] = None
        for module, names in (
            (os, ("fork", "pidfd_open", "fchmod", "geteuid", "getuid", "register_at_fork", "memfd_create")),
            (signal, ("pidfd_send_signal", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGKILL", "pthread_sigmask")),
            (socket, ("AF_UNIX",)),
        ):
            for name in names:
                delattr(module, name)
        import pathlib
        import bgsupervisor.processes as processes
        processes.PROC = pathlib.Path("no-such-table")
        """,
        test_there="""
        import os
        from bgsupervisor import Service, current, task

        @task
        def mail(to: str) -> list:
            current().progress(1, 2)
            return [to, current().id]

        @task
        def fail() -> None:
            raise OSError("no")

        def test_all(bgsupervisor):
            service = Service()
            handle = service.request(mail, {"to": "a"})
            with bgsupervisor.inline():
                failed = service.request(fail)
            assert service.get(failed).reason == "RAISED"
            [record] = bgsupervisor.run_pending()
            assert service.result(handle) == ["a", handle.id]
            assert (record.pid, record.boot_id, record.start_ticks) == (os.getpid(), "unknown", 0)
        """,
    )
    project.pytest(
        "-p", "elsewhere", "-p", "no:platformdirs", "--capture=sys", passed=1, PYTHONPATH=str(project.folder)
    )


# The page


def put_snippets(folder, *, where):
    """Write the files of the page that *where* lets through; return how many tests they hold."""
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"```(?:python|toml|ini)\n# (\S+)\n(.*?)```", page, re.DOTALL)
    blocks = [(name, text) for name, text in blocks if where(name)]
    for name, text in blocks:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
    return sum(len(re.findall(r"^ *def test_", text, re.MULTILINE)) for _, text in blocks)


def test_the_snippets_of_the_page_work(project):
    tests = put_snippets(project.folder, where=lambda name: not name.startswith("orders/"))
    assert tests >= 9
    project.pytest(passed=tests, PYTHONPATH=str(project.folder))


def test_the_snippets_of_the_page_work_by_unittest(project):
    tests = put_snippets(project.folder, where=lambda name: name == "shop.py" or name.startswith("tests/"))
    assert "$ python -m unittest\n" in (ROOT / "docs" / "testing.md").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "unittest"], cwd=project.folder, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"Ran {tests} test" in done.stderr
