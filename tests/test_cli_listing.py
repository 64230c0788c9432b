"""What `ps` shows, on a terminal of any width and in a pipe; rows are made by hand, so that each case is exact."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from rich.cells import cell_len

from bgsupervisor import processes
from bgsupervisor.cli import text

LIMIT_S = 20.0
RUNNING = {"status": "START", "pid": 4711, "start_ticks": 1, "slot": 3}
"""A process that cannot be: no other one started at the first tick of this boot."""
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def app(make_app):
    return make_app("")


def test_columns_that_say_nothing_are_left_out(app):
    app.service.request("appx:add")

    assert app.cli("ps").stdout.splitlines() == ["ID TASK STATUS  PROGRESS", " 1 add  REQUEST position 1"]


def test_in_a_pipe_every_row_has_every_field(app):
    _fill(app)
    lines = app.cli("ps").stdout.splitlines()

    assert lines[0].split() == ["ID", "TASK", "KEY", "STATUS", "REASON", "PID", "TIME", "CPU", "MEM", "PROGRESS"]
    statuses = [re.split(" +", line.strip())[3] for line in lines[1:]]
    assert statuses == ["START", "START", "REQUEST", "REQUEST", "DONE", "INTERRUPTED"]
    assert "\x1b" not in "".join(lines)
    assert any(line.endswith("ValueError: " + "a very long story " * 20 + "end") for line in lines), "nothing is cut"


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 200])
def test_on_a_terminal_no_row_is_wider_than_it(app, columns, rich):
    _fill(app)
    _supervise(app)
    shown = _on_terminal(app, "ps", columns=columns, rich=rich)
    lines = _table(shown)

    assert len(lines) == 7
    assert max(cell_len(line) for line in lines) <= columns
    assert ("\x1b[" in shown) is rich


def test_eighty_columns_show_who_how_long_and_how_far(app):
    _fill(app)
    _supervise(app)
    header, first = _table(_on_terminal(app, "ps"))[:2]

    assert header.split() == ["ID", "TASK", "KEY", "STATUS", "PID", "TIME", "CPU", "MEM", "PROGRESS"]
    for word in ("ImportInvoi", "invoice-7", "START", "4711", "99%", "120M", "━━╸── ", " 50%"):
        assert word in first, first


def test_a_wide_terminal_shows_all_and_a_longer_bar(app):
    _fill(app)
    _supervise(app)
    header, first = _table(_on_terminal(app, "ps", columns=160))[:2]

    assert "REASON" in header
    assert "━━━━━─────  50% row 5 of 10" in first


def test_live_tasks_come_first_in_the_order_in_which_they_start_then_what_ended_last(app):
    later = app.service.request("a:later", delay_s=3000)
    sooner = app.service.request("a:sooner", delay_s=300)
    low = app.service.request("a:low")
    high = app.service.request("a:high", priority=9)
    old = [app.service.request("a:old") for _ in range(12)]
    for number, handle in enumerate(old):
        _set(app, handle, status="DONE", ended_at=_ago(100 - number))
    running = app.service.request("a:running")
    _set(app, running, **RUNNING, started_at=_ago(1), heartbeat_at=_ago(0))
    expected = [running, high, low, sooner, later, *reversed(old[2:])]

    assert _ids(app) == [handle.id for handle in expected]
    lines = app.cli("ps").stdout.splitlines()
    told = ["position 1", "position 2", "due in 4 min", "due in 49 min"]
    assert all(line.endswith(words) for line, words in zip(lines[2:6], told, strict=True)), lines
    assert _ids(app, "--all") == sorted((handle.id for handle in [*expected, *old[:2]]), reverse=True)
    assert _ids(app, "--limit", "2") == [running.id, high.id]
    assert _ids(app, "--status", "done") == [handle.id for handle in reversed(old)]
    assert _ids(app, "--status", "DONE", "--status", "START", "--limit", "3") == [running.id, old[11].id, old[10].id]


def test_names_and_keys_select(app):
    one = app.service.request("shop.tasks:Import", key="a")
    two = app.service.request("blog.tasks:Import", key="b")
    app.service.request("shop.tasks:Export", key="a")

    assert _ids(app, "--name", "shop.tasks:Import") == [one.id]
    assert _ids(app, "--name", "Import") == [one.id, two.id]
    assert _ids(app, "--name", "Import", "--key", "b") == [two.id]
    text = app.cli("ps").stdout
    assert "shop.tasks:Import" in text, "Import alone would name two tasks"
    assert "tasks:Export" not in text
    assert app.cli("ps", "--name", "nothing").stderr.endswith("no task matches\n")


def test_json_has_the_columns_of_the_table_without_what_may_be_large_or_secret(app):
    _fill(app)
    found = json.loads(app.cli("ps", "--json").stdout)
    columns = app.service.ledger.store.tables.Task._meta.sorted_field_names
    expected = [name for name in columns if name not in {"data", "result", "error", "stack"}] + [
        "waiting_for",
        "unresponsive",
        "unreadable",
    ]

    assert all(list(one) == expected for one in found)
    assert found[0]["requested_at"].endswith("+00:00")
    assert found[0]["waiting_for"] is None
    assert "hunter2" not in json.dumps(found)


def test_a_child_that_is_not_heard_is_unresponsive_only_while_somebody_listens(app):
    handle = app.service.request("appx:add")
    began = time.monotonic()
    _set(app, handle, **RUNNING, started_at=_ago(60), heartbeat_at=_ago(25.5))

    told = int(re.search(r"last heard (\d+) s ago", app.cli("ps").stdout)[1])
    assert 25 <= told <= 25.5 + time.monotonic() - began
    assert json.loads(app.cli("ps", "--json").stdout)[0]["unresponsive"] is False
    _supervise(app)
    silent = int(re.search(r"unresponsive (\d+) s", app.cli("ps").stdout)[1])
    assert 25 <= silent <= 26 + time.monotonic() - began
    assert json.loads(app.cli("ps", "--json").stdout)[0]["unresponsive"] is True
    _set(app, handle, heartbeat_at=_ago(0))
    assert "unresponsive" not in app.cli("ps").stdout


def test_a_process_that_is_gone_is_not_called_running_while_nobody_supervises(app):
    handle = app.service.request("appx:add")
    own = processes.own_identity("here")
    facts = {"host": own.host, "boot_id": own.boot_id, "pid_ns": own.pid_ns, "pid": own.pid}
    _set(
        app,
        handle,
        status="START",
        started_at=_ago(9),
        heartbeat_at=_ago(9),
        start_ticks=own.start_ticks + 1,
        slot=3,
        **facts,
    )

    assert "its process is gone" in app.cli("ps").stdout


def test_the_absence_of_a_supervisor_is_told_with_its_time(app):
    app.service.request("appx:add")
    assert "no supervisor has been seen yet; start one with `bgsupervisor run`" in app.cli("ps").stderr

    _supervise(app, heartbeat_at=_ago(20))
    assert "no supervisor" not in app.cli("ps").stderr
    _supervise(app, heartbeat_at=_ago(46))
    assert re.search(r"no supervisor has been seen since .*\d\d:\d\d:\d\d; start", app.cli("ps").stderr)
    _supervise(app, start_ticks=1)
    assert "no supervisor has been seen since" in app.cli("ps").stderr, "its process is another one now"


def test_a_supervisor_that_lives_and_cannot_write_is_told_from_one_that_is_not_there(app):
    app.service.request("appx:add")
    lock = app.state_dir / "supervisor.lock"
    app.state_dir.mkdir()
    lock.write_text(json.dumps({"pid": os.getpid()}))
    told = app.cli("ps").stderr
    assert f"a supervisor, PID {os.getpid()}, is there and has written nothing yet" in told
    assert "start one" not in told
    assert "no supervisor is alive" not in app.cli("why", "1").stdout

    _supervise(app, heartbeat_at=_ago(50))
    lock.touch()
    told = app.cli("ps").stderr
    assert re.search(
        rf"the supervisor, PID {os.getpid()}, lives but could not write to the database since .*\d\d:\d\d", told
    )
    assert "no supervisor" not in told
    _supervise(app, heartbeat_at=_ago(0))
    assert "could not write" not in app.cli("ps").stderr

    old = time.time() - 61
    os.utime(lock, (old, old))
    _supervise(app, heartbeat_at=_ago(50))
    told = app.cli("ps").stderr
    assert re.search(
        rf"the supervisor, PID {os.getpid()}, has stood still since .*\d\d:\d\d:\d\d: it hangs, or the", told
    )
    assert "could not write" not in told
    _supervise(app, heartbeat_at=_ago(50), start_ticks=1)
    assert "no supervisor has been seen since" in app.cli("ps").stderr, "its process is another one now"
    lock.write_text(json.dumps({"pid": 2**22 - 1}))
    _supervise(app, start_ticks=1)
    assert "no supervisor has been seen since" in app.cli("ps").stderr


def test_a_supervisor_that_was_killed_is_not_there_though_nobody_has_reaped_it(app):
    supervisor = app.start()
    app.service.request("appx:add")
    supervisor.process.kill()
    os.waitid(os.P_PID, supervisor.process.pid, os.WEXITED | os.WNOWAIT)
    told = app.cli("ps").stderr
    assert "is there" not in told
    assert "no supervisor has been seen since" in told


def test_what_keeps_everybody_from_writing_is_told(app):
    app.service.request("appx:add")
    with app.database.locked():
        told = app.cli("ps", "--json")
        assert "is locked by another writer for longer than 1 s; try again. Bodies go on" in told.stderr
        assert len(json.loads(told.stdout)) == 1
    assert "locked" not in app.cli("ps").stderr


def test_code_that_is_missing_or_does_not_load_is_told(app):
    app.service.request("appx:absent")
    trace = "Traceback (most recent call last):\n  File 'x', line 1\nModuleNotFoundError: No module named 'smtp'\n"
    _supervise(app, catalogue='{"appx:add":{}}', code_error=json.dumps([{"module": "mail", "error": trace}]))
    done = app.cli("ps")

    assert "code missing" in done.stdout
    sentence = "module mail failed to load: ModuleNotFoundError: No module named 'smtp'; see `bgsupervisor check`"
    assert sentence in done.stderr

    _supervise(app, catalogue="{}", started_at=_ago(1))
    assert "code missing" not in app.cli("ps").stdout, "it is still loading"
    _supervise(app, catalogue="{}", started_at=_ago(100))
    assert "code missing" in app.cli("ps").stdout


def test_a_wish_to_end_it_is_seen(app):
    handle = app.service.request("appx:add")
    _set(app, handle, **RUNNING, started_at=_ago(1), heartbeat_at=_ago(0), cancel_requested_at=_ago(0))
    assert "cancel requested" in app.cli("ps").stdout

    _set(app, handle, ending="TIMED_OUT")
    assert "ending: TIMED_OUT" in app.cli("ps").stdout


def test_foreign_text_cannot_steer_the_terminal_nor_break_a_line(app):
    handle = app.service.request("appx:add", key="a\x1b[31mb\nc")
    _set(
        app,
        handle,
        **RUNNING,
        started_at=_ago(1),
        heartbeat_at=_ago(0),
        message="one\r\n\x1b]0;title\x07two\u202ethree",
    )
    out = app.cli("ps").stdout

    assert len(out.splitlines()) == 2
    assert not set(out) & {"\x1b", "\x07", "\r", "\u202e"}
    assert not {"\x07", "\u202e"} & set(app.cli("show", "1").stdout)


def test_counts_and_warnings_are_no_part_of_the_rows(app):
    _fill(app)
    done = app.cli("ps")

    assert "REQUEST 2 · START 2; in 24 h DONE 1 · INTERRUPTED 1" in done.stderr
    assert "·" not in done.stdout


def test_what_is_not_shown_is_told(app):
    app.service.request_many("appx:add", [{} for _ in range(130)])
    done = app.cli("ps")

    assert len(done.stdout.splitlines()) == 101
    assert "only 100 of them are shown" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "words", "short"),
    [
        (0, "0 s", "0ms"),
        (0.25, "0 s", "250ms"),
        (9.96, "9 s", "10.0s"),
        (59.9, "59 s", "59s"),
        (725, "12 min", "12m05s"),
        (11520, "3 h 12 min", "3h12m"),
        (86400, "1 day", "1d00h"),
        (442800, "5 days 3 h", "5d03h"),
        (-5, "0 s", "0ms"),
    ],
)
def test_durations_read_well_and_stay_short(seconds, words, short):
    assert (text.duration(seconds), text.short_duration(seconds)) == (words, short)


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [(0, "0K"), (2048, "2K"), (1_048_100, "1M"), (125_829_120, "120M"), (1_288_490_188, "1.2G"), (2**45, "32T")],
)
def test_sizes_stay_short(size_bytes, expected):
    assert text.size(size_bytes) == expected


@pytest.mark.parametrize("columns", range(8))
def test_cut_text_never_takes_more_columns_than_it_may(columns):
    for whole in ("", "abc", "abcdefghij", "日本語テキスト", "e\u0301a\u0301o\u0301u\u0301", "a日b本c"):
        shown = text.cut(whole, columns)
        assert cell_len(shown) <= columns
        assert shown == whole or shown.endswith("…") or columns == 0


def _ago(seconds):
    return datetime.now(UTC) - timedelta(seconds=seconds)


def _set(app, handle, **columns):
    store = app.service.ledger.store
    with store.writing():
        store.tables.Task.update(**columns).where(store.tables.Task.id == int(handle)).execute()


def _supervise(app, **columns):
    """Have a row of a supervisor that lives: this process."""
    own = processes.own_identity("here")
    row = {
        "host": own.host,
        "boot_id": own.boot_id,
        "pid_ns": own.pid_ns,
        "pid": own.pid,
        "start_ticks": own.start_ticks,
        "started_at": _ago(10),
        "heartbeat_at": _ago(0),
        "slots": 16,
        "version": "0.1.0",
        "catalogue": '{"appx:ImportInvoices":{},"appx:add":{}}',
    }
    store = app.service.ledger.store
    with store.writing():
        store.tables.Supervisor.delete().execute()
        store.tables.Supervisor.insert(**{**row, **columns}).execute()


def _fill(app):
    """Have one task of each kind, with everything that makes rows wide."""
    request = app.service.request
    first, wide = request("appx:ImportInvoices", key="invoice-7"), request("appx:日本語", key="鍵 " * 20)
    request("appx:add", {"password": "hunter2"})
    request("appx:add", delay_s=3000)
    done, failed = request("appx:add", key="short"), request("appx:add")
    running = {**RUNNING, "started_at": _ago(83), "heartbeat_at": _ago(0), "cpu_percent": 99.2}
    message = "row 5 of 10, then the other ones"
    _set(app, first, **running, rss_bytes=125_829_120, progress_done=5, progress_total=10, message=message)
    _set(
        app,
        wide,
        **{**running, "pid": 4194304},
        rss_bytes=2**40,
        progress_done=1,
        progress_total=10,
        message="請求書を読み込む" * 9,
    )
    _set(app, done, status="DONE", started_at=_ago(9), ended_at=_ago(5))
    detail = "ValueError: " + "a very long story " * 20 + "end"
    _set(app, failed, status="INTERRUPTED", reason="RAISED", detail=detail, started_at=_ago(8), ended_at=_ago(7))


def _ids(app, *arguments):
    return [one["id"] for one in json.loads(app.cli("ps", "--json", *arguments).stdout)]


def _table(shown):
    """Return the lines of the table, without colours: all from the header on."""
    lines = [ESCAPES.sub("", line) for line in shown.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("ID "))
    return lines[start:]


def _on_terminal(app, *arguments, columns=80, rich=True):
    """Run a command on a terminal; return what it shows there, of stderr too."""
    environment = app.environment(COLUMNS=str(columns), TERM="xterm-256color")
    if not rich:
        hidden = app.folder / "without-rich"
        hidden.mkdir(exist_ok=True)
        (hidden / "rich.py").write_text("raise ImportError('not installed here')\n")
        environment["PYTHONPATH"] = str(hidden)
    command = [sys.executable, "-m", "bgsupervisor", *arguments]
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(command, cwd=app.folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = _read_all(ours)
        assert process.wait(LIMIT_S) == 0, shown
    finally:
        os.close(ours)
    return shown.replace("\r\n", "\n")


def _read_all(descriptor):
    pieces = []
    deadline = time.monotonic() + LIMIT_S
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while time.monotonic() < deadline:
            if select.select([descriptor], [], [], 0.1)[0]:
                pieces.append(os.read(descriptor, 65536))
    return b"".join(pieces).decode()
