"""docs/frameworks.md is run: files as they stand, commands as they are given, tasks by a real supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from conftest import LIMIT_S, App, wait_until
from pace import allowed_s
from sentry_sink import sentry_sink

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.\w+|\.env)\n")
SHARED = "The same everywhere"
TOGETHER = "Inside your transaction"
AT_IMPORT = "What is made at import"


def sections():
    """Return the code blocks of the page by section, each as (language, text)."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {title: BLOCK.findall(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def files_of(section):
    """Return the files of a section by name: the blocks whose first line names one."""
    return {found[1]: text for _, text in sections()[section] if (found := FILE_NAME.match(text))}


def commands_of(section):
    """Return the commands of a section, each with the output that the page shows."""
    told = "\n".join(text for language, text in sections()[section] if language == "console")
    return [tuple(part.strip("\n").partition("\n")[::2]) for part in re.split(r"^\$ ", told, flags=re.MULTILINE)[1:]]


class Following(App):
    """An application of what the page says, and nothing else."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder
        self.config = folder / "bgsupervisor.toml"
        self.state_dir = folder / ".bgsupervisor"
        self.supervisors = []
        self._service = None
        self._servers = []

    def write_files(self, *titles):
        for title in titles:
            for name, text in files_of(title).items():
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)

    def shell(self, command, environment=None):
        """Run a command of the page in the application's folder; this Python's programs are found first."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environment(PATH=path, **(environment or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=allowed_s(LIMIT_S * 2),
            check=False,
        )

    def python(self, text, **environment):
        """Run a program in the application's folder, any warning an error; return what it printed as JSON."""
        (self.folder / "asking.py").write_text(text)
        done = self.shell(f"{shlex.quote(sys.executable)} -W error asking.py", environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def serve(self, arguments, said):
        """Start a web server and return the address that it tells."""
        output = self.folder / f"serve-{len(self._servers)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment(PYTHONUNBUFFERED="1"),
            )
        self._servers.append(process)
        found = wait_until(
            lambda: process.poll() is not None or re.search(said, output.read_text()), "the server tells"
        )
        assert process.poll() is None, output.read_text()
        return found[1]

    def end(self):
        for server in self._servers:
            server.kill()
            server.wait(LIMIT_S)
        super().end()


@pytest.fixture
def app(tmp_path):
    app = Following(tmp_path / "app")
    yield app
    app.end()


def test_every_code_block_of_the_page_is_a_file_or_a_command_of_a_section_that_is_run():
    for title, blocks in sections().items():
        named = "A task's name", "Connections", "A plain script", "Cron", "Flask", "Django", "FastAPI", "Sentry"
        assert title in {SHARED, TOGETHER, AT_IMPORT, *named}
        for language, text in blocks:
            assert FILE_NAME.match(text) or language in {"console", "crontab"}, f"nobody runs this of {title}: {text}"
    assert sum(len(blocks) for blocks in sections().values()) == PAGE.read_text().count("```") // 2


def test_the_files_for_everybody_pass_check(app):
    app.write_files(SHARED)

    check, run = (command for command, _ in commands_of(SHARED))

    done = app.shell(check)
    assert (done.returncode, "tasks:MakeReport" in done.stdout) == (0, True), done.stdout + done.stderr
    assert run == "bgsupervisor run"


# ---- inside your transaction ----


@pytest.fixture(params=["sqlite", "postgres"])
def place(request):
    """The address of the database, None for the page's own; to be asked for before the application, which uses it."""
    return request.getfixturevalue("postgres_url") if request.param == "postgres" else None


@contextlib.contextmanager
def orders_of(app, url):
    """Make the table of the page's orders, and say how many there are."""
    connection = sqlite3.connect(app.folder / "shop.db") if url is None else psycopg.connect(url)
    id = "INTEGER PRIMARY KEY" if url is None else "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    with contextlib.closing(connection):
        connection.execute(f"CREATE TABLE orders (id {id}, customer TEXT NOT NULL)")
        connection.commit()
        yield lambda: (connection.execute("SELECT count(*) FROM orders").fetchone()[0], connection.rollback())[0]


def put(app, *changes):
    """Change what differs with PostgreSQL in the page's files."""
    for path in app.folder.rglob("*"):
        if path.suffix in {".py", ".toml"}:
            text = path.read_text()
            for before, after in changes:
                text = text.replace(before, after)
            path.write_text(text)


ONE_COMMIT = """
import json, {module} as shop

def failing(*arguments, **options):
    request(*arguments, **options)
    raise ZeroDivisionError

shop.create("Ada")
[record] = shop.service.list()
record = shop.service.wait(record.id, timeout_s=15)
request, shop.service.request = shop.service.request, failing
try:
    shop.create("Grace")
except ZeroDivisionError:
    print(json.dumps([record.status, shop.service.result(record.id), len(shop.service.list())]))
"""


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ("sqlite", "by_sqlalchemy"),
        ("sqlite", "by_peewee"),
        ("sqlite", "by_sqlite3"),
        ("postgres", "by_sqlalchemy"),
        ("postgres", "by_peewee"),
        ("postgres", "by_psycopg"),
    ],
    indirect=["place"],
)
def test_an_order_and_its_task_are_one_commit_and_the_task_runs_after_it(place, app, module):
    app.write_files(TOGETHER)
    if place is not None:
        address = place.replace("postgresql:", "postgresql+psycopg:")
        put(
            app,
            ('create_engine("sqlite:///shop.db")', f'create_engine("{address}")'),
            ('SqliteDatabase("shop.db")', f'PostgresqlDatabase("{place}")'),
            ('atomic("IMMEDIATE")', "atomic()"),
            ("sqlite:///shop.db", place),
        )
    ((migrate, _),) = commands_of(TOGETHER)
    done = app.shell(migrate)
    assert done.returncode == 0, done.stderr
    app.start()

    with orders_of(app, place) as count:
        told = app.python(ONE_COMMIT.format(module=module))

        assert told == ["DONE", "invoice for order 1", 1]
        assert count() == 1


def test_the_script_prints_what_the_page_shows(app):
    app.write_files(SHARED, "A plain script")
    app.start()

    ((command, output),) = commands_of("A plain script")

    done = app.shell(command)
    assert done.stdout.strip() == output.strip(), done.stderr
    assert (app.folder / "report-2026.txt").read_text().startswith("2026-01\n2026-02\n")


def test_a_task_of_the_script_itself_is_refused_as_the_page_says(app):
    app.write_files(SHARED)
    refused = app.shell(
        f"""{shlex.quote(sys.executable)} -c '
from bgsupervisor import Service, task
@task
def here() -> None: ...
Service().request(here)'"""
    )

    assert refused.returncode == 1
    assert "TaskNotConfigured" in refused.stderr


def test_the_commands_for_cron_request_and_wait_as_the_page_says(app):
    app.write_files(SHARED)
    app.start()

    (plain, _), (waiting, _) = commands_of("Cron")

    assert app.shell(plain).returncode == 0
    done = app.shell(waiting)
    assert (done.returncode, done.stdout) == (0, '"report-2026.txt"\n'), done.stderr
    assert [app.wait(record.id).status for record in app.service.list()] == ["DONE", "DONE"]


def _cron_command():
    ((_, entry),) = [block for block in sections()["Cron"] if block[0] == "crontab"]
    command = entry.strip().split(maxsplit=5)[5]
    assert command.startswith("cd /srv/app && bin/")
    return command.removeprefix("cd /srv/app && bin/")


def test_the_crontab_entry_is_silent_when_all_is_well(app):
    app.write_files(SHARED)
    app.start()

    done = app.shell(_cron_command())

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [record.status for record in app.service.list()] == ["DONE"]


def test_the_crontab_entry_says_what_went_wrong(app):
    app.write_files(SHARED)
    (app.folder / "report-2026.txt").mkdir()
    app.start()

    done = app.shell(_cron_command())

    assert "RAISED" in done.stdout
    assert "IsADirectoryError" in done.stdout


def test_flask_requests_looks_and_cancels(app):
    pytest.importorskip("flask", reason="Flask is not installed; the extra `dev` has it")
    httpx = pytest.importorskip("httpx", reason="httpx is not installed; the extra `dev` has it")
    app.write_files(SHARED, "Flask")
    url = app.serve(["-m", "flask", "--app", "app", "run", "--port", "0"], r"Running on (\S+)")

    with httpx.Client(base_url=url, timeout=LIMIT_S) as browser:
        first, second = browser.post("/reports/2026"), browser.post("/reports/2026")
        assert (first.status_code, second.json()) == (202, first.json())
        id = first.json()["id"]
        assert browser.get(f"/reports/{id}").json()["status"] == "REQUEST"
        assert browser.get("/reports/999").status_code == 404
        assert browser.post(f"/reports/{id}/cancel").json()["reason"] == "CANCELLED"
        app.start()
        later = browser.post("/reports/2027").json()["id"]
        wait_until(lambda: browser.get(f"/reports/{later}").json()["status"] == "DONE", "the report is made")
        app.service.request("tasks:MakeReport", {"year": 1}, key="another")
        assert browser.get(f"/reports/{later + 1}").status_code == 404


@pytest.fixture
def django_app(place, app):
    """A project as Django's own commands make it, with the page's files."""
    pytest.importorskip("django", reason="Django is not installed; the extra `dev` has it")
    for command in ("-m django startproject mysite .", "manage.py startapp orders"):
        done = app.shell(f"{shlex.quote(sys.executable)} {command}")
        assert done.returncode == 0, done.stderr
    settings = app.folder / "mysite" / "settings.py"
    settings.write_text(settings.read_text().replace("INSTALLED_APPS = [", 'INSTALLED_APPS = [\n    "orders",'))
    app.write_files("Django")
    if place is not None:
        put(app, ("sqlite:///db.sqlite3", place))
        keys = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
        named = {keys[key]: str(value) for key, value in psycopg.conninfo.conninfo_to_dict(place).items()}
        database = {"default": {"ENGINE": "django.db.backends.postgresql", **named}}
        settings.write_text(f"{settings.read_text()}\nDATABASES = {database!r}\n")
    for command in ("makemigrations", "migrate"):
        done = app.shell(f"{shlex.quote(sys.executable)} manage.py {command} orders")
        assert done.returncode == 0, done.stderr
    ((migrate, _),) = commands_of("Django")
    done = app.shell(migrate)
    assert done.returncode == 0, done.stderr
    return app


DJANGO = """
import json, django
django.setup()
from django.db import transaction
from django.test import Client, RequestFactory
from orders import views
from orders.models import Order
"""
SETTINGS = {"DJANGO_SETTINGS_MODULE": "mysite.settings"}


def test_django_requests_in_its_transaction_and_the_body_finds_the_order(django_app):
    assert django_app.shell("bgsupervisor check").returncode == 0
    django_app.start()

    told = django_app.python(
        DJANGO
        + """
created = views.create(RequestFactory().post("/orders", {"customer": "Ada"}))
order = json.loads(created.content)["order"]
task = views.service.list(key=f"order-{order}")[0]
record = views.service.wait(task.id, timeout_s=15)
looked = json.loads(views.look(RequestFactory().get("/"), order).content)
print(json.dumps({"looked": looked["status"], "result": views.service.result(task.id),
                  "invoiced": Order.objects.get(pk=order).invoiced}))
""",
        **SETTINGS,
    )

    assert told == {"looked": "DONE", "result": "invoice for Ada", "invoiced": True}


def test_django_leaves_no_task_of_a_transaction_that_was_rolled_back(django_app):
    told = django_app.python(
        DJANGO
        + """
try:
    with transaction.atomic():
        views.create(RequestFactory().post("/orders", {"customer": "Ada"}))
        raise RuntimeError
except RuntimeError:
    pass
print(json.dumps([Order.objects.count(), len(views.service.list())]))
""",
        **SETTINGS,
    )

    assert told == [0, 0]


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_django_in_one_file_with_our_tables_locks_out_a_request_without_its_connection(django_app):
    told = django_app.python(
        DJANGO
        + """
from bgsupervisor import LockedByCaller
from orders.tasks import SendInvoice
views.service.counts()
with transaction.atomic():
    order = Order.objects.create(customer="Ada")
    try:
        views.service.request(SendInvoice, {"order_id": order.pk})
    except LockedByCaller as error:
        print(json.dumps(str(error)))
""",
        **SETTINGS,
    )

    assert "kept locked by a transaction of Django of this very thread; have the request join it, connection=" in told


def test_django_without_the_connection_requests_after_its_commit_as_the_page_says(django_app):
    told = django_app.python(
        DJANGO
        + """
from orders.tasks import SendInvoice
with transaction.atomic():
    order = Order.objects.create(customer="Ada")
    transaction.on_commit(lambda: views.service.request(SendInvoice, {"order_id": order.pk}))
    before = len(views.service.list())
print(json.dumps([before, len(views.service.list())]))
""",
        **SETTINGS,
    )

    assert told == [0, 1]


def test_django_has_transactions_on_sqlite_wait_for_each_other_by_the_option_of_the_page(django_app, place):
    """Whatever they do first: here they read."""
    options = {} if place is not None else {"OPTIONS": {"transaction_mode": "IMMEDIATE"}}
    settings = django_app.folder / "mysite" / "settings.py"
    settings.write_text(f'{settings.read_text()}\nDATABASES["default"] |= {options!r}\n')

    told = django_app.python(
        DJANGO
        + """
import threading
from django.db import connection

def create():
    for _ in range(20):
        with transaction.atomic():
            Order.objects.count()
            views.create(RequestFactory().post("/orders", {"customer": "Ada"}))
    connection.close()

threads = [threading.Thread(target=create) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([Order.objects.count(), len(views.service.list())]))
""",
        **SETTINGS,
    )

    assert told == [80, 80]


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_django_without_its_settings_is_told_by_check(django_app):
    (django_app.folder / ".env").write_text("")

    done = django_app.shell("bgsupervisor check")

    assert done.returncode == 1
    assert "settings are not configured" in done.stdout + done.stderr


def test_fastapi_requests_and_looks(app):
    pytest.importorskip("fastapi", reason="FastAPI is not installed; the extra `dev` has it")
    pytest.importorskip("httpx", reason="httpx is not installed; the extra `dev` has it")
    app.write_files(SHARED, "FastAPI")
    app.start()

    told = app.python(
        """
import asyncio, json
import httpx
from main import app, service

async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as browser:
        started = await browser.post("/reports/2026")
        id = started.json()["id"]
        await asyncio.to_thread(service.wait, id, timeout_s=15)
        looked, unknown = await browser.get(f"/reports/{id}"), await browser.get("/reports/999")
        return [started.status_code, looked.json()["status"], unknown.status_code]

print(json.dumps(asyncio.run(ask())))
"""
    )

    assert told == [202, "DONE", 404]


# ---- Sentry ----


def test_a_body_reports_to_sentry_what_the_page_says(app):
    pytest.importorskip("sentry_sdk", reason="sentry-sdk is not installed; the extra `dev` has it")
    app.write_files(SHARED, "Sentry")
    with sentry_sink() as sink:
        app.start(environment={"SENTRY_DSN": sink.dsn})
        handle = app.service.request("tasks:ChargeCard", {"order_id": 12})
        app.wait(handle)
        wait_until(lambda: sink.titles() == ["LookupError", "charging a card"], "Sentry has both")
        (event,) = [event for event in sink.events if "exception" in event]

    assert event["tags"]["order"] == 12
    facts = {key: value for key, value in event["extra"].items() if key.startswith("task_")}
    assert facts == {"task_id": handle.id, "task_name": "tasks:ChargeCard", "task_attempt": 1, "task_reason": "RAISED"}
    assert [frame["function"] for frame in event["exception"]["values"][0]["stacktrace"]["frames"]] == ["run"]


# ---- what is made at import ----


def test_generators_made_at_import_are_shared_as_the_page_says(app):
    pytest.importorskip("numpy", reason="numpy is not installed; the extra `dev` has it")
    app.write_files(SHARED, AT_IMPORT)
    app.config.write_text(
        app.config.read_text().replace('["tasks"]', '["draws"]') + 'child_setup = "telemetry:set_up"\n'
    )
    app.start()
    handles = app.service.request_many("draws:draw", [{}] * 3)
    for handle in handles:
        app.wait(handle)
    found = [app.service.result(handle) for handle in handles]

    assert [len(set(column)) for column in zip(*found, strict=True)] == [1, 3, 3, 3]
    wait_until((app.folder / "flushed").exists, "what child_setup registered at exit was run")
