"""What an application has opened at its import stays open in its children and is what it was; nothing of ours does."""

from __future__ import annotations

import os
import select
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import Supervising, wait_until

from bgsupervisor import Status, descriptors

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"), pytest.mark.of_sqlite]

LINES = 20
TASKS = 4

OPENINGS = {
    "file": """
        handler = logging.FileHandler(FOLDER / "app.log")
        log = logging.getLogger("app")
        log.addHandler(handler)
        log.setLevel("INFO")
        log.propagate = False
        number = handler.stream.fileno()
        def use(line):
            log.info(line)
    """,
    "socket": """
        ends = socket.socketpair()
        number = ends[0].fileno()
        def use(line):
            ends[0].send(line.encode())
            assert ends[1].recv(100) == line.encode()
    """,
    "pipe": """
        number, writer = os.pipe()
        def use(line):
            os.write(writer, line.encode())
            assert os.read(number, 100) == line.encode()
    """,
    "epoll": """
        epoll = select.epoll()
        number = epoll.fileno()
        def use(line):
            assert epoll.poll(0) == []
    """,
    "loop": """
        loop = asyncio.new_event_loop()
        number = loop._selector.fileno()
        def use(line):
            assert loop.run_until_complete(asyncio.sleep(0, line)) == line
    """,
    "sqlite": """
        connection = sqlite3.connect(FOLDER / "its.db", isolation_level=None, check_same_thread=False)
        connection.execute("CREATE TABLE IF NOT EXISTS line (text)")
        [number] = [int(one) for one in os.listdir("/proc/self/fd") if leads_to(int(one)).endswith("its.db")]
        def use(line):
            connection.execute("INSERT INTO line VALUES (?)", [line])
    """,
    "postgres": """
        import psycopg
        connection = psycopg.connect(POSTGRES, autocommit=True, prepare_threshold=None)
        number = connection.fileno()
        def use(line):
            assert connection.execute("SELECT %s", [line]).fetchone() == (line,)
    """,
}
"""How an application opens its first descriptor, and what a body does with it."""

APPLICATION = """
import asyncio, logging, os, select, socket, sqlite3, threading
from contextlib import closing
from pathlib import Path
from bgsupervisor import current, task

FOLDER = Path(__file__).parent
POSTGRES = {postgres!r}

def leads_to(number):
    try:
        return os.readlink(f"/proc/self/fd/{{number}}")
    except OSError:
        return ""

def opening():
    global use, opened
    {opening}
    opened = number, leads_to(number), os.fstat(number).st_ino

if {threaded}:
    thread = threading.Thread(target=opening)
    thread.start()
    thread.join()
else:
    opening()

@task
def load() -> list:
    print("begins")
    current().reach("loaded", 1)  # the child opens the tasks' database
    id = current().id
    with closing(sqlite3.connect(FOLDER / f"own-{{id}}.db")) as own, open(FOLDER / f"own-{{id}}.txt", "w") as text:
        own.execute("CREATE TABLE line (text)")
        for index in range({lines}):
            use(f"task {{id}}, line {{index}}")
            own.execute("INSERT INTO line VALUES (?)", [index])
            text.write(f"{{index}}\\n")
        own.commit()
    number, name, inode = opened
    assert (leads_to(number), os.fstat(number).st_ino) == (name, inode)
    return list(opened)
"""


def application(opening, *, threaded=False, postgres=""):
    """Return the source of an application that opens something before anything else."""
    lines = OPENINGS[opening].replace("        ", "    ").strip()
    names = "handler, log, ends, writer, epoll, loop, connection, number"
    return APPLICATION.format(opening=f"global {names}\n    {lines}", threaded=threaded, lines=LINES, postgres=postgres)


def start_without_standard_descriptors(app, closing_them="<&- >&- 2>&-", **environment):
    """Start a supervisor as a daemon that has closed its standard descriptors would."""
    command = [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), "run"]
    output = app.folder / "run-closed.log"
    output.touch()
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {closing_them}', "sh", *command], cwd=app.folder, env=app.environment(**environment)
    )
    app.supervisors.append(Supervising(process, output))
    wait_until(lambda: process.poll() is not None or app.supervisor_row(process.pid), "the supervisor is there")
    assert process.poll() is None


def run_one_after_the_other(app, count=TASKS):
    """Run tasks singly, for what is shared is used by one at a time; return their records."""
    records = []
    for _ in range(count):
        record = app.wait(app.service.request("appx:load"))
        assert record.status is Status.DONE, record
        assert app.log_of(record) == "begins\n"
        records.append(record)
    return records


def assert_all_is_whole(app, records):
    """See that each file holds its own lines and nothing else, and that each database is one."""
    for path in [app.folder / "bgsupervisor.db", *app.folder.glob("own-*.db"), *app.folder.glob("its.db")]:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], path
    for record in records:
        text = (app.folder / f"own-{record.id}.txt").read_text()
        assert text.split() == [str(index) for index in range(LINES)]
        with closing(sqlite3.connect(app.folder / f"own-{record.id}.db")) as connection:
            assert connection.execute("SELECT count(*) FROM line").fetchone() == (LINES,)
    expected = [f"task {record.id}, line {index}" for record in records for index in range(LINES)]
    if (app.folder / "app.log").exists():
        assert (app.folder / "app.log").read_text().splitlines() == expected
    if (app.folder / "its.db").exists():
        with closing(sqlite3.connect(app.folder / "its.db")) as connection:
            assert [text for (text,) in connection.execute("SELECT text FROM line ORDER BY rowid")] == expected


@pytest.fixture
def source(request):
    """Make sources; a server of PostgreSQL is started for those alone that need one."""

    def make(opening, **options):
        postgres = ""
        if opening == "postgres":
            server = request.getfixturevalue("postgres")
            postgres = server.socket_url("postgres")
        return application(opening, postgres=postgres, **options)

    return make


@pytest.mark.parametrize("opening", OPENINGS)
def test_what_is_opened_first_at_import_stays_what_it_was(make_app, source, opening):
    app = make_app(source(opening))
    app.start()
    assert_all_is_whole(app, run_one_after_the_other(app))


@pytest.mark.parametrize("opening", OPENINGS)
def test_what_a_thread_opens_stays_with_reuse_reload_and_no_stdio(make_app, source, opening):
    app = make_app(source(opening, threaded=True), reuse=3, spares=1)
    start_without_standard_descriptors(app)
    records = run_one_after_the_other(app)
    assert app.cli("reload").returncode == 0
    records += run_one_after_the_other(app)
    assert_all_is_whole(app, records)


@pytest.mark.parametrize("closing_them", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_a_hook_of_pythons_start_opens_stays_what_it_is(make_app, tmp_path, closing_them):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    # The hook of an agent that watches programs: it comes before any line of ours.
    (hooks / "sitecustomize.py").write_text(
        f"import builtins\nbuiltins.hook = open({str(tmp_path / 'hook.log')!r}, 'a')\n"
    )
    app = make_app(
        """
from bgsupervisor import current, task

@task
def load() -> None:
    print("printed")
    current().reach("loaded", 1)
    print(current().id, file=hook, flush=True)
"""
    )
    start_without_standard_descriptors(app, closing_them, PYTHONPATH=str(hooks))
    records = [app.wait(app.service.request("appx:load")) for _ in range(2)]
    assert [record.status for record in records] == [Status.DONE] * 2, records
    assert [app.log_of(record) for record in records] == ["printed\n"] * 2
    assert (tmp_path / "hook.log").read_text().split() == ["1", "2"]
    assert_all_is_whole(app, [])


# ---- what is nobody's but the fork server's ----

ASKING = """
import os, subprocess, sys, time
from pathlib import Path
from bgsupervisor import task

HELD = os.pipe()

@task
def until(name: str) -> None:
    while not Path(name).exists():
        time.sleep(0.01)

@task
def gives_to_a_program() -> list[str]:
    look = '''
import os
names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd") if int(number) > 2]
print(*[os.readlink(name) for name in names if os.path.exists(name)])
'''
    done = subprocess.run([sys.executable, "-c", look], close_fds=False, capture_output=True, text=True, check=True)
    return done.stdout.split()
"""


def leads_to(pid):
    """Return the sockets, pipes and pidfds of a process, each with whether it reads or writes, or whom it watches."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        name = str(path.readlink())
        if int(path.name) > 2 and (name.startswith(("socket:", "pipe:")) or "pidfd" in name):
            lines = (Path(f"/proc/{pid}/fdinfo") / path.name).read_text().splitlines()
            facts = dict(line.split(":\t") for line in lines if ":\t" in line)
            found.add((name, facts.get("Pid") or int(facts["flags"], 8) & os.O_ACCMODE))
    return found


def test_a_child_has_none_of_the_fork_servers_descriptors(make_app):
    app = make_app(ASKING, spares=1)
    app.start()
    handles = [app.service.request("appx:until", {"name": "end"}) for _ in range(3)]
    children = [app.started(handle).pid for handle in handles]
    [record] = app.state_dir.glob("nursery-*-*")
    fork_server = leads_to(record.name.split("-")[1])
    assert len([name for name, _ in fork_server if name.startswith("socket:")]) >= 3
    assert len([name for name, _ in fork_server if "pidfd" in name]) >= 3
    of_the_application = {name for name, _ in leads_to(children[0])} & {name for name, _ in leads_to(children[1])}
    for child in children:
        common = {name for name, _ in leads_to(child) & fork_server}
        assert len(common) == 2, common  # the application's pipe, and the resource tracker's
        assert common <= of_the_application
    (app.folder / "end").touch()


def test_a_program_that_a_body_starts_gets_no_descriptor_of_ours(make_app):
    app = make_app(ASKING)
    app.start()
    assert app.wait(app.service.request("appx:gives_to_a_program")).result == "[]"


def test_a_file_that_a_thread_opens_after_the_import_stays_what_it_is(make_app):
    app = make_app(
        """
import os, threading, time
from pathlib import Path
from bgsupervisor import current, task

def open_late():
    global late
    while not Path("late").exists():
        time.sleep(0.01)
    late = open("late.log", "a")
    Path("opened").touch()

threading.Thread(target=open_late, daemon=True).start()

@task
def load() -> None:
    current().reach("loaded", 1)
    print(current().id, file=late, flush=True)
""",
        spares=0,
    )
    app.start()
    (app.folder / "late").touch()
    wait_until((app.folder / "opened").exists, "the thread has opened its file")
    handles = [app.service.request("appx:load") for _ in range(3)]
    assert [app.wait(handle).status for handle in handles] == [Status.DONE] * 3
    assert sorted((app.folder / "late.log").read_text().split()) == ["1", "2", "3"]
    assert_all_is_whole(app, [])


@pytest.mark.parametrize(("start_method", "first"), [("fork", 0), ("fork", 3), ("spawn", 0)])
def test_an_application_that_closes_all_at_import_loses_nothing(make_app, first, start_method):
    app = make_app(
        f"""
import multiprocessing, os
from pathlib import Path
from bgsupervisor import current, task

os.closerange({first}, 1024)
files = [open(f"file-{{number}}", "ab", buffering=0) for number in range(12)]

@task
def load() -> str:
    print("said by the body")
    current().reach("loaded", 1)
    with multiprocessing.Pool(1) as pool:  # asks the resource tracker
        pool.map(abs, [1])
    for number, file in enumerate(files):
        file.write(b"line of %d\\n" % number)
    return "ended"
""",
        start_method=start_method,
        reuse=2 if start_method == "fork" else 1,
    )
    app.start()
    count = 3 if start_method == "fork" else 1
    for _ in range(count):
        record = app.wait(app.service.request("appx:load"))
        assert record.status is Status.DONE, record
        assert app.log_of(record) == "said by the body\n"
    for number in range(12):
        assert (app.folder / f"file-{number}").read_text() == f"line of {number}\n" * count
    assert ("closed stdout and opened a file in its place" in app.supervisors[0].log) is (first == 0)
    assert_all_is_whole(app, [])


def test_check_writes_into_no_file_of_an_application_that_closes_all(make_app):
    app = make_app(
        """
import os
from bgsupervisor import task

os.closerange(0, 1024)
files = [open(f"file-{number}", "ab") for number in range(12)]
print("said by the application")

@task
def load() -> None:
    pass
"""
    )
    done = app.cli("check")
    assert (done.returncode, "1 task\n" in done.stdout) == (0, True), done
    assert [path.stat().st_size for path in app.folder.glob("file-*")][3:] == [0] * 9


@pytest.mark.parametrize(
    ("closing", "is_heard"),
    [("0, 3", True), ("1, 2", True), ("3, 1024", True), ("0, 1024", False)],
    ids=["standard", "stdout", "all others", "all"],
)
def test_request_writes_into_no_file_of_an_application(make_app, closing, is_heard):
    app = make_app(
        f"""
import os
from pathlib import Path
from bgsupervisor import task

os.closerange({closing})
folder = Path(__file__).parent
files = [open(folder / f"{{os.getpid()}}-{{number}}", "ab") for number in range(12)]

@task
def load() -> str:
    return "ended"
"""
    )
    app.start()
    done = app.cli("request", "load", "--wait", "--timeout-s", "30")
    assert done.returncode == 0, done
    assert [record.result for record in app.service.list()] == ['"ended"']
    assert (done.stdout == '"ended"\n') is is_heard
    wrong = app.cli("request", "laod")
    assert (wrong.returncode, "did you mean appx:load?" in wrong.stderr) == (2, is_heard)
    files = [path for path in app.folder.iterdir() if path.name[0].isdigit()]
    assert len(files) >= 24
    assert {path.stat().st_size for path in files} == {0}


def test_request_answers_where_the_import_redirects_stdout(make_app):
    app = make_app(
        """
import os
os.dup2(os.open("own.log", os.O_WRONLY | os.O_CREAT, 0o600), 1)
from bgsupervisor import task

@task
def load() -> None:
    pass
"""
    )
    done = app.cli("request", "load")
    assert (done.returncode, done.stdout) == (0, "requested task 1 (appx:load)\n")
    assert (app.folder / "own.log").read_text() == ""


@pytest.mark.parametrize("way", ["socket.socket()", "dead_pipe()"])
def test_what_nobody_reads_stays_in_the_place_of_stdout(make_app, way):
    app = make_app(
        f"""
import os, socket
from bgsupervisor import task

def dead_pipe():
    reader, writer = os.pipe()
    os.dup2(writer, 9, inheritable=False)
    os.close(reader)
    os.close(writer)
    return os.fdopen(os.dup(9), "wb", 0)

os.closerange(0, 3)
opened = [{way} for _ in range(3)]
before = [os.readlink(f"/proc/self/fd/{{one.fileno()}}") for one in opened]

@task
def load() -> list:
    print("said")
    return [before, [os.readlink(f"/proc/self/fd/{{one.fileno()}}") for one in opened]]
"""
    )
    app.start()
    record = app.wait(app.service.request("appx:load"))
    before, now = app.service.result(record.id)
    assert before == now
    assert app.log_of(record) == "said\n"


@pytest.mark.parametrize("closed", [range(3), [0], [1], [2]])
def test_what_a_body_closes_costs_the_next_one_in_its_child_nothing(make_app, closed):
    app = make_app(
        f"""
import os, sys
from bgsupervisor import current, task

@task
def closes() -> None:
    for number in {list(closed)}:
        os.close(number)

@task
def load() -> int:
    current().reach("loaded", 1)
    print("printed")
    os.write(2, b"written")
    return len([number for number in range(3) if os.get_inheritable(number)])
""",
        reuse=2,
        slots=1,
        spares=0,
    )
    app.start()
    for _ in range(10):  # a new child may be faster than the one that is free again
        closing, loading = app.service.request("appx:closes"), app.service.request("appx:load")
        first, record = app.wait(closing), app.wait(loading)
        assert (first.status, record.status, record.result) == (Status.DONE, Status.DONE, "3"), record
        if first.pid == record.pid:
            break
    assert first.pid == record.pid, "no child was reused"
    assert app.log_of(record) == "printed\nwritten"
    assert_all_is_whole(app, [])


# ---- the one place that decides ----


def test_closing_own_leaves_a_file_that_has_taken_over_a_number(tmp_path):
    own = descriptors.Own()
    reader, writer = os.pipe()
    own.note(reader, writer)
    with (tmp_path / "taken").open("w") as file:
        os.dup2(file.fileno(), writer)
        own.close()
        assert descriptors.identity_of(reader) is None
        assert os.path.samestat(os.fstat(writer), os.fstat(file.fileno()))
    os.close(writer)


def test_closing_own_leaves_another_kind_of_anonymous_descriptor():
    own = descriptors.Own()
    number = os.eventfd(0)
    own.note(number)
    try:
        with closing(select.epoll()) as other:
            os.dup2(other.fileno(), number)
        own.close()
        assert descriptors.identity_of(number) is not None
    finally:
        os.close(number)


def test_closing_own_leaves_what_was_struck_out():
    own = descriptors.Own()
    reader, writer = os.pipe()
    own.note(reader, writer)
    own.forget(writer)
    own.close()
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(reader)
