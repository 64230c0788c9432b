"""unittest, isolated by a line or a base class; and the ways on which a test process could reach a real supervisor."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest

from bgsupervisor import Service, statedir

SHOP = """
    from bgsupervisor import Service, task

    service = Service()

    @task
    def mail(to: str = "") -> str:
        return to
    """

CASES = """
    import unittest
    from shop import mail, service

    class Plain(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            service.request(mail)

        def setUp(self):
            self.assertEqual(service.list(), [])
            self.handle = service.request(mail, unique=True)

        def test_one(self):
            self.assertTrue(self.handle.created)

        def test_two(self):
            self.assertTrue(self.handle.created)

        @classmethod
        def tearDownClass(cls):
            service.request(mail)

    class Asynchronous(unittest.IsolatedAsyncioTestCase):
        async def test_three(self):
            self.assertEqual(service.list(), [])
            service.request(mail)
    """

BOXES = """
    import unittest
    from bgsupervisor.testing import TaskBoxTestCase
    from shop import mail, service

    class Boxed(TaskBoxTestCase):
        def setUp(self):
            service.request(mail, {"to": "jana"})

        def test_one(self):
            [record] = self.bgsupervisor.run_pending()
            self.assertEqual(service.result(record.id), "jana")

        def test_two(self):
            self.bgsupervisor.assert_requested(mail, times=1)

    class Asynchronous(TaskBoxTestCase, unittest.IsolatedAsyncioTestCase):
        async def test_three(self):
            service.request(mail)
            self.bgsupervisor.assert_requested(mail, times=1)
    """


class Project:
    """A folder with a real database, in which nothing may happen, and tests that run in a process of their own."""

    def __init__(self, folder):
        self.folder = folder / "project"
        self.temporary = folder / "temporary"
        self.folder.mkdir()
        self.temporary.mkdir()
        (self.folder / "state").mkdir()
        self.write("bgsupervisor.toml", 'state_dir = "state"\n')
        self.write("shop.py", SHOP)
        service = Service(config=self.folder / "bgsupervisor.toml")
        service.counts()
        service.close()

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def python(self, *arguments, code=0):
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=kept | {"TMPDIR": str(self.temporary)},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def unittest(self, *arguments, ran, code=0):
        text = self.python("-m", "unittest", *arguments, code=code)
        assert re.search(rf"Ran {ran} tests?", text), text
        return text

    def pytest(self, *arguments, passed, code=0):
        text = self.python("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments, code=code)
        assert f"{passed} passed" in text, text
        return text

    def rows(self):
        with closing(sqlite3.connect(self.folder / "bgsupervisor.db")) as connection:
            return connection.execute("SELECT count(*) FROM bgsupervisor_task").fetchone()[0]


@pytest.fixture
def project(tmp_path):
    """A project; in the end no task is in its database, its supervisor was not woken, and nothing is left in TMPDIR."""
    made = Project(tmp_path)
    directory = statedir.open_dir(made.folder / "state")
    wake = statedir.bind(directory, "wake.sock", socket.SOCK_DGRAM, 0o600)
    yield made
    assert made.rows() == 0
    with pytest.raises(BlockingIOError):
        wake.recv(10)
    wake.close()
    os.close(directory)
    assert list(made.temporary.iterdir()) == []


@pytest.mark.parametrize("where", ["tests/__init__.py", "tests/test_shop.py"])
def test_isolate_gives_each_unittest_its_own_database(project, where):
    project.write("tests/__init__.py", "")
    project.write("tests/test_shop.py", CASES)
    path = project.folder / where
    path.write_text("from bgsupervisor.testing import isolate\nisolate()\n" + path.read_text())
    project.unittest(ran=3)
    project.pytest(passed=3)


def test_a_task_box_test_case_has_its_box(project):
    project.write("test_shop.py", BOXES)
    project.unittest(ran=3)
    project.pytest(passed=3)
    project.pytest("-o", "bgsupervisor_isolation=off", passed=3)


def test_a_task_box_test_case_isolates_the_cases_beside_it(project):
    project.write("test_shop.py", BOXES)
    project.write("test_plain.py", CASES)
    project.unittest("test_shop", "test_plain", ran=6)


def test_the_box_of_a_class_that_is_not_running_a_test_is_missed(project):
    project.write(
        "test_shop.py",
        """
        from bgsupervisor.testing import TaskBoxTestCase

        class Outside(TaskBoxTestCase):
            def test_one(self): ...

        try:
            Outside("test_one").bgsupervisor
        except RuntimeError as error:
            print(error)
        """,
    )
    assert "self.bgsupervisor belongs to a running test" in project.unittest("test_shop", ran=1)


def test_an_error_after_a_commit_is_an_error_of_its_test_alone(project):
    project.write(
        "test_shop.py",
        """
        import peewee
        from bgsupervisor import Service, task
        from bgsupervisor.testing import TaskBoxTestCase

        @task
        def fail() -> None:
            raise LookupError("held until now")

        class Cases(TaskBoxTestCase):
            def test_one(self):
                self.bgsupervisor.mode, self.bgsupervisor.raise_errors = "inline", True
                database = peewee.SqliteDatabase(":memory:")
                with database.connection_context(), database.atomic():
                    Service(database).request(fail)

            def test_two(self): ...
        """,
    )
    text = project.unittest(ran=2, code=1)
    assert "LookupError: held until now" in text
    assert "FAILED (errors=1)" in text


def test_a_forked_child_shares_the_box_of_its_test_and_removes_nothing(project):
    project.write(
        "test_shop.py",
        """
        import os, sys
        from bgsupervisor.testing import TaskBoxTestCase
        from shop import mail, service

        class Forks(TaskBoxTestCase):
            def test_one(self):
                service.request(mail)
                pid = os.fork()
                if pid == 0:
                    service.request(mail)
                    sys.exit(0)  # with all exit handlers
                self.assertEqual(os.waitpid(pid, 0)[1] >> 8, 1)  # unittest reports the SystemExit as a failure
                self.bgsupervisor.assert_requested(mail, times=2)
        """,
    )
    project.unittest(ran=1)


WORKERS = """
    import multiprocessing, os, subprocess, sys, unittest, unittest.mock
    from bgsupervisor import Service
    from bgsupervisor.testing import isolation_off
    from shop import mail, service

    def request(to):
        return service.request(mail, {"to": to}).id

    def request_in_worker(method):
        with multiprocessing.get_context(method).Pool(1) as pool:
            return pool.map(request, ["jana"])[0]

    class Workers(unittest.TestCase):
        def test_spawned(self):
            request_in_worker("spawn")

        def test_by_a_fork_server(self):
            with unittest.mock.patch("tempfile.tempdir", "/tmp"):  # the path of a socket must be short
                request_in_worker("forkserver")

        def test_spawned_by_a_fork(self):
            pid = os.fork()
            if pid == 0:
                request_in_worker("spawn")
                os._exit(0)
            self.assertEqual(os.waitpid(pid, 0)[1], 0)

        def test_a_program_is_real(self):
            code = "from shop import service; print(len(service.list()), service._store.database.database)"
            told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
            self.assertIn("0 " + os.path.abspath("bgsupervisor.db"), told)

        def test_isolation_off_holds_in_a_worker(self):
            with isolation_off(), multiprocessing.get_context("spawn").Pool(1) as pool:
                self.assertEqual(pool.apply(place), os.path.abspath("bgsupervisor.db"))

    def place():
        return str(service._store.database.database)
    """


@pytest.mark.parametrize("runner", ["pytest", "unittest"])
def test_workers_of_multiprocessing_are_isolated_and_programs_are_not(project, runner):
    project.write("test_shop.py", WORKERS)
    if runner == "pytest":
        project.pytest(passed=5)
    else:
        project.write("isolated/__init__.py", "from bgsupervisor.testing import isolate\n\nisolate()\n")
        project.write("isolated/test_here.py", "from test_shop import Workers\n")
        project.unittest("isolated.test_here", ran=5)


# pytest


def test_pytest_isolates_what_conftest_requests_when_it_is_imported(project):
    project.write("conftest.py", "from shop import mail, service\nservice.request(mail)\n")
    project.write("test_shop.py", "def test_one(): ...\n")
    project.pytest(passed=1)


def test_pytest_isolates_threads_and_exit_handlers_that_outlive_it(project):
    project.write(
        "test_shop.py",
        """
        import atexit, threading
        from shop import mail, service

        def request():
            service.request(mail)

        def test_one():
            main = threading.main_thread()
            threading.Thread(target=lambda: main.join() or request()).start()
            atexit.register(request)
        """,
    )
    project.pytest(passed=1)


def test_pytest_isolates_the_command_line_called_within_a_test(project):
    project.write(
        "test_shop.py",
        """
        import pytest
        from click.testing import CliRunner
        from bgsupervisor.cli.program import program
        from shop import mail, service

        @pytest.mark.parametrize("arguments", [
            ["request", "shop:mail"], ["stop", "--timeout-s", "0"], ["migrate"], ["health"], ["ps"], ["prune"]
        ])
        def test_command(arguments):
            CliRunner().invoke(program, arguments)

        def test_run_is_refused():
            result = CliRunner().invoke(program, ["run", "--burst"])
            assert result.exception.exit_code == 3
            assert "cannot supervise: this process runs tests" in str(result.exception)

        def test_request(bgsupervisor):
            assert CliRunner().invoke(program, ["request", "shop:mail"]).exit_code == 0
            bgsupervisor.assert_requested(mail, times=1)
        """,
    )
    before = {path for path in project.folder.rglob("*") if "__pycache__" not in path.parts}
    project.pytest(passed=8)
    after = {path for path in project.folder.rglob("*") if "__pycache__" not in path.parts}
    assert after - before == {project.folder / "test_shop.py"} - before


def test_pytest_with_isolation_off_stays_off_under_django(project):
    pytest.importorskip("django", reason="Django is not installed; the extra `dev` has it")
    project.write(
        "test_shop.py",
        """
        from django.conf import settings
        from django.test.utils import setup_test_environment

        settings.configure()
        setup_test_environment()

        def test_one():
            from shop import service
            assert service.config.database.endswith("project/bgsupervisor.db")
        """,
    )
    project.pytest("-o", "bgsupervisor_isolation=off", passed=1)
    (project.folder / "test_shop.py").write_text(
        (project.folder / "test_shop.py").read_text().replace("assert ", "assert not ")
    )
    project.pytest("-p", "no:bgsupervisor", passed=1)


def test_a_run_that_was_killed_is_cleared_away_by_the_next(project):
    project.write("test_plain.py", "def test_one(): ...\n")
    project.write(
        "test_shop.py",
        """
        import os, signal, sys
        from shop import mail, service

        def test_one():
            service.request(mail)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    project.python("-m", "pytest", "test_shop.py", code=-9)
    assert len(list(project.temporary.glob("bgsupervisor-tests-*/in-use"))) == 1
    project.write("test_shop.py", "from shop import mail, service\ndef test_one(): service.request(mail)\n")
    project.pytest("test_shop.py", passed=1)


def test_a_run_leaves_the_folder_of_another_that_goes_on(project):
    project.write("test_inner.py", "from shop import mail, service\ndef test_one(): service.request(mail)\n")
    project.write(
        "test_outer.py",
        """
        import subprocess, sys
        from shop import mail, service

        def test_one(bgsupervisor):
            service.request(mail)
            inner = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_inner.py"]
            subprocess.run(inner, check=True)
            bgsupervisor.assert_requested(mail, times=1)
            service.request(mail)
        """,
    )
    project.pytest("test_outer.py", passed=1)
