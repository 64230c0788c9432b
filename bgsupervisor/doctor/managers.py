"""Checks of the supervisor and of what restarts it: the lock, a stop, cron's entry, systemd's unit."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.doctor.findings import note, ok, wrong
from bgsupervisor.ipc.lock import LOOP_STUCK_S, Lock
from bgsupervisor.ipc.statedir import StopMark
from bgsupervisor.system.fingerprint import newer_code
from bgsupervisor.system.users import user_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.doctor.findings import Machine, Result, Site

__all__ = ["PROCESSES_PER_SLOT", "cron_runs", "entry", "loaded_code", "lock", "lock_holder", "stop_mark", "unit"]

CRONTAB_LIMIT_S = 30.0
"""Longest wait for the crontab program, in seconds."""
_CRON_DAEMONS = ("cron", "crond", "fcron", "bcron-sched")
"""The daemons of Debian, cronie, dcron and busybox (by a link), fcron and bcron."""
PROCESSES_PER_SLOT = 4
"""Processes and threads per slot: a child, its thread, and room for those that its body starts."""


def lock(site: Site) -> Iterator[Result]:
    """Report which process holds the lock, and whether its loop still turns."""
    path = site.state_dir.lock
    if site.config.state_dir.exists() and not os.access(site.config.state_dir, os.X_OK):
        yield note(f"user {user_name(os.geteuid())} may not enter {site.config.state_dir}")
        return
    age_s = Lock(path, site.machine.clock).age_s()
    if age_s is None:
        yield note("no supervisor has run here yet")
        return
    holder = lock_holder(site)
    if holder is None:
        yield note(f"no process holds it; it was last touched {age_s:.0f} s ago")
    elif age_s > LOOP_STUCK_S:
        yield wrong(
            f"PID {holder} holds it and has shown no sign of life for {age_s:.0f} s; "
            "check that process, and end it if it hangs: its tasks live on"
        )
    else:
        yield ok(f"PID {holder} holds it, touched {age_s:.0f} s ago")


def loaded_code(site: Site) -> Iterator[Result]:
    """Check that the living supervisor has loaded the code that is on disk."""
    if lock_holder(site) is None:
        yield ok("no supervisor is alive; the next one loads the code on disk")
        return
    names = newer_code(site.state_dir.fingerprint)
    if names:
        yield note(f"code on disk is newer than what is loaded ({', '.join(names)}); `bgsupervisor reload` loads it")
    else:
        yield ok("no code was changed since it was loaded")


def lock_holder(site: Site) -> int | None:
    """Return the PID of the supervisor that holds the lock, None if none does.

    Reads the kernel's list, because trying the lock could disturb a `run` that starts at this moment.
    """
    path = site.state_dir.lock
    try:
        state = path.stat()
        lines = (site.machine.proc / "locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    noted = Lock(path).holder()
    for line in lines:
        # 3: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF; a waiter has an arrow after the colon
        _, kind, _, mode, pid, where, *_ = [*line.split(), *([""] * 6)]
        device, _, inode = where.rpartition(":")
        if (kind, mode, inode) != ("FLOCK", "WRITE", str(state.st_ino)) or not pid.isdigit():
            continue
        here = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}"
        if device == here or int(pid) == noted:  # some file systems show another device there
            return int(pid)
    return None


def stop_mark(site: Site) -> Iterator[Result]:
    """Report a stop."""
    mark = StopMark.read(site.state_dir.stop_mark)
    if mark is None:
        yield ok("it is not stopped")
    else:
        yield note(f"stopped by {mark.by} at {mark.at}, until `bgsupervisor start`")


def entry(site: Site) -> Iterator[Result]:
    """Check that cron or systemd restarts a supervisor, and report when one was last seen."""
    found = [*_cron_entries(site), *_units(site)]
    names = ", ".join(map(str, found))
    seen = "none has ever been seen"
    if site.alive:
        seen = "a supervisor is alive"
    elif site.seen_at is not None:
        seen = f"one was last seen at {site.seen_at.isoformat(timespec='seconds')}"
    how = "`bgsupervisor cron --install` or `bgsupervisor systemd --install`"
    if found and (site.alive or StopMark.read(site.state_dir.stop_mark) is not None):
        yield ok(f"{names}; {seen}")
    elif found:
        hint = "check that cron runs, or that the unit is enabled"
        if cron_runs(site.machine.proc) is False:
            hint = "no cron daemon runs; start it, or enable the unit"
        yield wrong(f"{names}, but no supervisor is alive, {seen}; {hint}")
    elif site.alive:
        yield note(f"{seen}, but neither cron nor systemd was found to restart it; {how} does that")
    else:
        yield wrong(f"neither cron nor systemd was found to start a supervisor, and {seen}; {how} does that")


def cron_runs(proc: Path) -> bool | None:
    """Return whether a cron daemon runs on this machine; None where other users' processes are hidden (hidepid)."""
    if not os.access(proc / "1" / "comm", os.R_OK):
        return None
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if name == "busybox" and words[1:2] == [b"crond"]:
                return True
            if name in _CRON_DAEMONS and words[0] != b"CRON":  # what Debian's forks for a job calls itself CRON
                return True
    return False


def unit(site: Site) -> Iterator[Result]:
    """Check that systemd, where it is used, neither kills tasks at a restart nor stops the unit for their memory."""
    units = _units(site)
    if not units:
        yield ok("no unit of systemd is used")
    for path, settings in units.items():
        kill_mode = settings.get("KillMode", "control-group")
        oom_policy = settings.get("OOMPolicy", "stop")
        tasks_max = settings.get("TasksMax", "")
        needed = site.config.slots * PROCESSES_PER_SLOT
        if kill_mode != "process":
            yield wrong(f"{path} has KillMode={kill_mode}: each restart of it kills the tasks; set KillMode=process")
        elif tasks_max.isdigit() and int(tasks_max) < needed:
            yield wrong(f"{path} has TasksMax={tasks_max}; {site.config.slots} slots need {needed}, raise it")
        elif oom_policy != "continue":
            yield note(
                f"{path} has OOMPolicy={oom_policy}: a task that the kernel kills for lack of memory may stop the "
                "unit; set OOMPolicy=continue"
            )
        else:
            yield ok(f"{path}: KillMode=process, OOMPolicy=continue")


def _cron_entries(site: Site) -> Iterator[str]:
    for path in site.machine.cron_files:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (str(file) for file in files if _names_us(_lines(file), site))
    owner = user_name(_owner(site))
    if _names_us(_crontab(site.machine, owner), site):
        yield f"the crontab of {owner}"


def _crontab(machine: Machine, owner: str) -> list[str]:
    """Return the crontab of the supervising user, as far as this user may read it."""
    program = shutil.which(machine.crontab)
    me = user_name(os.geteuid())
    if program is None or (owner != me and os.geteuid() != 0):
        return []
    whose = [] if owner == me else ["-u", owner]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(
            [program, *whose, "-l"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=CRONTAB_LIMIT_S,
        )
        return answer.stdout.splitlines()
    return []


def _owner(site: Site) -> int:
    """Return the user that supervises, or will."""
    with contextlib.suppress(OSError):
        return site.config.state_dir.stat().st_uid
    return os.geteuid()


def _names_us(lines: list[str], site: Site) -> bool:
    return any(_runs_us(line.replace("\\%", "%"), site) for line in lines if not line.lstrip().startswith("#"))


def _runs_us(command: str, site: Site) -> bool:
    """Whether a command line runs a supervisor of this configuration, or of an unnamed one."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    if "run" not in words or not any("bgsupervisor" in Path(word).name for word in words[: words.index("run")]):
        return False
    named = re.search(r"--config[= ](.+)", "\n".join(words).replace("--config\n", "--config "))
    return named is None or site.config.path is None or _is_same(Path(named[1]), site.config.path)


def _is_same(named: Path, known: Path) -> bool:
    with contextlib.suppress(OSError):
        return named == known or named.samefile(known)
    return False


def _units(site: Site) -> dict[Path, dict[str, str]]:
    """Return the settings of the units that run our supervisor."""
    found = {}
    for folder in site.machine.unit_folders:
        for path in sorted(folder.glob("*.service")):
            settings = _settings(path)
            if _runs_us(settings.get("ExecStart", "").replace("%%", "%").replace("$$", "$"), site):
                found[path] = settings
    return found


def _settings(path: Path) -> dict[str, str]:
    """Return the [Service] part of a unit and its drop-ins; the last value counts."""
    settings: dict[str, str] = {}
    for file in (path, *sorted(path.with_name(f"{path.name}.d").glob("*.conf"))):
        section = ""
        for line in "\n".join(_lines(file)).replace("\\\n", " ").splitlines():
            text = line.strip()
            if text.startswith("["):
                section = text
            elif section == "[Service]" and "=" in text:
                key, _, value = text.partition("=")
                settings[key.strip()] = value.strip()  # a comment's key begins with # and is nobody's
    return settings


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
