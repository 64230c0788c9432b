"""Who imports whom, who does what, and that the package loads where supervising cannot be done."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bgsupervisor

PACKAGE = Path(bgsupervisor.__file__).parent
SOURCE = str(PACKAGE.parent)

LAYERS = (
    {"cli", "testing", "__main__"},
    {"supervisor", "doctor"},
    {"worker"},
    {"arguments", "backings", "service", "tasks", "catalogue", "registry", "task_context"},
    {"ledger"},
    {"database"},
    {"ipc"},
    {"config", "config_files", "file_trust"},
    {"system"},
    {
        "addresses",
        "clock",
        "environment",
        "errors",
        "failpoints",
        "lookalikes",
        "mismatch",
        "options",
        "payload",
        "sanitize",
        "signatures",
        "sizes",
        "statuses",
    },
)
"""From the left: each imports within its own layer and to its right only. The package itself holds the version."""

LEFTWARDS = {("backings", "testing"): "under Django's test runner a Service isolates itself"}
"""Imports inside a function that lead to the left, and why."""

SENDS_SIGNALS = {
    "system.processes": "through a pidfd",
    "system.process_tree": "to a process and its descendants",
    "supervisor.termination": "terminations, after their reason is committed",
    "supervisor.suspension": "suspensions, after their commit",
    "worker.forkserver": "strays of its own, which it has not reaped, and kills that the supervisor ordered",
    "supervisor.forkservers": "strays that a dead fork server left to the supervisor",
    "supervisor.wait_manager": "a wait manager that does not answer",
    "system.stacks": "a question for a stack, by a signal that who has no handler for it ignores",
    "worker.child": "itself, when SIGTERM is to do what it does to any process",
    "supervisor.portable": "children of its own, which it has not reaped, and what psutil sees below them",
    "cli.dev.linux": "its own child, the supervisor, which it has not reaped",
    "cli.load_check": "the process that `check` loads the application in",
}


class Module:
    """One file of the package, read and not imported."""

    def __init__(self, path):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        self.path = path

    @functools.cached_property
    def tree(self):
        return ast.parse(self.path.read_text())

    @functools.cached_property
    def imports(self):
        return set(self._imports(self.tree, lazy=False))

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


def layer_of(module):
    return next(number for number, names in enumerate(LAYERS) if module.partition(".")[0] in names)


def modules_where(condition):
    return {name for name, module in MODULES.items() if condition(module)}


# ---- imports ----


def test_every_module_has_one_layer():
    assert {name.partition(".")[0] for name in MODULES} - {"__init__"} == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


def test_imports_go_to_the_right_only():
    leftwards = {
        (name, imported, lazy)
        for name, module in MODULES.items()
        for imported, lazy in module.imports
        if "__init__" not in {name, imported} and layer_of(imported) < layer_of(name)
    }
    assert {(name, imported.partition(".")[0]) for name, imported, _ in leftwards} == set(LEFTWARDS)
    assert all(lazy for _, _, lazy in leftwards)


def test_no_modules_import_each_other_in_a_cycle():
    graph = {name: {one for one, lazy in module.imports if not lazy} - {name} for name, module in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


# ---- who does what ----


def test_only_the_ledger_writes_rows():
    holders = modules_where(
        lambda m: any(isinstance(n, ast.Attribute) and n.attr == "tables" for n in ast.walk(m.tree))
    )
    assert holders == {
        "ledger.queries",
        "ledger.slots",
        "ledger.waits",
        "ledger.barriers",
        "ledger.waitgraph",
        "database.store",
        "database.sqlite_store",
        "database.postgres_store",
        "database.migrations",
        "cli.display.rows",
    }
    writes = (".insert", ".insert_many", ".update", ".delete", ".create", ".save", ".bulk_create")
    writers = modules_where(lambda module: any(call.endswith(writes) for call in module.calls()))
    assert {name for name in writers if name.startswith(("ledger.", "database.", "cli.display.rows"))} == {
        "ledger.transitions",
        "ledger.requests",
        "ledger.slots",
        "ledger.parts",
        "ledger.locks",
        "ledger.waits",
        "ledger.barriers",
    }  # `ps` reads the tables for itself
    assert modules_where(lambda module: any(call.endswith("execute_sql") for call in module.calls())) <= {
        "database.store",
        "database.sqlite_store",
        "database.postgres_store",
        "database.migrations",
        "database.migrations.0001_initial",
        "database.postgres",  # the lock that stands in for SQLite's one writer
        "ledger.external",  # what opens a transaction, and which database it is
    }
    importers = modules_where(
        lambda m: any("peewee" in ast.unparse(n) for n in ast.walk(m.tree) if isinstance(n, ast.Import))
    )
    assert importers == {
        "ledger.queries",
        "ledger.requests",
        "ledger.transitions",
        "ledger.slots",
        "ledger.parts",
        "ledger.barriers",
        "ledger.waitgraph",
        "ledger.external",
        "database.errors",
        "database.store",
        "database.sqlite_store",
        "database.postgres_store",
        "database.tables",
        "database.migrations.dialects",
        "database.postgres",
        "backings",
        "service",
        "cli.display.rows",
        "cli.commands.migrate",
        "testing.box",
    }
    assert not any(call.startswith("peewee.") for call in MODULES["backings"].calls())


def test_a_status_is_written_in_one_function_and_two_texts():
    writers = set()
    for function in ast.walk(MODULES["ledger.transitions"].tree):
        if isinstance(function, ast.FunctionDef):
            keys = [key for node in ast.walk(function) if isinstance(node, ast.Dict) for key in node.keys]
            if any(isinstance(key, ast.Constant) and key.value == "status" for key in keys):
                writers.add(function.name)
    assert writers == {"_move"}
    texts = [function for function in ast.walk(MODULES["database.sql"].tree) if isinstance(function, ast.FunctionDef)]
    assert {text.name for text in texts if 'SET "status"' in ast.unparse(text).replace("\\'", "'")} == {
        "claim",
        "finish",
    }


def test_only_the_clock_reads_clocks():
    readers = modules_where(
        lambda module: any(
            call.startswith("time.")
            or call in {"datetime.now", "datetime.utcnow", "datetime.today", "date.today", "monotonic", "perf_counter"}
            for call in module.calls()
        )
    )
    assert readers == {"clock"}
    importers = modules_where(
        lambda module: any(
            alias.name == "time" or (isinstance(node, ast.ImportFrom) and node.module == "time")
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        )
    )
    assert importers == {"clock"}


def test_one_module_reads_the_environment():
    readers = modules_where(
        lambda m: m.uses("os.environ", "os.environb") or {"os.getenv", "os.putenv"} & set(m.calls())
    )
    assert readers == {"environment"}


def test_signals_are_sent_by_those_who_may():
    ways = ("os.kill", "os.killpg", "signal.pidfd_send_signal", "signal_tree", "send_signal", ".terminate", ".kill")
    assert modules_where(lambda module: any(call.endswith(ways) for call in module.calls())) == set(SENDS_SIGNALS)


def test_nothing_that_a_socket_brings_is_ever_unpickled():
    readers = modules_where(lambda module: any("pickle" in call or "marshal" in call for call in module.calls()))
    assert readers == {"cli.load_check"}  # its parent hands it the configuration through a pipe


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
        [sys.executable, "-c", code], env={"PYTHONPATH": SOURCE}, check=True, timeout=90, capture_output=True, text=True
    )
    loaded = set(said.stdout.split())
    assert loaded & {"click", "rich", "psutil", "multiprocessing", "asyncio", "ctypes", "playhouse"} == set()
    assert {name for name in loaded if name.startswith("bgsupervisor.")} <= {
        f"bgsupervisor.{module}"
        for module in (
            *(
                "arguments",
                "backings",
                "addresses",
                "clock",
                "config",
                "config_files",
                "file_trust",
                "mismatch",
                "options",
                "registry",
                "signatures",
                "task_context",
                "environment",
                "errors",
                "failpoints",
                "payload",
                "lookalikes",
                "sanitize",
                "sizes",
            ),
            *("statuses", "catalogue", "service", "tasks", "database", "database.postgres", "database.sql"),
            *("database.errors", "database.store", "database.tables", "database.values"),
            *("ipc", "ipc.messages", "ipc.sockets", "ipc.statedir"),
            *("ledger", "ledger.attempts", "ledger.barriers", "ledger.cycles", "ledger.locks", "ledger.parts"),
            *("ledger.queries", "ledger.records", "ledger.requests", "ledger.slots", "ledger.transitions"),
            *("ledger.waitgraph", "ledger.waits"),
            *("system", "system.files", "system.users"),
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

from bgsupervisor.cli.commands.run import supervise
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
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    bodies, rows, error, refusal = found.stdout.splitlines()
    assert bodies == "3 Hello Jana"
    assert rows == "REQUEST CANCELLED"
    assert error == "AccessError"
    assert refusal.startswith("supervising needs Linux")
    assert f"this is {platform}" in refusal
