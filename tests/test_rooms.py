"""Who imports whom, who does what, and that the package loads where supervising cannot be done."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bgsupervisor

PACKAGE = Path(bgsupervisor.__file__).parent
SOURCE = str(PACKAGE.parent)

FLOORS = (
    {"__main__"},
    {"cli"},
    {"supervisor", "doctor", "portable"},
    {"testing"},
    {"__init__"},
    {"service"},
    {"borrowed", "names"},
    {"nurseries", "boards", "recovery", "enforcement", "deaths", "housekeeping", "spawned"},
    {"wards"},
    {"reception"},
    {"nursery"},
    {"child"},
    {"coordination", "leftovers"},
    {"link"},
    {"board"},
    {"ledger"},
    {"waits"},
    {"barriers"},
    {"needs"},
    {"models"},
    {"migrations"},
    {"bodies", "inherited", "reporting"},
    {"tasks"},
    {"payload"},
    {"exits"},
    {"wire"},
    {"stacks"},
    {"processes", "oom", "logs", "notify", "stamp", "titles", "postgres", "gate", "callers"},
    {"linux"},
    {"config"},
    {"statedir"},
    {"clock"},
    {"connections"},
    {"descriptors", "statuses", "errors", "circles", "pauses", "statements", "lookalikes", "sizes", "cleaning"},
)
"""The rooms of the package from the top: each may import from the floors below its own, and from nowhere else."""

UPWARDS = {
    ("child", "nursery"): "a spawned child loads the application by itself, as a nursery does for forked ones",
    ("child", "service"): "a body requests tasks as any application does",
    ("service", "testing"): "under Django's test runner a Service isolates itself",
    ("supervisor", "__init__"): "it writes the package's version into its row",
    ("portable", "__init__"): "the same",
}
"""Imports inside a function that lead upwards or sideways, and why."""

STRANGERS = {
    "link": {"tasks", "payload", "ledger"},
    "ledger": {"processes", "linux", "tasks", "payload", "postgres"},
    "models": {"wire", "tasks", "processes"},
    "nursery": {"ledger", "models"},
    "payload": {"config", "statedir"},
    "processes": {"wire", "config", "statedir"},
    "reception": {"ledger", "models", "tasks"},
    "tasks": {"config", "statedir", "processes", "linux"},
    "wire": {"config", "statedir", "processes"},
}
"""Rooms below that a room could reach and has promised not to know."""

SENDS_SIGNALS = {
    "processes": "the room for it",
    "enforcement": "orders, after their reason is committed",
    "nursery": "strays of its own, which it has not reaped, and kills that the supervisor ordered",
    "nurseries": "strays that a dead nursery left to the supervisor",
    "boards": "a board that does not answer",
    "stacks": "a question for a stack, by a signal that who has no handler for it ignores",
    "child": "itself, when SIGTERM is to do what it does to any process",
    "portable": "children of its own, which it has not reaped, and what psutil sees below them",
    "cli.development": "its own child, the supervisor, which it has not reaped",
    "cli.loading": "the process that `check` loads the application in",
}


class Module:
    """One file of the package, read and not imported."""

    def __init__(self, path):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        self.room = parts[0]
        self.tree = ast.parse(path.read_text())
        self.imports = set(self._imports(self.tree, lazy=False))

    def _imports(self, node, *, lazy):
        """Yield (module, whether inside a function); what only a type checker imports is left out."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{self.name} imports relatively"
                for alias in child.names:
                    yield from self._resolved(f"{child.module}.{alias.name}", child.module, lazy=inside)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield from self._resolved(alias.name, alias.name, lazy=inside)
            yield from self._imports(child, lazy=inside)

    @staticmethod
    def _resolved(longer, shorter, *, lazy):
        for dotted in (longer, shorter):
            package, _, rest = dotted.partition(".")
            if package != "bgsupervisor":
                continue
            base = PACKAGE.joinpath(*rest.split("."))
            if not rest:
                yield "__init__", lazy
                return
            if base.is_dir() or base.with_suffix(".py").exists():
                yield rest, lazy
                return

    def calls(self):
        """Yield every call as it is written, without its arguments."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func)

    def uses(self, *dotted):
        return any(ast.unparse(node) in dotted for node in ast.walk(self.tree) if isinstance(node, ast.Attribute))


MODULES = {module.name: module for module in map(Module, sorted(PACKAGE.rglob("*.py")))}


def room_of(name):
    return name.partition(".")[0]


def floor_of(room):
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def who(condition):
    return {name for name, module in MODULES.items() if condition(module)}


# ---- imports ----


def test_every_module_has_its_floor_and_every_floor_its_modules():
    assert {module.room for module in MODULES.values()} == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downwards_only(name):
    module = MODULES[name]
    upwards = {
        (module.room, room_of(imported), lazy)
        for imported, lazy in module.imports
        if room_of(imported) != module.room and floor_of(module.room) >= floor_of(room_of(imported))
    }
    assert all(lazy and (importer, imported) in UPWARDS for importer, imported, lazy in upwards), upwards


@pytest.mark.parametrize("name", STRANGERS)
def test_a_room_does_not_know_what_it_promises_not_to_know(name):
    assert {room_of(imported) for imported, _ in MODULES[name].imports} & STRANGERS[name] == set()


def test_every_exception_is_still_needed():
    lazy = {
        (module.room, room_of(imported)) for module in MODULES.values() for imported, lazy in module.imports if lazy
    }
    assert set(UPWARDS) <= lazy


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {one for one, lazy in module.imports if not lazy} for name, module in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


# ---- who does what ----


def test_only_the_ledger_writes_rows():
    holders = who(lambda m: any(isinstance(n, ast.Attribute) and n.attr == "tables" for n in ast.walk(m.tree)))
    assert holders == {"ledger", "waits", "barriers", "needs", "models", "migrations", "cli.rows"}
    writes = (".insert", ".insert_many", ".update", ".delete", ".create", ".save", ".bulk_create")
    writers = who(lambda module: any(call.endswith(writes) for call in module.calls()))
    assert writers & holders == {"ledger", "waits", "barriers"}  # `ps` reads the tables for itself
    assert who(lambda module: any(call.endswith("execute_sql") for call in module.calls())) <= {
        "models",
        "migrations",
        "migrations.0001_initial",
        "postgres",  # the lock that stands in for SQLite's one writer
        "borrowed",  # what opens a transaction, and which database it is
    }
    importers = who(lambda m: any("peewee" in ast.unparse(n) for n in ast.walk(m.tree) if isinstance(n, ast.Import)))
    assert importers == {
        "ledger",
        "waits",
        "barriers",
        "needs",
        "models",
        "borrowed",
        "migrations.dialects",
        "postgres",
        "service",
        "cli.rows",
        "cli.migrate",
        "testing.box",
    }
    assert not any(call.startswith("peewee.") for call in MODULES["service"].calls())


def test_a_status_is_written_in_one_function_and_two_texts():
    writers = set()
    for function in ast.walk(MODULES["ledger"].tree):
        if isinstance(function, ast.FunctionDef):
            keys = [key for node in ast.walk(function) if isinstance(node, ast.Dict) for key in node.keys]
            if any(isinstance(key, ast.Constant) and key.value == "status" for key in keys):
                writers.add(function.name)
    assert writers == {"_move"}
    texts = [function for function in ast.walk(MODULES["statements"].tree) if isinstance(function, ast.FunctionDef)]
    assert {text.name for text in texts if 'SET "status"' in ast.unparse(text).replace("\\'", "'")} == {
        "claim",
        "finish",
    }


def test_only_the_clock_reads_clocks():
    readers = who(
        lambda module: any(
            call.startswith("time.")
            or call in {"datetime.now", "datetime.utcnow", "datetime.today", "date.today", "monotonic", "perf_counter"}
            for call in module.calls()
        )
    )
    assert readers == {"clock"}
    importers = who(
        lambda module: any(
            alias.name == "time" or (isinstance(node, ast.ImportFrom) and node.module == "time")
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        )
    )
    assert importers == {"clock"}


def test_only_the_configuration_reads_the_environment():
    readers = who(lambda m: m.uses("os.environ", "os.environb") or {"os.getenv", "os.putenv"} & set(m.calls()))
    assert readers == {"config"}


def test_signals_are_sent_by_those_who_may():
    ways = ("os.kill", "os.killpg", "signal.pidfd_send_signal", "signal_tree", "send_signal", ".terminate", ".kill")
    assert who(lambda module: any(call.endswith(ways) for call in module.calls())) == set(SENDS_SIGNALS)


def test_nothing_that_a_socket_brings_is_ever_unpickled():
    readers = who(lambda module: any("pickle" in call or "marshal" in call for call in module.calls()))
    assert readers == {"cli.loading"}  # its parent hands it the configuration through a pipe


# ---- the package as users see it ----


def test_what_the_package_offers_is_what_it_says_it_offers_and_what_type_checkers_see():
    offered = {
        alias.name: node.module
        for node in ast.walk(MODULES["__init__"].tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("bgsupervisor.")
        for alias in node.names
    }
    assert sorted(bgsupervisor.__all__) == sorted(offered)
    assert set(bgsupervisor.__all__) <= set(dir(bgsupervisor))
    for name, module in offered.items():
        assert getattr(bgsupervisor, name) is getattr(importlib.import_module(module), name), name
    with pytest.raises(AttributeError, match="has no attribute 'Servise'"):
        bgsupervisor.Servise  # noqa: B018 - the question itself raises


def test_a_web_process_that_imports_the_package_does_not_pay_for_supervising():
    # Peewee loads the driver of PostgreSQL wherever it is installed, whatever the database.
    code = (
        "import sys; sys.modules['psycopg'] = None; from bgsupervisor import Service, Task, task; print(*sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": SOURCE}, check=True, timeout=20, capture_output=True, text=True
    )
    loaded = set(said.stdout.split())
    assert loaded & {"click", "rich", "psutil", "multiprocessing", "asyncio", "ctypes", "playhouse"} == set()
    assert {name for name in loaded if name.startswith("bgsupervisor.")} <= {
        f"bgsupervisor.{room}"
        for room in (
            *("clock", "config", "errors", "ledger", "models", "payload", "postgres"),
            *("barriers", "circles", "names", "needs", "pauses", "service", "statedir", "statements", "statuses"),
            *("tasks", "waits", "wire", "lookalikes", "sizes", "cleaning"),
        )
    }


ELSEWHERE = """
import sys

# What other systems have as well is loaded before they are pretended to be one.
import asyncio, click, ctypes, msgspec, peewee, playhouse.migrations, psutil, selectors, socket, sqlite3, subprocess
import concurrent.futures, inspect, logging.handlers, multiprocessing.context, os, select, signal, tempfile, tomllib

HIDDEN = {"fcntl", "resource", "pwd", "grp", "termios", "syslog", "tty", "pty", "readline"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
for name in HIDDEN:
    sys.modules.pop(name, None)
GONE = {
    os: "fork geteuid getuid getppid setsid killpg pidfd_open register_at_fork O_DIRECTORY O_CLOEXEC O_NONBLOCK pipe2 "
        "fchmod statvfs ST_RDONLY WNOHANG pwrite",
    socket: "AF_UNIX SO_PEERCRED MSG_NOSIGNAL socketpair",
    select: "poll epoll",
    signal: "SIGKILL SIGHUP SIGCHLD SIGUSR1 SIGUSR2 pidfd_send_signal pthread_sigmask set_wakeup_fd",
}
for module, names in GONE.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = sys.argv[1]

import bgsupervisor
from bgsupervisor import Service, Task, task

class Add(Task):
    def run(self, a: int, b: int) -> int:
        return sum(self.track([a, b]))

@task
def greet(name: str) -> str:
    bgsupervisor.current().progress(1, 2)
    return f"Hello {name}"

print(Add().run(1, 2), greet("Jana"))
service = Service("sqlite:///" + sys.argv[2])
handle = service.request("app:Add", {"a": 1, "b": 2}, key="k")
print(service.status(handle), service.cancel(handle, by="jana").reason)
service.close()
try:
    Service("sqlite:///" + sys.argv[2] + "/missing/x.db").request("app:Add")
except bgsupervisor.BgSupervisorError as error:
    print(type(error).__name__)

from bgsupervisor.cli.run import supervise
try:
    supervise(service.config, burst=True)
except bgsupervisor.UnsupportedSystem as error:
    print(error)
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_where_nothing_can_be_supervised_bodies_and_requests_work_and_run_refuses(tmp_path, platform):
    found = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, platform, str(tmp_path / "tasks.db")],
        cwd=tmp_path,
        env={"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    bodies, rows, error, refusal = found.stdout.splitlines()
    assert bodies == "3 Hello Jana"
    assert rows == "REQUEST CANCELLED"
    assert error == "AccessError"
    assert refusal.startswith("supervising needs Linux")
    assert f"this is {platform}" in refusal
