"""Checks of who supervises and what keeps it so: the lock, a stop, cron's entry, systemd's unit."""

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
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.statedir import StopMark
from bgsupervisor.system.fingerprint import newer_code
from bgsupervisor.system.users import user_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.doctor.findings import Machine, Scene, Told

__all__ = ["PROCESSES_PER_SLOT", "cron_runs", "entry", "loaded_code", "lock", "lock_holder", "stop_mark", "unit"]

STUCK_S = 60.0
"""A supervisor touches its lock file once a second; one that has not for so long hangs."""
CRONTAB_LIMIT_S = 30.0
_CRON_DAEMONS = ("cron", "crond", "fcron", "bcron-sched")
"""The daemons of Debian, cronie, dcron and busybox (by a link), fcron and bcron."""
PROCESSES_PER_SLOT = 4
"""A child and its thread, and room for what its body starts; threads count as processes do."""


def lock(scene: Scene) -> Iterator[Told]:
    """Tell who holds the lock, and whether it still moves."""
    path = scene.state_dir.lock
    if scene.config.state_dir.exists() and not os.access(scene.config.state_dir, os.X_OK):
        yield note(f"user {user_name(os.geteuid())} may not look into {scene.config.state_dir}")
        return
    age_s = Lock(path, scene.machine.clock).age_s()
    if age_s is None:
        yield note("nobody has supervised here yet")
        return
    holder = lock_holder(scene)
    if holder is None:
        yield note(f"nobody holds it; it was last touched {age_s:.0f} s ago")
    elif age_s > STUCK_S:
        yield wrong(
            f"PID {holder} holds it and has shown no sign of life for {age_s:.0f} s; "
            "look at that process, and end it if it hangs: its tasks live on"
        )
    else:
        yield ok(f"PID {holder} holds it, touched {age_s:.0f} s ago")


def loaded_code(scene: Scene) -> Iterator[Told]:
    """See that the living supervisor has loaded the code that is on disk."""
    if lock_holder(scene) is None:
        yield ok("no supervisor is alive; the next one loads the code on disk")
        return
    names = newer_code(scene.state_dir.fingerprint)
    if names:
        yield note(f"code on disk is newer than what is loaded ({', '.join(names)}); `bgsupervisor reload` loads it")
    else:
        yield ok("no code was changed since it was loaded")


def lock_holder(scene: Scene) -> int | None:
    """Return the PID of the supervisor that holds the lock, None if nobody does; takes no lock itself.

    The kernel's list is read, because trying the lock could be in the way of a `run` that starts just now.
    """
    path = scene.state_dir.lock
    try:
        state = path.stat()
        lines = (scene.machine.proc / "locks").read_text(encoding="ascii", errors="replace").splitlines()
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


def stop_mark(scene: Scene) -> Iterator[Told]:
    """Tell whether somebody has stopped it."""
    mark = StopMark.read(scene.state_dir.stop_mark)
    if mark is None:
        yield ok("nobody has stopped it")
    else:
        yield note(f"stopped by {mark.by} at {mark.at}, until `bgsupervisor start`")


def entry(scene: Scene) -> Iterator[Told]:
    """See that cron or systemd brings a supervisor back, and tell when one was last seen."""
    found = [*_cron_entries(scene), *_units(scene)]
    names = ", ".join(map(str, found))
    seen = "none has ever been seen"
    if scene.alive:
        seen = "a supervisor is alive"
    elif scene.seen_at is not None:
        seen = f"one was last seen at {scene.seen_at.isoformat(timespec='seconds')}"
    how = "`bgsupervisor cron --install` or `bgsupervisor systemd --install`"
    if found and (scene.alive or StopMark.read(scene.state_dir.stop_mark) is not None):
        yield ok(f"{names}; {seen}")
    elif found:
        hint = "see that cron runs, or that the unit is enabled"
        if cron_runs(scene.machine.proc) is False:
            hint = "no cron daemon runs; start it, or see that the unit is enabled"
        yield wrong(f"{names}, but no supervisor is alive, {seen}; {hint}")
    elif scene.alive:
        yield note(f"{seen}, but neither cron nor systemd was found to bring it back; {how} does that")
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


def unit(scene: Scene) -> Iterator[Told]:
    """See that systemd, where it supervises, neither kills tasks at a restart nor counts their memory as its own."""
    units = _units(scene)
    if not units:
        yield ok("no unit of systemd is used")
    for path, settings in units.items():
        kill_mode = settings.get("KillMode", "control-group")
        oom_policy = settings.get("OOMPolicy", "stop")
        tasks_max = settings.get("TasksMax", "")
        needed = scene.config.slots * PROCESSES_PER_SLOT
        if kill_mode != "process":
            yield wrong(f"{path} has KillMode={kill_mode}: each restart of it kills the tasks; set KillMode=process")
        elif tasks_max.isdigit() and int(tasks_max) < needed:
            yield wrong(f"{path} has TasksMax={tasks_max}; {scene.config.slots} slots need {needed}, raise it")
        elif oom_policy != "continue":
            yield note(
                f"{path} has OOMPolicy={oom_policy}: a task that the kernel kills for want of memory may stop the "
                "unit; set OOMPolicy=continue"
            )
        else:
            yield ok(f"{path}: KillMode=process, OOMPolicy=continue")


def _cron_entries(scene: Scene) -> Iterator[str]:
    for path in scene.machine.cron_files:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (str(file) for file in files if _names_us(_lines(file), scene))
    owner = user_name(_owner(scene))
    if _names_us(_crontab(scene.machine, owner), scene):
        yield f"the crontab of {owner}"


def _crontab(machine: Machine, owner: str) -> list[str]:
    """Return the crontab of who supervises, as far as this user may see it."""
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


def _owner(scene: Scene) -> int:
    """Return the user who supervises, or will."""
    with contextlib.suppress(OSError):
        return scene.config.state_dir.stat().st_uid
    return os.geteuid()


def _names_us(lines: list[str], scene: Scene) -> bool:
    return any(_runs_us(line.replace("\\%", "%"), scene) for line in lines if not line.lstrip().startswith("#"))


def _runs_us(command: str, scene: Scene) -> bool:
    """Whether a command line runs a supervisor of this configuration, or of one that it does not name."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    if "run" not in words or not any("bgsupervisor" in Path(word).name for word in words[: words.index("run")]):
        return False
    named = re.search(r"--config[= ](.+)", "\n".join(words).replace("--config\n", "--config "))
    return named is None or scene.config.path is None or _is_same(Path(named[1]), scene.config.path)


def _is_same(named: Path, known: Path) -> bool:
    with contextlib.suppress(OSError):
        return named == known or named.samefile(known)
    return False


def _units(scene: Scene) -> dict[Path, dict[str, str]]:
    """Return the settings of the units that run our supervisor."""
    found = {}
    for folder in scene.machine.unit_folders:
        for path in sorted(folder.glob("*.service")):
            settings = _settings(path)
            if _runs_us(settings.get("ExecStart", "").replace("%%", "%").replace("$$", "$"), scene):
                found[path] = settings
    return found


def _settings(path: Path) -> dict[str, str]:
    """Return the [Service] part of a unit and its drop-ins; the last word counts."""
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
