"""Log files: their names, their limits, and reading them while they are written."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bgsupervisor.clock import SystemClock
from bgsupervisor.system import logs, syscalls

MIB = 1 << 20
WRITER = "import sys\nfor n in range({lines}):\n    print('line', n, 'x' * 1000)\nprint('the end')\n"


class ScriptedClock(SystemClock):
    """Does one step of a script at each sleep, so that a test needs no time."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def sleep(self, seconds):
        assert seconds <= 0.1
        self.steps.pop(0)()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "task-1-1.log"


def append(path, text):
    fd = logs.open_for_append(path)
    os.write(fd, text.encode())
    os.close(fd)


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def room(path):
    return path.stat().st_blocks * 512


def with_hole(path, first, hole, last):
    """Write a log whose middle is cut out; sizes in blocks of 4096 bytes, texts repeat to fill."""
    path.write_bytes((first * 4096)[:4096] + b"\0" * hole * 4096 + last)
    with path.open("r+b") as file:
        if not syscalls.punch_hole(file.fileno(), 4096, hole * 4096):
            pytest.skip("this file system has no holes")


def test_a_log_is_found_before_and_after_its_task_ended(tmp_path):
    facts = {"id": 7, "attempt": 2, "pid": 100, "start_ticks": 5}
    assert logs.find(tmp_path, **facts) is None
    running = logs.process_log(tmp_path, 100, 5)
    running.touch()
    assert logs.find(tmp_path, **facts) == running
    ended = running.rename(logs.task_log(tmp_path, 7, 2))
    assert logs.find(tmp_path, **facts) == ended
    assert [running.name, ended.name] == ["process-100-5.log", "task-7-2.log"]
    assert logs.find(tmp_path, id=8, attempt=1, pid=None, start_ticks=None) is None


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_log_is_readable_for_owner_and_group_whatever_the_umask(log, umask):
    before = os.umask(umask)
    try:
        fd = logs.open_for_append(log)
    finally:
        os.umask(before)
    assert log.stat().st_mode & 0o777 == 0o640
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_second_opening_appends(log):
    append(log, "one\n")
    append(log, "two\n")
    assert log.read_text() == "one\ntwo\n"


def test_thirty_megabytes_stay_bounded_and_keep_their_first_and_last_lines(log):
    limit = MIB
    fd = logs.open_for_append(log)
    with subprocess.Popen([sys.executable, "-c", WRITER.format(lines=30_000)], stdout=fd) as writer:
        while writer.poll() is None:
            logs.bound(fd, limit)
        logs.bound(fd, limit)
    os.close(fd)
    assert writer.returncode == 0
    assert room(log) <= limit
    if log.stat().st_size < 30 * 10**6:
        pytest.skip("this file system has no holes")
    text = "".join(logs.read(log))
    assert text.startswith("line 0 x")
    assert text.endswith("\nthe end\n")
    assert text.count(" left out ...") == 1
    assert logs.tail(log, 2) == ["line 29999 " + "x" * 1000, "the end"]


def test_a_log_within_its_limit_is_left_alone(log):
    append(log, "x" * 8192)
    assert not logs.bound(log, 64 * 1024)
    assert log.read_text() == "x" * 8192


def test_a_sparse_log_is_judged_by_its_room_not_its_size(log):
    log.touch()
    os.truncate(log, 100 * MIB)
    assert not logs.bound(log, MIB)


def test_without_holes_the_first_quarter_remains_and_the_writer_goes_on(log, monkeypatch):
    monkeypatch.setattr(syscalls, "punch_hole", lambda *_: False)
    fd = logs.open_for_append(log)
    os.write(fd, b"first\n" + b"x" * MIB)
    assert logs.bound(log, MIB // 2)
    os.write(fd, b"\nlast\n")
    os.close(fd)
    assert log.stat().st_size == MIB // 8 + 6
    assert logs.tail(log, 1) == ["last"]
    assert log.read_text().startswith("first\n")


def test_the_cut_is_told_in_one_line_of_its_own(log):
    with_hole(log, b"begun ", 3, b"rest\nlast\n")
    text = "".join(logs.read(log))
    assert "\n... 12 KiB left out ...\nrest\nlast\n" in text
    assert "\0" not in text


def test_a_hole_at_the_end_is_no_text(log):
    append(log, "one\n")
    os.truncate(log, MIB)
    assert "".join(logs.read(log)).startswith("one\n")
    assert logs.tail(log, 5, max_bytes=4096) == []


def test_a_divided_character_does_no_harm(log):
    with_hole(log, "é".encode()[:1] * 4096, 1, "é".encode()[1:] + b" end\n")
    assert logs.tail(log, 1) == ["\N{REPLACEMENT CHARACTER} end"]
    assert "".join(logs.read(log)).endswith("\n\N{REPLACEMENT CHARACTER} end\n")


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        ("", 3, []),
        ("one", 3, ["one"]),
        ("one\n\n", 3, ["one", ""]),
        ("one\ntwo\nthree\n", 2, ["two", "three"]),
        ("one\n", 0, []),
    ],
)
def test_tail_gives_the_last_lines(log, text, lines, expected):
    append(log, text)
    assert logs.tail(log, lines) == expected


def test_tail_looks_at_no_more_than_it_may(log):
    append(log, "x" * MIB + "\nlast\n")
    assert [len(line) for line in logs.tail(log, 10, max_bytes=106)] == [100, 4]


def test_following_survives_the_renaming_of_the_log(tmp_path):
    running, ended = logs.process_log(tmp_path, 100, 5), logs.task_log(tmp_path, 1, 1)
    over = []
    clock = ScriptedClock(
        lambda: append(running, "one\ntw"),
        lambda: append(running, "o\n"),
        lambda: running.rename(ended),
        lambda: append(running, "of the next task\n"),
        lambda: append(ended, "three\n"),
        lambda: (append(ended, "four\n"), over.append(True)),
    )
    followed = logs.follow(
        lambda: logs.find(tmp_path, id=1, attempt=1, pid=100, start_ticks=5), lambda: bool(over), clock
    )
    assert "".join(followed) == "one\ntwo\nthree\nfour\n"
    assert clock.steps == []


def test_following_begins_at_the_beginning_and_puts_characters_together(log):
    append(log, "before\n")
    letter = "é".encode()
    ends = iter([False, True])

    def write_rest():
        with log.open("ab") as file:
            file.write(letter[1:] + b"\n")

    with log.open("ab") as file:
        file.write(letter[:1])
    followed = logs.follow(lambda: log, lambda: next(ends), ScriptedClock(write_rest))
    assert "".join(followed) == "before\né\n"


def test_following_a_task_without_a_log_ends_with_it(tmp_path):
    ends = iter([False, True])
    clock = ScriptedClock(lambda: None)
    assert "".join(logs.follow(lambda: tmp_path / "missing", lambda: next(ends), clock)) == ""


def test_following_tells_what_was_cut_out_ahead_of_it(log):
    ends = iter([False, True])
    append(log, "one\n")

    def grow():
        with_hole(log, b"one\n", 2, b"last\n")

    text = "".join(logs.follow(lambda: log, lambda: next(ends), ScriptedClock(grow)))
    assert text.endswith("... 8 KiB left out ...\nlast\n")


def test_a_follower_that_is_left_closes_the_file(log):
    append(log, "one\n")
    before = open_files()
    followed = logs.follow(lambda: log, lambda: False, ScriptedClock())
    assert list(itertools.islice(followed, 1)) == ["one\n"]
    followed.close()
    assert open_files() == before
