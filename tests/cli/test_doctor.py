"""`bgsupervisor doctor`: each check meets what it is for, broken and whole."""

from __future__ import annotations

import grp  # noqa: F401 - another user may be unable to read this Python's folder, so it is loaded before
import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.app import wait_until
from support.as_user import NOBODY, as_nobody, needs_root, open_folder

from bgsupervisor import config as configuration
from bgsupervisor.cli.commands import doctor as command
from bgsupervisor.cli.session import Session
from bgsupervisor.doctor import CHECKS, Grade, Machine, Site, examine, limits, managers, system
from bgsupervisor.doctor import files as file_checks
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.system.users import user_name

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"),
]

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)


class At:
    """A clock that does not move."""

    def __init__(self, now=NOW):
        self._now = now

    def now(self):
        return self._now

    def monotonic(self):
        return 0.0


@pytest.fixture
def machine(tmp_path):
    """A machine in a folder of its own, on which nothing is installed yet."""
    proc = tmp_path / "proc"
    (proc / "self" / "ns").mkdir(parents=True)
    (proc / "1").mkdir()
    (proc / "1" / "comm").write_text("systemd\n")
    (proc / "self" / "ns" / "pid").touch()
    (proc / "self" / "cgroup").write_text("0::/user.slice/session\n")
    (proc / "self" / "mountinfo").write_text("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n")
    (proc / "locks").write_text("")
    for folder in ("units", "cron.d", "cgroup/user.slice/session"):
        (tmp_path / folder).mkdir(parents=True)
    return Machine(
        proc=proc,
        cgroup_root=tmp_path / "cgroup",
        unit_folders=(tmp_path / "units",),
        cron_files=(tmp_path / "cron.d",),
        crontab=str(tmp_path / "crontab"),
        sqlite_version=(3, 51, 3),
        clock=At(),
    )


@pytest.fixture
def site(tmp_path, machine):
    """A set-up without a fault, as far as files are concerned."""
    folder = tmp_path / "srv"
    folder.mkdir()
    (folder / "bgsupervisor.toml").touch()
    return Site(config=configuration.load(folder / "bgsupervisor.toml", environ={}), machine=machine)


def moved(site, database, **more):
    """Return the site with another database, and its state directory beside it."""
    path = Path(database)
    fresh = replace(site.config, database=f"sqlite:///{path}", state_dir=path.parent / ".bgsupervisor", **more)
    return replace(site, config=fresh)


def told(check, site):
    """Return the worst thing that a check tells, as (grade, sentence)."""
    grades = list(Grade)
    return max(check(site), key=lambda one: grades.index(one[0]))


def fails(check, site, sentence, grade=Grade.WRONG):
    found = told(check, site)
    assert found[0] is grade, found
    assert sentence in found[1]


def passes(check, site, sentence=""):
    found = told(check, site)
    assert found[0] is Grade.OK, found
    assert sentence in found[1]


# ---- rights ----


def test_a_folder_that_is_not_there_is_wrong(site, tmp_path):
    fails(
        file_checks.rights, moved(site, tmp_path / "absent" / "x.db"), f"the folder {tmp_path}/absent of the database"
    )
    passes(file_checks.rights, site, f"is for user {user_name(os.geteuid())} alone")


@needs_root
def test_what_this_user_may_not_write_is_named_with_its_rights(site):
    with open_folder() as folder:
        (folder / "x.db").touch(0o644)
        there = moved(site, folder / "x.db")
        said = as_nobody(lambda: told(file_checks.rights, there))
        assert "WRONG" in said
        assert f"{folder} cannot be written by user nobody" in said
        assert "it is root:root 0755" in said
        folder.chmod(0o777)
        assert f"{folder}/x.db cannot be written by user nobody" in as_nobody(lambda: told(file_checks.rights, there))


def test_a_shared_folder_is_setgid_and_its_files_are_the_groups(site, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "x.db").touch()
    there = moved(site, folder / "x.db")
    folder.chmod(0o770)
    (folder / "x.db").chmod(0o600)
    fails(file_checks.rights, there, f"may write {folder} but not {folder}/x.db; chgrp")
    (folder / "x.db").chmod(0o660)
    fails(file_checks.rights, there, "not setgid", Grade.NOTE)
    folder.chmod(0o2770)
    passes(file_checks.rights, there, f"shares {folder}")


@needs_root
def test_a_file_of_another_group_in_a_shared_folder_is_wrong(site, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2770)
    (folder / "x.db").touch()
    (folder / "x.db").chmod(0o660)
    os.chown(folder / "x.db", 0, NOBODY)
    fails(file_checks.rights, moved(site, folder / "x.db"), "chgrp")


# ---- the state directory's owner ----


@needs_root
def test_a_state_directory_of_another_user_is_wrong_unless_that_user_supervises(site):
    site.config.state_dir.mkdir()
    passes(file_checks.state_directory, site, "is root's")
    os.chown(site.config.state_dir, NOBODY, NOBODY)
    fails(file_checks.state_directory, site, "is nobody's, and `run` refuses user root; supervise as nobody")
    fails(file_checks.state_directory, replace(site, alive=True), "is nobody's, the user that supervises", Grade.NOTE)


@needs_root
def test_a_state_directory_that_cannot_be_made_is_wrong(site):
    passes(file_checks.state_directory, site, "the first `bgsupervisor run` creates it")
    with open_folder() as folder:
        there = moved(site, folder / "x.db")
        assert "user nobody cannot create it" in as_nobody(lambda: told(file_checks.state_directory, there))


# ---- where they lie ----


def test_a_database_behind_a_link_to_the_newest_release_is_wrong(site, tmp_path):
    release = tmp_path / "site" / "20300501120000"
    release.mkdir(parents=True)
    (tmp_path / "current").symlink_to(release)
    fails(
        file_checks.deploy_folder,
        moved(site, tmp_path / "current" / "x.db"),
        f"the database {tmp_path}/current/x.db lies in {tmp_path}/current, which the next deploy replaces",
    )
    (release / "data").symlink_to(tmp_path / "srv")
    passes(file_checks.deploy_folder, moved(site, tmp_path / "current" / "data" / "x.db"))


@pytest.mark.parametrize("release", ["20300501120000", "7", "v12.1", "3f2a91c"])
def test_a_database_in_a_releases_own_folder_is_wrong(site, tmp_path, release):
    folder = tmp_path / "releases" / release
    folder.mkdir(parents=True)
    fails(file_checks.deploy_folder, moved(site, folder / "x.db"), f"lies in {folder}")


def test_other_links_and_folders_do_not_matter_to_a_deploy(site, tmp_path):
    (tmp_path / "home").symlink_to(tmp_path / "srv")
    (tmp_path / "releases" / "telemetry").mkdir(parents=True)
    passes(file_checks.deploy_folder, site)
    passes(file_checks.deploy_folder, moved(site, tmp_path / "home" / "x.db"))
    passes(file_checks.deploy_folder, moved(site, tmp_path / "releases" / "telemetry" / "x.db"))


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.s3fs", "fuse.rclone"]
)
def test_a_network_file_system_is_wrong(site, machine, kind):
    root = (machine.proc / "self" / "mountinfo").read_text()
    mount = f"30 22 0:41 / {site.database.parent} rw shared:2 - {kind} server:/tasks rw\n"
    (machine.proc / "self" / "mountinfo").write_text(root + mount)
    fails(file_checks.file_system, site, f"is on {kind}; it must not be on a network file system")


@pytest.mark.parametrize(
    ("kind", "told"), [("overlay", "on a volume"), ("tmpfs", "after a reboot"), ("fuse.x", "make sure that")]
)
def test_a_file_system_that_does_not_last_is_noted(site, machine, kind, told):
    mount = f"30 22 0:41 / {site.database.parent} rw - {kind} none rw\n"
    (machine.proc / "self" / "mountinfo").write_text(mount)
    fails(file_checks.file_system, site, told, Grade.NOTE)


def test_the_innermost_and_latest_mount_counts_whatever_is_in_its_name(site, machine, tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    mounted = str(folder).replace(" ", r"\040")
    (machine.proc / "self" / "mountinfo").write_text(
        f"30 1 0:41 / {mounted} rw - nfs4 a:/b rw\n31 1 0:42 / {mounted} rw master:3 - xfs /dev/sdb rw\n"
        f"32 1 8:1 / / rw - ext4 /dev/sda1 rw\n33 1 0:43 / {mounted}er rw - nfs4 a:/c rw\n"
    )
    passes(file_checks.file_system, moved(site, folder / "x.db"), "is on xfs")


def test_a_machine_that_does_not_tell_its_mounts_is_noted(site, machine):
    (machine.proc / "self" / "mountinfo").write_text("30 1 0:41 / /elsewhere rw - ext4 /dev/sda1 rw\n")
    fails(file_checks.file_system, site, "the file system of", Grade.NOTE)


def test_the_file_system_of_this_machine_is_found(site):
    here = replace(site, machine=Machine())
    assert told(file_checks.file_system, here)[0] in {Grade.OK, Grade.NOTE}


@needs_root
def test_less_than_100_mib_are_too_few(site, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        there = replace(moved(site, small / "x.db"), machine=Machine())
        fails(file_checks.free_space, there, f"2 MiB are free for {small}; free some")
        fails(file_checks.file_system, there, "is on tmpfs", Grade.NOTE)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_enough_room_passes(site, monkeypatch):
    passes(file_checks.free_space, moved(site, "/dev/shm/x.db") if _room("/dev/shm") else site, "iB are free")


def _room(folder):
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize > file_checks.SPACE_MIN_BYTES


# ---- SQLite, clock, kernel, PID 1 ----


@pytest.mark.parametrize("version", [(3, 7, 0), (3, 40, 1), (3, 44, 5), (3, 45, 6), (3, 50, 6), (3, 51, 2)])
def test_versions_with_the_checkpoint_bug_are_noted(site, version):
    there = replace(site, machine=replace(site.machine, sqlite_version=version))
    fails(system.sqlite, there, "the supervisor is the only regular checkpointer", Grade.NOTE)


@pytest.mark.parametrize("version", [(3, 44, 6), (3, 44, 9), (3, 50, 7), (3, 51, 3), (3, 52, 0), (4, 0, 0)])
def test_versions_without_the_checkpoint_bug_pass(site, version):
    passes(system.sqlite, replace(site, machine=replace(site.machine, sqlite_version=version)))


def test_a_clock_of_the_past_is_wrong(site):
    there = replace(site, machine=replace(site.machine, clock=At(datetime(1970, 1, 1, tzinfo=UTC))))
    fails(system.clock, there, "the system clock says 1970-01-01; set it")
    passes(system.clock, site, "2030-05-01")


def test_rows_of_the_future_are_wrong(site):
    moments = [("the request of task 7", NOW + timedelta(seconds=90)), ("the heartbeat of task 8", NOW)]
    fails(system.clock, replace(site, moments=moments), "the request of task 7 lies 90 s in the future")
    passes(system.clock, replace(site, moments=[("the request of task 7", NOW + timedelta(seconds=59))]))


def test_a_kernel_without_pidfds_is_wrong(site, monkeypatch):
    passes(system.kernel, site)

    def forbidden(pid):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    fails(system.kernel, site, "pidfds or child subreapers are missing: [Errno 38] Function not implemented")


def test_a_kernel_without_subreapers_is_wrong(site, monkeypatch):
    def forbidden():
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(system.syscalls, "is_child_subreaper", forbidden)
    fails(system.kernel, site, "Operation not permitted")


def test_a_containers_pid_1_that_is_no_init_is_noted(site, machine):
    (machine.proc / "1" / "comm").write_text("gunicorn\n")
    fails(system.first_process, site, "PID 1 of this container is gunicorn, which may not reap", Grade.NOTE)
    (machine.proc / "1" / "comm").write_text("tini\n")
    passes(system.first_process, site, "tini")


def test_whatever_pid_1_of_a_whole_machine_is_passes(site, machine):
    (machine.proc / "1" / "comm").write_text("strange\n")
    whole = replace(machine, initial_pid_namespace=(machine.proc / "self/ns/pid").stat().st_ino)
    passes(system.first_process, replace(site, machine=whole))


# ---- memory and processes ----


def cgroup(machine, text, **files):
    (machine.proc / "self" / "cgroup").write_text(text)
    for path, value in files.items():
        file = machine.cgroup_root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")


def test_the_lowest_memory_limit_on_the_way_up_is_told(site, machine):
    passes(limits.memory, site, "no limit of memory")
    cgroup(machine, "0::/a/b\n", **{"a/b/memory.max": "max", "a/memory.max": 8 << 30, "memory.max": 4 << 30})
    fails(limits.memory, site, "may use 4 GiB, 256 MiB for each of 16 slots", Grade.NOTE)


def test_the_first_version_of_cgroups_is_read_too(site, machine):
    lines = "4:memory:/docker/x\n8:pids:/docker/x\n0::/\n"
    unlimited = 9223372036854771712
    cgroup(machine, lines, **{"memory/memory.limit_in_bytes": 512 << 20, "pids/pids.max": 63})
    fails(limits.memory, site, "may use 512 MiB", Grade.NOTE)
    fails(limits.processes, site, "may have 63 processes and threads, and 16 slots need 64")
    cgroup(machine, lines, **{"memory/memory.limit_in_bytes": unlimited, "pids/pids.max": 64})
    passes(limits.memory, site)
    passes(limits.processes, site, "may have 64 processes")


def test_fewer_processes_than_four_for_each_slot_are_wrong(site, machine):
    cgroup(machine, "0::/a\n", **{"a/pids.max": 40})
    fails(limits.processes, site, "raise TasksMax of the unit (or --pids-limit), or lower `slots`")
    passes(limits.processes, replace(site, config=replace(site.config, slots=10)))
    cgroup(machine, "0::/a\n", **{"a/pids.max": "max"})
    passes(limits.processes, site, "no limit of processes")


# ---- lock and stop ----


@pytest.fixture
def held(site):
    """A site whose lock this process holds, on the machine's own table of locks."""
    site.config.state_dir.mkdir()
    lock = Lock(site.state_dir.lock)
    assert lock.acquire()
    yield replace(site, machine=replace(site.machine, proc=Path("/proc")))
    lock.close()


def touched(site, seconds):
    at = site.machine.clock.now().timestamp() - seconds
    os.utime(site.state_dir.lock, (at, at))


def test_a_lock_that_is_held_and_touched_passes(held):
    touched(held, 2)
    passes(managers.lock, held, f"PID {os.getpid()} holds it, touched 2 s ago")


def test_a_lock_that_is_held_and_not_touched_for_a_minute_is_wrong(held):
    touched(held, 61)
    fails(managers.lock, held, f"PID {os.getpid()} holds it and has shown no sign of life for 61 s")


def test_a_lock_that_nobody_holds_is_told_and_not_taken(site):
    fails(managers.lock, site, "no supervisor has run here yet", Grade.NOTE)
    site.config.state_dir.mkdir()
    site.state_dir.lock.write_text('{"pid": 1}')
    touched(site, 5)
    before = site.state_dir.lock.stat().st_mtime_ns
    fails(managers.lock, site, "no process holds it; it was last touched 5 s ago", Grade.NOTE)
    assert (site.state_dir.lock.stat().st_mtime_ns, site.state_dir.lock.read_text()) == (before, '{"pid": 1}')


def test_a_waiter_and_another_files_holder_are_not_the_lock_s(site, machine):
    site.config.state_dir.mkdir()
    site.state_dir.lock.write_text('{"pid": 4711}')
    inode = site.state_dir.lock.stat().st_ino
    (machine.proc / "locks").write_text(
        f"1: FLOCK  ADVISORY  WRITE 4711 99:99:{inode + 1} 0 EOF\n"
        f"2: POSIX  ADVISORY  WRITE 4711 99:99:{inode} 0 EOF\n"
        f"3: FLOCK  ADVISORY  WRITE 4712 99:99:{inode} 0 EOF\n"
        f"3: -> FLOCK  ADVISORY  WRITE 4711 99:99:{inode} 0 EOF\n"
    )
    assert managers.lock_holder(site) is None
    (machine.proc / "locks").write_text(f"1: FLOCK  ADVISORY  WRITE 4711 99:99:{inode} 0 EOF\n")
    assert managers.lock_holder(site) == 4711, "a file system that shows another device there"


@needs_root
def test_a_state_directory_that_is_closed_to_this_user_is_noted(site):
    with open_folder() as folder:
        there = moved(site, folder / "x.db")
        StateDir(there.config.state_dir).create()
        assert "user nobody may not enter" in as_nobody(lambda: told(managers.lock, there))


def test_a_stop_is_told_with_who_and_when(site):
    passes(managers.stop_mark, site)
    site.config.state_dir.mkdir()
    StopMark("leave", by="jana", at="2030-05-01T11:00:00+00:00").write(site.state_dir.stop_mark)
    fails(managers.stop_mark, site, "stopped by jana at 2030-05-01T11:00:00+00:00", Grade.NOTE)


# ---- cron and systemd ----


UNIT = """\
[Unit]
Description=tasks
KillMode=process

[Service]
ExecStart=/srv/venv/bin/bgsupervisor run --config {config}
{more}
"""
WHOLE = "KillMode=process\nOOMPolicy=continue"


def write_unit(site, more=WHOLE, config=None, name="bgsupervisor.service"):
    path = site.machine.unit_folders[0] / name
    path.write_text(UNIT.format(config=config or site.config.path, more=more))
    return path


def test_without_an_entry_and_a_supervisor_something_is_wrong(site):
    fails(managers.entry, site, "neither cron nor systemd was found to start a supervisor, and none has ever been seen")
    seen = replace(site, seen_at=NOW)
    fails(managers.entry, seen, "one was last seen at 2030-05-01T12:00:00+00:00")
    fails(managers.entry, replace(seen, alive=True), "neither cron nor systemd was found to restart it", Grade.NOTE)


def test_a_cron_file_that_runs_this_configuration_is_found(site):
    file = site.machine.cron_files[0] / "tasks"
    alive = replace(site, alive=True)
    for line in (
        f"* * * * * deploy /srv/venv/bin/bgsupervisor run --config {site.config.path}",
        f"* * * * * deploy /srv/venv/bin/python -m bgsupervisor --config={site.config.path} run",
        "* * * * * deploy cd /srv && venv/bin/bgsupervisor run",
    ):
        file.write_text(f"PATH=/bin\n{line}\n")
        passes(managers.entry, alive, f"{file}; a supervisor is alive")
    for line in (
        f"# * * * * * deploy /srv/venv/bin/bgsupervisor run --config {site.config.path}",
        "* * * * * deploy /srv/venv/bin/bgsupervisor run --config /srv/other/bgsupervisor.toml",
        f"* * * * * deploy /srv/venv/bin/bgsupervisor health --config {site.config.path}",
    ):
        file.write_text(f"{line}\n")
        fails(managers.entry, site, "neither cron nor systemd")


def test_the_entry_that_the_program_prints_is_found_whatever_the_path(make_app, site):
    app = make_app("", name='50% of it\'s "space"')
    printed = app.cli("cron", "--cron-d").stdout
    (site.machine.cron_files[0] / "tasks").write_text(printed)
    there = replace(site, config=configuration.load(app.config, environ={}), alive=True)
    passes(managers.entry, there, "tasks; a supervisor is alive")


def test_the_unit_that_the_program_prints_is_found_and_whole(make_app, site):
    app = make_app("", name="50% $HOME")
    (site.machine.unit_folders[0] / "bgsupervisor.service").write_text(app.cli("systemd").stdout)
    there = replace(site, config=configuration.load(app.config, environ={}), alive=True)
    passes(managers.entry, there, "bgsupervisor.service; a supervisor is alive")
    passes(managers.unit, there, "KillMode=process, OOMPolicy=continue")


def test_a_users_crontab_is_found(site):
    program = Path(site.machine.crontab)
    program.write_text(f"#!/bin/sh\necho '* * * * * bgsupervisor run --config {site.config.path}'\n")
    program.chmod(0o755)
    passes(managers.entry, replace(site, alive=True), f"the crontab of {user_name(os.geteuid())}")


def test_an_entry_without_a_supervisor_is_wrong_unless_it_was_stopped(site):
    path = write_unit(site)
    fails(managers.entry, replace(site, seen_at=NOW), f"{path}, but no supervisor is alive")
    site.config.state_dir.mkdir()
    StopMark("leave", by="jana", at="now").write(site.state_dir.stop_mark)
    passes(managers.entry, site, str(path))


def test_a_unit_that_kills_all_at_a_restart_is_wrong(site):
    passes(managers.unit, site, "no unit")
    write_unit(site, "OOMPolicy=continue")
    fails(managers.unit, site, "has KillMode=control-group: each restart of it kills the tasks; set KillMode=process")
    write_unit(site, f"{WHOLE}\nKillMode=mixed")
    fails(managers.unit, site, "has KillMode=mixed")
    write_unit(site, "# KillMode=mixed\n" + WHOLE)
    passes(managers.unit, site)


def test_the_word_of_a_drop_in_counts(site):
    path = write_unit(site)
    folder = path.with_name(f"{path.name}.d")
    folder.mkdir()
    (folder / "override.conf").write_text("[Service]\nKillMode=control-group\n")
    fails(managers.unit, site, "has KillMode=control-group")


def test_a_unit_that_counts_a_tasks_memory_as_its_own_is_noted(site):
    write_unit(site, "KillMode=process")
    fails(managers.unit, site, "has OOMPolicy=stop", Grade.NOTE)


def test_a_unit_with_too_few_processes_is_wrong(site):
    write_unit(site, f"{WHOLE}\nTasksMax=32")
    fails(managers.unit, site, "has TasksMax=32; 16 slots need 64")
    write_unit(site, f"{WHOLE}\nTasksMax=infinity")
    passes(managers.unit, site)


def test_other_units_are_left_alone(site):
    write_unit(site, "KillMode=control-group", config="/srv/other/bgsupervisor.toml")
    (site.machine.unit_folders[0] / "web.service").write_text("[Service]\nExecStart=/usr/bin/gunicorn run\n")
    passes(managers.unit, site, "no unit of systemd is used")


# ---- all together ----


def test_a_check_that_meets_an_unreadable_machine_does_not_stop_the_others(site, tmp_path):
    blind = replace(site, machine=replace(site.machine, proc=tmp_path / "absent"))
    found = {one.check: one for one in examine(blind)}
    assert set(found) == set(CHECKS)
    assert found["PID 1"].message.startswith("it cannot be checked: [Errno 2]")
    assert found["SQLite"].grade is Grade.OK


TASKS = """
    from bgsupervisor import task

    @task
    def add(a: int = 1) -> int:
        return a
"""


def lines_of(done):
    lines = [re.split(" {2,}", line, maxsplit=2) for line in done.stdout.splitlines()]
    return {check: (grade, sentence) for grade, check, sentence in lines}


def test_a_set_up_that_works_is_ok_line_by_line_and_nothing_is_made(make_app):
    app = make_app(TASKS)
    before = set(app.folder.iterdir())
    found = lines_of(app.cli("doctor"))
    assert found["configuration"] == ("ok", str(app.config))
    assert found["task modules"] == ("ok", "appx: 1 task(s)")
    assert found["database"][0] == "note"
    assert set(app.folder.iterdir()) - before <= {app.folder / "__pycache__"}

    started = app.start()
    found = lines_of(app.cli("doctor"))
    assert found["database"] == ("ok", f"{app.service.ledger.store.place}: 0 wait, 0 run")
    assert found["lock"][0] == "ok"
    assert f"PID {started.process.pid} holds it" in found["lock"][1]
    assert found["clock"][0] == found["kernel"][0] == "ok"
    assert found["entry"][0] in {"ok", "note"}


def test_what_is_wrong_leaves_with_1_and_is_told_in_json_too(make_app):
    app = make_app("import nothing_of_that_name", database="sqlite:///current/x.db")
    (app.folder / "7").mkdir()
    (app.folder / "current").symlink_to(app.folder / "7")
    done = app.cli("doctor", "--json")
    assert done.returncode == 1
    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert set(found) == {"configuration", "task modules", "database", *CHECKS}
    assert found["task modules"]["grade"] == found["deploy folder"]["grade"] == "WRONG"
    assert (
        "module appx does not load: ModuleNotFoundError: No module named 'nothing_of_that_name'"
        in found["task modules"]["told"]
    )


def test_a_missing_configuration_is_told_alone(make_app, tmp_path):
    done = make_app("").cli("doctor", "--config", str(tmp_path / "absent.toml"))
    assert (done.returncode, done.stderr) == (1, "")
    assert (
        done.stdout == f"WRONG  configuration  {tmp_path}/absent.toml does not exist; correct its name, or create it\n"
    )


def test_no_modules_and_modules_without_tasks_are_wrong(make_app):
    app = make_app("", tasks=[])
    assert lines_of(app.cli("doctor"))["task modules"] == ("WRONG", "none are configured; name yours in `tasks`")
    app.configure()
    assert lines_of(app.cli("doctor"))["task modules"] == ("WRONG", "no task is defined in appx")


@pytest.mark.of_sqlite
def test_a_damaged_database_is_told_and_the_other_checks_go_on(make_app):
    app = make_app(TASKS)
    (app.folder / "bgsupervisor.db").write_bytes(b"notes, and no database\n" * 500)
    found = lines_of(app.cli("doctor"))
    assert found["database"][0] == "WRONG"
    assert "is damaged" in found["database"][1]
    assert found["PID 1"][0] in {"ok", "note"}


@pytest.mark.of_sqlite
def test_a_database_of_the_application_gets_no_tables_by_being_looked_at(make_app):
    app = make_app(TASKS)
    path = app.folder / "bgsupervisor.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE customer (id INTEGER)")
    connection.close()
    assert "has none of our tables yet" in lines_of(app.cli("doctor"))["database"][1]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("customer",)]
    assert connection.execute("PRAGMA journal_mode").fetchall() == [("delete",)]
    connection.close()


@pytest.mark.of_sqlite  # with a server no clock of this machine is in the rows
def test_a_row_of_the_future_is_found_in_the_database(make_app):
    app = make_app(TASKS)
    id = app.service.request("appx:add").id
    assert lines_of(app.cli("doctor"))["clock"][0] == "ok"
    app.database.rows("UPDATE bgsupervisor_task SET requested_at = '2999-01-01 00:00:00.000000+00:00'")
    grade, sentence = lines_of(app.cli("doctor"))["clock"]
    assert grade == "WRONG"
    assert f"the request of task {id} lies" in sentence


@pytest.mark.of_sqlite  # some checks are of its file
def test_a_set_up_with_nothing_wrong_leaves_with_0(make_app, site, monkeypatch):
    app = make_app(TASKS)
    app.start()
    there = replace(site, config=configuration.load(app.config, environ={}))
    write_unit(there)
    whole = replace(there.machine, proc=Path("/proc"), cgroup_root=site.machine.cgroup_root, clock=Machine().clock)
    found = list(command.findings(Session(app.config), whole))
    assert [one for one in found if one.grade is Grade.WRONG] == []
    assert {one.check for one in found} == {"configuration", "task modules", "database", *CHECKS}
    monkeypatch.setattr(command, "findings", lambda _: iter(found))
    assert CliRunner().invoke(command.doctor, []).exit_code == 0


def test_a_hanging_supervisor_is_found_by_its_lock(make_app):
    app = make_app(TASKS)
    started = app.start()
    pid = started.process.pid
    os.kill(pid, 19)
    try:
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "T", "it has stopped")
        os.utime(app.state_dir / "supervisor.lock", (1, 1))
        grade, sentence = lines_of(app.cli("doctor"))["lock"]
    finally:
        os.kill(pid, 18)
    assert grade == "WRONG"
    assert f"PID {pid} holds it and has shown no sign of life for" in sentence
