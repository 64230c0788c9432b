"""The place where it happens: a folder with an application, its processes by identity, and nothing left behind.

This process is the child subreaper of all that it starts, so whatever loses its parent comes to it, is reaped like an
orphan by PID 1, and can be counted at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgsupervisor import Service
from bgsupervisor.ipc.sockets import connect
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.system.syscalls import set_child_subreaper
from torture.database import Database
from torture.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Arena", "Life", "ProcessRef"]

BODIES = Path(__file__).with_name("bodies.py")


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process by PID and start ticks."""

    pid: int
    ticks: int


@dataclasses.dataclass(slots=True)
class Life:
    """One `bgsupervisor run`, from its start to its end (monotonic)."""

    ref: ProcessRef
    started_at: float
    ended_at: float | None = None
    status: int | None = None


class Arena:
    """One application under torture.

    Args:
        folder: Empty or missing.
        options: Of its configuration.
        url: Of its database; by default a file of SQLite in the folder.
    """

    def __init__(self, folder: Path, options: dict[str, Any], url: str | None = None) -> None:
        set_child_subreaper()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = folder / "bgsupervisor.toml"
        self.database = Database(url or f"sqlite:///{folder / 'bgsupervisor.db'}")
        self.state = StateDir(folder / ".bgsupervisor")
        self.oracle = Oracle(folder)
        self.lives: list[Life] = []
        self._popens: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        shutil.copy(BODIES, folder / "bodies.py")
        known = {"database": self.database.url, "tasks": ["bodies"], **options}
        lines = [f"{key} = {value!r}".replace("'", '"') for key, value in known.items()]
        self.config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.service = Service(config=self.config)
        self.service.counts()  # the tables are there from now on

    # Supervisors

    def start_supervisor(self) -> Life:
        """Start `bgsupervisor run`, as cron does; it leaves at once if there is one."""
        with (self.folder / "run.log").open("ab") as log:
            started_at = time.monotonic()
            command = [sys.executable, "-m", "bgsupervisor", "--config", str(self.config), "run"]
            popen = subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        life = Life(ProcessRef(popen.pid, start_ticks(popen.pid) or -1), started_at)
        with self._lock:
            self.lives.append(life)
            self._popens.append(popen)
        return life

    def living(self) -> list[Life]:
        """Return the supervisors that have not ended, and those that are about to leave because there is one."""
        return [life for life in self.lives if life.ended_at is None]

    def reap(self) -> None:
        """Reap whoever has ended: supervisors, and what others left to this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            with self._lock:
                life = next((one for one in self.lives if one.ended_at is None and one.ref.pid == pid), None)
                popen = next((one for one in self._popens if one.pid == pid), None)
                if popen is not None:
                    popen.returncode = status  # nobody else has to wait for it
                    self._popens.remove(popen)
            if life is not None:
                life.status = os.waitstatus_to_exitcode(status)
                life.ended_at = time.monotonic()

    # Whom there is to hurt

    def running(self) -> list[tuple[int, ProcessRef]]:
        """Return the running tasks and who runs them, as their rows have it."""
        query = "SELECT id, pid, start_ticks FROM bgsupervisor_task WHERE status = 'START'"
        return [(id, ProcessRef(pid, ticks)) for id, pid, ticks in self.database.rows(query)]

    def fork_servers(self) -> list[ProcessRef]:
        """Return the fork servers that have left their identity in the state directory, living or not."""
        names = [path.name.split("-") for path in self.state.path.glob("forkserver-*-*")]
        return [ProcessRef(int(pid), int(ticks)) for _, pid, ticks in names]

    def spares(self) -> list[ProcessRef]:
        """Return the children of fork servers that run nothing now."""
        busy = {ref.pid for _, ref in self.running()}
        pids = {pid for ref in self.fork_servers() if is_alive(ref) for pid in children(ref.pid)} - busy
        return [ProcessRef(pid, ticks) for pid in sorted(pids) if (ticks := start_ticks(pid)) is not None]

    def wait_manager(self) -> ProcessRef | None:
        """Return who listens on the wait manager's socket."""
        try:
            with connect(self.state.path, "manager.sock", socket.SOCK_STREAM) as sock:
                pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        except OSError:
            return None
        ticks = start_ticks(pid)
        return None if ticks is None else ProcessRef(pid, ticks)

    def ours(self) -> list[ProcessRef]:
        """Return all living processes that descend from this one."""
        found, todo = [], children(os.getpid())
        while todo:
            pid = todo.pop()
            todo += children(pid)
            ticks = start_ticks(pid)
            if ticks is not None and is_alive(ProcessRef(pid, ticks)):
                found.append(ProcessRef(pid, ticks))
        return found

    @staticmethod
    def send(ref: ProcessRef, number: int) -> bool:
        """Send a signal to a process that is still the one that is meant, and descends from this one."""
        try:
            pidfd = os.pidfd_open(ref.pid)
        except OSError:
            return False
        try:
            if start_ticks(ref.pid) != ref.ticks or not descends_from_us(ref.pid):
                return False
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def end(self) -> None:
        """End all that is left, and see it gone."""
        deadline = time.monotonic() + 20
        while (left := self.ours()) and time.monotonic() < deadline:
            for ref in left:
                self.send(ref, signal.SIGKILL)
            self.reap()
            time.sleep(0.05)
        self.reap()
        self.service.close()


def stat(pid: int) -> Sequence[bytes]:
    """Return the fields of a process's stat file from the third on; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ()


def start_ticks(pid: int) -> int | None:
    """Return when a process was started; None if there is none."""
    fields = stat(pid)
    return int(fields[19]) if fields else None


def is_alive(ref: ProcessRef) -> bool:
    """Whether a process is there and no zombie."""
    fields = stat(ref.pid)
    return bool(fields) and int(fields[19]) == ref.ticks and fields[0] not in (b"Z", b"X")


def children(pid: int) -> list[int]:
    """Return the children of all threads of a process."""
    found: list[int] = []
    threads: list[Path] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        threads = list(Path(f"/proc/{pid}/task").glob("*/children"))
    for path in threads:
        with contextlib.suppress(OSError):
            found += [int(one) for one in path.read_text(encoding="ascii").split()]
    return found


def descends_from_us(pid: int) -> bool:
    """Whether a process was started by this one, by whatever number of others in between."""
    own = os.getpid()
    while pid > 1 and pid != own:
        fields = stat(pid)
        if not fields:
            return False
        pid = int(fields[1])
    return pid == own


def command_of(pid: int) -> str:
    """Return what a process was started as, for people to read."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return ""
