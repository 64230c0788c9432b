"""The entries for cron and systemd, and supervisors that live by them."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from support.app import LIMIT_S, App, Supervising, wait_until
from support.as_user import NOBODY, as_nobody, needs_root, open_folder

from bgsupervisor import Status
from bgsupervisor.cli import service_files
from bgsupervisor.cli.commands import cron, systemd
from bgsupervisor.cli.program import program
from bgsupervisor.errors import AccessError, ConfigError

pytestmark = pytest.mark.any_database

ROOT = Path(__file__).parents[2]
SOURCE = """
import os, time
from bgsupervisor import Task, task

@task
def hello() -> str:
    return "old"

@task
def where() -> str:
    return os.getcwd()

class Slow(Task):
    def run(self, seconds: float = 30) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.progress(0)
            time.sleep(0.02)
        return "old"
"""
NEW = SOURCE.replace('"old"', '"new"')
ODD_NAME = "a b 100% it's"
FAKE_CRONTAB = """#!/bin/sh
[ ! -f "$FAKE.refuses" ] || { echo "you are not allowed" >&2; exit 1; }
case "$1" in
-l) [ -f "$FAKE" ] || { echo "no crontab for you" >&2; exit 1; }; cat "$FAKE" ;;
-) cat > "$FAKE" ;;
esac
"""


@pytest.fixture
def app(make_app):
    return make_app(SOURCE)


@pytest.fixture
def odd_app(make_app):
    return make_app(SOURCE, name=ODD_NAME)


def invoke(*arguments):
    """Call the program here; return what it said and how it left."""
    answer = CliRunner().invoke(program, [str(one) for one in arguments])
    if answer.exception is not None and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer


# ---- What is printed -------------------------------------------------------------------------------------------


def test_a_crontab_entry_names_program_and_configuration_by_absolute_paths(app):
    line = app.cli("cron").stdout.splitlines()[-1]

    assert line.startswith("* * * * * ")
    words = shlex.split(line.removeprefix("* * * * * "))
    assert words[1:] == ["run", "--config", str(app.config)]
    assert Path(words[0]) == Path(sys.executable).with_name("bgsupervisor")


def command_of(line):
    """Return what cron hands to the shell: after five words, with the backslash before each % taken away."""
    command, escaped = "", False
    for letter in line.split(maxsplit=5)[5]:
        if letter == "%" and not escaped:
            return command  # the rest would be the command's input
        command = (command[:-1] if letter == "%" else command) + letter
        escaped = letter == "\\" and not escaped
    return command


@pytest.mark.parametrize(
    "word", ["plain", "a b", "100%", "it's", 'say "x"', "$HOME", "back\\slash", "\\%", "a\\%b%c\\"]
)
def test_any_word_passes_cron_and_the_shell_unchanged(word):
    line = f"* * * * * printf %s {service_files.cron_quoted(word)}".replace("printf %s", "printf \\%s")

    printed = subprocess.run(["sh", "-c", command_of(line)], capture_output=True, text=True, check=True).stdout

    assert printed == word


def test_a_cron_d_file_has_shell_path_mailto_and_the_user(app):
    lines = app.cli("cron", "--cron-d", "--user", "nobody").stdout.splitlines()

    settings = dict(line.split("=", 1) for line in lines if "=" in line and line[0] not in "#*")
    assert settings == {"SHELL": "/bin/sh", "PATH": "/usr/local/bin:/usr/bin:/bin", "MAILTO": "root"}
    assert lines[-1].split()[:6] == ["*"] * 5 + ["nobody"]
    assert lines[-1].endswith(f" run --config {app.config}")


def test_without_a_user_the_owner_of_the_state_directory_supervises(app):
    lines = app.cli("cron", "--cron-d").stdout.splitlines()
    owner = app.folder.owner()

    assert lines[-1].split()[5] == owner
    assert f"User={owner}" in app.cli("systemd").stdout.splitlines()


@needs_root
def test_the_owner_of_the_state_directory_goes_before_that_of_the_configuration(app):
    app.state_dir.mkdir()
    os.chown(app.state_dir, NOBODY, -1)

    assert "User=nobody" in app.cli("systemd").stdout.splitlines()


def test_an_entry_keeps_a_link_to_the_newest_release(make_app, tmp_path):
    app = make_app(SOURCE, name="releases/1")
    (tmp_path / "current").symlink_to("releases/1")
    config = tmp_path / "current" / "bgsupervisor.toml"

    for command in ("cron", "systemd"):
        printed = app.cli(command, "--config", config)
        assert f"--config {config}\n" in printed.stdout, printed.stderr


def test_the_program_is_named_as_it_was_called(app, tmp_path, monkeypatch):
    (tmp_path / "current").symlink_to(Path(sys.executable).parent)
    called = tmp_path / "current" / "bgsupervisor"

    told = subprocess.run([called, "cron", "--config", app.config], capture_output=True, text=True, check=True).stdout

    assert told.splitlines()[-1].split()[5] == str(called)


def test_without_a_console_script_python_is_named(app, tmp_path, monkeypatch):
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))

    assert invoke("cron", "--config", app.config).output.splitlines()[-1].split()[5:8] == [
        str(python),
        "-m",
        "bgsupervisor",
    ]


def test_settings_that_cron_would_not_have_are_told(app):
    told = app.cli("cron", environment={"BGSUPERVISOR_SLOTS": "3"})

    assert "slots came from the environment" in told.stderr
    assert app.cli("cron").stderr == ""


def test_an_entry_needs_a_configuration_file(tmp_path):
    environment = {"BGSUPERVISOR_DATABASE": f"sqlite:///{tmp_path}/x.db", "PATH": os.environ["PATH"]}
    told = subprocess.run(
        [sys.executable, "-m", "bgsupervisor", "cron"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert told.returncode == 3
    assert "bgsupervisor init" in told.stderr


def test_a_name_that_is_none_is_refused(app):
    for command in (["cron", "--cron-d"], ["systemd"]):
        assert "is not a user's name" in app.cli(*command, "--user", "root\nroot").stderr
    assert app.cli("cron", "--user", "root").returncode == 2


# ---- The unit --------------------------------------------------------------------------------------------------

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there to verify the unit"
)


def verified(unit, folder, *options):
    path = folder / "bgsupervisor.service"
    path.write_text(unit)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    return subprocess.run(
        ["systemd-analyze", *options, "verify", "--man=no", path],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@needs_systemd_analyze
def test_systemd_finds_nothing_wrong_with_the_unit(app, tmp_path):
    answer = verified(app.cli("systemd").stdout, tmp_path)

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@needs_systemd_analyze
def test_systemd_finds_nothing_wrong_with_a_unit_of_odd_paths(tmp_path):
    script = tmp_path / "a b 100%" / "bgsupervisor"
    script.parent.mkdir(parents=True)
    script.symlink_to(shutil.which("true"))
    found = service_files.Installation((str(script),), tmp_path / ODD_NAME / 'say "$x"\\.toml', tmp_path, "root")

    answer = verified(service_files.fill(service_files.UNIT, found, "root", service_files.unit_quoted), tmp_path)

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_a_program_that_systemd_would_not_start_is_refused(app, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "it's" / "python"))

    with pytest.raises(ConfigError, match="starts no program with quotes"):
        invoke("systemd", "--config", app.config)


def test_the_unit_has_tasks_live_and_the_supervisor_come_back():
    unit = (ROOT / service_files.UNIT).read_text().splitlines()

    wanted = (
        "Type=notify NotifyAccess=main WatchdogSec=30 KillMode=process OOMPolicy=continue Restart=always RestartSec=1 "
        "StartLimitIntervalSec=0 SuccessExitStatus=100 RestartPreventExitStatus=100 UMask=0007"
    )
    assert set(wanted.split()) <= set(unit)
    assert "ExecReload=/bin/kill -HUP $MAINPID" in unit


def test_the_comments_of_an_entry_stay_whole_whoever_supervises(app):
    for command, template in ((["systemd"], service_files.UNIT), (["cron", "--cron-d"], service_files.CRON_D)):
        printed = app.cli(*command, "--user", "alice").stdout.splitlines()
        shipped = (ROOT / template).read_text().splitlines()

        assert [line for line in printed if line.startswith("#")][1:] == [
            line for line in shipped if line.startswith("#")
        ][1:]
        assert any("alice" in line for line in printed)


def test_a_unit_for_root_keeps_the_capabilities_of_its_tasks(app):
    printed = {user: app.cli("systemd", "--user", user).stdout.splitlines() for user in ("root", "alice")}

    assert [line for line in printed["alice"] if line not in printed["root"]] == [
        "User=alice",
        "CapabilityBoundingSet=",
    ]


@needs_root
def test_root_installs_a_unit_for_the_machine_and_is_told_what_to_type(app, tmp_path, monkeypatch):
    monkeypatch.setattr(systemd, "SYSTEM_FOLDER", tmp_path)

    told = invoke("systemd", "--config", app.config, "--install", "--user", "nobody").output

    unit = tmp_path / "bgsupervisor.service"
    assert "User=nobody" in unit.read_text().splitlines()
    assert unit.stat().st_mode & 0o777 == 0o644
    assert told.splitlines()[-2:] == ["  systemctl daemon-reload", "  systemctl enable --now bgsupervisor"]


@needs_root
def test_another_user_installs_a_unit_of_their_own(app, tmp_path, monkeypatch):
    with open_folder() as folder:
        shutil.copy(app.config, folder)
        os.chown(folder, NOBODY, NOBODY)
        monkeypatch.setattr(systemd, "USER_FOLDER", folder / "units")

        told = as_nobody(lambda: invoke("systemd", "--config", folder / app.config.name, "--install").output)

        unit = (folder / "units" / "bgsupervisor.service").read_text()
        assert "loginctl enable-linger nobody" in told
        assert "WantedBy=default.target" in unit
        assert "User=" not in unit
        assert not re.search("Protect|Restrict|SystemCall|Capability|Hardening", unit)
        assert "\n\nRestart=always\n" in unit
        if shutil.which("systemd-analyze"):
            assert verified(unit, tmp_path, "--user").stderr == ""


def test_an_entry_of_another_configuration_is_left_alone(make_app, tmp_path, monkeypatch):
    monkeypatch.setattr(cron, "CRON_D_FOLDER", tmp_path)
    user = tmp_path.owner()
    first, second = make_app(SOURCE, name="first"), make_app(SOURCE, name="second")
    invoke("cron", "--config", first.config, "--cron-d", "--install", "--user", user)

    with pytest.raises(ConfigError, match=f"is not of {second.config} and was not changed"):
        invoke("cron", "--config", second.config, "--cron-d", "--install", "--user", user)


# ---- Installing for cron ---------------------------------------------------------------------------------------


def test_a_cron_d_file_has_a_name_that_cron_reads_and_rights_that_it_trusts(app, tmp_path, monkeypatch):
    monkeypatch.setattr(cron, "CRON_D_FOLDER", tmp_path)
    monkeypatch.setattr(cron, "check_user", print)
    before = os.umask(0o077)
    try:
        for _ in range(2):
            told = invoke("cron", "--config", app.config, "--cron-d", "--install", "--user", "jo.doe").output
    finally:
        os.umask(before)

    path = tmp_path / "bgsupervisor-jo_doe"
    assert path.read_text().splitlines()[-1].split()[5] == "jo.doe"
    assert path.stat().st_mode & 0o777 == 0o644
    assert str(path) in told
    assert "0644" in told
    assert [one.name for one in tmp_path.glob("*bgsupervisor*")] == [path.name]


def test_a_user_whom_the_machine_does_not_know_is_refused(app):
    told = app.cli("cron", "--cron-d", "--install", "--user", "nobody-at-all")

    assert told.returncode == 2
    assert "no user nobody-at-all" in told.stderr


@needs_root
def test_only_root_installs_into_cron_d(app):
    with open_folder() as folder:
        shutil.copy(app.config, folder)
        act = lambda: invoke("cron", "--config", folder / app.config.name, "--cron-d", "--install", "--user", "root")  # noqa: E731

        said = as_nobody(act)

    assert said.startswith(f"{AccessError.__name__}: user nobody cannot write /etc/cron.d/bgsupervisor-root: ")
    assert "install it as root" in said


class Crontab:
    """A `crontab` program that keeps what it is given in a file."""

    def __init__(self, folder):
        self.file = folder / "crontab.txt"
        program = folder / "bin" / "crontab"
        program.parent.mkdir()
        program.write_text(FAKE_CRONTAB)
        program.chmod(0o755)
        self.environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "FAKE": str(self.file)}

    def install(self, app):
        return app.cli("cron", "--install", environment=self.environment)


@pytest.fixture
def crontab(tmp_path):
    return Crontab(tmp_path)


def test_the_first_install_makes_a_crontab(app, crontab):
    told = crontab.install(app)

    assert told.returncode == 0, told.stderr
    lines = crontab.file.read_text().splitlines()
    assert lines == [f"# bgsupervisor: {app.config}", app.cli("cron").stdout.splitlines()[-1]]
    assert lines[-1] in told.stdout


def test_a_second_install_changes_nothing_and_a_changed_entry_is_replaced_in_its_place(app, crontab):
    others = ["MAILTO=x@example.org", "# mine\x0c", "", "5 4 * * * backup --config x  "]
    mark = f"# bgsupervisor: {app.config}"
    older = f"*/5 * * * * /old/bgsupervisor run --config {app.config}"
    crontab.file.write_text("\n".join([*others[:2], mark, older, *others[2:]]) + "\n")

    crontab.install(app)
    first = crontab.file.read_text()
    again = crontab.install(app)

    line = app.cli("cron").stdout.splitlines()[-1]
    assert first.split("\n") == [*others[:2], mark, line, *others[2:], ""]
    assert crontab.file.read_text() == first
    assert "it is there already" in again.stdout


def test_an_entry_without_its_mark_is_not_doubled_and_a_mark_alone_takes_no_line(app, crontab):
    line = app.cli("cron").stdout.splitlines()[-1]
    mark = f"# bgsupervisor: {app.config}"
    crontab.file.write_text(f"{line}\n{mark}\n1 1 * * * mine\n")

    crontab.install(app)

    assert crontab.file.read_text() == f"{mark}\n{line}\n1 1 * * * mine\n"


def test_two_installations_have_an_entry_each(make_app, crontab):
    first, second = make_app(SOURCE, name="first"), make_app(SOURCE, name="second")
    for app in (first, second, first):
        crontab.install(app)

    assert crontab.file.read_text().count("* * * * *") == 2


def test_a_crontab_program_that_refuses_is_quoted(app, crontab):
    crontab.file.write_text("1 1 * * * mine\n")
    Path(f"{crontab.file}.refuses").touch()

    told = crontab.install(app)

    assert told.returncode == 1
    assert told.stderr == "the `crontab` program refused: you are not allowed; nothing was changed\n"
    assert crontab.file.read_text() == "1 1 * * * mine\n"


def test_without_a_crontab_program_one_sentence_says_so(app, tmp_path):
    told = app.cli("cron", "--install", environment={"PATH": str(tmp_path)})

    assert told.returncode == 1
    assert told.stderr == "there is no `crontab` program here; install cron, or print the entry without --install\n"


# ---- The templates in a wheel ----------------------------------------------------------------------------------


def test_the_commands_work_from_an_installed_wheel(app, tmp_path):
    copy, built, installed = tmp_path / "copy", tmp_path / "built", tmp_path / "installed"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("bgsupervisor", "cron", "systemd"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", built],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(installed)

    for command in (["cron"], ["cron", "--cron-d"], ["systemd"]):
        environment = {"PYTHONPATH": str(installed)}
        told = subprocess.run(
            [sys.executable, "-m", "bgsupervisor", *command, "--config", app.config],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.stdout == app.cli(*command).stdout, told.stderr


# ---- Living by the line ----------------------------------------------------------------------------------------


class Cron:
    """Runs an application's printed line as cron does: a bare environment, the folder /, /bin/sh."""

    def __init__(self, app):
        self.app = app
        self.command = command_of(app.cli("cron").stdout.splitlines()[-1])
        self.started = []

    def minute(self):
        output = self.app.folder / f"cron-{len(self.started)}.log"
        environment = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "HOME": "/", "LOGNAME": "x"}
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(Supervising(process, output))
        return self.started[-1]

    def end(self):
        """Kill shells and supervisors; a shell may wait for its supervisor, or have become it."""
        for one in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait(LIMIT_S)


@pytest.fixture
def cron_of():
    """Make a stand-in of cron for an application; what it started is killed before the application is ended."""
    made = []

    def make(app):
        made.append(Cron(app))
        return made[-1]

    yield make
    for one in made:
        one.end()


def running(started):
    return [one for one in started if one.process.poll() is None]


def done(app, name="appx:hello", **data):
    handle = app.service.request(name, data)
    record = app.wait(handle)
    assert record.status is Status.DONE, record
    return app.service.result(handle)


def test_a_supervisor_lives_by_the_printed_line(odd_app, cron_of):
    cron = cron_of(odd_app)
    first = cron.minute()

    assert done(odd_app) == "old"
    assert done(odd_app, "appx:where") == str(odd_app.folder)
    second = cron.minute()

    assert second.process.wait(LIMIT_S) == 0
    assert first.process.poll() is None
    assert [one.output.read_text() for one in cron.started] == ["", ""]
    assert "supervising" in (odd_app.state_dir / "logs" / "supervisor.log").read_text()


def test_of_five_runs_in_the_same_second_one_stays(app, cron_of):
    cron = cron_of(app)
    for _ in range(5):
        cron.minute()

    wait_until(lambda: len(running(cron.started)) == 1, "four have left", 30)

    assert done(app) == "old"
    assert sorted(one.process.poll() or 0 for one in cron.started) == [0] * 5
    assert [one.output.read_text() for one in cron.started] == [""] * 5


def test_what_keeps_run_from_supervising_reaches_crons_mail(app, cron_of):
    cron = cron_of(app)
    app.configure(slots=-1)

    told = cron.minute()

    assert told.process.wait(LIMIT_S) == 3
    assert "slots must be" in told.output.read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_runs_beside_a_supervisor_leave_nothing(app):
    supervising = app.start()
    done(app)
    before, processes = files(app), sessions()
    began = time.monotonic()

    for _ in range(100):
        told = app.cli("run", stdin=subprocess.DEVNULL)
        assert (told.returncode, told.stdout, told.stderr) == (0, "", "")

    print(f"100 runs took {time.monotonic() - began:.1f} s")
    assert files(app) == before
    assert sessions() == processes
    assert supervising.process.poll() is None


def files(app):
    return sorted(str(path) for path in app.folder.rglob("*") if "__pycache__" not in str(path))


def sessions():
    """Return the processes that this one has started, and theirs."""
    return sorted(one.pid for one in psutil.Process().children(recursive=True))


# ---- Releases --------------------------------------------------------------------------------------------------


class Releases(App):
    """Releases behind a link `current`, with the database outside of them."""

    def __init__(self, folder):
        self.root = folder
        (folder / "shared").mkdir(parents=True)
        super().__init__(folder / "releases" / "1", SOURCE, database="sqlite:///../shared/bgsupervisor.db")
        self.current = folder / "current"
        self.current.symlink_to("releases/1")
        self.config = self.current / "bgsupervisor.toml"
        self.state_dir = folder / "shared" / ".bgsupervisor"

    def release(self, number, source):
        new = self.root / "releases" / str(number)
        shutil.copytree(self.folder, new, ignore=shutil.ignore_patterns("__pycache__", "*.log"))
        (new / "appx.py").write_text(source)
        link = self.root / "current.new"
        link.symlink_to(new.relative_to(self.root))
        link.replace(self.current)


@pytest.fixture
def releases(tmp_path):
    made = Releases(tmp_path / "srv")
    yield made
    made.end()


def test_a_run_after_the_link_was_switched_has_new_tasks_run_on_the_new_release(releases, cron_of):
    cron = cron_of(releases)
    first = cron.minute()
    assert done(releases) == "old"
    slow = releases.service.request("appx:Slow", {"seconds": 2})
    releases.started(slow)

    releases.release(2, NEW)
    cron.minute()

    wait_until(lambda: done(releases) == "new", "new tasks run on the new release")
    assert done(releases, "appx:where") == str(releases.root / "releases" / "2")
    releases.wait(slow)
    assert releases.service.result(slow) == "old"
    assert first.process.poll() is None
    assert (releases.root / "shared" / "bgsupervisor.db").exists()
    assert not list((releases.root / "releases").rglob("*.db*"))


def test_the_release_recipe_of_the_page_brings_new_code_into_force(releases):
    page = (ROOT / "docs" / "deploy.md").read_text()
    recipe = page.split("With cron:")[1].split("```")[1].removeprefix("console\n")
    releases.start()
    shutil.copytree(releases.folder, releases.root / "releases" / "8", ignore=shutil.ignore_patterns("__pycache__"))
    (releases.root / "releases" / "8" / "appx.py").write_text(NEW)
    script = Path(sys.executable).with_name("bgsupervisor")

    said = []
    for line in recipe.strip().splitlines():
        command = line.removeprefix("$ ").replace("/srv/myapp/venv/bin/bgsupervisor", str(script))
        command = command.replace("/srv/myapp", str(releases.root))
        told = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        said.append(told.stdout)

    assert said == ["", "reloaded: loaded 3 tasks\n", "nothing to do: the tables are this version's\n"]
    assert done(releases) == "new"


def test_every_command_and_option_of_the_page_exists():
    page = (ROOT / "docs" / "deploy.md").read_text()
    context = program.make_context("bgsupervisor", [], resilient_parsing=True)
    calls = re.findall(r"bgsupervisor (?!-)([a-z]+)((?: --[a-z-]+(?: (?![a-z]*`)[\w/.]+)?)*)", page)

    known = [(name, program.get_command(context, name), re.findall("--[a-z-]+", options)) for name, options in calls]

    assert len(known) > 15
    assert [name for name, command, _ in known if command is None] == []
    unknown = [
        (name, option)
        for name, command, options in known
        if command is not None
        for option in options
        if option not in {opt for param in command.params for opt in param.opts}
    ]
    assert unknown == []


def test_the_configuration_is_the_same_from_everywhere(releases):
    deeper = releases.current / "a" / "b"
    deeper.mkdir(parents=True)
    check = [sys.executable, "-m", "bgsupervisor", "check", "--json"]
    bare = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "HOME": "/"}
    named = ["--config", str(releases.config)]
    ways = {
        "cwd / and --config": (check + named, "/", os.environ),
        "cron": (check + named, "/", bare),
        "a variable": (check, "/", {**bare, "BGSUPERVISOR_CONFIG": str(releases.config)}),
        "a shell in a subfolder": (check, deeper, {**os.environ, "PWD": str(deeper)}),
    }

    found = {}
    for way, (command, folder, environment) in ways.items():
        told = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        config = json.loads(told.stdout)["config"]
        found[way] = {key: one["value"] for key, one in config.items()}

    assert found["cron"]["database"] == f"sqlite:///{releases.root}/shared/bgsupervisor.db"
    assert [way for way in ways if found[way] != found["cron"]] == []


# ---- Another virtualenv ----------------------------------------------------------------------------------------


@pytest.fixture
def other_python(tmp_path):
    """Make a virtualenv of another path that has what this one has."""
    folder = tmp_path / "other-venv"
    (folder / "bin").mkdir(parents=True)
    python = Path(sys.executable).resolve()
    (folder / "bin" / "python").symlink_to(python)
    (folder / "pyvenv.cfg").write_text(f"home = {python.parent}\n")
    return folder / "bin" / "python"


def run_other(python, app):
    paths = f"{ROOT}:{sysconfig.get_path('purelib')}"
    output = app.folder / "other.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [python, "-m", "bgsupervisor", "run", "--config", app.config],
            env=app.environment(PYTHONPATH=paths),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    app.supervisors.append(Supervising(process, output))
    return app.supervisors[-1]


def test_a_run_of_another_virtualenv_takes_over_and_no_task_is_lost(app, other_python):
    first = app.start()
    slow = app.service.request("appx:Slow", {"seconds": 3})
    app.started(slow)

    second = run_other(other_python, app)

    wait_until(lambda: app.supervisor_row(second.process.pid), "the second supervises")
    assert first.process.wait(LIMIT_S) == 0
    assert done(app) == "old"
    record = app.wait(slow)
    assert (record.status, record.attempt) == (Status.DONE, 1)
    assert second.process.poll() is None


def test_without_auto_reload_another_virtualenv_leaves_too(make_app, other_python):
    app = make_app(SOURCE, auto_reload=False)
    first = app.start()

    second = run_other(other_python, app)

    assert second.process.wait(LIMIT_S) == 0
    assert second.output.read_text() == ""
    assert first.process.poll() is None
