"""The system calls that Python lacks, against the running kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bgsupervisor.errors import UnsupportedSystem
from bgsupervisor.system import syscalls
from bgsupervisor.system.syscalls import FileWatch, is_child_subreaper, pidfd_exit, punch_hole, set_child_subreaper

MIB = 1 << 20


@pytest.fixture
def watched(tmp_path):
    path = tmp_path / "watched"
    path.write_text("one")
    watch = FileWatch(path)
    yield path, watch
    watch.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def is_readable(watch):
    return bool(select.select([watch], [], [], 0)[0])


def append(path):
    with path.open("a") as file:
        file.write("two")


@pytest.mark.parametrize(
    "change",
    [append, lambda path: path.rename(path.with_name("other")), lambda path: path.unlink(), lambda p: p.chmod(0o600)],
    ids=["write", "rename", "unlink", "chmod"],
)
def test_a_watch_becomes_readable_when_its_file_changes(watched, change):
    path, watch = watched
    assert not is_readable(watch)
    change(path)
    assert is_readable(watch)
    assert watch.drain()


def test_a_drained_watch_is_silent_and_never_blocks(watched):
    path, watch = watched
    append(path)
    assert watch.drain()
    assert not watch.drain()
    assert not is_readable(watch)


def test_a_watch_needs_its_file(tmp_path):
    before = open_files()
    with pytest.raises(FileNotFoundError) as raised:
        FileWatch(tmp_path / "missing")
    assert raised.value.filename == str(tmp_path / "missing")
    assert open_files() == before


def test_a_watch_is_not_inherited_and_closes_twice(watched):
    _, watch = watched
    assert not os.get_inheritable(watch.fileno())
    watch.close()
    watch.close()
    assert watch.fileno() == -1


def test_a_punched_hole_frees_blocks_and_keeps_the_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * MIB)
    with path.open("r+b") as file:
        if not punch_hole(file.fileno(), 4096, MIB - 8192):
            pytest.skip("this file system has no holes")
    assert path.stat().st_size == MIB
    assert path.stat().st_blocks * 512 < MIB // 2
    assert path.read_bytes()[4095:4097] == b"x\0"


def test_a_hole_in_what_is_not_writable_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file"):
        punch_hole(file.fileno(), 0, 4096)


def test_a_file_system_without_holes_is_told_from_an_error(monkeypatch, tmp_path):
    answers = [errno.EINTR, errno.EOPNOTSUPP]

    def fallocate(*arguments):
        ctypes.set_errno(answers.pop(0))
        return -1

    monkeypatch.setattr(syscalls, "_libc", lambda: SimpleNamespace(fallocate64=fallocate))
    assert punch_hole(0, 0, 4096) is False
    assert answers == []


def test_a_subreaper_becomes_the_parent_of_orphans():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        set_child_subreaper()
        middle = os.fork()
        if middle == 0:
            if os.fork() == 0:
                os.read(reading, 1)  # until the test has looked
            os._exit(0)
        os.waitpid(middle, 0)
        os.write(writing, b"x")
        orphan, _ = os.wait()
        os._exit(7 if is_child_subreaper() and orphan > 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    os.close(reading)
    os.close(writing)
    assert not is_child_subreaper()


@pytest.mark.parametrize(("ending", "status"), [("exit", 3 << 8), ("kill", signal.SIGKILL)])
def test_a_pidfd_tells_the_exit_only_after_the_reaping(ending, status):
    child = os.fork()
    if child == 0:
        if ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    pidfd = os.pidfd_open(child)
    select.select([pidfd], [], [], 10)
    assert pidfd_exit(pidfd) is None
    os.waitpid(child, 0)
    known = pidfd_exit(pidfd)
    os.close(pidfd)
    if known is None:
        pytest.skip("this kernel keeps no exit for a pidfd (before 6.15)")
    assert known == status


def test_what_is_no_pidfd_has_no_exit():
    with open(os.devnull) as file:  # noqa: PTH123 - a descriptor is all it takes
        assert pidfd_exit(file.fileno()) is None


def test_another_system_is_named(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    syscalls._libc.cache_clear()
    with pytest.raises(UnsupportedSystem, match="darwin"):
        set_child_subreaper()
    syscalls._libc.cache_clear()
