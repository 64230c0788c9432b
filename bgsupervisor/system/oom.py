"""The kernel's evidence about memory: was a SIGKILL the OOM killer's? Knows no tasks and kills nothing.

Counters are taken when a process starts and compared after its death. Each OOM kill that explained one death is used
up, so that the kill of one process never explains the death of its neighbour in the same cgroup.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = ["Counters", "OomWatch"]

INITIAL_PID_NAMESPACE = 4026531836  # the inode that the kernel gives to the first one (PROC_PID_INIT_INO)
KEPT = 1000  # PIDs and counter files; older ones are forgotten
READS_AT_ONCE = 10_000  # records of the kernel log per call; the next call reads the rest of a flood
RECORD_MAX_BYTES = 65536  # the kernel's own limit is 8192
KERNEL_PREFIXES = frozenset(b"01234567")  # priority with facility 0: what programs write there has another one

KILLED = re.compile(rb"(?:^|: )Killed process (\d+) \(")
SUMMARY = re.compile(rb"^oom-kill:.*,pid=(\d+),uid=\d+$")


@dataclass(frozen=True, slots=True)
class Counters:
    """The counters when a process started.

    Attributes:
        cgroup_file: The file that counts the OOM kills of its memory cgroup, None if there is none to be read.
        cgroup_kills: What stood there.
        host_kills: OOM kills of the whole host since boot, None if unreadable.
        log_kills: Kills that this watch had read in the kernel log.
        log_losses: How often records of the kernel log were lost before they could be read.
    """

    cgroup_file: Path | None
    cgroup_kills: int | None
    host_kills: int | None
    log_kills: int
    log_losses: int


class OomWatch:
    """Follows the kernel log and the OOM counters from now on; close it at the end.

    None of its calls blocks, and none fails because something is not readable: there is less evidence then.
    """

    def __init__(
        self,
        kmsg: Path = Path("/dev/kmsg"),
        vmstat: Path = Path("/proc/vmstat"),
        proc: Path = Path("/proc"),
        cgroup_root: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        self._vmstat = vmstat
        self._proc = proc
        self._cgroup_root = cgroup_root
        self._named: dict[int, int] = {}  # PID -> how many kills had been read when it was named
        self._log_kills = 0
        self._log_losses = 0
        self._explained: dict[Path, int] = {}  # counter file -> up to which kill deaths are explained
        self._fd = _open_at_end(kmsg) if self._sees_kernel_pids() else -1

    def counters_of(self, pid: int) -> Counters:
        """Take the counters for a process that starts now."""
        return self.counters([pid])[0]

    def counters(self, pids: Iterable[int]) -> list[Counters]:
        """Take the counters for processes that start now, each counter once."""
        self._read_log()
        host_kills, kills_of = _count(self._vmstat), functools.cache(_count)
        found = []
        for pid in pids:
            file = self._cgroup_file(pid, kills_of)
            cgroup_kills = None if file is None else kills_of(file)
            found.append(Counters(file, cgroup_kills, host_kills, self._log_kills, self._log_losses))
        return found

    def evidence(self, pid: int, before: Counters) -> str | None:
        """Return whether a SIGKILL that we did not send was the OOM killer's.

        Args:
            pid: The dead process.
            before: Its counters from the time it started.

        Returns:
            A sentence with the strongest evidence there is, or None: nothing points to the OOM killer.
        """
        self._read_log()
        cgroup_moved = self._moved(before.cgroup_file, before.cgroup_kills)
        host_moved = self._moved(self._vmstat, before.host_kills)
        sentence = self._judge(pid, before, cgroup_moved=cgroup_moved, host_moved=host_moved)
        if sentence is not None:
            self._explain(before.cgroup_file, before.cgroup_kills)
            self._explain(self._vmstat, before.host_kills)
        return sentence

    def close(self) -> None:
        """Give the kernel log back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _judge(self, pid: int, before: Counters, *, cgroup_moved: bool | None, host_moved: bool | None) -> str | None:
        if self._named.get(pid, 0) > before.log_kills:
            return f"killed by the kernel's OOM killer: the kernel log names PID {pid}"
        if self._log_is_complete(before):
            return None
        if cgroup_moved:
            return "killed by the kernel's OOM killer: the task's cgroup counted an OOM kill while it ran"
        if cgroup_moved is None and host_moved:
            log = "cannot be read" if self._fd < 0 else "lost records"
            return f"likely the kernel's OOM killer: the host counted an OOM kill while it ran and the kernel log {log}"
        return None

    def _log_is_complete(self, before: Counters) -> bool:
        """Return whether the log's silence is evidence: it is read, lost nothing and shows every kill of the host.

        The kernel counts a kill a moment before it logs it, so a death may be examined in between.
        """
        if self._fd < 0 or self._log_losses > before.log_losses:
            return False
        now = _count(self._vmstat)
        if now is None or before.host_kills is None:
            return True
        return self._log_kills - before.log_kills >= now - before.host_kills

    def _moved(self, file: Path | None, before: int | None) -> bool | None:
        """Return whether a counter shows a kill that no death was explained by yet; None if it cannot be read."""
        now = None if file is None else _count(file)
        if file is None or now is None or before is None:
            return None
        return now > max(before, self._explained.get(file, 0))

    def _explain(self, file: Path | None, before: int | None) -> None:
        if file is None or before is None:
            return
        used_up = max(before, self._explained.pop(file, 0)) + 1
        self._explained[file] = used_up
        _keep_newest(self._explained)

    def _sees_kernel_pids(self) -> bool:
        try:
            return (self._proc / "self/ns/pid").stat().st_ino == INITIAL_PID_NAMESPACE
        except OSError:
            return False

    def _read_log(self) -> None:
        if self._fd < 0:
            return
        for _ in range(READS_AT_ONCE):
            try:
                records = os.read(self._fd, RECORD_MAX_BYTES)
            except BrokenPipeError:
                self._log_losses += 1  # overrun: the next read gives the oldest record that is left
                continue
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            if not records:
                return
            for line in records.splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        prefix, _, text = line.partition(b";")
        priority = prefix.partition(b",")[0]
        if len(priority) != 1 or priority[0] not in KERNEL_PREFIXES:
            return
        if found := KILLED.search(text):
            self._log_kills += 1
            self._name(int(found[1]), self._log_kills)
        elif found := SUMMARY.search(text):
            self._name(int(found[1]), self._log_kills + 1)  # the kernel writes it just before the kill itself

    def _name(self, pid: int, at: int) -> None:
        self._named.pop(pid, None)
        self._named[pid] = at
        _keep_newest(self._named)

    def _cgroup_file(self, pid: int, kills_of: Callable[[Path], int | None]) -> Path | None:
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
        paths = {}
        for line in lines.splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update(dict.fromkeys(controllers.split(","), path.strip("/")))
        if "memory" in paths:
            file = self._cgroup_root / "memory" / paths["memory"] / "memory.oom_control"
            return file if kills_of(file) is not None else None
        return self._unified_file(paths[""], kills_of) if "" in paths else None

    def _unified_file(self, path: str, kills_of: Callable[[Path], int | None]) -> Path | None:
        """Return the counter of the nearest cgroup upwards that accounts memory; the root has none."""
        folder = Path(path)
        for name in (folder, *folder.parents):
            file = self._cgroup_root / name / "memory.events"
            if kills_of(file) is not None:
                return file
        return None


def _open_at_end(kmsg: Path) -> int:
    try:
        fd = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return -1
    return fd


def _count(file: Path) -> int | None:
    """Return the number in the line "oom_kill N" of a file, None if there is none."""
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if name == "oom_kill":
            return int(number)
    return None


def _keep_newest(table: dict[Any, int]) -> None:
    if len(table) > KEPT:
        del table[next(iter(table))]
