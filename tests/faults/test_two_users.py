"""A web application of one user, a supervisor of another, and the group that they share."""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from support.app import App, Supervising, wait_until
from support.as_user import needs_root
from support.pace import allowed_s
from support.users import COMMON, DEPLOY, WEB, as_user, ask_as, their_python

from bgsupervisor import Status
from bgsupervisor.system.users import user_name

__all__ = ["their_python"]

pytestmark = [needs_root, pytest.mark.of_sqlite]  # whose file they share

SOURCE = """
import os, time
from bgsupervisor import task

@task
def hello() -> int:
    print("said by the body")
    return os.getuid()

@task
def slow() -> None:
    print("begun", flush=True)
    time.sleep(60)
"""
REQUEST = """
import json, sys, time
from bgsupervisor import Service
service = Service(config=sys.argv[1])
handle = service.request(sys.argv[2])
record = service.wait(handle, timeout_s=20) if sys.argv[2].endswith("hello") else service.get(handle)
pickup = record.started_at and (record.started_at - record.requested_at).total_seconds()
print(json.dumps([record.id, str(record.status), pickup]))
"""
DEPLOY_NAME, WEB_NAME = user_name(DEPLOY), user_name(WEB)


class SharedApp(App):
    """An application that DEPLOY owns, in a folder that it shares with WEB through the group COMMON."""

    def __init__(self, folder, python, **options):
        self.python, self.python_environment = python
        super().__init__(folder, SOURCE, **options)
        # What docs/deploy.md says: chgrp and chmod g+s.
        folder.chmod(0o2770)
        for path in (folder, *folder.iterdir()):
            os.chown(path, DEPLOY, COMMON)

    def start(self, *arguments, wait=True, **options):
        output = Path(tempfile.mkdtemp(dir=self.folder.parent)) / "run.log"
        with output.open("wb") as file:
            process = as_user(
                DEPLOY,
                self.command("run", *arguments),
                environment=self.python_environment,
                stdout=file,
                stderr=file,
                **options,
            )
        started = Supervising(process, output)
        self.supervisors.append(started)
        if wait:
            wait_until(
                lambda: process.poll() is not None or self.supervisor_row(process.pid), "it has loaded the tasks"
            )
            own = self.state_dir / "logs" / "supervisor.log"
            assert process.poll() is None, output.read_text() + own.read_text()
        return started

    def command(self, *arguments):
        return [self.python, "-m", "bgsupervisor", "--config", self.config, *arguments]

    def ask(self, uid, *arguments, **options):
        return ask_as(uid, self.command(*arguments), environment=self.python_environment, **options)

    def request(self, name="appx:hello", *, uid=WEB, **options):
        """Request a task as the web application does; return the finished process."""
        command = [self.python, "-c", REQUEST, self.config, name]
        return ask_as(uid, command, environment=self.python_environment, **options)

    def requested(self, *arguments, **options):
        told = self.request(*arguments, **options)
        assert told.returncode == 0, told.stderr
        return json.loads(told.stdout)


@pytest.fixture
def make_shared(their_python):
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    made = []

    def make(**options):
        made.append(SharedApp(root / f"app{len(made)}", their_python, **options))
        return made[-1]

    yield make
    for app in made:
        app.end()
    shutil.rmtree(root)


@pytest.fixture
def app(make_shared):
    return make_shared()


def rights(path):
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_gid


@pytest.mark.parametrize("first", ["supervisor", "request"])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_request_of_one_user_runs_at_once_as_the_other(app, first, umask):
    if first == "request":
        app.requested("appx:absent", umask=umask)
    app.start(umask=umask)

    id, status, pickup_s = app.requested(umask=umask)

    print(f"picked up after {pickup_s * 1000:.1f} ms")
    assert (status, json.loads(app.service.get(id).result)) == ("DONE", DEPLOY)
    assert pickup_s < allowed_s(1)
    database = app.folder / "bgsupervisor.db"
    for path in (database, Path(f"{database}-wal"), Path(f"{database}-shm")):
        assert rights(path) == (0o660, COMMON), path
    assert rights(app.state_dir) == (0o2750, COMMON)
    assert rights(app.state_dir / "wake.sock") == (0o660, COMMON)
    assert rights(app.state_dir / "control.sock")[0] == 0o600


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_ps_show_and_log_tell_the_web_user_everything(app, umask):
    app.start(umask=umask)
    id, _, _ = app.requested()
    running, _, _ = app.requested("appx:slow")
    app.started(running)

    listed = app.ask(WEB, "ps", "--json")
    assert [one["status"] for one in json.loads(listed.stdout)] == ["START", "DONE"], listed.stderr
    shown = app.ask(WEB, "show", str(id))
    assert "said by the body" in shown.stdout
    assert shown.stderr == ""
    ended = app.ask(WEB, "log", str(id))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "said by the body\n", "")
    wait_until(lambda: app.ask(WEB, "log", str(running)).stdout == "begun\n", "the log of what runs can be read")
    assert app.ask(WEB, "cancel", str(running)).returncode == 0
    assert app.wait(running).status is Status.INTERRUPTED


def test_a_web_user_outside_the_state_directory_is_served_through_the_database_alone(app):
    supervising = app.start()
    app.state_dir.chmod(0o700)

    id, status, pickup_s = app.requested()

    print(f"picked up without a wake-up after {pickup_s * 1000:.1f} ms")
    assert status == "DONE"
    assert pickup_s < allowed_s(1.5)
    listed = app.ask(WEB, "ps")
    assert listed.returncode == 0
    assert "hello" in listed.stdout
    assert "no supervisor" not in listed.stderr
    shown = app.ask(WEB, "show", str(id))
    assert shown.returncode == 0
    assert shown.stderr == f"this user cannot read {app.state_dir}/logs\n"
    for command in (["log", str(id)], ["log", "-f", str(id)]):
        told = app.ask(WEB, *command)
        assert told.returncode == 1
        assert told.stderr == (
            f"bgsupervisor: user {WEB_NAME} cannot read {app.state_dir}/logs: Permission denied; "
            "ask its owner, or read it as that user\n"
        )
    supervising.kill()
    app.service.ledger.store.database.execute_sql("UPDATE bgsupervisor_supervisor SET heartbeat_at = '2020-01-01'")
    assert "no supervisor has been seen since" in app.ask(WEB, "ps").stderr
    assert "stopped by" not in app.ask(WEB, "ps").stderr


def test_a_commit_without_a_wake_up_is_seen_soon_after_the_disk_has_it(app):
    app.start()
    app.state_dir.chmod(0o700)

    pickups = sorted(app.requested()[2] for _ in range(5))

    print("without a wake-up:", ", ".join(f"{one * 1000:.1f} ms" for one in pickups))
    assert pickups[-1] < allowed_s(1.5)
    assert pickups[2] < allowed_s(0.4)  # once a second would be 0.5


@pytest.mark.parametrize("command", ["stop", "start", "reload"])
@pytest.mark.parametrize("uid", [0, WEB])
def test_only_the_owner_steers_the_supervisor(app, uid, command):
    supervising = app.start()
    (app.state_dir / "stopped").unlink(missing_ok=True)
    if command == "start":
        supervising.stop()
        app.ask(DEPLOY, "stop")

    told = app.ask(uid, command)

    assert told.returncode == 1
    assert (
        f"{app.state_dir} belongs to user {DEPLOY_NAME}, but this is user {user_name(uid)}; {command} as" in told.stderr
    )
    assert (app.state_dir / "stopped").exists() == (command == "start")


@pytest.mark.parametrize("uid", [0, WEB])
def test_run_refuses_whoever_does_not_own_the_state_directory(app, uid):
    app.start().stop()

    told = app.ask(uid, "run")

    assert told.returncode == 1
    assert told.stderr == (
        f"bgsupervisor: {app.state_dir} belongs to user {DEPLOY_NAME}, but this is user {user_name(uid)}; "
        f"supervise as {DEPLOY_NAME}, or name another state_dir\n"
    )
    assert {path.stat().st_uid for path in app.state_dir.rglob("*")} == {DEPLOY}


def test_state_directory_of_another_user_in_its_place_is_refused(app):
    supervising = app.start()
    running, _, _ = app.requested("appx:slow")
    app.started(running)
    aside = app.state_dir.with_name("aside")

    moved = ask_as(WEB, ["sh", "-c", f"mv {app.state_dir} {aside} && mkdir -m 777 {app.state_dir}"])

    assert moved.returncode == 0, moved.stderr
    wait_until(lambda: supervising.process.poll() is not None, "the supervisor leaves")
    told = app.ask(DEPLOY, "run")
    assert told.returncode == 1
    assert f"{app.state_dir} belongs to user {WEB_NAME}, but this is user {DEPLOY_NAME}" in told.stderr
    assert app.service.get(running).status is Status.START
    shutil.rmtree(app.state_dir)
    aside.rename(app.state_dir)


def test_a_database_file_that_the_web_user_may_not_write_is_named(app):
    app.requested("appx:hello2", uid=DEPLOY)
    database = app.folder / "bgsupervisor.db"
    database.chmod(0o640)

    for told in (app.request(), app.ask(WEB, "request", "appx:hello")):
        assert told.returncode == 1
        assert f"the database file {database} cannot be written by user {WEB_NAME}" in told.stderr.splitlines()[-1]


def test_a_folder_that_the_web_user_may_not_write_is_named(app):
    app.requested("appx:hello2", uid=DEPLOY)
    app.folder.chmod(0o2750)

    for told in (app.request(), app.ask(WEB, "request", "appx:hello")):
        assert told.returncode == 1
        assert f"the folder {app.folder} cannot be written by user {WEB_NAME}" in told.stderr.splitlines()[-1]


def test_a_folder_that_the_supervisor_may_not_write_is_named(app):
    os.chown(app.folder, 0, COMMON)
    app.folder.chmod(0o2750)

    told = app.ask(DEPLOY, "run")

    assert told.returncode == 1
    assert f"user {DEPLOY_NAME} cannot create {app.state_dir}: Permission denied" in told.stderr


def test_a_configuration_that_the_supervisor_may_not_read_is_named(app):
    os.chown(app.config, 0, 0)
    app.config.chmod(0o600)

    told = app.ask(DEPLOY, "run")

    assert told.returncode == 1
    assert f"user {DEPLOY_NAME} cannot read {app.config}: Permission denied" in told.stderr


def test_without_a_common_group_the_web_user_is_told_what_is_missing(app):
    app.start()

    told = app.request(groups=())

    assert told.returncode == 1
    assert WEB_NAME in told.stderr.splitlines()[-1]
    assert str(app.folder) in told.stderr.splitlines()[-1]


def follow_the_page(folder):
    """Type the commands of docs/deploy.md for two users, for a folder."""
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    block = page.split("<!-- two users -->")[1].split("```")[1].removeprefix("console\n")
    lines = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
    rights_of = [line for line in lines if line.startswith(("install ", "chgrp ", "chmod ", "find "))]
    assert rights_of
    for line in rights_of:
        command = (
            line.replace("/srv/myapp/shared", str(folder)).replace("deploy", DEPLOY_NAME).replace("myapp", str(COMMON))
        )
        subprocess.run(["sh", "-ec", command], check=True)


def placed_in(app, folder):
    app.configure(database=f"sqlite:///{folder.name}/bgsupervisor.db")
    os.chown(app.config, DEPLOY, COMMON)
    app.state_dir = folder / ".bgsupervisor"


def test_the_commands_of_the_page_give_two_users_what_they_need(make_shared):
    app = make_shared()
    folder = app.folder / "shared"
    follow_the_page(folder)
    placed_in(app, folder)
    app.start()

    assert app.requested()[1] == "DONE"
    assert app.ask(WEB, "log", "1").stdout == "said by the body\n"


def test_recipe_for_two_users_leaves_the_state_directory_closed(make_shared):
    app = make_shared()
    folder = app.folder / "shared"
    folder.mkdir()
    os.chown(folder, DEPLOY, DEPLOY)
    folder.chmod(0o755)
    placed_in(app, folder)
    app.requested("appx:absent", uid=DEPLOY)
    app.start().stop()
    assert rights(folder / "bgsupervisor.db")[0] == 0o600

    follow_the_page(folder)

    assert rights(folder / "bgsupervisor.db") == (0o660, COMMON)
    for path in (app.state_dir, *app.state_dir.rglob("*")):
        assert path.name == "wake.sock" or not rights(path)[0] & 0o022, path
    app.start()
    assert app.requested()[1] == "DONE"
