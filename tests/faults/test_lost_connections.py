"""A connection that is lost before, within or after a COMMIT: nothing doubled, nothing lost that was acknowledged."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import psycopg
import pytest
from support.app import wait_until
from support.pace import allowed_s
from support.postgres_proxy import (
    COMMIT,
    TO_CLIENT,
    TO_SERVER,
    AnswerCut,
    Cut,
    LostCommit,
    Proxy,
    commit_cut,
    with_another_pid,
    without_options,
)
from support.postgres_server import empty, filled, make_tables, small_disk

from bgsupervisor import Service, Status
from bgsupervisor.clock import SystemClock
from bgsupervisor.database import postgres
from bgsupervisor.database.connection_limit import CONNECTIONS_MAX, ConnectionLimit
from bgsupervisor.database.store import Store
from bgsupervisor.errors import DatabaseError, ServerAway, Undecided
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger import Ledger
from bgsupervisor.ledger.attempts import Batch, Claim, DueTask, Telemetry
from bgsupervisor.ledger.locks import Held
from bgsupervisor.ledger.requests import Request
from bgsupervisor.ledger.slots import Waiter, Waiting
from bgsupervisor.statuses import Reason
from bgsupervisor.system.processes import ProcessIdentity

WHERES = ("before", "within", "after")
BUSY_S = 5.0


@pytest.fixture
def store_url(postgres_with_tables):
    """Of the two kinds of database only this one."""
    empty(postgres_with_tables)
    return postgres_with_tables


@pytest.fixture
def proxy(postgres):
    proxy = Proxy(postgres.port)
    yield proxy
    proxy.close()


@pytest.fixture
def direct(postgres, store_url):
    """The address of the test's database over TCP, with a password."""
    return postgres.url(store_url.partition("@/")[2].partition("?")[0])


@pytest.fixture
def through(proxy, postgres, direct):
    """The same, through the proxy."""
    return direct.replace(f":{postgres.port}/", f":{proxy.port}/")


@pytest.fixture
def service(through, tmp_path, store_url):
    config = tmp_path / "bgsupervisor.toml"
    config.write_text(f'database = "{through}"\ntasks = ["appx"]\nbusy_timeout_s = {BUSY_S}\n')
    service = Service(config=config)
    yield service
    service.close()


@pytest.fixture
def ledger(store):
    """What the rows say, by a connection that nobody cuts."""
    return Ledger(store, SystemClock())


@pytest.fixture
def lossy(through, store_url):
    """A ledger behind the proxy that waits patiently, as a child's."""
    store = Store.open(through, "bgsupervisor_", busy_timeout_s=BUSY_S, patience_s=BUSY_S)
    yield Ledger(store, SystemClock())
    store.close()


def start(ledger, id=None, pid=1):
    id = ledger.request(Request(name="a:b", data="{}"))[0] if id is None else id
    claim = Claim(DueTask(id, 0, "a:b", "{}", None), ProcessIdentity("here", "boot", 1, pid, 1), id, 0.0)
    (claimed,) = ledger.apply(Batch(claims=[claim])).claimed
    return claimed.attempt


# ---- what people ask for ----

cut_anywhere = pytest.mark.parametrize("where", WHERES)


def cut_in(proxy, where, act):
    """Do *act* while its COMMIT is cut, and see that it was."""
    proxy.arm(commit_cut(where))
    found = act()
    assert not proxy.armed
    return found


@cut_anywhere
def test_a_request_with_a_unique_key_whose_commit_is_lost_is_recorded_once_and_told_truly(
    service, ledger, proxy, where
):
    service.counts()
    handle = cut_in(proxy, where, lambda: service.request("a:b", unique="k"))
    assert [(record.id, handle.created) for record in ledger.find()] == [(handle.id, True)]


@cut_anywhere
def test_many_requests_whose_commit_is_lost_are_recorded_once(service, ledger, proxy, where):
    service.counts()
    handles = cut_in(proxy, where, lambda: service.request_many("a:b", [{"n": n} for n in range(20)]))
    assert sorted(record.id for record in ledger.find()) == [handle.id for handle in handles]
    assert len(handles) == 20


@cut_anywhere
def test_a_cancel_a_suspension_a_resumption_and_a_retry_survive_a_lost_commit(service, ledger, proxy, where):
    running = start(ledger)
    assert cut_in(proxy, where, lambda: service.suspend(running.id, by="jana")).suspend_requested_by == "jana"
    assert cut_in(proxy, where, lambda: service.resume(running.id)).suspend_requested_at is None
    assert cut_in(proxy, where, lambda: service.cancel(running.id, by="jana")).cancel_requested_by == "jana"
    waiting = ledger.request(Request(name="a:b", data="{}"))[0]
    assert cut_in(proxy, where, lambda: service.cancel(waiting)).reason is Reason.CANCELLED
    assert cut_in(proxy, where, lambda: service.retry(waiting)).status is Status.REQUEST
    assert ledger.get(waiting).attempt == 0


@pytest.mark.parametrize("direction", [TO_SERVER, TO_CLIENT])
@pytest.mark.parametrize("reset", [False, True])
def test_a_request_cut_at_any_byte_is_recorded_once(service, ledger, proxy, direction, reset):
    ids = []
    for after_bytes in range(1, 400, 13):
        proxy.arm(Cut(direction, after_bytes, reset))
        while proxy.armed:  # a few, until so many bytes have passed
            ids.append(service.request("a:b", {"n": len(ids)}).id)
    rows = ledger.find()
    assert collections.Counter(record.data for record in rows) == {f'{{"n":{n}}}': 1 for n in range(len(ids))}
    assert sorted(record.id for record in rows) == sorted(ids)
    assert proxy.cuts_done == 31


def test_a_request_whose_number_was_given_to_another_as_well_takes_a_new_one(lossy, ledger, proxy, monkeypatch):
    draw, doubles = lossy.store.draw_id, []

    def draw_what_another_draws():
        id = draw()
        if not doubles:
            with ledger.store.connected():
                doubles.append(ledger._insert(Request(name="a:b", data='{"n":1}'), id=id)[0])
            proxy.arm(AnswerCut((b"INSERT INTO",), "before"))
        return id

    monkeypatch.setattr(lossy.store, "draw_id", draw_what_another_draws)
    id = lossy.request(Request(name="a:b", data='{"n":2}'))[0]
    assert not proxy.armed
    assert [(record.id, record.data) for record in ledger.find()] == [(id, '{"n":2}'), (doubles[0], '{"n":1}')]


def test_numbers_that_are_taken_already_are_passed_over(ledger):
    taken = [ledger.request(Request(name="a:b", data="{}"))[0] for _ in range(3)]
    ledger.store.database.execute_sql("ALTER TABLE bgsupervisor_task ALTER id RESTART")  # as a crash sets it back
    assert ledger.request(Request(name="a:b", data="{}"))[0] == max(taken) + 1


def test_without_a_server_a_request_says_after_busy_timeout_s_that_nothing_was_recorded(service, ledger, proxy):
    service._store.patience_s = 0.5
    proxy.close()
    for act in (
        lambda: service.request("a:b"),
        lambda: service.request_many("a:b", [{}, {}]),
        lambda: service.cancel(1),
    ):
        before = time.monotonic()
        with pytest.raises(ServerAway, match=r"is away or has given up .*; nothing was recorded$"):
            act()
        assert time.monotonic() - before < allowed_s(3)
    assert ledger.find() == []


@pytest.mark.parametrize("options", [{}, {"unique": "k"}])
def test_a_request_whose_outcome_nobody_can_tell_says_so(service, ledger, proxy, options):
    service._store.patience_s = 0.5
    service.counts()
    # The request goes out, its answer does not come in, and nobody can be asked.
    proxy.refuses = True
    proxy.arm(commit_cut("within") if options else AnswerCut((b"INSERT INTO",)))
    with pytest.raises(Undecided, match="it may have been recorded or not: look before it is asked for again"):
        service.request("a:b", **options)
    assert len(ledger.find()) <= 1


# ---- what supervisors and children write ----


@cut_anywhere
def test_a_pass_whose_commit_is_lost_takes_effect_once(lossy, ledger, proxy, where):
    ending, noted = start(ledger), start(ledger, pid=2)
    id = ledger.request(Request(name="a:b", data="{}"))[0]
    claim = Claim(DueTask(id, 0, "a:b", "{}", None), ProcessIdentity("here", "boot", 1, 3, 1), id, 0.0)
    batch = Batch(
        ends={ending: AttemptResult(result="1")}, claims=[claim], telemetry={noted: Telemetry(progress_done=1.0)}
    )
    lossy.find()
    if where == "before":
        proxy.arm(commit_cut(where))
        with pytest.raises(ServerAway):
            lossy.apply(batch)
        assert ledger.get(id).status is Status.REQUEST
        outcome = lossy.apply(batch)
    else:
        outcome = cut_in(proxy, where, lambda: lossy.apply(batch))
    assert (outcome.ended, outcome.claimed) == ({ending}, [claim])
    assert [ledger.get(one).status for one in (ending.id, noted.id, id)] == [Status.DONE, Status.START, Status.START]
    assert ledger.get(id).attempt == 1


def patiently(call):
    """Do as a child does: repeat what was not recorded."""
    while True:
        with contextlib.suppress(ServerAway):
            return call()


@cut_anywhere
def test_what_children_write_of_waiting_survives_a_lost_commit(lossy, ledger, proxy, where):
    holder, other = start(ledger), start(ledger, pid=2)
    limits = {"slots": 4, "max_waiting": 9}

    def act(call):
        return cut_in(proxy, where, lambda: patiently(call))

    lossy.find()
    assert act(lambda: lossy.waits.reach(holder.id, 1, "loaded", "7", slots=4))
    assert act(lambda: lossy.waits.acquire(Waiter(holder.id, 1), "l", 1, **limits)) == Held(0, None)
    assert act(lambda: lossy.waits.acquire(Waiter(other.id, 1), "l", 1, **limits)).slot_given
    assert act(lambda: lossy.waits.release(holder.id, 1, "l", slots=4)) == [f"turn:{other.id}"]
    assert ledger.waits.held(other.id, 1, "l").permit == 0
    waiter = Waiter(holder.id, 1, 1)
    assert act(lambda: lossy.waits.begin(waiter, [Waiting("end", target_id=other.id)], **limits))
    assert len(ledger.waits.rows()) == 1
    assert act(lambda: lossy.waits.resume(waiter, slots=4)) is not None
    assert ledger.waits.rows() == []
    assert act(lambda: lossy.waits.barriers.arrive(other.id, 1, "scope x", "b", 2)) == (0, [])
    assert act(lambda: lossy.waits.barriers.leave(other.id, "scope x", "b", 0)) is None


def test_a_commit_that_never_arrives_is_decided_by_ending_its_session(lossy, ledger, proxy):
    """The way to the server is dead, but it does not know: its session holds the lock of all writers."""
    attempt = start(ledger)
    lossy.find()
    cut = LostCommit()
    proxy.arm(cut)
    before = time.monotonic()
    assert patiently(lambda: lossy.end(attempt, AttemptResult(result="1")))
    assert cut.done
    assert time.monotonic() - before < allowed_s(5)  # and not only after its idle_in_transaction_session_timeout
    assert ledger.get(attempt.id).status is Status.DONE


# ---- all together ----

APP = """
import os, pathlib
from bgsupervisor import current, task

def begun():
    with open("oracle", "a") as oracle:
        oracle.write(f"{current().id}\\n")

@task
def quick(n: int) -> int:
    begun()
    return n

@task
def locks(n: int) -> int:
    begun()
    with current().lock("all"):
        current().reach("held", n)
    return n

@task
def follows(n: int, on: int) -> int:
    begun()
    return current().wait_for(on, part="held")
"""


BACKLOG = 30  # requesters wait while so many tasks do


class Requester(threading.Thread):
    """Requests tasks until told to stop; remembers what it was told of each."""

    def __init__(self, config, ledger, first):
        super().__init__()
        self.config = config
        self.ledger = ledger
        self.first = first
        self.told = {}
        self.going = threading.Event()
        self.going.set()

    def run(self):
        service = Service(config=self.config)
        n, locking = self.first, None
        while self.going.is_set():
            time.sleep(0.05)
            with contextlib.suppress(DatabaseError):
                if sum(self.ledger.live_counts().values()) > BACKLOG:
                    continue
            n += 1
            try:
                if locking is not None:
                    handle, locking = service.request("appx:follows", {"n": n, "on": locking}, key=str(n)), None
                elif n % 8 == 0:
                    handle = service.request("appx:locks", {"n": n}, key=str(n))
                    locking = handle.id
                elif n % 8 == 3:
                    handle = service.request("appx:quick", {"n": n}, key=str(n), unique=str(n))
                else:
                    handle = service.request("appx:quick", {"n": n}, key=str(n))
                self.told[n] = handle.id
            except Undecided:
                self.told[n] = Undecided
            except DatabaseError as error:
                self.told[n] = error
        service.close()
        self.ledger.store.close()


def tear(proxy, dice, cuts):
    """Cut so many times, at chosen places."""
    deadline = time.monotonic() + 1 * cuts
    while proxy.cuts_done < cuts:
        if not proxy.armed:
            time.sleep(dice.choice([0, 0.01, 0.05]))
            reset = dice.random() < 0.5
            direction = dice.choice([TO_SERVER, TO_CLIENT])
            somewhere = Cut(direction, dice.choice([1, 30, 300, 3000]) + dice.randrange(300), reset)
            proxy.arm(dice.choice([somewhere, commit_cut(dice.choice(WHERES), reset)]))
        assert time.monotonic() < deadline, f"only {proxy.cuts_done} of {cuts} cuts"
        time.sleep(0.002)


def torn(make_app, url, ledger, havoc, **options):
    """Run an application and two requesters through *havoc*, and see that all is well in the end."""
    app = make_app(APP, database=url, slots=4, reuse=20, **options)
    app.start()
    requesters = [Requester(app.config, ledger, first) for first in (0, 100_000)]
    for requester in requesters:
        requester.start()
    try:
        havoc(app)
    finally:
        for requester in requesters:
            requester.going.clear()
            requester.join(30)
    try:
        wait_until(lambda: not any(ledger.live_counts().values()), "all have ended", 60)
    except BaseException:
        print(app.supervisors[0].log[-20_000:])
        for record in ledger.find(statuses=[Status.REQUEST, Status.START]):
            print(record, ledger.waits.rows([record.id]))
        raise
    rows = ledger.find()
    told = requesters[0].told | requesters[1].told
    ids = collections.defaultdict(list)
    for record in rows:
        ids[int(record.key)].append(record.id)
    for n, outcome in told.items():
        if isinstance(outcome, int):
            assert ids[n] == [outcome], n
        elif outcome is Undecided:
            assert len(ids[n]) <= 1, n
        else:
            assert ids[n] == [], f"{n}: {outcome}"
    assert {record.status for record in rows} == {Status.DONE}
    begun = collections.Counter(map(int, (app.folder / "oracle").read_text().split()))
    assert begun == {record.id: 1 for record in rows}
    assert app.supervisors[0].process.poll() is None
    return told


@pytest.mark.parametrize("dies", [False, True])
def test_a_claim_that_was_committed_without_its_supervisor_knowing_is_given_back_and_its_body_begins_once(
    make_app, proxy, through, ledger, dies
):
    app = make_app(APP, database=through)
    app.start()
    app.service.close()
    proxy.refuses = True  # so that it cannot ask, either
    proxy.arm(AnswerCut((COMMIT, b"SKIP LOCKED")))
    id = ledger.request(Request(name="appx:quick", data='{"n": 1}'))[0]
    claimed = wait_until(lambda: (record := ledger.get(id)).status is Status.START and record, "it is claimed")
    assert not proxy.armed
    if dies:
        os.kill(claimed.pid, signal.SIGKILL)  # the child that has not heard of it
    proxy.refuses = False
    record = wait_until(lambda: (record := ledger.get(id)).ended and record, "it has ended")
    assert (record.status, record.attempt, record.tries) == (Status.DONE, 2, 0)
    assert (app.folder / "oracle").read_text() == f"{id}\n"


def test_sixty_cuts_neither_lose_nor_double_anything(make_app, proxy, through, ledger):
    torn(make_app, through, ledger, lambda _: tear(proxy, random.Random(60), 60))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_cuts_neither_lose_nor_double_anything(make_app, proxy, through, ledger, seed):
    told = torn(make_app, through, ledger, lambda _: tear(proxy, random.Random(seed), 1000))
    assert len(told) > 200


# ---- a server that starts anew, or does not answer ----


@pytest.fixture
def own_url(own_server):
    url = own_server.url(own_server.make_database())
    make_tables(url)
    return url


@pytest.fixture
def own_ledger(own_url):
    store = Store.open(own_url, "bgsupervisor_", busy_timeout_s=BUSY_S)
    yield Ledger(store, SystemClock())
    store.close()


def test_a_server_that_is_started_anew_again_and_again_loses_and_doubles_nothing(
    make_app, own_server, own_url, own_ledger
):
    def start_anew(_):
        for _ in range(3):
            time.sleep(0.5)  # they request meanwhile
            own_server.stop()
            own_server.start()

    told = torn(make_app, own_url, own_ledger, start_anew, busy_timeout_s=30.0)
    assert all(isinstance(outcome, int) for outcome in told.values()), told  # none had to give up


def crash(server):
    """Have all its sessions end and its memory be lost, as when the kernel kills one of its processes."""
    with contextlib.closing(psycopg.connect(server.socket_url("postgres"), autocommit=True)) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        wait_until(lambda: not answers(victim), "the server has crashed")
    wait_until(lambda: answers(server), "the server is back")


def answers(ref):
    """Return whether a connection is alive, or a server lets one in."""
    try:
        ref.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def give_out(connection, number):
    """Have transactions committed until *number* is the next, and begin that."""
    while True:
        connection.execute("BEGIN")
        found = int(connection.execute("SELECT pg_current_xact_id()::text").fetchone()[0])
        if found >= number:
            assert found == number
            return
        connection.execute("COMMIT")


@pytest.mark.parametrize("ends_with", [None, "", "ROLLBACK", "COMMIT"])
def test_after_a_crash_of_the_server_nobody_is_told_that_anothers_transaction_was_his(
    own_server, own_url, own_ledger, ends_with
):
    """The number of a transaction that is lost is given out again: to nobody yet, or to one that is open or over."""
    store = own_ledger.store
    store.patience_s = BUSY_S
    with contextlib.ExitStack() as stack:

        def lose():
            with store.writing():
                number = int(postgres.transaction_of(store.database).number)
                crash(own_server)
                others.append(stack.enter_context(contextlib.closing(psycopg.connect(own_url, autocommit=True))))
                if ends_with is not None:
                    give_out(others[0], number)
                    others[0].execute(ends_with)

        others = []
        with pytest.raises(Undecided if ends_with == "COMMIT" else ServerAway):
            lose()
        assert answers(others[0])


def test_a_server_that_is_started_anew_still_knows_what_was_committed_and_after_a_crash_does_not_say(
    own_server, own_ledger
):
    store = own_ledger.store
    with store.writing():
        known = postgres.transaction_of(store.database)
    store.close()
    own_server.stop()
    own_server.start()
    with store.connected():
        assert postgres.outcome_of(store.database, known) is True
        assert postgres.outcome_of(store.database, known._replace(number="0")) is None  # it knows of no such
    crash(own_server)
    with store.connected(), pytest.raises(DatabaseError, match="has crashed meanwhile"):
        postgres.outcome_of(store.database, known)


LIMITED = """
import pathlib, time
from bgsupervisor import task

@task
def until(name: str) -> str:
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
    return "over"

@task(timeout_s=1.0)
def limited() -> None:
    pathlib.Path("limited").write_text("began")
    try:
        time.sleep(600)
    finally:
        pathlib.Path("limited").write_text("ended")
"""


def stand_still(make_app, tmp_path, server, url, ledger, *, for_s):
    """Have the server stand still under a supervisor, a body that ends, one whose time is over, and people."""
    app = make_app(LIMITED, database=url, busy_timeout_s=1.0, slots=4, grace_s=3.0)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "manager"))
        app.start(environment={"NOTIFY_SOCKET": str(tmp_path / "manager")})
        going, ending = (app.service.request("appx:until", {"name": name}) for name in ("later", "go"))
        limited = app.service.request("appx:limited")
        for handle in (going, ending, limited):
            app.started(handle)
        wait_until((app.folder / "limited").exists, "the body has begun")
        manager.setblocking(False)
        drain(manager)
        server.stand_still()
        stopped_at = time.monotonic()
        try:
            (app.folder / "go").touch()
            for act in ("health", "ps"):
                before = time.monotonic()
                said = app.cli(act)
                assert time.monotonic() - before < allowed_s(10)
                assert said.returncode != 0
                assert "is away or has given up (" in said.stdout + said.stderr
            before = time.monotonic()
            with pytest.raises(DatabaseError, match="has not answered for"):
                app.service.request("appx:until", {"name": "go"}, key="in vain")
            assert time.monotonic() - before < allowed_s(10)
            wait_until(lambda: (app.folder / "limited").read_text() == "ended", "its time was over all the same")
            gaps = [moment - before for before, moment in itertools.pairwise(beats(manager, stopped_at + for_s))]
            assert max(gaps) < 8, gaps
        finally:
            server.go_on()
    assert app.wait(ending).status is Status.DONE
    assert app.wait(limited).reason is Reason.TIMED_OUT
    assert ledger.get(going.id).status is Status.START
    (app.folder / "later").touch()
    assert app.wait(going).status is Status.DONE
    wait_until(lambda: not any(ledger.live_counts().values()), "all have ended")
    assert len(ledger.find(key="in vain")) <= 1
    assert {record.attempt for record in ledger.find()} == {1}
    assert "has not answered for" in app.supervisors[0].log


def drain(manager):
    with contextlib.suppress(BlockingIOError):
        while True:
            manager.recv(4096)


def beats(manager, until):
    """Return when the watchdog was fed."""
    moments = [time.monotonic()]
    while time.monotonic() < until:
        if select.select([manager], [], [], 0.5)[0] and b"WATCHDOG" in manager.recv(4096):
            moments.append(time.monotonic())
    return [*moments, time.monotonic()]


def test_a_server_that_stands_still_holds_up_neither_bodies_nor_the_loop_nor_people(
    make_app, tmp_path, own_server, own_url, own_ledger
):
    stand_still(make_app, tmp_path, own_server, own_url, own_ledger, for_s=12)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_server_that_stands_still_for_a_minute(make_app, tmp_path, own_server, own_url, own_ledger):
    stand_still(make_app, tmp_path, own_server, own_url, own_ledger, for_s=60)


LARGE = """
import pathlib, random, time
from bgsupervisor import task

@task
def large() -> str:
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    return random.randbytes(100_000).hex()
"""


def test_on_a_full_disk_bodies_go_on_and_their_ends_are_recorded_once_there_is_room(make_app, own_server):
    with small_disk(own_server) as disk, filled(disk / "filler") as filler:
        own_server.execute(f"CREATE TABLESPACE tight LOCATION '{disk}'", "CREATE DATABASE tight TABLESPACE tight")
        app = make_app(LARGE, database=own_server.url("tight"), slots=4)
        app.start()
        handles = [app.service.request("appx:large") for _ in range(3)]
        for handle in handles:
            app.started(handle)
        filler.fill()
        (app.folder / "go").touch()
        wait_until(lambda: "the disk is full; free some space" in app.supervisors[0].log, "the supervisor says so")
        with pytest.raises(DatabaseError, match="cannot be written, the disk is full"):
            app.service.request_many("appx:large", [{"n": "x" * 5000}] * 2000)
        assert all(app.service.get(handle).status is Status.START for handle in handles)
        filler.empty()
        for handle in handles:
            assert app.wait(handle, 30).status is Status.DONE
        assert {(record.status, record.attempt) for record in app.service.list()} == {(Status.DONE, 1)}
        app.end()
        own_server.execute("DROP DATABASE tight WITH (FORCE)", "CHECKPOINT", "DROP TABLESPACE tight")


# ---- how many connections a host has ----

HOLDS_A_CONNECTION = """
import pathlib, sys, time
from bgsupervisor.database.connection_limit import ConnectionLimit
with ConnectionLimit(pathlib.Path(sys.argv[1])).connected(5):
    print("in", flush=True)
    time.sleep(60)
"""
WAITING = """
import pathlib, time
from bgsupervisor import current, task

@task
def waits(on: int, locking: bool) -> int:
    value = current().wait_for(on, part="opened")
    if locking:
        with current().lock("one after the other"):
            current().reach("seen", value)
    return value

@task
def opens() -> None:
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    current().reach("opened", 7)
"""
HOST_CONNECTIONS = 10  # docs/postgresql.md says so


class Sampler(threading.Thread):
    """Counts the connections of a database again and again, its own left out."""

    def __init__(self, url):
        super().__init__()
        self.url, self.most, self.going = url, 0, threading.Event()
        self.going.set()

    def run(self):
        counting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with contextlib.closing(psycopg.connect(self.url, autocommit=True)) as connection:
            while self.going.is_set():
                self.most = max(self.most, connection.execute(counting).fetchone()[0])
                time.sleep(0.002)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("children", "supervised"), [(100, True), (25, False)])
def test_however_many_children_wait_and_end_a_host_has_but_a_few_connections(
    make_app, direct, ledger, children, supervised
):
    app = make_app(WAITING, database=direct, slots=4)
    started = app.start()
    app.service.close()
    sampler = Sampler(direct)
    sampler.start()
    try:
        opener = ledger.request(Request(name="appx:opens", data="{}"))[0]
        data = f'{{"on": {opener}, "locking": {"false" if supervised else "true"}}}'
        ledger.request_many([Request(name="appx:waits", data=data)] * children)
        wait_until(lambda: len(ledger.waits.rows()) == children, "all wait", 90)
        if not supervised:
            started.kill()
        (app.folder / "go").touch()
        wait_until(lambda: not any(ledger.live_counts().values()), "all have ended", 90)
    finally:
        sampler.going.clear()
        sampler.join()
    rows = ledger.find()
    assert {(record.status, record.attempt) for record in rows} == {(Status.DONE, 1)}
    assert len(rows) == children + 1
    assert 3 < sampler.most <= HOST_CONNECTIONS + 1  # and this test's


def test_a_process_killed_while_it_holds_a_connection_frees_its_place(tmp_path):
    sessions = [
        subprocess.Popen([sys.executable, "-c", HOLDS_A_CONNECTION, tmp_path], stdout=subprocess.PIPE)
        for _ in range(CONNECTIONS_MAX)
    ]
    try:
        for one in sessions:
            assert one.stdout.readline() == b"in\n"
        with pytest.raises(TimeoutError), ConnectionLimit(tmp_path).connected(0.05):
            pass
        sessions[3].kill()
        sessions[3].wait()
        with ConnectionLimit(tmp_path).connected(5) as is_outermost:
            assert is_outermost
    finally:
        for one in sessions:
            one.kill()
            one.communicate()


def test_a_thread_waits_for_the_turn_of_another_no_longer_than_its_limit(tmp_path):
    limit, connected, over = ConnectionLimit(tmp_path), threading.Event(), threading.Event()

    def hold():
        with limit.connected(5):
            connected.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert connected.wait(5)
    before = time.monotonic()
    with pytest.raises(TimeoutError), limit.connected(0.1):
        pass
    assert time.monotonic() - before < allowed_s(5)
    over.set()
    holder.join()
    with limit.connected(5) as is_outermost:
        assert is_outermost


def test_threads_of_a_process_take_one_place_and_a_fork_of_it_another(tmp_path):
    limit = ConnectionLimit(tmp_path)
    with limit.connected(1) as outer, limit.connected(0) as inner:
        assert (outer, inner) == (True, False)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException), limit.connected(0) as own:
                os._exit(0 if own else 1)
            os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0
    for _ in range(20 * CONNECTIONS_MAX):  # until it has had each
        with limit.connected(0):
            pass
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), limit.connected(0):
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_call_within_the_gate_leaves_no_session_behind_when_it_returns(lossy, direct, tmp_path):
    lossy.store.limit_connections(tmp_path)
    left = 0
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    with contextlib.closing(psycopg.connect(direct, autocommit=True)) as connection:
        for _ in range(30):
            lossy.find()
            left += connection.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {others}").fetchone()[0]
    assert left == 0


# ---- a pooler in between ----


@pytest.mark.parametrize("as_pooler", [with_another_pid, without_options])
def test_a_connection_pooler_is_refused_with_a_sentence(make_app, proxy, through, as_pooler):
    proxy.change = as_pooler
    app = make_app(WAITING, database=through)
    with pytest.raises(
        DatabaseError, match=r"is behind a connection pooler \(PgBouncer or its like\).*; name the server"
    ):
        app.service.request("appx:opens")
    for command in ("run", "doctor", "health"):
        said = app.cli(command)
        assert said.returncode != 0
        assert "is behind a connection pooler" in said.stdout + said.stderr
    proxy.change = lambda _line, _direction, data: data
    assert app.service.request("appx:opens")
