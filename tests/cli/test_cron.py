"""A real cron daemon: it starts a supervisor within a minute, and later minutes leave nothing behind."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
from support.app import LIMIT_S, wait_until

from bgsupervisor import Status

pytestmark = [
    pytest.mark.cron,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may write into /etc/cron.d"),
    pytest.mark.skipif(
        shutil.which("cron") is None, reason="there is no cron daemon here (Debian: apt-get install cron)"
    ),
    pytest.mark.skipif(not Path("/etc/cron.d").is_dir(), reason="this machine's cron reads no /etc/cron.d"),
]

SENDMAIL = Path("/usr/sbin/sendmail")
MINUTE_S = 75
"""cron looks at the full minute; a busy machine adds some seconds."""
CONTROL = "said by the control"
SOURCE = """
import os
from bgsupervisor import task

@task
def environment() -> dict[str, str]:
    return dict(os.environ)
"""


@pytest.fixture
def app(make_app):
    app = make_app(SOURCE, name="a b 100%")
    yield app

    def is_left():
        """Kill them again and again: cron may have begun to start one that is not to be seen yet, or stands by."""
        for pid in supervisors(app):
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        return any(str(app.config) in " ".join(words) for words in command_lines().values())

    wait_until(lambda: not is_left(), "all that cron has started has been killed")


def is_daemon(process):
    """Whether it is a cron daemon; what that forks for a job calls itself CRON."""
    with contextlib.suppress(psutil.Error):
        return process.name() == "cron" and "CRON" not in process.cmdline()[:1]
    return False


@pytest.fixture
def daemon():
    """Have a cron daemon: the machine's own, or one of this test."""
    if any(is_daemon(process) for process in psutil.process_iter()):
        yield
        return
    process = subprocess.Popen(["cron", "-f"], stdin=subprocess.DEVNULL)
    yield
    process.terminate()
    process.wait(LIMIT_S)


@pytest.fixture
def mails(tmp_path):
    """Take in what cron mails; return the folder of the mails, None on a machine that really mails them."""
    if SENDMAIL.exists():
        yield None
        return
    folder = tmp_path / "mails"
    folder.mkdir()
    SENDMAIL.write_text(f"#!/bin/sh\ncat > {folder}/$$.part && mv {folder}/$$.part {folder}/$$.mail\n")
    SENDMAIL.chmod(0o755)
    yield folder
    SENDMAIL.unlink()


@pytest.fixture
def entry():
    path = Path(f"/etc/cron.d/bgsupervisor-test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def texts(mails):
    return [path.read_text() for path in mails.glob("*.mail")]


def command_lines():
    """Return the command lines of all processes, by PID."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found[process.pid] = process.cmdline()
    return found


def supervisors(app):
    """Return the PIDs of all `bgsupervisor run` of this application."""
    return [
        pid
        for pid, words in command_lines().items()
        if str(app.config) in " ".join(words)
        and ("run" in words or " ".join(words).startswith("bgsupervisor: supervisor"))
        and "sh" not in Path(words[0]).name
    ]


def files(app):
    return sorted(str(path) for path in app.folder.rglob("*") if "__pycache__" not in str(path))


def test_cron_keeps_one_supervisor_alive_and_hears_nothing_of_it(app, daemon, mails, entry):
    handle = app.service.request("appx:environment")
    printed = app.cli("cron", "--cron-d", "--user", "root").stdout
    minutes = app.folder.parent / "minutes"
    entry.write_text(f"{printed}* * * * * root echo {CONTROL}; echo >> {minutes}\n")
    entry.chmod(0o644)

    wait_until(minutes.exists, "the control entry has run, so cron reads the file", MINUTE_S)
    record = app.wait(handle)
    assert record.status is Status.DONE, record
    environment = app.service.result(handle)
    assert (environment["PATH"], environment["SHELL"]) == ("/usr/local/bin:/usr/bin:/bin", "/bin/sh")
    first = wait_until(lambda: supervisors(app), "the supervisor is there")
    before = wait_until(lambda: files(app), "the folder is there")

    wait_until(lambda: len(minutes.read_text()) > 1, "the next minute has come", MINUTE_S)
    wait_until(lambda: supervisors(app) == first, "the second run has left")

    assert files(app) == before
    if mails is not None:
        wait_until(lambda: len(texts(mails)) > 1, "the control's mails have come")
        assert [text for text in texts(mails) if CONTROL not in text] == []
    assert "supervising" in (app.state_dir / "logs" / "supervisor.log").read_text()
    entry.unlink()
    assert app.cli("stop").returncode == 0
    wait_until(lambda: not supervisors(app), "it has left", LIMIT_S)
