"""Stop, start, reload, and what a service manager hears."""

import os
import signal
import socket
import textwrap
import time

import pytest
from support.app import LIMIT_S, wait_until

from bgsupervisor import Reason, Status

pytestmark = pytest.mark.any_database

SOURCE = """
import os, time
from bgsupervisor import Task, task

@task
def hello() -> str:
    return "old"

@task
def environment() -> list[str]:
    return sorted(os.environ)

class Slow(Task):
    def run(self, seconds: float = 30) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.progress(0)
            time.sleep(0.02)
        return "old"
"""
NEW = SOURCE.replace('"old"', '"new"') + "# of another size: bytecode is only renewed for another second or size\n"
BROKEN = NEW + "\nraise ValueError('half a deploy')\n"


@pytest.fixture
def app(make_app):
    return make_app(SOURCE)


def gone(supervising):
    return wait_until(lambda: supervising.process.poll() is not None, "the supervisor has left")


def test_stop_leaves_running_tasks_alone_and_keeps_run_away_until_start(app):
    supervising = app.start()
    handle = app.service.request("appx:Slow", {"seconds": 5})
    app.started(handle)

    stopped = app.cli("stop")

    assert stopped.returncode == 0, stopped.stderr
    assert "supervisor stopped; 1 task still running" in stopped.stdout
    assert supervising.process.poll() == 0
    again = app.cli("run")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert app.wait(handle).status is Status.DONE
    assert "has ended" in app.cli("start").stdout
    app.start()
    assert app.wait(app.service.request("appx:hello")).status is Status.DONE


@pytest.mark.on_both
def test_stop_drain_waits_for_running_tasks_and_admits_no_other(app):
    supervising = app.start()
    running = app.service.request("appx:Slow", {"seconds": 1})
    app.started(running)
    stop = app.cli("stop", "--drain", "--timeout-s", "0")
    waiting = app.service.request("appx:hello")

    gone(supervising)

    assert stop.returncode == 1
    assert "it will obey when it can" in stop.stderr
    assert app.service.get(running).status is Status.DONE
    assert app.service.get(waiting).status is Status.REQUEST


def test_a_drain_that_is_lifted_goes_on(app):
    supervising = app.start()
    running = app.service.request("appx:Slow", {"seconds": 30})
    app.started(running)
    app.cli("stop", "--drain", "--timeout-s", "0")

    app.cli("start")

    assert app.wait(app.service.request("appx:hello")).status is Status.DONE
    assert supervising.process.poll() is None


@pytest.mark.on_both
def test_stop_kill_ends_running_tasks_as_stopped_and_says_who(app):
    supervising = app.start()
    handle = app.service.request("appx:Slow")
    app.started(handle)

    assert app.cli("stop", "--kill").returncode == 0

    record = app.service.get(handle)
    assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.STOPPED)
    assert supervising.process.poll() == 0


def test_stop_without_a_supervisor_says_so_and_stands(app):
    assert app.cli("stop").returncode == 0
    assert app.cli("run").returncode == 0
    assert not app.service.ledger.supervisors()


def test_reload_gives_new_tasks_new_code_and_lets_running_ones_finish_on_the_old(app):
    supervising = app.start()
    old = app.service.request("appx:Slow", {"seconds": 2})
    app.started(old)
    app.write(NEW)

    answer = app.cli("reload")

    assert (answer.returncode, answer.stdout) == (0, "reloaded: loaded 3 tasks\n")
    new = app.service.request("appx:hello")
    app.wait(new)
    app.wait(old)
    assert (app.service.result(new), app.service.result(old)) == ("new", "old")
    assert supervising.process.poll() is None


def test_code_that_fails_to_load_does_not_replace_code_that_works(app):
    app.start()
    app.write(BROKEN)

    answer = app.cli("reload")

    assert answer.returncode == 1
    assert "half a deploy" in answer.stderr
    handle = app.service.request("appx:hello")
    app.wait(handle)
    assert app.service.result(handle) == "old"
    wait_until(lambda: "half a deploy" in app.cli("ps").stderr, "ps says what failed")
    assert app.cli("reload", "--force").returncode == 0
    late = app.service.request("appx:hello")
    app.write(NEW)
    assert app.cli("reload").returncode == 0
    app.wait(late)
    assert app.service.result(late) == "new"


def test_a_reload_takes_the_new_configuration_but_not_another_database(app):
    app.start()
    app.configure(slots=3, database="sqlite:///other.db", state_dir=str(app.state_dir))

    assert app.cli("reload").returncode == 0

    # The command line reads the new file, the living supervisor keeps its database.
    wait_until(lambda: app.service.ledger.supervisors()[0].slots == 3, "the new number of slots is in force")
    assert not (app.folder / "other.db").exists()


def test_hup_reloads(app):
    supervising = app.start()
    app.write(NEW)

    supervising.process.send_signal(signal.SIGHUP)

    def result():
        handle = app.service.request("appx:hello")
        app.wait(handle)
        return app.service.result(handle) == "new"

    wait_until(result, "new code is in force")


def test_a_run_that_finds_changed_code_has_it_loaded_once(app):
    app.start()
    app.write(NEW)

    first, second = app.cli("run"), app.cli("run")

    assert [(one.returncode, one.stdout, one.stderr) for one in (first, second)] == [(0, "", "")] * 2
    wait_until(lambda: app.supervisors[0].log.count("loaded 3 tasks") == 2, "the code was loaded again")
    handle = app.service.request("appx:hello")
    app.wait(handle)
    assert app.service.result(handle) == "new"
    app.cli("run")
    assert app.supervisors[0].log.count("loaded 3 tasks") == 2


def test_auto_reload_can_be_switched_off(make_app):
    app = make_app(SOURCE, auto_reload=False)
    app.start()
    app.write(NEW)

    app.cli("run")

    handle = app.service.request("appx:hello")
    app.wait(handle)
    assert app.service.result(handle) == "old"


@pytest.mark.parametrize(
    ("on_term", "status", "reason"),
    [("leave", Status.DONE, None), ("drain", Status.DONE, None), ("kill", Status.INTERRUPTED, Reason.STOPPED)],
)
def test_on_term_decides_what_becomes_of_running_tasks(make_app, on_term, status, reason):
    app = make_app(SOURCE, on_term=on_term)
    supervising = app.start()
    handle = app.service.request("appx:Slow", {"seconds": 1.5})
    app.started(handle)

    assert supervising.stop() == 0

    ended_before_it_left = app.service.get(handle).ended
    record = app.wait(handle)
    assert (record.status, record.reason) == (status, reason)
    assert ended_before_it_left == (on_term != "leave")


@pytest.fixture
def manager(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify.sock"))
        listener.settimeout(LIMIT_S)
        yield listener


def hear(manager, word):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        said = manager.recv(4096).decode()
        if word in said:
            return said
    return pytest.fail(f"{word} was not said")


def count_words(manager):
    """Return how much is said until there is silence."""
    for count in range(100):
        try:
            manager.recv(4096)
        except TimeoutError:
            return count
    return 100


def test_the_service_manager_hears_ready_watchdog_and_stopping(app, manager):
    supervising = app.start(environment={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "3000000"})

    assert "supervising" in hear(manager, "READY=1")
    hear(manager, "WATCHDOG=1")
    supervising.stop()
    assert "SIGTERM" in hear(manager, "STOPPING=1")


def test_a_body_does_not_inherit_the_service_managers_socket(app, manager):
    app.start(environment={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"})
    handle = app.service.request("appx:environment")
    app.wait(handle)

    names = set(app.service.result(handle))

    assert "PATH" in names
    assert not names & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}


def test_under_a_service_manager_run_stands_by_until_the_other_supervisor_has_gone(app, manager):
    first = app.start()
    second = app.start(environment={"NOTIFY_SOCKET": manager.getsockname()}, wait=False)

    assert "standing by" in hear(manager, "READY=1")
    hear(manager, "WATCHDOG=1")
    first.stop()

    wait_until(lambda: app.supervisor_row(second.process.pid), "the second supervises")


def test_who_stands_by_says_once_that_the_other_supervisor_hangs(app, manager):
    first = app.start()
    os.kill(first.process.pid, signal.SIGSTOP)
    old = time.time() - 61
    os.utime(app.state_dir / "supervisor.lock", (old, old))
    second = app.start(environment={"NOTIFY_SOCKET": manager.getsockname()}, wait=False)

    assert "no sign of life" in hear(manager, "STATUS=standing by: the supervisor with PID")
    for _ in range(2):
        assert "STATUS" not in hear(manager, "WATCHDOG=1")
    assert second.output.read_text().count("holds the lock but has shown no sign of life for 6") == 1
    os.kill(first.process.pid, signal.SIGCONT)


def test_under_a_service_manager_a_stop_is_told_by_the_exit_code(app, manager):
    app.cli("stop")

    left = app.start(environment={"NOTIFY_SOCKET": manager.getsockname()}, wait=False)

    assert left.process.wait(LIMIT_S) == 100


def test_a_watchdog_word_comes_from_the_loop_itself(app, manager):
    supervising = app.start(environment={"NOTIFY_SOCKET": manager.getsockname()})
    hear(manager, "WATCHDOG=1")
    os.kill(supervising.process.pid, signal.SIGSTOP)
    manager.settimeout(2.5)
    heard = count_words(manager)
    os.kill(supervising.process.pid, signal.SIGCONT)

    assert heard <= 2  # what was said before the stop took effect


def test_a_supervisor_that_hangs_makes_run_say_so_and_fail(app):
    supervising = app.start()
    os.kill(supervising.process.pid, signal.SIGSTOP)
    lock = app.state_dir / "supervisor.lock"
    old = time.time() - 61
    os.utime(lock, (old, old))

    told = app.cli("run")

    os.kill(supervising.process.pid, signal.SIGCONT)
    assert told.returncode == 1
    assert f"PID {supervising.process.pid}" in told.stderr


def test_a_lock_file_that_is_old_only_since_the_machine_slept_is_no_hanging_supervisor(app):
    app.start()
    lock = app.state_dir / "supervisor.lock"
    old = time.time() - 3600
    os.utime(lock, (old, old))  # the loop touches it within a second

    told = app.cli("run")

    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_a_declared_secret_is_masked_by_show_though_its_class_is_not_imported_there(make_app):
    app = make_app("from bgsupervisor import task\n@task(secret=('iban',))\ndef pay(iban: str, amount: int): pass\n")
    app.start()
    handle = app.service.request("appx:pay", {"iban": "DE00 1234", "amount": 5})
    app.wait(handle)

    told = app.cli("show", str(handle.id))

    assert "DE00" not in told.stdout + app.cli("show", str(handle.id), "--json").stdout
    assert '"amount":5' in told.stdout


def test_ps_says_who_stopped(app):
    app.cli("stop")

    app.service.request("appx:hello")
    assert "`bgsupervisor start` allows it again" in app.cli("ps").stderr


def test_a_drain_leaves_bodies_that_wait_for_what_does_not_start_any_more(make_app):
    waiter = """
        @task
        def waits(id: int):
            from bgsupervisor import current
            return current().wait_for(id)
    """
    app = make_app(SOURCE + textwrap.dedent(waiter))
    supervising = app.start()
    later = app.service.request("appx:hello", delay_s=8)
    waiting = app.service.request("appx:waits", {"id": later.id})
    wait_until(lambda: app.started(waiting).slot is None, "its slot is given to others")

    app.cli("stop", "--drain")
    gone(supervising)

    assert app.service.get(waiting).status is Status.START
    app.cli("start")
    app.start()
    app.wait(waiting, limit_s=30)
    assert app.service.result(waiting) == "old"
