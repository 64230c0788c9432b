"""Files, folders and sockets of the state directory, and the database's file: which user may do what with them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.app import wait_until
from support.as_user import NOBODY, as_nobody, needs_root, open_folder
from support.users import COMMON, WEB, as_user, ask_as, their_python

from bgsupervisor import Service, Status
from bgsupervisor.config import load
from bgsupervisor.database import connection_limit
from bgsupervisor.doctor import Grade, Machine, Site, files, system
from bgsupervisor.errors import AccessError
from bgsupervisor.ipc import exit_journal
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.messages import Exited, ProcessRef
from bgsupervisor.ipc.sockets import connect
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.supervisor import housekeeping
from bgsupervisor.system import logs
from bgsupervisor.system.files import NotOwnFile, open_dir, open_own, open_own_dir
from bgsupervisor.system.fingerprint import Fingerprint, write_fingerprint
from bgsupervisor.worker import wait_manager
from bgsupervisor.worker.wait_client import WakeUps

__all__ = ["their_python"]

SOURCE = """
    import os
    from bgsupervisor import current, task

    @task
    def hello() -> int:
        return os.getuid()

    @task
    def waits(id: int) -> None:
        current().wait_for(id, "never")

    @task
    def sleeps() -> None:
        import time
        time.sleep(60)
"""


class RunsCode:
    """Its pickle makes a file in the process that unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def umask():
    """Have files made by default as under the shipped unit."""
    before = os.umask(0o007)
    yield
    os.umask(before)


@pytest.fixture
def folder():
    """A state directory that every user may enter, as root's."""
    with open_folder() as outer:
        state = StateDir(outer / "state")
        state.create()
        state.path.chmod(0o755)
        yield state.path


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


def plant(path, kind, target):
    """Put at *path* what another user could have put there."""
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("planted")
        os.chown(path, NOBODY, NOBODY)


# ---- files ----


@needs_root
@pytest.mark.parametrize("kind", ["link", "pipe", "foreign file"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND | os.O_CREAT])
def test_open_own_of_what_others_may_have_planted_raises(tmp_path, kind, flags):
    target = tmp_path / "target"
    target.write_text("kept")
    target.chmod(0o604)
    plant(tmp_path / "file", kind, target)

    with pytest.raises((NotOwnFile, OSError)) as raised:
        os.close(open_own(tmp_path / "file", flags, 0o640))

    assert isinstance(raised.value, NotOwnFile) or raised.value.errno == errno.ENXIO  # a pipe that nobody reads
    assert (target.read_text(), mode_of(target)) == ("kept", 0o604)


@pytest.mark.parametrize("mask", [0o000, 0o007, 0o077])
@pytest.mark.parametrize("before", [None, 0o666, 0o400])
def test_open_own_gives_its_mode_whatever_was_there_and_the_umask(tmp_path, mask, before):
    path = tmp_path / "file"
    if before is not None:
        path.touch()
        path.chmod(before)
    old = os.umask(mask)
    try:
        os.close(open_own(path, os.O_WRONLY | os.O_CREAT, 0o640))
    finally:
        os.umask(old)

    assert mode_of(path) == 0o640


def write_lock(state):
    lock = Lock(state.lock)
    assert lock.acquire()
    lock.close()


def take_lock_over(state):
    lock, later = Lock(state.lock), Lock(state.lock)
    assert lock.acquire()
    later.take_over(wait_s=0.0)
    lock.close()
    later.close()


def write_exit(state):
    exit_journal.write(state.fork_server_path(1, 1), Exited(ref=ProcessRef(2, 2), exit_code=0, signal=None))


def keep_exits(state):
    exit_journal.keep(state.fork_server_path(1, 1), [])


def rotate_log(state):
    state.own_log.write_bytes(b"x" * (housekeeping.LOG_ROTATED_BYTES + 1))
    housekeeping.rotate(state.own_log)


def go_through_the_gate(state):
    with connection_limit.ConnectionLimit(state.path).connected(1.0):
        pass


WRITERS = {
    "supervisor.lock": write_lock,
    ".supervisor.lock.PID": take_lock_over,
    "stopped": lambda state: StopMark("leave", "root", "now").write(state.stop_mark),
    ".stopped.PID": lambda state: StopMark("leave", "root", "now").write(state.stop_mark),
    "code.fingerprint": lambda state: write_fingerprint(state.fingerprint, Fingerprint({}, "", "")),
    ".code.fingerprint.PID": lambda state: write_fingerprint(state.fingerprint, Fingerprint({}, "", "")),
    "authkey": lambda state: wait_manager.make_key(state.path),
    ".authkey.PID": lambda state: wait_manager.make_key(state.path),
    "forkserver-1-1": write_exit,
    "forkserver-1-1 kept": keep_exits,
    "logs/supervisor.log": lambda state: os.close(logs.open_for_append(state.own_log)),
    "logs/supervisor.log.1": rotate_log,
    "logs/process-1-1.log": lambda state: logs.bound(state.logs / "process-1-1.log", 16384),
    **{f"database-{number}": go_through_the_gate for number in range(connection_limit.CONNECTIONS_MAX)},
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_follows_a_planted_link(tmp_path, name):
    state = StateDir(tmp_path / "state")
    state.create()
    target = tmp_path / "target"
    target.write_bytes(b"kept" * 10_000)
    target.chmod(0o604)
    (state.path / name.partition(" ")[0].replace("PID", str(os.getpid()))).symlink_to(target)

    with contextlib.suppress(OSError, AccessError):
        WRITERS[name](state)

    assert (target.read_bytes(), mode_of(target)) == (b"kept" * 10_000, 0o604)


@needs_root
def test_exits_of_another_users_record_are_no_exits(tmp_path):
    record = tmp_path / "forkserver-1-1"
    exit_journal.write(record, Exited(ref=ProcessRef(2, 2), exit_code=0, signal=None))
    assert list(exit_journal.read(record)) == [ProcessRef(2, 2)]

    os.chown(record, NOBODY, NOBODY)

    assert exit_journal.read(record) == {}


def test_a_file_that_is_not_ones_own_is_told_with_what_to_do(tmp_path):
    (tmp_path / "supervisor.lock").symlink_to(tmp_path / "target")

    with pytest.raises(AccessError, match=r"cannot write .*/supervisor.lock: it is a link; remove it, or give it to"):
        Lock(tmp_path / "supervisor.lock").acquire()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_as_one(tmp_path, monkeypatch, number):
    def refuse(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)

    with pytest.raises(AccessError) as raised:
        Lock(tmp_path / "supervisor.lock").acquire()

    assert str(raised.value).endswith("; the file system there has no locks; name a state_dir on a local one")


# ---- what `run` refuses ----


@pytest.mark.parametrize("mode", [0o2770, 0o775, 0o777, 0o1777])
@pytest.mark.parametrize("name", [".", "logs"])
def test_run_in_a_state_directory_that_others_may_write_refuses(make_app, mode, name):
    app = make_app(SOURCE)
    state = StateDir(app.state_dir)
    state.create()
    (state.path / name).chmod(mode)

    told = app.cli("run")

    assert told.returncode == 1
    assert "may write" in told.stderr
    assert f"chmod {mode & ~0o022:04o} {(state.path / name)}\n" in told.stderr.replace("/.\n", "\n")
    assert not state.lock.exists()
    grade, sentence = _worst(files.state_directory, app)
    assert grade is Grade.WRONG
    assert "may write" in sentence
    subprocess.run(["sh", "-c", told.stderr.strip().rpartition("; ")[2]], check=True)
    assert _worst(files.state_directory, app)[0] is Grade.OK
    app.start()


@needs_root
@pytest.mark.parametrize("what", ["logs", "link"])
def test_run_refuses_folders_and_links_of_another_user(make_app, tmp_path, what):
    app = make_app(SOURCE)
    state = StateDir(app.state_dir)
    if what == "logs":
        state.create()
        os.chown(state.logs, NOBODY, NOBODY)
    else:
        StateDir(tmp_path / "elsewhere").create()
        state.path.symlink_to(tmp_path / "elsewhere")
        os.chown(state.path, NOBODY, NOBODY, follow_symlinks=False)

    told = app.cli("run")

    assert told.returncode == 1
    assert {"logs": "belongs to user nobody", "link": "is a link that user nobody has made"}[what] in told.stderr
    assert _worst(files.state_directory, app)[0] is Grade.WRONG


def test_run_with_a_planted_lock_leaves_the_target_alone(make_app):
    app = make_app(SOURCE)
    StateDir(app.state_dir).create()
    target = app.folder / "target"
    target.write_text("kept")
    (app.state_dir / "supervisor.lock").symlink_to(target)

    told = app.cli("run")

    assert (told.returncode, target.read_text()) == (1, "kept")
    assert "supervisor.lock: it is a link; remove it" in told.stderr


@needs_root
def test_run_as_root_warns_once(make_app):
    app = make_app(SOURCE)
    started = app.start()

    assert started.log.count("every task runs as root") == 1


@needs_root
def test_doctor_notes_root(make_app):
    app = make_app(SOURCE)

    snapshot = _snapshot(app)

    assert [grade for grade, _ in system.user(snapshot)] == [Grade.NOTE]
    assert as_nobody(lambda: [told for _, told in system.user(snapshot)]) == "['tasks run as user nobody']"


def _snapshot(app):
    return Site(config=load(app.config, environ={}), machine=Machine())


def _worst(check, app):
    return max(check(_snapshot(app)), key=lambda one: list(Grade).index(one[0]))


# ---- all files of a supervisor that runs ----


@pytest.mark.usefixtures("umask")
@pytest.mark.of_sqlite  # whose file is one of them
def test_every_file_of_a_supervisor_has_its_mode_under_umask_007(make_app):
    app = make_app(SOURCE)
    app.folder.chmod(0o755)  # else it would be its group's to write, and the database with it
    app.start()
    sleeping = app.started(app.service.request("appx:sleeps"))
    app.service.request("appx:waits", {"id": sleeping.id})
    app.wait(app.service.request("appx:hello"))
    wait_until((app.state_dir / "manager.sock").exists, "there is a wait manager")
    assert app.cli("stop").returncode == 0

    found = {path.relative_to(app.state_dir): mode_of(path) for path in app.state_dir.rglob("*")}

    wanted = {"wake.sock": 0o660, "logs": 0o750, "stopped": 0o640, "supervisor.lock": 0o640, "code.fingerprint": 0o640}
    wanted |= dict.fromkeys(["control.sock", "manager.sock", "notify.sock", "authkey"], 0o600)
    assert wanted.keys() <= set(map(str, found))
    assert any(path.name.startswith("forkserver-") for path in found)
    for path, mode in found.items():
        assert mode == wanted.get(str(path), 0o640), path
    assert mode_of(app.state_dir) == 0o750
    for end in ("", "-wal", "-shm"):
        file = app.folder / f"bgsupervisor.db{end}"
        assert not file.exists() or mode_of(file) == 0o600, file


# ---- sockets that speak pickle ----

DIAL = """
import pickle, socket, struct, sys
from multiprocessing import connection
from pathlib import Path

class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[2]),)

folder = Path(sys.argv[1])
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.settimeout(5)
sock.connect(str(folder / "manager.sock"))
sock.setblocking(True)
made = connection.Connection(sock.detach())
try:
    key = (folder / "authkey").read_bytes()
    connection.answer_challenge(made, key)
    connection.deliver_challenge(made, key)
    made.send(RunsCode())
    made.recv()
except (EOFError, ConnectionError) as error:
    print("hung up")
"""


@pytest.fixture
def root_manager(folder):
    """A wait manager of root's in a state directory that every user may enter; yields the directory."""
    code = "import sys, pathlib; from bgsupervisor.worker import wait_manager as m; m.main(pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, folder])
    try:
        wait_until((folder / "manager.sock").exists, "it listens")
        yield folder
    finally:
        process.kill()
        process.wait(10)


def test_a_wake_up_of_the_same_user_is_answered(root_manager):
    wake_ups = WakeUps(root_manager)

    assert wake_ups.seen(["task:1"]) == [0]
    wake_ups.drop()


@needs_root
def test_wait_manager_key_and_socket_open_to_all_run_nobodys_pickle(root_manager, their_python):
    python, environment = their_python
    ran = root_manager.parent / "ran"
    root_manager.chmod(0o777)
    (root_manager / "authkey").chmod(0o666)
    (root_manager / "manager.sock").chmod(0o777)

    told = ask_as(WEB, [python, "-c", DIAL, root_manager, ran], environment=environment)
    control = subprocess.run(
        [sys.executable, "-c", DIAL, root_manager, ran.with_name("control")], capture_output=True, check=True
    )

    assert (told.stdout, told.stderr) == ("hung up\n", "")
    assert not ran.exists()
    assert ran.with_name("control").exists(), control  # as the owner the same does run


SERVE = """
import os, socket, sys
from multiprocessing import connection
from pathlib import Path

class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[2]),)

os.umask(0)
folder = Path(sys.argv[1])
listener = connection.Listener(str(folder / "manager.sock"))
(folder / "authkey").write_bytes(b"k" * 32)
print("listening", flush=True)
while True:
    made = listener.accept()
    try:
        connection.deliver_challenge(made, b"k" * 32)
        connection.answer_challenge(made, b"k" * 32)
        made.recv()
        made.send(RunsCode())
    except (EOFError, OSError):
        pass
"""


@needs_root
@pytest.mark.parametrize("key", ["its own", "of the owner"])
@pytest.mark.parametrize("state", ["its own", "of the owner"])
def test_wake_up_dials_no_wait_manager_of_another_user(folder, key, state, their_python):
    python, environment = their_python
    folder.chmod(0o777)
    ran = folder.parent / "ran"
    command = [python, "-c", SERVE, folder, ran]
    with as_user(WEB, command, environment=environment, stdout=subprocess.PIPE) as serving:
        try:
            assert serving.stdout.readline() == b"listening\n"
            if key == "of the owner":
                os.chown(folder / "authkey", 0, 0)
            if state == "its own":
                os.chown(folder, WEB, WEB)
            else:
                folder.chmod(0o755)

            assert WakeUps(folder).seen(["task:1"]) is None
            assert not ran.exists()
        finally:
            serving.kill()


@needs_root
def test_own_listener_closes_the_connection_of_another_user(folder, their_python):
    python, environment = their_python
    listener = wait_manager.OwnListener(folder / "manager.sock", 16)
    assert mode_of(folder / "manager.sock") == 0o600
    (folder / "manager.sock").chmod(0o777)

    dial = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(sys.argv[1]); "
        "print('dialled', flush=True); print(s.recv(1))"
    )
    command = [python, "-c", dial, folder / "manager.sock"]
    with as_user(WEB, command, environment=environment, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout.readline() == b"dialled\n"
        with socket.socket(socket.AF_UNIX) as own:
            own.connect(str(folder / "manager.sock"))
            own.sendall(b"\0\0\0\1x")

            with listener.accept() as accepted:
                assert accepted.recv_bytes() == b"x"

        assert stranger.stdout.read() == b"b''\n"
    listener.close()


@pytest.mark.usefixtures("umask")
def test_own_listener_is_closed_to_others_before_it_listens(tmp_path, monkeypatch):
    modes, listen = [], socket.socket.listen

    def note_and_listen(sock, size):
        modes.extend(map(mode_of, tmp_path.iterdir()))
        listen(sock, size)

    monkeypatch.setattr(socket.socket, "listen", note_and_listen)

    wait_manager.OwnListener(tmp_path / "manager.sock", 16).close()

    assert modes == [0o600]


@needs_root
@pytest.mark.parametrize(("uid", "mode"), [(0, 0o770), (0, 0o707), (NOBODY, 0o700)])
def test_open_own_dir_that_others_own_or_may_write_raises(tmp_path, uid, mode):
    os.close(open_own_dir(tmp_path))
    tmp_path.chmod(mode)
    os.chown(tmp_path, uid, -1)

    with pytest.raises(PermissionError, match="another user owns it or may write there"):
        open_own_dir(tmp_path)


@needs_root
def test_connect_to_another_users_socket_raises(folder, their_python):
    python, environment = their_python
    folder.chmod(0o777)
    serve = (
        "import os, socket, sys; os.umask(0); s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); "
        "print(1, flush=True); s.accept()[0].recv(1)"
    )
    command = [python, "-c", serve, folder / "control.sock"]
    with as_user(WEB, command, environment=environment, stdout=subprocess.PIPE) as serving:
        assert serving.stdout.readline() == b"1\n"
        with pytest.raises(PermissionError, match="another user's"):
            connect(folder, "control.sock", socket.SOCK_STREAM)
        serving.kill()


def test_make_key_writes_a_new_key_each_time(tmp_path):
    first, second = wait_manager.make_key(tmp_path), wait_manager.make_key(tmp_path)

    directory = open_dir(tmp_path)
    assert first != second == wait_manager.read_key(directory)
    assert [(path.name, mode_of(path)) for path in tmp_path.iterdir()] == [("authkey", 0o600)]
    os.close(directory)


def test_make_key_on_a_full_disk_raises_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large"):
            wait_manager.make_key(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [b"", b"short"])
def test_read_key_that_is_not_whole_raises(tmp_path, key):
    (tmp_path / "authkey").write_bytes(key)
    directory = open_dir(tmp_path)

    with pytest.raises(OSError, match="no whole key"):
        wait_manager.read_key(directory)

    os.close(directory)


# ---- the database ----


@pytest.mark.parametrize(
    ("folder_mode", "gid", "wanted"),
    [
        (0o755, 0, 0o600),
        (0o700, 0, 0o600),
        (0o2750, 0, 0o660),
        (0o2770, COMMON, 0o660),
        (0o770, 0, 0o660),
        (0o770, COMMON, 0o600),  # a new file is of its maker's first group, which is not the folder's
    ],
)
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@needs_root
def test_database_file_has_the_mode_that_its_folder_asks_for(tmp_path, folder_mode, gid, wanted, mask):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, 0, gid)
    folder.chmod(folder_mode)
    before = os.umask(mask)
    service = Service(f"sqlite:///{folder}/x.db")
    try:
        service.request("a:b")
        assert {path.name: mode_of(path) for path in folder.iterdir()} == dict.fromkeys(
            ["x.db", "x.db-wal", "x.db-shm"], wanted
        )
    finally:
        os.umask(before)
        service.close()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_database_file_that_is_there_keeps_its_mode(tmp_path, mode):
    tmp_path.chmod(0o2770)
    (tmp_path / "x.db").touch()
    (tmp_path / "x.db").chmod(mode)

    with contextlib.closing(Service(f"sqlite:///{tmp_path}/x.db")) as service:
        service.request("a:b")

    assert mode_of(tmp_path / "x.db") == mode


@pytest.mark.of_sqlite
@pytest.mark.parametrize(
    ("folder_mode", "mode", "grade", "sentence"),
    [
        (0o755, 0o600, Grade.OK, "alone"),
        (0o755, 0o660, Grade.NOTE, "though no group shares"),
        (0o755, 0o666, Grade.WRONG, "every user may write"),
        (0o777, 0o600, Grade.WRONG, "every user may write"),
        (0o2770, 0o660, Grade.OK, "shares"),
        (0o2770, 0o600, Grade.WRONG, "but not"),
        (0o2750, 0o660, Grade.NOTE, "may not write it"),
    ],
)
def test_doctor_says_who_may_write_the_database(make_app, folder_mode, mode, grade, sentence):
    app = make_app(SOURCE)
    database = app.folder / "bgsupervisor.db"
    database.touch()
    database.chmod(mode)
    app.folder.chmod(folder_mode)

    found = _worst(files.rights, app)

    assert found[0] is grade
    assert sentence in found[1]


# ---- other users ----

STRANGER = """
import os, socket, sys
from pathlib import Path
folder = Path(sys.argv[1])

def tried(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return "done"

def dial(name, kind):
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(str(folder / ".bgsupervisor" / name))

state = folder / ".bgsupervisor"
acts = [lambda: open(folder / "bgsupervisor.db", "rb"), lambda: open(folder / "bgsupervisor.db", "r+b")]
acts += [lambda: (folder / "new").touch(), lambda: os.listdir(state), lambda: (state / "stopped").touch()]
acts += [lambda name=name: dial(name, socket.SOCK_STREAM) for name in ("control.sock", "manager.sock")]
acts += [lambda name=name: dial(name, socket.SOCK_DGRAM) for name in ("wake.sock", "notify.sock")]
acts += [lambda: open(state / "authkey"), lambda: open(state / "logs" / "supervisor.log")]
print(*[tried(act) for act in acts])
"""


@needs_root
@pytest.mark.of_sqlite
def test_another_user_of_the_machine_can_do_nothing(make_app, their_python):
    python, environment = their_python
    app = make_app(SOURCE)
    with open_folder() as outer:
        app.folder = app.folder.rename(outer / "app")
        app.config, app.state_dir = app.folder / "bgsupervisor.toml", app.folder / ".bgsupervisor"
        try:
            app.start()
            sleeping = app.started(app.service.request("appx:sleeps"))
            app.service.request("appx:waits", {"id": sleeping.id})
            wait_until((app.state_dir / "manager.sock").exists, "there is a wait manager")

            told = ask_as(WEB, [python, "-c", STRANGER, app.folder], environment=environment, groups=())

            assert (set(told.stdout.split()), told.stderr) == ({"PermissionError"}, "")
        finally:
            app.end()


@pytest.mark.of_sqlite
def test_a_writer_of_the_database_runs_loaded_names_only(make_app):
    app = make_app(SOURCE)
    app.start()
    known, unknown = app.service.request("appx:hello"), app.service.request("os:abort")
    (app.folder / "elsewhere.py").write_text("from bgsupervisor import task\n@task\ndef planted(): ...\n")
    planted = app.service.request("elsewhere:planted")

    assert app.wait(known).status is Status.DONE
    later = app.service.request("appx:hello")
    assert app.wait(later).status is Status.DONE
    assert [app.service.get(one).status for one in (unknown, planted)] == [Status.REQUEST] * 2


def test_public_shows_a_browser_no_data_and_no_error(make_app):
    app = make_app("""
        from bgsupervisor import task

        @task
        def fails(secret: str) -> None:
            raise ValueError(secret)
    """)
    app.start()
    record = app.wait(app.service.request("appx:fails", {"secret": "hunter2"}))

    shown = json.dumps(record.public())

    assert "hunter2" in record.error
    assert "hunter2" not in shown
    for fact in (record.host, str(app.folder), "ValueError"):
        assert fact not in shown
    assert not {"data", "result", "error", "stack", "pid", "host"} & record.public().keys()
