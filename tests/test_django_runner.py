"""Django's test runner: nothing that a test requests reaches the database or the supervisor of the project."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from bgsupervisor import Service, statedir

pytest.importorskip("django", reason="Django is not installed; the extra `dev` has it")

PROJECT = {
    "bgsupervisor.toml": """
        database = "sqlite:///db.sqlite3"
        state_dir = "state"
        env_file = ".env"
        setup = "django:setup"
        tasks = ["orders.tasks"]
        """,
    ".env": "DJANGO_SETTINGS_MODULE=mysite.settings\n",
    "orders/models.py": """
        from django.db import models

        class Order(models.Model):
            customer = models.CharField(max_length=100)
        """,
    "orders/tasks.py": """
        from bgsupervisor import Task
        from orders.models import Order

        class SendInvoice(Task):
            def run(self, order_id: int) -> str:
                return Order.objects.get(pk=order_id).customer
        """,
    "orders/views.py": """
        from bgsupervisor import Service
        from django.conf import settings
        from django.db import connection, transaction
        from django.http import JsonResponse
        from orders.models import Order
        from orders.tasks import SendInvoice

        service = Service(config=settings.BASE_DIR / "bgsupervisor.toml")

        @transaction.atomic
        def after_commit(request):
            order = Order.objects.create(customer=request.POST["customer"])
            transaction.on_commit(lambda: service.request(SendInvoice, {"order_id": order.pk}, unique=True))
            return JsonResponse({"order": order.pk})

        @transaction.atomic
        def within(request):
            order = Order.objects.create(customer=request.POST["customer"])
            handle = service.request(SendInvoice, {"order_id": order.pk}, connection=connection)
            return JsonResponse({"order": order.pk, "task": handle.id})
        """,
    "mysite/urls.py": """
        from django.urls import path
        from orders import views
        urlpatterns = [path("after", views.after_commit), path("within", views.within)]
        """,
}

VIEW = """
    from django.test import TestCase
    from orders.views import SendInvoice, service

    class AfterCommit(TestCase):
        def order(self):
            with self.captureOnCommitCallbacks(execute=True) as callbacks:
                self.client.post("/after", {"customer": "jana"})
            self.assertEqual(len(callbacks), 1)
            self.assertEqual(service.counts()["REQUEST"], 1)

        def test_one(self):
            self.order()

        def test_two(self):
            self.order()

    class Within(TestCase):
        def test_three(self):
            task = self.client.post("/within", {"customer": "jana"}).json()["task"]
            self.assertEqual(service.status(task), "REQUEST")
    """


class Project:
    """A Django project as its own commands make it, with a supervised database in which nothing may happen."""

    def __init__(self, folder, temporary):
        self.folder = folder
        self.temporary = temporary
        folder.mkdir()
        temporary.mkdir()
        self.python("-m", "django", "startproject", "mysite", ".")
        self.python("manage.py", "startapp", "orders")
        (folder / "orders" / "tests.py").unlink()
        settings = folder / "mysite" / "settings.py"
        settings.write_text(settings.read_text().replace("INSTALLED_APPS = [", "INSTALLED_APPS = ['orders',"))
        self.write(PROJECT)
        self.python("manage.py", "makemigrations", "-v0")
        self.python("manage.py", "migrate", "-v0")
        self.service = Service(config=folder / "bgsupervisor.toml")
        self.service.counts()  # makes our tables
        self.service.close()

    def write(self, files):
        for name, text in files.items():
            (self.folder / name).write_text(textwrap.dedent(text))

    def python(self, *arguments, code=0, **environment):
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=kept | {"TMPDIR": str(self.temporary)} | environment,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def test(self, *arguments, ran, **named):
        text = self.python("manage.py", "test", *arguments, **named)
        assert re.search(rf"Ran {ran} tests?", text), text
        return text

    def rows(self):
        with closing(sqlite3.connect(self.folder / "db.sqlite3")) as connection:
            return connection.execute("SELECT count(*) FROM bgsupervisor_task").fetchone()[0]

    def assert_untouched(self):
        assert self.rows() == 0
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def project(tmp_path):
    """A project, with the socket at which its supervisor would be woken."""
    made = Project(tmp_path / "project", tmp_path / "temporary")
    (made.folder / "state").mkdir()
    directory = statedir.open_dir(made.folder / "state")
    wake = statedir.bind(directory, "wake.sock", socket.SOCK_DGRAM, 0o600)
    made.wake = wake
    yield made
    with pytest.raises(BlockingIOError):
        wake.recv(10)
    wake.close()
    os.close(directory)


def test_the_runner_isolates_each_test_unasked(project):
    project.write({"orders/tests.py": VIEW})
    project.test(ran=3)
    project.assert_untouched()


def test_a_project_outside_its_tests_is_not_isolated(project):
    project.service.request("orders.tasks:SendInvoice", {"order_id": 1}, delay_s=3600)
    code = "from orders.views import service; print(len(service.list()), service.config.database)"
    assert f"1 sqlite:///{project.folder}/db.sqlite3" in project.python("manage.py", "shell", "-v0", "-c", code)
    project.service.close()
    project.wake.recv(10)


PART = """
    class Part{number}(TestCase):
        def test_it(self):
            with self.captureOnCommitCallbacks(execute=True):
                self.client.post("/after", {{"customer": "jana"}})
            self.assertEqual([one.id for one in service.list()], [1])

        @classmethod
        def tearDownClass(cls):
            super().tearDownClass()
            request_outside()
    """
OUTSIDE = """
    import os

    def request_outside():
        service.request(SendInvoice, {"order_id": 1})
        with open("boxes", "a") as file:
            file.write(f"{os.getpid()} {service.config.database}\\n")
    """


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("first", ["the parent", "a worker"])
def test_parallel_test_processes_share_nothing_and_leave_nothing(project, method, first):
    parts = "".join(PART.format(number=number) for number in range(6))
    project.write({"orders/tests.py": VIEW + OUTSIDE + parts})
    if first == "the parent":
        with (project.folder / "orders" / "tests.py").open("a") as file:
            file.write("\nrequest_outside()\n")
    else:  # where all Services were made before there was a test environment
        with (project.folder / "orders" / "models.py").open("a") as file:
            file.write("\nimport orders.views\n")
    project.write(
        {
            "run.py": f"""
            import multiprocessing, sys
            if __name__ == "__main__":
                multiprocessing.set_start_method({method!r})
                from django.core.management import execute_from_command_line
                execute_from_command_line(sys.argv)
            """
        }
    )
    text = project.python("run.py", "test", "--parallel", "2", DJANGO_SETTINGS_MODULE="mysite.settings")
    assert "Ran 9 tests" in text

    boxes = {tuple(line.split()) for line in (project.folder / "boxes").read_text().splitlines()}
    assert len(boxes) == len({pid for pid, _ in boxes}) == len({path for _, path in boxes})
    assert len(boxes) >= (2 if first == "the parent" else 1)
    project.assert_untouched()


def test_a_live_server_requests_in_the_box_of_its_test(project):
    project.write(
        {
            "orders/tests.py": """
        from urllib.request import urlopen
        from django.test import LiveServerTestCase
        from bgsupervisor.testing import TaskBoxTestCase
        from orders.tasks import SendInvoice
        from orders.models import Order
        from orders.views import service

        class Live(TaskBoxTestCase, LiveServerTestCase):
            def order(self):
                urlopen(self.live_server_url + "/after", data=b"customer=jana", timeout=20).read()
                self.bgsupervisor.assert_requested(SendInvoice, times=1)
                [record] = self.bgsupervisor.run_pending(raise_errors=True)
                self.assertEqual(service.result(record.id), "jana")

            def test_one(self):
                self.order()

            def test_two(self):
                self.order()
        """
        }
    )
    settings = project.folder / "mysite" / "settings.py"
    settings.write_text(settings.read_text().replace("'django.middleware.csrf.CsrfViewMiddleware',", ""))
    project.test(ran=2)
    project.assert_untouched()


def test_what_is_requested_outside_tests_stays_away_too(project):
    project.write(
        {
            "orders/tests.py": """
        import atexit
        from django.test import TestCase
        from orders.views import SendInvoice, service

        def request():
            service.request(SendInvoice, {"order_id": 1})

        request()
        atexit.register(request)
        setUpModule = tearDownModule = request

        class Orders(TestCase):
            @classmethod
            def setUpTestData(cls):
                request()

            def test_nothing(self):
                self.assertEqual(service.list(), [])
        """
        }
    )
    project.test(ran=1)
    assert project.rows() == 0


def test_a_test_that_means_it_reaches_the_real_database(project):
    project.write(
        {
            "orders/tests.py": """
        from django.test import SimpleTestCase
        from bgsupervisor.testing import isolation_off
        from orders.views import SendInvoice, service

        class Orders(SimpleTestCase):
            @isolation_off()
            def test_real(self):
                self.assertTrue(service.config.database.endswith("/db.sqlite3"))
                self.assertEqual(service.counts()["REQUEST"], 0)

            def test_isolated(self):
                self.assertFalse(service.config.database.endswith("/db.sqlite3"))
        """
        }
    )
    project.test(ran=2)
    project.assert_untouched()


def snippets(page):
    text = (Path(__file__).parent.parent / "docs" / page).read_text()
    found = re.findall(r"```(?:python|toml|sh)\n# (\S+)\n(.*?)```", text, re.DOTALL)
    return {name: text for name, text in found if name.startswith("orders/")}


def test_the_snippets_of_the_page_work(project):
    project.write(snippets("frameworks.md") | snippets("testing.md"))
    urls = PROJECT["mysite/urls.py"].replace('path("after", views.after_commit), path("within", views.within)', "PATHS")
    project.write({"mysite/urls.py": urls.replace("PATHS", 'path("orders/", views.create)')})
    project.python("manage.py", "makemigrations", "-v0")
    project.test(ran=3)
    project.assert_untouched()


def test_the_runner_on_a_server_follows_rollbacks_and_can_drop_its_database(project, postgres_url):
    import psycopg

    keys = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
    parts = psycopg.conninfo.conninfo_to_dict(postgres_url)
    given = {"ENGINE": "django.db.backends.postgresql", **{keys[key]: str(value) for key, value in parts.items()}}
    settings = project.folder / "mysite" / "settings.py"
    settings.write_text(f"{settings.read_text()}\nDATABASES = {{'default': {given!r}}}\n")
    project.write(
        {
            "orders/tests.py": VIEW
            + """
    from django.db import transaction
    from django.test import TransactionTestCase

    class Committed(TransactionTestCase):
        def test_four(self):
            self.client.post("/within", {"customer": "jana"})
            with self.assertRaises(ZeroDivisionError), transaction.atomic():
                self.client.post("/within", {"customer": "jana"})
                1 / 0
            self.assertEqual(len(service.list()), 1)
    """
        }
    )
    project.test(ran=4)
    project.assert_untouched()
