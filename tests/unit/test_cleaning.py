"""Text of others in logs, on terminals and in what programs read: it steers nothing and forges no line."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from support.app import wait_until

import bgsupervisor
from bgsupervisor import sanitize
from bgsupervisor.cli import main
from bgsupervisor.sanitize import LineFormatter, clean, clean_line_keeping_colours, escaped, quoted
from bgsupervisor.system import titles
from bgsupervisor.system.sd_notify import Notifier

SOURCE = r"""
    import time
    from bgsupervisor import task

    FORGED = "no\n2026-01-01 00:00:00,000 INFO task 1 (appx:other) ended: DONE\x1b[2J\u202e\x85\x9b31m"

    @task
    def raises() -> None:
        print("\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2Jgone")
        raise RuntimeError(FORGED)

    @task
    def waits() -> None:
        for _ in range(6000):
            time.sleep(0.01)
"""
HOSTILE = (
    "a\n2026-01-01 00:00:00,000 INFO task 1 (appx:other) ended: DONE\x1b[2J\x85\x9b31m\u202e\u2066\u200f\u061c\u200b"
)
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")


def steering(text):
    """Return the characters that could steer a terminal or change how a line reads."""
    return {one for one in text if one != "\n" and unicodedata.category(one) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}


CONTROLS = [
    *range(0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0x200B,
    0x200D,
    0x200E,
    0x200F,
]
CONTROLS += [0x061C, 0x2028, 0x2029, 0xFEFF, 0xD800, 0xDFFF, 0xE0001]


@pytest.mark.parametrize("code", CONTROLS, ids=hex)
def test_clean_of_a_control_leaves_one_line_that_steers_nothing(code):
    cleaned = clean(f"a{chr(code)}b")
    assert cleaned in ("a b", "a\N{REPLACEMENT CHARACTER}b")
    assert steering(clean_line_keeping_colours(f"a{chr(code)}b")) <= {"\t"}


@pytest.mark.parametrize("code", [code for code in CONTROLS if not 0xD800 <= code < 0xE000], ids=hex)
def test_escaped_json_means_the_same_and_steers_nothing(code):
    text = json.dumps({"a": f"x{chr(code)}ü"}, ensure_ascii=False, indent=2)
    assert steering(escaped(text)) == set()
    assert json.loads(escaped(text)) == json.loads(text)


def test_clean_keeps_letters_of_all_languages():
    assert clean("Grüße, 東京, עברית, 👍") == "Grüße, 東京, עברית, 👍"


def test_colours_are_kept_and_end_with_their_line():
    assert clean_line_keeping_colours("\x1b[1;31mred\tone") == "\x1b[1;31mred\tone\x1b[0m"
    assert steering(clean_line_keeping_colours("\x1b[2J\x1b]0;t\x07\x1b[5n")) == set()


@pytest.mark.parametrize(
    ("text", "written"),
    [("appx:Import", "appx:Import"), ("a b", '"a b"'), ('x"\n', '"x\\"\\n"'), ("\x85", '"\\u0085"')],
)
def test_quoted_value_of_a_log_line_is_one_word(text, written):
    assert quoted(text) == written


def record_of(*arguments, trace=None):
    return logging.LogRecord("bgsupervisor", logging.ERROR, "", 0, "%s cannot %s", arguments, trace)


def test_formatter_writes_one_line_and_indents_a_traceback():
    try:
        int(HOSTILE)
    except ValueError as problem:
        error = RuntimeError(HOSTILE)
        trace = (RuntimeError, error, problem.__traceback__)
    first, *rest = (
        LineFormatter("%(asctime)s %(levelname)s %(message)s").format(record_of("a", HOSTILE, trace=trace)).split("\n")
    )
    assert RECORD.match(first)
    assert any("INFO task 1" in line for line in rest)
    assert all(line.startswith("    ") or not line for line in rest)
    assert steering("\n".join([first, *rest])) == set()


def test_messages_are_clean_whichever_handler_an_application_has(caplog):
    with caplog.at_level(logging.INFO, "bgsupervisor"):
        logging.getLogger("bgsupervisor").info("%s, %d, %s", HOSTILE, 5, ValueError(HOSTILE))
    message = caplog.records[-1].getMessage()
    assert "\n" not in message
    assert steering(message) == set()
    assert ", 5, " in message


def test_title_of_a_process_is_clean(monkeypatch):
    told = []
    monkeypatch.setattr(titles, "_set", told.append)
    titles.set_title(titles.task_title(5, f"appx:{HOSTILE}\ud800"))
    assert told[0].startswith("bgsupervisor: task 5 ")
    assert steering(told[0]) == set()
    assert "\n" not in told[0]


def test_status_for_the_service_manager_adds_no_line(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        Notifier(address).ready("here\nWATCHDOG=trigger\x1b[2J")
        assert manager.recv(1000).decode() == "READY=1\nSTATUS=here WATCHDOG=trigger\N{REPLACEMENT CHARACTER}[2J"


PRINTS_OURS_ALONE = {
    "output": "it is the room for it",
    "following": "dev's lines, which it cleans as it prints them, with their colours",
    "log": "what a task printed; cleaned on a terminal",
    "doctor": "a colour of ours stands before what is cleaned",
    "run": "a traceback that is cleaned, and indented",
    "request": "a result as JSON, escaped",
    "health": "metrics and the one line, each cleaned before",
    "program": "a sentence without a value",
    "cron": "entries, in which nothing stands that is not printable",
    "systemd": "the same",
}
"""The modules of the command line that print by themselves, and why."""


def test_commands_print_through_what_cleans():
    folder = Path(bgsupervisor.__file__).parent / "cli"
    printing = {
        path.stem
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "click.secho", "sys.stdout.write")
    }
    assert printing == PRINTS_OURS_ALONE.keys()


# ---- the real thing ----


@pytest.fixture
def app(make_app):
    """An application in which a task raised, one was cancelled and one waits, all with texts that forge and steer."""
    app = make_app(SOURCE, spares=1, grace_s=0.2)
    app.supervising = app.start("--log-to-stderr")
    raised = app.service.request("appx:raises", key=HOSTILE)
    app.wait(raised)
    running = app.service.request("appx:waits", key=HOSTILE)
    app.started(running)
    app.service.suspend(running, by=HOSTILE)
    wait_until(lambda: app.service.get(running).suspended_at, "it is stopped")
    cancelled = app.service.request("appx:waits")
    app.started(cancelled)
    app.service.cancel(cancelled, by=HOSTILE)
    app.wait(cancelled)
    app.unknown = app.service.request(f"appx:{HOSTILE}", key=HOSTILE)
    return app


def test_log_and_stderr_of_a_supervisor_hold_no_forged_line_and_steer_nothing(app):
    log = app.state_dir / "logs" / "supervisor.log"
    wait_until(lambda: "CANCELLED" in log.read_text(), "the end is logged")
    for text in (log.read_text(), app.supervising.output.read_text()):
        assert "RAISED" in text
        assert [line for line in text.splitlines() if not RECORD.match(line) and not line.startswith("    ")] == []
        assert not re.search(r"^.{24}INFO task 1 \(appx:other\)", text, re.MULTILINE)
        assert steering(text) == set()


def test_details_of_structured_lines_are_json_that_steers_nothing(app):
    log = app.state_dir / "logs" / "supervisor.log"
    line = wait_until(lambda: re.search(r"task ended: id=1 .* detail=(.*)", log.read_text()), "the end is logged")
    assert "INFO task 1 (appx:other) ended: DONE\x1b[2J\u202e" in json.loads(line[1])


COMMANDS = [
    *(["ps"], ["ps", "--all"], ["ps", "--tree"], ["show", "1"], ["show", "1", "--full"], ["show", "3"], ["why", "1"]),
    *(["why", "2"], ["why", "4"], ["stack", "2"], ["stack", "1"], ["health"], ["health", "--prometheus"], ["doctor"]),
    *(["cancel", "2"], ["retry", "4"], ["prune", "--name", HOSTILE, "--dry-run"], ["request", f"appx:{HOSTILE}"]),
    *(
        ["request", "appx:raises", "--wait", "--timeout-s", "20"],
        ["ps", f"--{HOSTILE}"],
        [HOSTILE],
        ["suspend", "2"],
        ["check"],
    ),
]


@pytest.fixture
def command(app, monkeypatch, capsys):
    """Run a command of the command line in this process, which is fast; return what it printed, stdout first."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bgsupervisor", "--config", str(app.config), *arguments])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr()

    return run


def test_commands_print_nothing_that_steers(command):
    for arguments in COMMANDS:
        out, err = command(*arguments)
        assert out + err, arguments
        assert steering(out + err) == set(), arguments
        assert not re.search(f"^{RECORD.pattern}", f"{out}\n{err}", re.MULTILINE), arguments
    health, _ = command("health")
    assert health.count("\n") == 1
    assert health.count("|") == 1


@pytest.mark.parametrize(
    "arguments", [["ps", "--json"], ["show", "1", "--json"], ["why", "2", "--json"], ["doctor", "--json"]]
)
def test_json_escapes_what_steers_and_means_the_same(command, arguments):
    out, _ = command(*arguments)
    assert steering(out) == set()
    told = json.loads(out)
    if arguments[0] == "ps":
        assert HOSTILE in {one["key"] for one in told}
        assert HOSTILE in {one["suspend_requested_by"] for one in told}


def on_a_terminal(app, *arguments):
    """Return what a command prints on a terminal."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), *arguments],
        env=app.environment(TERM="xterm"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        close_fds=True,
    ) as process:
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while piece := os.read(master, 65536):
                text += piece
        assert process.wait() == 0
    os.close(master)
    return text.decode().replace("\r\n", "\n")


def test_log_on_a_terminal_keeps_colours_alone_and_raw_keeps_all(app):
    plain = on_a_terminal(app, "log", "1")
    first = plain.splitlines()[0]
    assert first.startswith("\x1b[31mred\x1b[0m ")
    assert steering(re.sub(r"\x1b\[\d*m", "", plain)) == set()
    assert "\x1b]0;title\x07 \x1b[2Jgone" in on_a_terminal(app, "log", "1", "--raw")
    assert "\x1b]0;title\x07 \x1b[2Jgone" in app.cli("log", "1").stdout


def test_cleaning_is_loaded_wherever_our_logger_is_used():
    folder = Path(bgsupervisor.__file__).parent
    code = "import bgsupervisor, logging; bgsupervisor.Service; print(logging.getLogger('bgsupervisor').filters)"
    said = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, check=True)
    assert sanitize._Arguments.__name__ in said.stdout
