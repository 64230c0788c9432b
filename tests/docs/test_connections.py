"""Connections that an application opens at its import: they are named, Django's are closed, and the remedies help."""

from __future__ import annotations

import http.server
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.app import wait_until
from support.pages import files_of

from bgsupervisor import Status
from bgsupervisor.worker.shared_connections import Imports

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"),
    pytest.mark.of_sqlite,
    pytest.mark.real_starts,
]

ENDING = """

from bgsupervisor import task

@task
def nothing() -> None:
    pass
"""


@pytest.fixture
def listener():
    """A socket to connect to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def in_wal(tmp_path):
    """An SQLite file in WAL mode."""
    path = tmp_path / "own.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE line (text)")
    return path


def findings(app):
    """Return what `check` and `doctor` say of the task modules."""
    done = app.cli("check")
    checked = [line for line in done.stderr.splitlines() if line.startswith(("warning: ", "DANGER: "))]
    doctored = [one for one in json.loads(app.cli("doctor", "--json").stdout) if one["check"] == "task modules"]
    return done.returncode, checked, [(one["grade"], one["told"]) for one in doctored if one["grade"] != "ok"]


# ---- what is named ----


def test_check_doctor_and_the_log_name_module_and_peer(make_app, listener, in_wal):
    address = listener.getsockname()
    app = make_app(
        f"import socket, mine\nsockets = [socket.create_connection({address!r}) for _ in range(2)]" + ENDING,
        tasks=["mine", "appx"],
    )
    app.write(f"import sqlite3\nconnection = sqlite3.connect({str(in_wal)!r})", module="mine")
    port = f"127.0.0.1:{address[1]}"
    expected = [
        f"importing mine opened 1 connection: {in_wal}. All children share it",
        f"importing appx opened 2 connections: {port}, {port}. All children share it",
    ]
    code, checked, doctored = findings(app)
    assert code == 0
    named = [line.removeprefix("warning: ").partition(", so ")[0] for line in checked if "importing" in line]
    assert named == expected
    found = [(grade, told.partition(", so ")[0]) for grade, told in doctored if "importing" in told]
    assert found == [("note", one) for one in expected]
    started = app.start()
    wait_until(lambda: all(one in started.log for one in expected), "the log names them")


def test_a_connection_of_setup_is_named_with_it(make_app, listener):
    app = make_app(
        f"""
import socket

def connect():
    globals()["kept"] = socket.create_connection({listener.getsockname()!r})
"""
        + ENDING,
        setup="appx:connect",
    )
    assert "importing appx:connect opened 1 connection: 127.0.0.1:" in app.cli("check").stderr


@pytest.mark.parametrize(
    "opening",
    [
        'kept = open("app.log", "a")',
        "import os; kept = os.pipe()",
        "import select; kept = select.epoll()",
        "import socket; kept = socket.socketpair()",
        "import asyncio; kept = asyncio.new_event_loop()",
        'import socket; kept = socket.create_server(("127.0.0.1", 0))',
        'import socket; kept = socket.socket(type=socket.SOCK_DGRAM); kept.connect(("127.0.0.1", 9))',
        "import socket; socket.create_connection(ADDRESS).close()",
        "import sqlite3; sqlite3.connect(OWN).close()",
        'import sqlite3; kept = sqlite3.connect(":memory:")',
        "from bgsupervisor import Service; kept = Service()",
    ],
)
def test_what_is_no_connection_or_was_closed_is_not_named(make_app, listener, in_wal, opening):
    app = make_app(f"ADDRESS, OWN = {listener.getsockname()!r}, {str(in_wal)!r}\n{opening}" + ENDING)
    done = app.cli("check")
    assert (done.returncode, done.stderr) == (0, "")


def test_spawned_children_share_nothing_and_nothing_is_named(make_app, listener):
    source = f"import socket\nkept = socket.create_connection({listener.getsockname()!r})"
    app = make_app(source + ENDING, start_method="spawn")
    assert app.cli("check").stderr == ""


def test_the_supervised_file_is_a_danger_for_all_who_look(make_app):
    app = make_app('import sqlite3\nkept = sqlite3.connect("bgsupervisor.db")' + ENDING)
    assert app.cli("migrate").returncode == 0
    told = f"importing appx left the supervised database {app.folder / 'bgsupervisor.db'} open: "
    code, checked, doctored = findings(app)
    assert code == 1
    [danger] = checked
    assert danger.startswith(f"DANGER: {told}")
    [(grade, said)] = doctored
    assert (grade, said.startswith(told)) == ("WRONG", True)
    started = app.start()
    wait_until(lambda: f"ERROR {told}" in started.log, "the log names it")
    wait_until(lambda: told in app.cli("ps").stderr, "ps warns")
    health = app.cli("health")
    assert (health.returncode, told in health.stdout) == (1, True), health.stdout


def test_looking_changes_neither_blocking_nor_locks(tmp_path, in_wal):
    listener = socket.create_server(str(tmp_path / "it.sock"), family=socket.AF_UNIX)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(tmp_path / "it.sock"))
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5.0)
    connection = sqlite3.connect(in_wal, isolation_level=None)
    try:
        imports = Imports(None)
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("BEGIN IMMEDIATE")
        imports.attribute("mine")
        assert os.get_blocking(peer.fileno())
        code = f"import sqlite3; sqlite3.connect({str(in_wal)!r}, timeout=0).execute('BEGIN IMMEDIATE')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "database is locked" in done.stderr
    finally:
        socket.setdefaulttimeout(before)
        connection.close()
        for one in (peer, listener):
            one.close()


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_service_that_is_used_at_import_shares_nothing(make_app, request, database):
    options = {} if database == "sqlite" else {"database": request.getfixturevalue("postgres_url")}
    app = make_app(
        """
from pathlib import Path
from bgsupervisor import Service, task

service = Service(config=Path(__file__).with_name("bgsupervisor.toml"))
known = service.list()

@task
def counts() -> int:
    return len(service.list())
""",
        reuse=2,
        **options,
    )
    assert app.cli("migrate").returncode == 0
    done = app.cli("check")
    assert (done.returncode, done.stderr) == (0, "")
    app.start()
    assert [app.service.result(app.wait(app.service.request("appx:counts")).id) for _ in range(3)] == [1, 2, 3]
    [record] = app.state_dir.glob("forkserver-*-*")
    held = [str(path.readlink()) for path in Path(f"/proc/{record.name.split('-')[1]}/fd").iterdir()]
    assert not [name for name in held if "bgsupervisor.db" in name]


# ---- Django ----

DJANGO = {
    "mysite/__init__.py": "",
    "mysite/settings.py": """
from pathlib import Path
FOLDER = Path(__file__).parent.parent
SECRET_KEY = "x"
INSTALLED_APPS = ["orders.apps.Orders"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": FOLDER / "db.sqlite3"}}
LOGGING = {
    "version": 1,
    "handlers": {"file": {"class": "logging.FileHandler", "filename": FOLDER / "app.log"}},
    "loggers": {"orders": {"handlers": ["file"], "level": "INFO", "propagate": False}},
}
""",
    "orders/__init__.py": "",
    "orders/apps.py": """
from django.apps import AppConfig

class Orders(AppConfig):
    name = "orders"
    def ready(self):
        from django.db import connection
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS line (text)")
            cursor.execute("SELECT count(*) FROM line")
""",
    "orders/tasks.py": """
import logging
from bgsupervisor import current, task
from django.db import connection

log = logging.getLogger("orders")

@task
def load() -> int:
    id = current().id
    current().reach("loaded", 1)
    for index in range(20):
        log.info("task %d, line %d", id, index)
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO line VALUES (%s)", [f"task {id}, line {index}"])
    return 1
""",
    ".env": "DJANGO_SETTINGS_MODULE=mysite.settings\n",
}


def test_django_may_query_in_ready_and_log_into_a_file(make_app):
    app = make_app(
        database="sqlite:///db.sqlite3",
        tasks=["orders.tasks"],
        setup="django:setup",
        env_file=".env",
        reuse=2,
        busy_timeout_s=20,
    )
    for name, text in DJANGO.items():
        (app.folder / name).parent.mkdir(exist_ok=True)
        (app.folder / name).write_text(text)
    done = app.cli("check")
    assert done.returncode == 0, done.stderr
    assert "db.sqlite3" not in done.stderr
    app.start()
    records = [app.wait(app.service.request("orders.tasks:load")) for _ in range(3)]
    assert app.cli("reload").returncode == 0
    handles = [app.service.request("orders.tasks:load") for _ in range(5)]
    records += [app.wait(handle, 30) for handle in handles]
    assert [record.status for record in records] == [Status.DONE] * 8, records
    expected = sorted(f"task {record.id}, line {index}" for record in records for index in range(20))
    assert sorted((app.folder / "app.log").read_text().splitlines()) == expected
    with closing(sqlite3.connect(app.folder / "db.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert sorted(text for (text,) in connection.execute("SELECT text FROM line")) == expected


# ---- the remedies of the page ----


class _Answering(http.server.BaseHTTPRequestHandler):
    """Answers with the number of the connection, which lives on."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps(self.client_address[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def api():
    """An HTTP server; each of its answers is the port that the request came from."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("module", "named"),
    [("with_psycopg", False), ("with_sqlite3", False), ("with_sqlalchemy", True), ("with_httpx", False)],
)
def test_the_remedies_of_the_page_give_each_child_its_own(make_app, postgres_url, api, module, named):
    app = make_app(tasks=[module], child_setup=f"{module}:connect", env_file=".env", spares=0)
    for name, text in files_of("Connections").items():
        if name != "bgsupervisor.toml":
            (app.folder / name).write_text(text)
    (app.folder / ".env").write_text(f"SHOP_URL={postgres_url}\nSHOP_API={api}\n")
    with closing(sqlite3.connect(app.folder / "shop.db")) as connection:
        connection.execute("CREATE TABLE orders (id)")
    done = app.cli("check")
    assert done.returncode == 0, done.stderr
    assert (f"importing {module} opened 1 connection: " in done.stderr) is named
    app.start()
    handles = [app.service.request(f"{module}:ask") for _ in range(6)]
    records = [app.wait(handle) for handle in handles]
    assert [record.status for record in records] == [Status.DONE] * 6, records
    answers = {app.service.result(record.id) for record in records}
    assert answers == {0} if module == "with_sqlite3" else len(answers) == 6


def test_without_the_remedy_children_share_the_connection(make_app, postgres_url):
    app = make_app(
        f"""
import psycopg
from bgsupervisor import task

connection = psycopg.connect({postgres_url!r}, autocommit=True, prepare_threshold=None)

@task
def ask() -> int:
    return connection.execute("SELECT pg_backend_pid()").fetchone()[0]
"""
    )
    app.start()
    records = [app.wait(app.service.request("appx:ask")) for _ in range(3)]
    assert len({app.service.result(record.id) for record in records}) == 1
