from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.as_user import NOBODY, as_nobody, needs_root, open_folder

import bgsupervisor
from bgsupervisor.errors import AccessError
from bgsupervisor.ipc import sockets
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.sockets import bind, connect, send_datagram
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.system import users
from bgsupervisor.system.files import open_dir

SOURCE = str(Path(bgsupervisor.__file__).parents[1])
HOLD = """
import subprocess, sys
from pathlib import Path
from bgsupervisor.ipc.lock import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire()
grandchild = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
print(grandchild.pid, flush=True)
input()
"""
READY_S = 20
"""No started Python needs longer; a test that waits so long fails."""


class StoppedClock:
    def __init__(self, now):
        self._now = now

    def now(self):
        return self._now

    def monotonic(self):
        return 0.0


@pytest.fixture
def shared():
    with open_folder() as folder:
        yield folder


@pytest.fixture
def folder_fd(tmp_path):
    fd = open_dir(tmp_path)
    yield fd
    os.close(fd)


@pytest.fixture
def deep(tmp_path):
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    assert len(os.fsencode(folder / "wake.sock")) > 107
    return folder


@pytest.fixture
def umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
def holder(tmp_path):
    """Yield a process that holds the lock and has started a program of its own, and that program's PID."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "supervisor.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": SOURCE},
        text=True,
    )
    grandchild = int(process.stdout.readline())
    yield process, grandchild
    os.kill(grandchild, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=READY_S)


# ---- The folder ------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_documentation():
    state = StateDir(Path("/s"))
    names = [state.lock.name, state.control.name, state.wake.name, state.logs.name, state.fork_server_path(7, 99).name]
    assert names == ["supervisor.lock", "control.sock", "wake.sock", "logs", "forkserver-7-99"]


@pytest.mark.usefixtures("umask")
def test_create_makes_both_folders_0750_whatever_the_umask(tmp_path):
    state = StateDir(tmp_path / "state")
    state.create()
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (state.path, state.logs)] == [0o750, 0o750]


def test_create_keeps_the_setgid_bit_of_a_shared_folder(tmp_path):
    tmp_path.chmod(0o2770)
    state = StateDir(tmp_path / "state")
    state.create()
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (state.path, state.logs)] == [0o2750, 0o2750]


def test_create_leaves_a_present_folder_as_it_is(tmp_path):
    state = StateDir(tmp_path / "state")
    state.path.mkdir(0o700)
    (state.path / "kept").touch()
    state.create()
    state.create()
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
    assert (state.path / "kept").exists()
    assert state.logs.is_dir()


def test_create_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "state").touch()
    with pytest.raises(AccessError, match=r"cannot create .*state: File exists; move the file"):
        StateDir(tmp_path / "state").create()


def test_create_without_a_parent_names_path_user_and_right(tmp_path):
    with pytest.raises(AccessError, match=r"No such file or directory; the folder .*absent, where") as caught:
        StateDir(tmp_path / "absent" / "state").create()
    facts = caught.value
    assert (facts.path, facts.right) == (str(tmp_path / "absent" / "state"), "create")
    assert facts.user == users.user_name(os.geteuid())


@needs_root
def test_create_in_a_folder_of_another_user_names_user_and_right(shared):
    said = as_nobody(StateDir(shared / "state").create)
    assert said.startswith(f"AccessError: user nobody cannot create {shared / 'state'}: Permission denied; ")


def test_the_owner_passes(tmp_path):
    StateDir(tmp_path).check_owner()


@needs_root
def test_another_user_is_refused_and_both_are_named(shared):
    said = as_nobody(StateDir(shared).check_owner)
    assert said.startswith(f"AccessError: {shared} belongs to user root, but this is user nobody; ")


@needs_root
def test_root_is_refused_in_the_folder_of_another_user(tmp_path):
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(AccessError, match="belongs to user nobody, but this is user root") as caught:
        StateDir(tmp_path).check_owner()
    assert (caught.value.user, caught.value.right) == ("root", "write")


def test_the_owner_of_a_missing_folder_is_no_traceback(tmp_path):
    with pytest.raises(AccessError, match=r"cannot read .*absent: No such file"):
        StateDir(tmp_path / "absent").check_owner()


def test_a_user_without_a_name_is_told_by_number():
    assert users.user_name(3_999_999_999) == "3999999999"


# ---- The lock --------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path):
    lock = Lock(tmp_path / "supervisor.lock")
    yield lock
    lock.close()


def test_one_has_the_lock_and_the_next_gets_it_when_it_is_closed(lock, tmp_path):
    second = Lock(tmp_path / "supervisor.lock")
    assert lock.acquire()
    assert not second.acquire()
    lock.close()
    assert second.acquire()
    second.close()


def test_to_acquire_twice_is_to_hold_once(lock, tmp_path):
    assert lock.acquire()
    assert lock.acquire()
    lock.close()
    second = Lock(tmp_path / "supervisor.lock")
    assert second.acquire()
    second.close()


@pytest.mark.usefixtures("umask")
def test_the_file_is_0640_whatever_the_umask_and_not_inherited(lock, tmp_path):
    lock.acquire()
    assert stat.S_IMODE((tmp_path / "supervisor.lock").stat().st_mode) == 0o640
    assert not os.get_inheritable(lock._fd)


def test_a_holder_that_is_killed_frees_the_lock_although_its_program_lives(lock, holder):
    process, grandchild = holder
    assert not lock.acquire()
    assert lock.holder() == process.pid
    process.kill()
    process.wait(timeout=READY_S)
    assert lock.acquire()
    os.kill(grandchild, 0)
    assert lock.holder() == os.getpid()


def test_the_next_holder_replaces_a_longer_note(lock, tmp_path):
    (tmp_path / "supervisor.lock").write_text('{"pid": 123456789012345678, "program": "of a long name"}\n')
    lock.acquire()
    assert (tmp_path / "supervisor.lock").read_text() == f'{{"pid": {os.getpid()}, "program": ""}}\n'


@pytest.mark.parametrize("note", ["", "{", "[]", "7", "{}", '{"pid": "x"}', "\0\0"])
def test_no_readable_note_is_no_holder(lock, tmp_path, note):
    assert lock.holder() is None
    (tmp_path / "supervisor.lock").write_text(note)
    assert lock.holder() is None


def test_the_lock_is_intact_until_its_file_is_removed_or_replaced(lock, tmp_path):
    assert not lock.is_intact()
    lock.acquire()
    assert lock.is_intact()
    (tmp_path / "supervisor.lock").rename(tmp_path / "moved")
    assert not lock.is_intact()
    (tmp_path / "supervisor.lock").touch()
    assert not lock.is_intact()
    (tmp_path / "moved").replace(tmp_path / "supervisor.lock")
    assert lock.is_intact()


def test_a_lock_taken_over_is_no_longer_its_holders(lock, tmp_path):
    path = tmp_path / "supervisor.lock"
    lock.acquire()
    other = Lock(path, program="other")

    assert other.take_over(wait_s=0)

    assert not lock.is_intact()
    assert other.is_intact()
    assert not Lock(path).acquire()
    assert [one.name for one in tmp_path.iterdir()] == ["supervisor.lock"]
    other.close()


def test_whoever_takes_over_waits_until_the_holder_has_left(lock, tmp_path):
    lock.acquire()
    leaving = threading.Timer(0.3, lock.close)
    leaving.start()
    other = Lock(tmp_path / "supervisor.lock")
    began = time.monotonic()

    assert other.take_over(wait_s=READY_S)

    assert 0.2 < time.monotonic() - began < READY_S
    leaving.join()
    other.close()


def test_of_two_that_take_over_at_once_the_later_stays(lock, tmp_path, monkeypatch):
    path = tmp_path / "supervisor.lock"
    lock.acquire()
    earlier, later = Lock(path), Lock(path)
    monkeypatch.setattr(earlier, "_wait_for", lambda *_: later.take_over(wait_s=0))

    assert not earlier.take_over(wait_s=0)

    assert later.is_intact()
    assert not earlier.is_intact()
    later.close()


@pytest.mark.parametrize(("noted", "is_other"), [("", False), ("ours", False), ("theirs", True)])
def test_another_program_is_one_that_was_noted_and_differs(lock, tmp_path, noted, is_other):
    path = tmp_path / "supervisor.lock"
    holder = Lock(path, program=noted)
    holder.acquire()
    assert Lock(path, program="ours").is_of_another_program() == is_other
    holder.close()


def test_a_file_replaced_while_it_was_being_locked_is_locked_again(lock, tmp_path, monkeypatch):
    path = tmp_path / "supervisor.lock"
    opened = lock._open_locked

    def open_then_lose():
        fd = opened()
        monkeypatch.undo()
        path.unlink()
        return fd

    monkeypatch.setattr(lock, "_open_locked", open_then_lose)
    assert lock.acquire()
    assert lock.is_intact()
    assert not Lock(path).acquire()


@needs_root
def test_a_path_that_cannot_be_looked_at_is_not_called_replaced(shared):
    inner = shared / "inner"
    inner.mkdir()
    os.chown(inner, NOBODY, NOBODY)

    def look():
        lock = Lock(inner / "supervisor.lock")
        lock.acquire()
        inner.chmod(0)
        return lock.is_intact()

    assert as_nobody(look) == "True"


@needs_root
def test_a_lock_that_may_not_be_written_names_user_and_path(shared):
    path = shared / "supervisor.lock"
    assert as_nobody(Lock(path).acquire).startswith(f"AccessError: user nobody cannot write {path}: Permission denied")


def test_age_counts_from_the_last_touch_and_is_never_negative(tmp_path):
    path = tmp_path / "supervisor.lock"
    lock = Lock(path, StoppedClock(datetime(2030, 1, 1, 0, 1, 30, tzinfo=UTC)))
    assert lock.age_s() is None
    lock.acquire()
    new_year = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    os.utime(path, (new_year, new_year))
    assert lock.age_s() == pytest.approx(90)
    os.utime(path, (new_year + 1000, new_year + 1000))
    assert lock.age_s() == 0
    lock.close()


def test_touch_sets_the_time_of_the_locked_file(lock, tmp_path):
    lock.touch()
    assert not (tmp_path / "supervisor.lock").exists()
    lock.acquire()
    os.utime(tmp_path / "supervisor.lock", (0, 0))
    assert lock.age_s() > 1_000_000
    lock.touch()
    assert lock.age_s() < 60


# ---- Sockets ---------------------------------------------------------------------------------------------------


def test_a_stream_in_a_deep_folder_can_be_dialled_by_path_and_by_descriptor(deep):
    fd = open_dir(deep)
    with bind(fd, "control.sock", socket.SOCK_STREAM, 0o600) as listening:
        for folder in (deep, fd):
            with connect(folder, "control.sock", socket.SOCK_STREAM) as dialled:
                peer, _ = listening.accept()
                dialled.send(b"hello")
                assert peer.recv(10) == b"hello"
                peer.close()
    os.close(fd)


def test_a_wake_up_wake_ups_near_and_deep(tmp_path, deep):
    for folder in (tmp_path, deep):
        fd = open_dir(folder)
        with bind(fd, "wake.sock", socket.SOCK_DGRAM, 0o660) as wake_ups:
            assert send_datagram(folder / "wake.sock")
            assert send_datagram(folder / "wake.sock", b"why")
            assert [wake_ups.recv(10), wake_ups.recv(10)] == [b"", b"why"]
        os.close(fd)


@pytest.mark.usefixtures("umask")
def test_a_bound_socket_has_its_mode_is_non_blocking_and_not_inherited(folder_fd, tmp_path):
    with bind(folder_fd, "wake.sock", socket.SOCK_DGRAM, 0o660) as wake_ups:
        assert stat.S_IMODE((tmp_path / "wake.sock").stat().st_mode) == 0o660
        assert not wake_ups.get_inheritable()
        assert wake_ups.gettimeout() == 0
    with (
        bind(folder_fd, "control.sock", socket.SOCK_STREAM, 0o600),
        connect(tmp_path, "control.sock", socket.SOCK_STREAM) as dialled,
    ):
        assert not dialled.get_inheritable()
        assert dialled.gettimeout() == 0


def test_bind_replaces_what_is_left_behind_and_leaves_no_temporary_name(folder_fd, tmp_path):
    bind(folder_fd, "control.sock", socket.SOCK_STREAM, 0o600).close()
    (tmp_path / f".control.sock.{os.getpid()}").touch()
    with bind(folder_fd, "control.sock", socket.SOCK_STREAM, 0o600):
        connect(folder_fd, "control.sock", socket.SOCK_STREAM).close()
    assert list(tmp_path.iterdir()) == [tmp_path / "control.sock"]


def test_bind_that_fails_leaves_no_temporary_name(folder_fd, tmp_path):
    (tmp_path / "control.sock").mkdir()
    with pytest.raises(IsADirectoryError):
        bind(folder_fd, "control.sock", socket.SOCK_STREAM, 0o600)
    assert list(tmp_path.iterdir()) == [tmp_path / "control.sock"]


def test_bind_survives_the_folder_being_renamed(tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    fd = open_dir(before)
    before.rename(tmp_path / "after")
    with bind(fd, "wake.sock", socket.SOCK_DGRAM, 0o660):
        assert send_datagram(tmp_path / "after" / "wake.sock")
    os.close(fd)


def test_to_dial_nobody_says_which_kind_of_nobody(folder_fd, tmp_path, deep):
    bind(folder_fd, "control.sock", socket.SOCK_STREAM, 0o600).close()
    for folder in (folder_fd, tmp_path):
        with pytest.raises(ConnectionRefusedError):
            connect(folder, "control.sock", socket.SOCK_STREAM)
    for folder in (folder_fd, tmp_path, deep, deep / "absent"):
        with pytest.raises(FileNotFoundError):
            connect(folder, "absent.sock", socket.SOCK_STREAM)


def test_to_dial_a_full_queue_does_not_block(folder_fd, monkeypatch):
    monkeypatch.setattr(sockets, "LISTEN_BACKLOG", 0)
    with (
        bind(folder_fd, "control.sock", socket.SOCK_STREAM, 0o600),
        connect(folder_fd, "control.sock", socket.SOCK_STREAM),
        pytest.raises(BlockingIOError),
    ):
        connect(folder_fd, "control.sock", socket.SOCK_STREAM)


def test_a_wake_up_that_nobody_hears_is_false_and_no_error(folder_fd, tmp_path, deep):
    bind(folder_fd, "wake.sock", socket.SOCK_DGRAM, 0o660).close()
    (tmp_path / "file").touch()
    for path in ("wake.sock", "file", "absent", "absent/wake.sock", deep / "absent", deep / "absent" / "absent"):
        assert not send_datagram(tmp_path / path), path


def test_a_wake_up_with_a_full_queue_is_false_and_does_not_block(folder_fd, tmp_path):
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 2
    with bind(folder_fd, "wake.sock", socket.SOCK_DGRAM, 0o660):
        notified = [send_datagram(tmp_path / "wake.sock") for _ in range(limit)]
    assert notified[0]
    assert not notified[-1]


@needs_root
def test_a_wake_up_that_this_user_may_not_wake_up_is_false(shared):
    fd = open_dir(shared)
    with bind(fd, "wake.sock", socket.SOCK_DGRAM, 0o660):
        assert as_nobody(lambda: send_datagram(shared / "wake.sock")) == "False"
    os.close(fd)


def test_a_system_without_unix_sockets_wake_ups_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    assert not send_datagram(tmp_path / "wake.sock")


def test_ringing_and_dialling_keep_no_descriptor_open(folder_fd, tmp_path, deep):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for folder in (tmp_path, deep):
        send_datagram(folder / "absent.sock")
        with pytest.raises(FileNotFoundError):
            connect(folder, "absent.sock", socket.SOCK_STREAM)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_module_imports_where_there_is_neither_fcntl_nor_pwd():
    code = "import sys; sys.modules['fcntl'] = sys.modules['pwd'] = None; import bgsupervisor.ipc.statedir"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": SOURCE}, check=True, timeout=READY_S)
