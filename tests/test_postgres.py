"""PostgreSQL: what an address may say, what a lost server costs, and that writers hold each other off as in SQLite."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from conftest import wait_until
from postgres_server import PASSWORD, empty, filled, make_tables, small_disk

import bgsupervisor
from bgsupervisor import Status, migrations
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import AccessError, AlreadyLive, DatabaseError
from bgsupervisor.ledger import Attempt, Batch, Claim, Due, Ledger, Note, Request
from bgsupervisor.models import Store
from bgsupervisor.processes import ProcessIdentity
from bgsupervisor.statuses import Reason
from bgsupervisor.wire import End

SOURCE = str(Path(bgsupervisor.__file__).parents[1])
WAIT_S = 20


def open_store(url, busy_timeout_s=10.0):
    return Store.open(url, "bgsupervisor_", busy_timeout_s=busy_timeout_s)


@contextlib.contextmanager
def ledger_on(url, **more):
    store = open_store(url, **more)
    yield Ledger(store, SystemClock())
    store.close()


@pytest.fixture
def store_url(postgres_with_tables):
    """Of the two kinds of database only this one."""
    empty(postgres_with_tables)
    return postgres_with_tables


@pytest.fixture
def ledger(store):
    return Ledger(store, SystemClock())


@pytest.fixture
def pool():
    """Threads of other clients, each with a connection of its own."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def running(ledger, **more):
    id = ledger.request(Request(name="a:b", data="{}", **more))[0]
    claim = Claim(Due(id, 0, "a:b", "{}", None), ProcessIdentity("here", "boot", 1, 1, 1), id, 0.0)
    (claimed,) = ledger.apply(Batch(claims=[claim])).claimed
    return claimed.attempt


def blocked(url):
    """Return how many sessions wait for a lock."""
    with contextlib.closing(psycopg.connect(url, autocommit=True)) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return connection.execute(query).fetchone()[0]


def refusal(url):
    """Return what a request in the database *url* raises."""
    with ledger_on(url) as ledger, pytest.raises((AccessError, DatabaseError)) as caught:
        ledger.request(Request(name="a:b", data="{}"))
    assert PASSWORD not in str(caught.value)
    assert "%20heim" not in str(caught.value)
    return caught.value


# ---- writers hold each other off ----


def test_a_plain_request_waits_for_no_other_writer(ledger, store_url):
    with ledger_on(store_url, busy_timeout_s=0.1) as other, ledger.store.writing():
        assert other.request(Request(name="a:b", data="{}"))[1]
        with pytest.raises(DatabaseError, match=r"locked by another writer for longer than 0\.1 s"):
            other.cancel(1, by=None)


def test_a_request_that_comes_after_another_task_never_misses_its_end(ledger, store_url, pool):
    first = running(ledger)

    def follow():
        with ledger_on(store_url) as other:
            return other.request(Request(name="a:b", data="{}", after=(first.id,)))[0]

    with ledger.store.writing():
        assert ledger.end(first, End(result="1"))
        following = pool.submit(follow)
        wait_until(lambda: blocked(store_url), "the request waits for the end")
    second = following.result(WAIT_S)
    assert [due.id for due in ledger.due(["a:b"], limit=9)] == [second]


def test_of_two_requests_with_one_unique_key_at_once_the_second_gets_the_first(ledger, store_url, pool):
    wanted = Request(name="a:b", data="{}", unique_key="k")

    def ask():
        with ledger_on(store_url) as other:
            return other.request(wanted)

    with ledger.store.writing(alone=False):
        id, created = ledger.request(wanted)
        asking = pool.submit(ask)
        wait_until(lambda: blocked(store_url), "the second waits for the first's commit")
    assert created
    assert asking.result(WAIT_S) == (id, False)


def test_a_unique_key_that_is_given_up_at_the_last_moment_is_taken(ledger, store_url, pool):
    wanted = Request(name="a:b", data="{}", unique_key="k")

    def ask():
        with ledger_on(store_url) as other:
            return other.request(wanted)

    with contextlib.suppress(LookupError), ledger.store.writing(alone=False):
        ledger.request(wanted)
        asking = pool.submit(ask)
        wait_until(lambda: blocked(store_url), "the second waits for the first's commit")
        raise LookupError
    assert asking.result(WAIT_S)[1]


def test_a_retry_whose_unique_key_a_request_takes_just_now_is_refused(ledger, store_url, pool):
    old = running(ledger, unique_key="k")
    ledger.end(old, End(reason=Reason.RAISED))

    def retry():
        with ledger_on(store_url) as other:
            return other.retry(old.id)

    with ledger.store.writing(alone=False):
        taken = ledger.request(Request(name="a:b", data="{}", unique_key="k"))[0]
        retrying = pool.submit(retry)
        wait_until(lambda: blocked(store_url), "the retry waits for the request's commit")
    with pytest.raises(AlreadyLive) as caught:
        retrying.result(WAIT_S)
    assert caught.value.id == taken
    assert ledger.get(old.id).status is Status.INTERRUPTED


def test_what_is_looked_at_is_as_of_one_moment(ledger, store_url):
    with ledger_on(store_url) as other, ledger.store.looking():
        assert ledger.find() == []
        other.request(Request(name="a:b", data="{}"))
        assert ledger.find() == []
    assert len(ledger.find()) == 1


def test_a_commit_of_another_connection_is_seen_from_the_version(ledger, store_url):
    with ledger_on(store_url) as other:
        other.request(Request(name="a:b", data="{}"))
        before = ledger.store.data_version()
        assert ledger.store.data_version() == before
        with other.store.writing():
            other.request(Request(name="a:b", data="{}"))
            during = ledger.store.data_version()
        assert ledger.store.data_version() not in {before, during}


# ---- the connection ----


def test_limits_are_set_on_every_connection_and_what_the_address_sets_wins(store_url):
    store = open_store(f"{store_url}&options=-c%20statement_timeout%3D7s", busy_timeout_s=2.5)

    def shown(name):
        with store.connected():
            return store.database.execute_sql(f"SHOW {name}").fetchone()[0]

    assert [shown("lock_timeout"), shown("statement_timeout")] == ["2500ms", "7s"]
    assert shown("idle_in_transaction_session_timeout") == "10s"
    assert [shown("synchronous_commit"), shown("TimeZone"), shown("application_name")] == ["on", "UTC", "bgsupervisor"]
    store.set_busy_timeout(0)
    assert shown("lock_timeout") == "1ms"  # 0 would wait for ever
    store.close()
    assert shown("lock_timeout") == "1ms"
    store.close()


def test_without_an_address_that_says_otherwise_a_dead_line_and_a_long_statement_have_limits(postgres, postgres_url):
    store = open_store(postgres_url)
    with contextlib.closing(store), store.connected():
        assert store.database.execute_sql("SHOW statement_timeout").fetchone()[0] == "1min"
        with socket.socket(fileno=os.dup(store.database.connection().fileno())) as line:
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            limits = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
            assert [line.getsockopt(socket.IPPROTO_TCP, limit) for limit in limits] == [10, 5, 3, 15_000]


def test_a_connection_of_before_a_fork_is_left_alone_by_the_child(ledger):
    ledger.request(Request(name="a:b", data="{}"))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            ledger.request(Request(name="a:child", data="{}"))
            ledger.store.close()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert [record.name for record in ledger.find()] == ["a:child", "a:b"]


def test_a_connection_that_was_ended_while_nobody_used_it_is_replaced_unseen(ledger, store_url):
    ledger.request(Request(name="a:b", data="{}"))
    with contextlib.closing(psycopg.connect(store_url, autocommit=True)) as operator:
        end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'bgsupervisor'"
        assert operator.execute(end).fetchone()[0]
    assert ledger.request(Request(name="a:b", data="{}"))[1]
    assert len(ledger.find()) == 2


def test_a_connection_that_is_lost_within_a_transaction_is_told_and_nothing_of_it_stays(ledger, store_url):
    with contextlib.closing(psycopg.connect(store_url, autocommit=True)) as operator:

        def lose_it():
            with ledger.store.writing():
                ledger.request(Request(name="a:b", data="{}"))
                pid = ledger.store.database.execute_sql("SELECT pg_backend_pid()").fetchone()[0]
                operator.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
                ledger.request(Request(name="a:b", data="{}"))

        with pytest.raises(DatabaseError, match="is away or has given up"):
            lose_it()
    assert ledger.find() == []
    assert ledger.request(Request(name="a:b", data="{}"))[1]


def test_a_store_that_nobody_has_any_more_hangs_up_at_once(store_url):
    count = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with contextlib.closing(psycopg.connect(store_url, autocommit=True)) as operator:
        gc.collect()
        gc.disable()
        try:
            forgotten = open_store(store_url)
            with forgotten.connected():
                assert operator.execute(count).fetchone()[0] == 1
            del forgotten
            wait_until(lambda: operator.execute(count).fetchone()[0] == 0, "its session has ended")
        finally:
            gc.enable()


def test_a_connection_that_was_lost_is_no_reason_why_nobody_can_write(ledger, store_url):
    ledger.find()
    with contextlib.closing(psycopg.connect(store_url, autocommit=True)) as operator:
        end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'bgsupervisor'"
        assert operator.execute(end).fetchone()[0]
    assert ledger.store.write_problem(wait_s=0.1) is None


HOLDER = """
import sys
from bgsupervisor.models import Store
store = Store.open(sys.argv[1], "bgsupervisor_", busy_timeout_s=10.0)
with store.writing():
    print("in", flush=True)
    input()
"""


def test_a_process_that_is_stopped_within_a_transaction_does_not_hold_up_the_others_for_ever(ledger, store_url):
    url = f"{store_url}&options=-c%20idle_in_transaction_session_timeout%3D300"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": SOURCE},
        text=True,
    )
    attempt = running(ledger)
    assert holder.stdout.readline() == "in\n"
    holder.send_signal(signal.SIGSTOP)
    ledger.store.set_busy_timeout(WAIT_S)
    assert ledger.end(attempt, End(result="1"))
    holder.kill()
    holder.communicate(timeout=WAIT_S)


# ---- what is wrong is said ----


def test_a_wrong_password_is_told_without_it(postgres, postgres_url):
    error = refusal(postgres_url.replace("ge%20heim", "ge%20hein"))
    assert isinstance(error, AccessError)
    assert "refuses the user postgres (" in str(error)
    assert "password authentication failed" in str(error)
    assert f"postgresql://postgres:***@127.0.0.1:{postgres.port}/" in str(error)
    assert error.user == "postgres"


def test_a_user_without_rights_is_told(postgres, postgres_url):
    name = postgres_url.rpartition("/")[2]
    postgres.execute("CREATE USER guest")
    try:
        error = refusal(f"postgresql://guest@/{name}?host={postgres.folder}&port={postgres.port}")
    finally:
        postgres.execute("DROP USER guest")
    assert isinstance(error, AccessError)
    assert "refuses the user guest (permission denied for schema public" in str(error)


def test_a_database_that_is_not_there_is_told(postgres):
    error = refusal(postgres.url("nowhere"))
    assert "is not there (" in str(error)
    assert 'database "nowhere" does not exist' in str(error)


def test_a_read_only_database_is_told(postgres, postgres_url):
    make_tables(postgres_url)
    name = postgres_url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert "is read-only, as a standby is" in str(refusal(postgres_url))


def test_tables_that_lost_a_column_are_told_with_the_command_to_type(postgres, postgres_url):
    make_tables(postgres_url)
    postgres.execute("ALTER TABLE bgsupervisor_task DROP COLUMN parent_id", database=postgres_url.rpartition("/")[2])
    error = refusal(postgres_url)
    assert "lacks tables or columns of this version" in str(error)
    assert "run `bgsupervisor migrate`" in str(error)


def test_a_missing_driver_is_told_with_the_command_to_type():
    code = "import sys; sys.modules['psycopg'] = None\nfrom bgsupervisor import Service\nService('postgresql://h/d')"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    ).stderr
    assert "its driver psycopg is not installed; install it with `pip install 'bgsupervisor[postgres]'`" in said


# ---- a server that goes and comes ----


@pytest.fixture
def own_url(own_server):
    if own_server.process.poll() is not None:
        own_server.start()
    return own_server.url(own_server.make_database())


def test_a_server_that_is_away_is_told_at_once_and_all_goes_on_when_it_is_back(own_server, own_url):
    with ledger_on(own_url) as ledger:
        attempt = running(ledger)
        own_server.stop()
        for act in (lambda: ledger.end(attempt, End(result="1")), ledger.find, lambda: ledger.cancel(1, by=None)):
            with pytest.raises(
                DatabaseError, match=r"is away or has given up .* see whether the server runs"
            ) as caught:
                act()
            assert PASSWORD not in str(caught.value)
        own_server.start()
        assert ledger.end(attempt, End(result="1"))
        assert ledger.get(attempt.id).status is Status.DONE


def test_a_disk_that_is_full_is_told_and_heals(own_server, own_url):
    with small_disk(own_server) as disk, filled(disk / "filler") as filler:
        own_server.execute(f"CREATE TABLESPACE small LOCATION '{disk}'", "CREATE DATABASE crowded TABLESPACE small")
        with ledger_on(own_server.url("crowded")) as ledger:
            attempt = running(ledger)
            filler.fill()
            much = [Request(name="a:b", data='"' + "x" * 5000 + '"')] * 4000
            with pytest.raises(DatabaseError, match="the disk is full; free some space"):
                ledger.request_many(much)
            filler.empty()
            assert ledger.end(attempt, End(result="1"))
        own_server.execute("DROP DATABASE crowded WITH (FORCE)", "CHECKPOINT", "DROP TABLESPACE small")


# ---- the command line, and a supervisor ----

APP = """
import pathlib, time
from bgsupervisor import current, task

@task
def quick(n: int) -> int:
    return n + 1

@task
def until(name: str) -> str:
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
    return "over"

@task
def loads(name: str) -> None:
    until(name)
    current().reach("loaded", 7)

@task
def awaits(id: int) -> int:
    with current().lock("report"):
        return current().wait_for(id, part="loaded")
"""


def test_whoever_only_looks_creates_no_tables(make_app, postgres_url):
    app = make_app(APP, database=postgres_url)
    listed, told = app.cli("ps"), app.cli("health")
    assert listed.returncode == 0, listed.stderr
    assert (told.returncode, told.stdout.partition("|")[0].strip()) == (
        3,
        f"UNKNOWN - {postgres_url.replace('ge%20heim%40', '***')} has none of our tables yet",
    )
    assert "has none of our tables yet" in listed.stderr
    assert app.cli("doctor").stdout.count("has none of our tables yet") == 1
    with contextlib.closing(psycopg.connect(postgres_url)) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    assert app.cli("migrate").stdout.splitlines() == [f"applied {name}" for name in migrations.available()]
    assert app.cli("migrate").stdout.startswith("nothing to do")


def test_no_command_shows_the_password(make_app, postgres_url):
    app = make_app(APP, database=postgres_url)
    app.start()
    handle = app.service.request("appx:quick", {"n": 1})
    app.wait(handle)
    said = ""
    for command in ("check", "check --json", "doctor", "health", "ps --all", f"show {handle.id}", f"why {handle.id}"):
        done = app.cli(*command.split())
        said += done.stdout + done.stderr
    app.supervisors[0].stop()
    said += app.supervisors[0].log + "".join(path.read_text() for path in (app.state_dir / "logs").glob("*"))
    for secret in (PASSWORD, PASSWORD.strip("@"), "ge%20heim"):
        assert secret not in said
    assert "postgresql://postgres:***@127.0.0.1" in said


def test_a_task_runs_to_its_end_waits_for_others_and_is_cancelled(make_app, postgres_url):
    app = make_app(APP, database=postgres_url, slots=3)
    app.start()
    assert app.service.result(app.wait(app.service.request("appx:quick", {"n": 1})).id) == 2
    loads = app.service.request("appx:loads", {"name": "go"})
    waiting = [app.service.request("appx:awaits", {"id": loads.id}) for _ in range(4)]
    after = app.service.request("appx:quick", {"n": 5}, after=waiting)
    wait_until(lambda: len(app.service.ledger.waits.rows()) == 4, "four wait for the part, or for the lock")
    (app.folder / "go").touch()
    for handle in waiting:
        assert app.wait(handle).result == "7"
    assert app.wait(after).result == "6"
    held_up = app.service.request("appx:until", {"name": "never"})
    app.started(held_up)
    app.service.cancel(held_up, by="jana")
    record = app.wait(held_up)
    assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.CANCELLED)


INSERT = "INSERT INTO bgsupervisor_task (name, data) VALUES ('appx:quick', '{\"n\": 1}')"


def sessions(connection, what="true"):
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return connection.execute(f"{query} AND {what}").fetchone()[0]


def test_a_request_written_by_hand_starts_at_its_commit_and_not_by_a_look_each_second(make_app, postgres_url):
    app = make_app(APP, database=postgres_url)
    app.start()
    with contextlib.closing(psycopg.connect(postgres_url, autocommit=True)) as hand:
        wait_until(lambda: sessions(hand, "query LIKE 'LISTEN%'"), "the supervisor listens")
        late = []
        for _ in range(7):
            with hand.transaction():
                hand.execute(INSERT)
            ids = [record.id for record in app.service.list(limit=1)]
            record = app.wait(ids[0])
            late.append((record.started_at - record.requested_at).total_seconds())
        assert sorted(late)[3] < 0.3, late
        # When the server hangs up it listens anew.
        hand.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        hand.execute(INSERT)
        assert app.wait(app.service.list(limit=1)[0].id).status is Status.DONE
        wait_until(lambda: sessions(hand, "query LIKE 'LISTEN%'"), "the supervisor listens again")


def test_what_wakes_is_a_request_a_cancel_and_a_retry_and_nothing_that_a_supervisor_writes(ledger):
    with ledger.store.connected():
        bell = ledger.store.listener()

    def rang():
        ready, _, _ = select.select([bell], [], [], 0.3)
        return bool(ready) and bell.drain()

    attempt = running(ledger)
    assert rang()
    ledger.apply(Batch(notes={attempt: Note(progress_done=1.0)}))
    claimed = ledger.request(Request(name="a:b", data="{}"))[0]
    assert rang()
    claim = Claim(Due(claimed, 0, "a:b", "{}", None), ProcessIdentity("here", "boot", 1, 2, 1), 7, 0.0)
    ledger.apply(Batch(claims=[claim]))
    ledger.apply(Batch(ends={Attempt(claimed, 1): End(result="1")}))
    assert not rang()
    ledger.cancel(attempt.id, by=None)
    assert rang()
    ledger.apply(Batch(ends={attempt: End(reason=Reason.CANCELLED)}))
    assert not rang()
    ledger.retry(attempt.id)
    assert rang()
    with contextlib.suppress(LookupError), ledger.store.writing():
        ledger.request(Request(name="a:b", data="{}"))
        raise LookupError
    assert not rang()
    bell.close()


def test_a_body_outlives_its_supervisor_and_the_next_one_records_its_end(make_app, postgres_url):
    app = make_app(APP, database=postgres_url)
    first = app.start()
    handle = app.service.request("appx:until", {"name": "go"})
    pid = app.started(handle).pid
    first.kill()
    app.start()
    (app.folder / "go").touch()
    record = app.wait(handle)
    assert (record.status, record.pid, record.attempt) == (Status.DONE, pid, 1)


def test_bodies_go_on_while_the_server_is_away_and_their_ends_are_recorded_when_it_is_back(
    make_app, own_server, own_url
):
    app = make_app(APP, database=own_url)
    app.start()
    handles = [app.service.request("appx:until", {"name": name}) for name in ("go", "later")]
    pids = [app.started(handle).pid for handle in handles]
    own_server.stop()
    told = app.cli("health")
    assert (told.returncode, told.stdout.startswith("CRITICAL - the database postgresql://")) == (2, True)
    assert "is away or has given up" in told.stdout
    (app.folder / "go").touch()
    said = wait_until(lambda: "is away" in app.supervisors[0].log and app.supervisors[0].log, "the supervisor says so")
    assert PASSWORD not in said
    own_server.start()
    assert app.wait(handles[0]).status is Status.DONE
    (app.folder / "later").touch()
    assert app.wait(handles[1]).status is Status.DONE
    assert [app.service.get(handle).pid for handle in handles] == pids
    assert app.service.ledger.interruptions(handles[0].id) == []
    assert app.supervisors[0].process.poll() is None
