"""What `cron` and `systemd` install they also remove, and nothing else; and `cron --install` where no cron runs."""

import os
import re

import pytest
from click.testing import CliRunner
from support.as_user import needs_root

from bgsupervisor.cli.commands import cron, systemd
from bgsupervisor.cli.program import program
from bgsupervisor.doctor.managers import cron_runs

FAKE_CRONTAB = """#!/bin/sh
[ ! -f "$FAKE.refuses" ] || { echo "you are not allowed" >&2; exit 1; }
case "$1" in
-l) [ -f "$FAKE" ] || { echo "no crontab for you" >&2; exit 1; }; cat "$FAKE" ;;
-) cat > "$FAKE" ;;
esac
"""
OTHERS = ["MAILTO=x@example.org", "# mine\x0c", "", "5 4 * * * backup run --config x  "]


def invoke(*arguments):
    answer = CliRunner().invoke(program, [str(one) for one in arguments])
    if answer.exception is not None and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer


@pytest.fixture
def apps(make_app):
    return make_app(name="a b 100%"), make_app(name="second")


@pytest.fixture
def crontab(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "crontab").write_text(FAKE_CRONTAB)
    (folder / "crontab").chmod(0o755)
    file = tmp_path / "crontab.txt"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(file))
    return file


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A process table in which only PID 1 is."""
    folder = tmp_path / "proc"
    monkeypatch.setattr(cron, "PROC", folder)

    def add(pid, name, *words):
        (folder / str(pid)).mkdir(parents=True)
        (folder / str(pid) / "comm").write_text(f"{name}\n")
        (folder / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words or (name,)))
        return folder

    add(1, "init")
    return add


# ---- cron ------------------------------------------------------------------------------------------------------


def test_cron_uninstall_removes_its_entry_and_no_other_line(apps, crontab):
    first, second = apps
    crontab.write_text("\n".join(OTHERS) + "\n")
    invoke("cron", "--config", second.config, "--install")
    before = crontab.read_text()
    invoke("cron", "--config", first.config, "--install")
    assert crontab.read_text() != before

    told = invoke("cron", "--config", first.config, "--uninstall")

    assert told.exit_code == 0
    continues = "a running supervisor continues until `bgsupervisor stop`"
    assert re.fullmatch(rf"removed from the crontab of \S+; {continues}\n", told.output)
    assert crontab.read_text() == before
    again = invoke("cron", "--config", first.config, "--uninstall")
    assert (again.exit_code, again.output.startswith("nothing to remove: the crontab of ")) == (0, True)
    assert crontab.read_text() == before


def test_cron_uninstall_removes_an_entry_that_was_edited(apps, crontab):
    app = apps[0]
    crontab.write_text(f"{OTHERS[0]}\n# bgsupervisor: {app.config}\n*/5 * * * * nice b run --config x\n{OTHERS[3]}\n")

    invoke("cron", "--config", app.config, "--uninstall")

    assert crontab.read_text() == f"{OTHERS[0]}\n{OTHERS[3]}\n"


def test_cron_uninstall_without_a_crontab_has_nothing_to_remove(apps, crontab, monkeypatch):
    told = invoke("cron", "--config", apps[0].config, "--uninstall")
    assert (told.exit_code, told.output.startswith("nothing to remove: ")) == (0, True)
    assert not crontab.exists()

    monkeypatch.setenv("PATH", "/nowhere")

    told = invoke("cron", "--config", apps[0].config, "--uninstall")
    assert (told.exit_code, told.output) == (0, "nothing to remove: there is no `crontab` program here\n")


def test_cron_uninstall_that_is_refused_fails(apps, crontab):
    invoke("cron", "--config", apps[0].config, "--install")
    crontab.with_name(f"{crontab.name}.refuses").touch()

    told = invoke("cron", "--config", apps[0].config, "--uninstall")

    assert told.exit_code == 1
    assert "refused: you are not allowed; nothing was changed" in told.output


def test_cron_d_uninstall_removes_the_files_of_its_configuration(apps, tmp_path, monkeypatch):
    folder = tmp_path / "cron.d"
    folder.mkdir()
    monkeypatch.setattr(cron, "CRON_D_FOLDER", folder)
    monkeypatch.setattr(cron, "check_user", print)
    first, second = apps
    for app, user in ((first, "jo.doe"), (first, "ann"), (second, "bob")):
        invoke("cron", "--config", app.config, "--cron-d", "--install", "--user", user)
    (folder / "bgsupervisor-mine").write_text("1 1 * * * root mine\n")

    one = invoke("cron", "--config", first.config, "--cron-d", "--uninstall", "--user", "ann")
    assert (one.exit_code, one.output.count("removed ")) == (0, 1)
    rest = invoke("cron", "--config", first.config, "--cron-d", "--uninstall")
    assert f"removed {folder}/bgsupervisor-jo_doe; " in rest.output

    assert sorted(path.name for path in folder.iterdir()) == ["bgsupervisor-bob", "bgsupervisor-mine"]
    again = invoke("cron", "--config", first.config, "--cron-d", "--uninstall")
    assert (again.exit_code, again.output) == (0, f"nothing to remove: {folder} has no entry of {first.config}\n")


@pytest.mark.parametrize("command", ["cron", "systemd"])
def test_install_and_uninstall_together_are_refused(apps, command):
    told = invoke(command, "--config", apps[0].config, "--install", "--uninstall")

    assert told.exit_code == 2


def test_cron_install_without_a_daemon_installs_and_warns(apps, crontab, proc):
    proc(70, "bash")
    told = invoke("cron", "--config", apps[0].config, "--install")

    assert told.exit_code == 0
    assert "warning: no cron daemon runs here" in told.stderr
    assert "within a minute" not in told.stdout
    assert "* * * * *" in crontab.read_text()

    proc(71, "crond")
    told = invoke("cron", "--config", apps[0].config, "--install")
    assert (told.stderr, "within a minute" in told.stdout) == ("", True)


@pytest.mark.parametrize(
    ("process", "runs"),
    [
        (("cron", "/usr/sbin/cron", "-f"), True),
        (("crond",), True),
        (("busybox", "busybox", "crond", "-f"), True),
        (("busybox", "busybox", "sh"), False),
        (("cron", "CRON", "-f"), False),  # what Debian's forks for a job
        (("cronjob",), False),
    ],
)
def test_cron_runs_knows_the_daemons(proc, process, runs):
    assert cron_runs(proc(70, *process)) is runs


def test_cron_runs_where_processes_are_hidden_is_unknown(tmp_path):
    (tmp_path / "4711").mkdir()

    assert cron_runs(tmp_path) is None


# ---- systemd ---------------------------------------------------------------------------------------------------


@needs_root
def test_systemd_uninstall_removes_the_unit_and_its_link(apps, tmp_path, monkeypatch):
    monkeypatch.setattr(systemd, "SYSTEM_FOLDER", tmp_path)
    first, second = apps
    path, link = tmp_path / "bgsupervisor.service", tmp_path / "multi-user.target.wants" / "bgsupervisor.service"
    invoke("systemd", "--config", first.config, "--install", "--user", "root")
    link.parent.mkdir()
    link.symlink_to(path)

    other = invoke("systemd", "--config", second.config, "--uninstall")
    assert (other.exit_code, path.exists(), link.is_symlink()) == (0, True, True)
    assert f"is not of {second.config} and was not changed" in other.output

    told = invoke("systemd", "--config", first.config, "--uninstall")

    assert told.exit_code == 0
    assert told.output.startswith(f"removed {path}\nremoved {link}\n")
    assert told.output.index("systemctl stop bgsupervisor") < told.output.index("systemctl daemon-reload")
    assert not path.exists()
    assert not link.is_symlink()
    again = invoke("systemd", "--config", first.config, "--uninstall")
    assert (again.exit_code, again.output) == (0, f"nothing to remove: {path} is not there\n")


def test_systemd_uninstall_of_another_user_is_of_their_own_unit(apps, tmp_path, monkeypatch):
    monkeypatch.setattr(systemd, "USER_FOLDER", tmp_path / "user")
    monkeypatch.setattr(systemd.os, "geteuid", lambda: 4711)
    monkeypatch.setattr(systemd, "user_name", lambda _: "jana")
    invoke("systemd", "--config", apps[0].config, "--install")
    path = tmp_path / "user" / "bgsupervisor.service"
    assert path.exists()

    told = invoke("systemd", "--config", apps[0].config, "--uninstall")

    assert "systemctl --user stop bgsupervisor" in told.output
    assert not path.exists()
