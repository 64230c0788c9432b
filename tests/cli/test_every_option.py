"""Every command works with every option of tasks and of the configuration; a new option fails here until it is used."""

from __future__ import annotations

import json
import sys

import click
import pytest

from bgsupervisor import Task, lookalikes
from bgsupervisor.cli import main
from bgsupervisor.cli.program import program
from bgsupervisor.config import OPTIONS
from bgsupervisor.errors import RequestRefused
from bgsupervisor.ipc.messages import TaskOptions

TASK_OPTIONS = {
    "name": "every-option",
    "timeout_s": 60.5,
    "stall_s": 30,
    "memory_limit_bytes": 2**33,
    "secret": ("password", "token"),
}
SOURCE = f"""
from bgsupervisor import Task, task

def connect(): ...

@task(**{TASK_OPTIONS!r})
def all_of_them(password: str = "", token: str = "") -> int:
    return 5

class AllOfThem(Task):
    name = "every-attribute"
    timeout_s = 60.5
    stall_s = 30
    memory_limit_bytes = 2**33
    secret = ("password", "token")
    def run(self, password: str = "", token: str = "") -> int:
        return 5

@task(timeout_s=1)
def one_secret(password: str = "") -> None: ...

@task
def plain() -> None: ...
"""
CONFIGURATION = {
    "database": "sqlite:///every.db",
    "table_prefix": "every_",
    "tasks": ["appx"],
    "setup": "appx:connect",
    "child_setup": "appx:connect",
    "slots": 2,
    "spares": 1,
    "reuse": 2,
    "max_waiting": 7,
    "state_dir": "state",
    "heartbeat_s": 0.5,
    "grace_s": 0.5,
    "keep_days": 2.5,
    "data_max_bytes": 100_000,
    "log_max_bytes": 100_000,
    "busy_timeout_s": 2.5,
    "unknown_names": "warn",
    "start_method": "fork",
    "auto_reload": True,
    "on_term": "leave",
    "env_file": "every.env",
    "python_path": ["."],
    "host": "every-host",
    "lease_s": 20.0,
}
CALLS = {
    "init": None,  # writes a configuration where there is none
    "run": None,  # the supervisor itself, which the application below starts
    "dev": None,  # a supervisor again; tests/test_dev.py
    "ps": [
        ["--all"],
        ["--tree"],
        ["--json"],
        ["--status", "DONE", "--name", "every-option", "--key", "k", "--limit", "5"],
    ],
    "show": [["1"], ["1", "--full"], ["1", "--json"]],
    "why": [["1"], ["1", "--json"]],
    "log": [["1"], ["1", "--raw"], ["1", "--follow"], ["1", "--attempt", "1"]],
    "stack": [["1"], ["1", "--full"]],
    "request": [
        ["every-option", '{"password": "x"}', "--priority", "5", "--key", "k", "--unique=5"],
        ["appx:plain", "--json"],
    ],
    "cancel": [["1", "--by", "jana"]],
    "suspend": [["1", "--by", "jana"]],
    "resume": [["1"]],
    "retry": [["1"]],
    "stop": None,  # would end the supervisor of the others
    "start": [[]],
    "reload": [[]],
    "prune": [["--dry-run"], ["--older-than-days", "1", "--status", "DONE", "--name", "every-option"]],
    "migrate": [["--check"]],
    "health": [[], ["--prometheus"], ["--max-wait-s", "5", "--max-interrupted", "5"]],
    "check": [[], ["--full"], ["--json"]],
    "doctor": [[], ["--json"]],
    "cron": [[]],
    "systemd": [[]],
}
"""How each command is called, or None where a test of its own has it."""


def test_this_file_uses_every_option_of_tasks():
    assert TASK_OPTIONS.keys() == set(lookalikes.OPTIONS)
    assert set(TaskOptions.__struct_fields__) == TASK_OPTIONS.keys() - {"name"}
    settable = {name for name, hint in Task.__annotations__.items() if hint.startswith("ClassVar") and name[0] != "_"}
    assert settable == TASK_OPTIONS.keys()


def test_this_file_uses_every_key_of_the_configuration():
    assert CONFIGURATION.keys() == {option.name for option in OPTIONS}


def test_this_file_calls_every_command():
    assert CALLS.keys() == set(program.list_commands(click.Context(program)))


@pytest.fixture
def app(make_app):
    app = make_app("", **CONFIGURATION)
    app.state_dir = app.folder / "state"
    (app.folder / "appx.py").write_text(SOURCE)
    (app.folder / "every.env").write_text("EVERY=1\n")
    app.start()
    for name in ("every-option", "every-attribute"):
        app.wait(app.service.request(name, {"password": "sesame", "token": "open"}, key="k"))
    return app


@pytest.fixture
def command(app, monkeypatch, capsys):
    """Run a command in this process; return its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bgsupervisor", "--config", str(app.config), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return run


def test_every_command_works_with_every_option(command):
    for name, calls in CALLS.items():
        for arguments in calls or ():
            code, out, err = command(name, *arguments)
            assert code in (0, 1, 2 if name == "health" else 0), (name, arguments, err)
            assert "Traceback" not in out + err, (name, arguments)
            assert "sesame" not in out + err, (name, arguments)


def test_check_shows_every_option_of_a_task_and_every_key(command):
    code, out, _ = command("check")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("  every-option"))
    assert line == "  every-option  (timeout_s 60.5, stall_s 30, memory_limit_bytes 8 GiB, secret password and token)"
    assert {line.split()[0] for line in out.split("\n\n")[0].splitlines()} == CONFIGURATION.keys()
    _, out, _ = command("check", "--json")
    assert json.loads(out)["tasks"]["every-attribute"]["secret"] == ["password", "token"]


# ---- arguments that cannot be ----

WRONG_IDS = ["1", "x", 1.5, True, None, b"1", [1], float("nan")]


@pytest.mark.parametrize("method", ["get", "wait", "result", "stack", "cancel", "suspend", "resume", "retry"])
def test_service_refuses_what_is_no_id(make_app, method):
    service = make_app("").service
    more = {"timeout_s": 0} if method == "wait" else {}
    for wrong in WRONG_IDS:
        with pytest.raises(RequestRefused, match="give a handle or an id"):
            getattr(service, method)(wrong, **more)


@pytest.mark.parametrize("limit", ["x", -1, 1.5, True, b"5", float("nan"), [5]])
def test_list_refuses_what_is_no_limit(make_app, limit):
    with pytest.raises(RequestRefused, match=r"limit is .*; it must be a whole number, 0 or more, or None"):
        make_app("").service.list(limit=limit)


def test_service_takes_the_largest_numbers(make_app):
    service = make_app("").service
    assert service.list(limit=2**70) == []
    assert service.list(limit=0) == []
    assert service.get(2**70) is None
    assert service.status(2**70) is None


@pytest.mark.parametrize("key", ["a\0", "\ud800", "", "x" * 1001, True, 1.5, b"a"])
def test_service_refuses_what_is_no_key(make_app, key):
    service = make_app("").service
    for ask in (
        lambda: service.status("appx:a", key=key),
        lambda: service.list(key=key),
        lambda: service.request("appx:a", key=key),
    ):
        with pytest.raises(RequestRefused, match="key is "):
            ask()


@pytest.mark.parametrize("name", ["a\0", "\ud800", " ", "x" * 1001])
def test_service_refuses_what_is_no_name(make_app, name):
    service = make_app("").service
    for ask in (lambda: service.status(name), lambda: service.counts(name), lambda: service.list(name=name)):
        with pytest.raises(RequestRefused, match=r"the task name .* cannot be"):
            ask()


@pytest.mark.parametrize("status", ["x", 5, [], b"DONE"])
def test_list_refuses_what_is_no_status(make_app, status):
    with pytest.raises(RequestRefused, match="it must be one of REQUEST, START, DONE, INTERRUPTED"):
        make_app("").service.list(status=status)


@pytest.mark.parametrize("timeout_s", ["5", None, True, float("nan")])
def test_wait_refuses_what_is_no_time(make_app, timeout_s):
    service = make_app("").service
    with pytest.raises(RequestRefused, match=r"timeout_s is .*; it must be a number of seconds"):
        service.wait(service.request("appx:a"), timeout_s=timeout_s)


def float_options():
    for name in program.list_commands(click.Context(program)):
        for param in program.get_command(click.Context(program), name).params:
            if isinstance(param.type, click.types.FloatParamType):
                yield name, param.opts[0]


@pytest.mark.parametrize(("name", "option"), list(float_options()))
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "NaN"])
def test_commands_refuse_what_is_no_number(name, option, number):
    found = program.get_command(click.Context(program), name)
    param = next(param for param in found.params if option in param.opts)
    with pytest.raises(click.BadParameter):
        param.type.convert(number, param, None)
