"""What is made at import and copied into each child: random numbers, signal handlers, exit callbacks, other state."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from support.app import wait_until

from bgsupervisor.statuses import Reason, Status

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"), pytest.mark.real_starts]

DRAWS = """
import random, secrets, tempfile, uuid
import numpy.random
from bgsupervisor import task
{at_import}

@task
def draws() -> dict[str, object]:
    return {{
        "numpy": numpy.random.rand(),
        "numpy integers": int(numpy.random.randint(2**31)),
        "random": random.random(),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "secrets": secrets.token_hex(),
        "temporary name": next(tempfile._get_candidate_names()),
    }}
"""
LATE = """
from bgsupervisor import task

@task
def draws() -> dict[str, object]:
    import numpy
    return {"numpy": numpy.random.rand()}
"""


def drawn(app, count=3):
    handles = app.service.request_many("appx:draws", [{}] * count)
    records = [app.wait(handle) for handle in handles]
    assert {record.status for record in records} == {Status.DONE}, records
    return [app.service.result(handle) for handle in handles]


@pytest.mark.parametrize(
    ("at_import", "options"),
    [
        ("", {}),
        ("", {"reuse": 3}),
        ("numpy.random.seed(7); random.seed(7)", {}),
        ("numpy.random.seed(7); random.seed(7)", {"start_method": "spawn"}),
        ("numpy.random.set_bit_generator(numpy.random.PCG64(7))", {}),
    ],
    ids=["fork", "reuse", "seeded", "seeded-spawn", "another-generator"],
)
def test_children_draw_different_random_numbers(make_app, at_import, options):
    app = make_app(DRAWS.format(at_import=at_import), **options)
    app.start()
    found = drawn(app)
    for source in found[0]:
        values = [one[source] for one in found]
        assert len(set(values)) == len(values), (source, values)


def test_numpy_that_the_body_imports_first_draws_different_numbers(make_app):
    app = make_app(LATE)
    app.start()
    assert len({one["numpy"] for one in drawn(app)}) == 3


def test_numpy_is_not_imported_for_its_seed(make_app):
    app = make_app(
        """
        import sys
        from bgsupervisor import task

        @task
        def draws() -> bool:
            return "numpy" in sys.modules
        """
    )
    app.start()
    assert drawn(app, 1) == [False]


def test_numpy_whose_import_fails_half_way_harms_no_child(make_app):
    app = make_app(
        """
        import sys, types
        from bgsupervisor import task
        sys.modules["numpy.random"] = types.ModuleType("numpy.random")

        @task
        def draws() -> int:
            return 1
        """
    )
    app.start()
    assert drawn(app, 1) == [1]


# ---- signals ----

SIGNALS = """
import asyncio, faulthandler, os, signal, sys, time
from pathlib import Path
from bgsupervisor import Cancelled, current, task

FOLDER = Path(__file__).parent

def on_signal(number, frame):
    (FOLDER / f"came-{signal.Signals(number).name}-{os.getpid()}").touch()

AT_IMPORT

def sets_sigterm():
    signal.signal(signal.SIGTERM, on_signal)

@task
def lists() -> dict[str, str]:
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGURG", "SIGPIPE")
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    return {name: getattr(one, "__name__", str(one)) for name, one in handlers.items()}

@task
def waits(patience_s: float = 30.0) -> int:
    (FOLDER / "ready").touch()
    ended_at = time.monotonic() + patience_s
    while time.monotonic() < ended_at and not list(FOLDER.glob("came-SIGTERM-*")):
        time.sleep(0.01)
    return os.getpid()
"""
ALL = """
for one in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
    signal.signal(one, on_signal)
"""


def signals_app(make_app, at_import, **options):
    app = make_app(SIGNALS.replace("AT_IMPORT", at_import), **options)
    app.start()
    return app


def warnings_of(app):
    return [line for line in app.supervisors[0].log.splitlines() if "importing the application set" in line]


def handlers_in_child(app):
    handle = app.service.request("appx:lists")
    app.wait(handle)
    return app.service.result(handle)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_handlers_set_at_import_hold_in_a_child(make_app, start_method):
    app = signals_app(make_app, ALL, start_method=start_method)
    found = handlers_in_child(app)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"):
        assert found.pop(name) == "on_signal", name
    assert found == {"SIGTERM": "_on_term", "SIGCHLD": "0", "SIGURG": "0", "SIGPIPE": "1"}
    assert warnings_of(app) == []


def test_a_signal_ignored_at_import_is_ignored_in_a_child(make_app):
    app = signals_app(make_app, "for one in (signal.SIGHUP, signal.SIGUSR1): signal.signal(one, signal.SIG_IGN)")
    found = handlers_in_child(app)
    assert (found["SIGINT"], found["SIGHUP"], found["SIGUSR1"]) == ("0", "1", "1")


def test_handlers_set_at_import_do_not_hold_in_the_fork_server(make_app):
    app = signals_app(make_app, ALL)
    (fork_server,) = app._fork_servers()
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(fork_server.pid, number)
    assert handlers_in_child(app)["SIGINT"] == "on_signal"
    assert list(app.folder.glob("came-*")) == []


def test_a_faulthandler_registered_at_import_answers_in_a_child(make_app):
    app = signals_app(make_app, "faulthandler.register(signal.SIGUSR1)")
    record = app.started(app.service.request("appx:waits"))
    wait_until((app.folder / "ready").exists, "the body runs")
    os.kill(record.pid, signal.SIGUSR1)
    (log,) = (app.state_dir / "logs").glob(f"process-{record.pid}-*.log")
    wait_until(lambda: "in waits" in log.read_text(), "the stacks are dumped")
    assert app.service.get(record.id).status is Status.START
    app.service.cancel(record.id)


@pytest.mark.parametrize(
    ("at_import", "names"),
    [
        ("signal.signal(signal.SIGTERM, on_signal)", ["SIGTERM"]),
        ("faulthandler.register(signal.SIGTERM, chain=True)", ["SIGTERM"]),
        ("signal.signal(signal.SIGCHLD, on_signal)", ["SIGCHLD"]),
        ("signal.signal(signal.SIGURG, on_signal)", ["SIGURG"]),
        ("signal.signal(signal.SIGTERM, on_signal); signal.signal(signal.SIGCHLD, on_signal)", ["SIGTERM", "SIGCHLD"]),
    ],
    ids=["sigterm", "sigterm-in-c", "sigchld", "sigurg", "two"],
)
def test_a_signal_of_ours_set_at_import_is_named_with_the_way_out(make_app, at_import, names):
    app = signals_app(make_app, at_import)
    lines = warnings_of(app)
    assert [name for name in names if any(f"set what {name} does" in line for line in lines)] == names, lines
    assert len(lines) == len(names)
    assert all("Set it in `child_setup`" in line for line in lines)
    checked = app.cli("check")
    assert all(f"set what {name} does" in checked.stdout + checked.stderr for name in names), checked
    handle = app.service.request("appx:waits")
    record = app.started(handle)
    wait_until((app.folder / "ready").exists, "the body runs")
    assert "in waits" in app.service.stack(handle)
    app.service.cancel(handle)
    assert app.wait(handle).reason is Reason.CANCELLED
    assert not (app.folder / f"came-SIGTERM-{record.pid}").exists()


def test_sigterm_set_in_child_setup_reaches_the_body_instead_of_ours(make_app):
    app = signals_app(make_app, "", child_setup="appx:sets_sigterm", reuse=2)
    for _ in range(2):
        handle = app.service.request("appx:waits")
        record = app.started(handle)
        wait_until((app.folder / "ready").exists, "the body runs")
        app.service.cancel(handle)
        assert app.wait(handle).status is Status.DONE  # it went on, and returned
        came = app.folder / f"came-SIGTERM-{record.pid}"
        assert came.exists()
        came.unlink()
        (app.folder / "ready").unlink()


# ---- exit callbacks ----

CALLBACKS = """
import atexit, os, sys, tempfile, weakref
from pathlib import Path
from bgsupervisor import task

FOLDER = Path(__file__).parent

class Thing:
    pass

def says(what):
    with open(FOLDER / "said", "a") as file:
        file.write(f"{what}\\n")

atexit.register(says, "inherited callback")
shared = tempfile.TemporaryDirectory(dir=FOLDER, prefix="shared-")
thing = Thing()
weakref.finalize(thing, says, "inherited finalizer")

def registers():
    atexit.register(says, "callback of child_setup")

@task
def makes() -> str:
    global own, mine
    own = tempfile.TemporaryDirectory(dir=FOLDER, prefix="own-")
    mine = Thing()
    weakref.finalize(mine, says, "finalizer of the body")
    atexit.register(says, "callback of the body")
    return own.name

@task
def looks() -> bool:
    return Path(shared.name).is_dir()
"""


def test_exit_callbacks_of_the_body_run_and_those_of_the_import_do_not(make_app):
    app = make_app(CALLBACKS, child_setup="appx:registers")
    app.start()
    handle = app.service.request("appx:makes")
    record = app.wait(handle)
    own = app.service.result(handle)
    wait_until(lambda: not Path(f"/proc/{record.pid}").exists(), "the child has left")
    said = (app.folder / "said").read_text().splitlines()
    assert sorted(said) == ["callback of child_setup", "callback of the body", "finalizer of the body"]
    assert not Path(own).exists()
    looked = app.service.request("appx:looks")
    app.wait(looked)
    assert app.service.result(looked) is True


# ---- all else ----

ELSE = """
import locale, os, resource, sys, tempfile
from bgsupervisor import task

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (NUMBER, hard))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.umask(0o027)
os.mkdir("inside")
os.chdir("inside")
sys.setswitchinterval(0.123)
locale.setlocale(locale.LC_CTYPE, "C")
os.environ["SET_AT_IMPORT"] = "yes"

@task
def finds() -> dict[str, object]:
    mask = os.umask(0)
    os.umask(mask)
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0] - NUMBER,
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "umask": mask,
        "folder": os.path.basename(os.getcwd()),
        "switch": sys.getswitchinterval(),
        "locale": locale.setlocale(locale.LC_CTYPE),
        "environment": os.environ.get("SET_AT_IMPORT"),
    }
"""


@pytest.mark.parametrize("number", ["333", "hard"])
def test_what_else_the_import_has_set_is_found_by_the_body(make_app, number):
    app = make_app(ELSE.replace("NUMBER", number))
    app.start()
    handle = app.service.request("appx:finds")
    record = app.wait(handle)
    assert record.status is Status.DONE, record
    assert app.service.result(handle) == {
        "files": 0,
        "core": 0,
        "umask": 0o027,
        "folder": "inside",
        "switch": 0.123,
        "locale": "C",
        "environment": "yes",
    }
