"""`bgsupervisor dev` on Linux: the parent of an ordinary supervisor, which prints what its tasks do."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING, TypeVar

import click
import msgspec

from bgsupervisor.cli.control_client import ask_to_reload, await_reload
from bgsupervisor.cli.dev.code_changes import Changes
from bgsupervisor.cli.dev.following import Following, Lines, echo, echo_failures, echo_start
from bgsupervisor.cli.display.output import counted, stopped_by, warn
from bgsupervisor.cli.load_check import python_command
from bgsupervisor.cli.session import own_state_dir
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import BgSupervisorError, Unkillable, WireError
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.messages import LoadFailure
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.system import process_tree
from bgsupervisor.system.logs import Reader
from bgsupervisor.system.syscalls import die_with_parent, set_child_subreaper

if TYPE_CHECKING:
    from bgsupervisor.cli.commands.dev import Interrupts
    from bgsupervisor.cli.session import Session
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.channel import Channel
    from bgsupervisor.ipc.messages import Reloaded
    from bgsupervisor.service import Service

__all__ = ["Development"]

POLL_S = 0.1
"""Interval between two readings of rows and logs, in seconds."""
RELOAD_S = 120.0
"""Longest wait for the answer to a reload, in seconds; importing a large application takes less."""
END_S = 30.0
"""Time that the supervisor has to leave, beyond two grace_s, in seconds."""
LEAVE_S = 3.0
"""Time that processes of a dead supervisor have to end by themselves, in seconds; idle ones need milliseconds."""
KILL_INTERVAL_S = 0.3
"""Interval between the SIGINTs that make a supervisor kill its tasks, in seconds: it counts them one by one."""
T = TypeVar("T")
_MAIN = "from bgsupervisor.cli import main; main()"
_NO_NEWS = re.compile(r"^\d{4}-\d\d-\d\d \S+ (INFO|DEBUG) |\bWARNING this is root\b|\bfailed to load\b| task ended: ")
"""Lines of the supervisor's log that are not shown: load failures and ends of tasks are shown in full.

The warning about root is for `run`: development in a container is often root's.
"""


class Development:
    """Supervises in the foreground, for one developer.

    Args:
        session: Names the configuration.
        slots: How many bodies run at once; None takes the configured number.
        interrupts: Counts the requests to end.
    """

    def __init__(self, session: Session, slots: int | None, interrupts: Interrupts) -> None:
        self._session = session
        self._slots = slots
        self._config = session.config(slots=slots)
        self._interrupts = interrupts
        self._clock = SystemClock()
        self._state_dir = StateDir(self._config.state_dir)
        self._log, self._log_lines = Reader(), Lines()
        self._channel: Channel | None = None
        self._answer_by = 0.0
        self._has_loaded = False

    def run(self) -> int:
        """Run until Ctrl-C, or until the supervisor has gone; return the exit code."""
        obstacle = self._obstacle()
        if obstacle is not None:
            warn(f"bgsupervisor: cannot supervise: {obstacle}")
            return 1
        set_child_subreaper()  # what the supervisor leaves behind, however it ends, becomes a child of this process
        for _ in self._log.new(lambda: self._state_dir.own_log):
            pass  # lines of earlier supervisors
        with contextlib.closing(self._session.service()) as service, tempfile.TemporaryFile() as stderr:
            following = Following(service, echo)
            supervisor = self._start(stderr)
            changes = None
            try:
                echo_start(self._config)
                changes = Changes(self._config, self._clock)
                while supervisor.poll() is None and not self._interrupts.count:
                    self._print_new(following)
                    self._keep_loaded(service, changes, supervisor.pid)
                    self._rest()
                is_wanted = self._interrupts.count > 0
                self._end(supervisor, following)
            finally:
                if changes is not None:
                    changes.close()
                self._leave_nothing(supervisor)
            self._print_new(following)
            following.close()
            return 0 if is_wanted else _report_lost(supervisor.returncode, stderr)

    def _obstacle(self) -> str | None:
        """Return why this process cannot supervise here now."""
        own_state_dir(self._config)
        mark = StopMark.read(self._state_dir.stop_mark)
        if mark is not None:
            return stopped_by(mark)
        lock = Lock(self._state_dir.lock, self._clock)
        pid = lock.holder()
        if lock.acquire():
            lock.close()
            return None
        named, kill = (f", PID {pid}", f" or `kill {pid}`") if pid is not None else ("", "")
        return (
            f"a supervisor is already running{named}; end it with Ctrl-C, `systemctl stop`{kill} "
            "(cron starts another within a minute)"
        )

    def _start(self, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start an ordinary supervisor; what it prints before it opens its log goes to *stderr*."""
        named = ["--config", str(self._session.config_path)] if self._session.config_path else []
        slots = [] if self._slots is None else ["--slots", str(self._slots)]
        return subprocess.Popen(
            [*python_command(_MAIN), *named, "run", "--on-term", "kill", *slots],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is for this process, which passes it on
            preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),  # noqa: PLW1509 - no threads yet
        )

    def _print_new(self, following: Following) -> None:
        with contextlib.suppress(BgSupervisorError):  # the supervisor logs errors of the database
            following.print_new()
        for piece in self._log.new(lambda: self._state_dir.own_log):
            for line in self._log_lines.of(piece):
                if not _NO_NEWS.search(line):
                    echo(f"{click.style('supervisor |', dim=True)} {line}")

    # Loading

    def _keep_loaded(self, service: Service, changes: Changes, pid: int) -> None:
        """Ask for a reload if the code has changed; a first load of no task may never appear in the row."""
        if not self._has_loaded:
            self._report_first_load(service, pid)
        if changes.found(self._config):
            self._ask_to_reload()

    def _report_first_load(self, service: Service, pid: int) -> None:
        """Print what the supervisor has loaded, as soon as its row shows it."""
        with contextlib.suppress(BgSupervisorError):
            row = next((row for row in service.ledger.supervisors() if row.pid == pid), None)
            if row is None:
                return
            failures = _decoded(row.code_error or "[]", list[LoadFailure])
            catalogue = _decoded(row.catalogue, dict[str, object])
            if not catalogue and not failures and self._config.tasks:
                return  # a row of an earlier moment
            self._has_loaded = True
            echo_failures([one for one in failures if one.module], self._config)  # the log has warnings about data
            echo(f"loaded {counted(len(catalogue), 'task')}")

    def _ask_to_reload(self) -> None:
        echo("the code has changed; loading it")
        if self._channel is not None:
            self._channel.close()
        try:
            self._channel = ask_to_reload(self._state_dir, force=False)
        except OSError as error:
            self._channel = None
            echo(f"cannot load it: the supervisor does not listen ({error.strerror}); save the file again")
            return
        self._answer_by = self._clock.monotonic() + RELOAD_S

    def _rest(self) -> None:
        """Wait a moment; for the answer to a reload, if one is due."""
        if self._channel is None:
            self._clock.sleep(POLL_S)
            return
        answer, why = None, "the supervisor has not answered; see logs/supervisor.log"
        try:
            answer = await_reload(self._channel, timeout_s=POLL_S, clock=self._clock)
        except WireError as error:
            why = str(error)
            self._channel.close()
        if answer is None and not self._channel.closed and self._clock.monotonic() < self._answer_by:
            return
        self._channel.close()
        self._channel = None
        if answer is None:
            echo(f"cannot load the code: {why}")
        else:
            self._has_loaded = True
            _report_reload(answer, self._config)

    # Ending

    def _end(self, supervisor: subprocess.Popen[bytes], following: Following) -> None:
        """End the supervisor and its tasks; kill them at another Ctrl-C."""
        running = following.running()
        if supervisor.poll() is None:
            names = ", ".join(f"{record.id} ({record.name})" for record in running)
            echo(f"ending {names}; Ctrl-C again kills" if names else "ending")
            supervisor.send_signal(signal.SIGTERM)
        kill_at, seen = 0.0, min(self._interrupts.count, 1)  # another one may have come while this was printed
        deadline = self._clock.monotonic() + 2 * self._config.grace_s + END_S
        while supervisor.poll() is None:
            if self._clock.monotonic() >= deadline:  # it is stopped, or waits for a database that is away
                warn("bgsupervisor: the supervisor does not leave; killing it and everything it started")
                supervisor.kill()
                supervisor.wait()
                break
            self._print_new(following)
            if self._interrupts.count > seen and self._clock.monotonic() >= kill_at:
                supervisor.send_signal(signal.SIGINT)
                kill_at = self._clock.monotonic() + KILL_INTERVAL_S
            self._clock.sleep(POLL_S)

    def _leave_nothing(self, supervisor: subprocess.Popen[bytes]) -> None:
        """Wait for the remaining processes, then end them: idle children, fork server, wait manager."""
        if supervisor.poll() is None:  # an error of ours
            supervisor.terminate()
        deadline = self._clock.monotonic() + LEAVE_S
        while _reap() and self._clock.monotonic() < deadline:
            self._clock.sleep(POLL_S / 10)
        with contextlib.suppress(Unkillable):
            process_tree.end_descendants(os.getpid(), grace_s=LEAVE_S, clock=self._clock)


def _reap() -> bool:
    """Reap dead children; return whether any live."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _decoded(text: str, type: type[T]) -> T:
    """Return what a supervisor's row holds; nothing if it is not JSON of ours."""
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(text, type=type)
    return type()


def _report_reload(answer: Reloaded, config: Config) -> None:
    echo_failures(answer.failures, config)
    if answer.done:
        echo(click.style(answer.detail, fg="green"))
    else:
        echo(click.style("the old code goes on", fg="yellow") + ("" if answer.failures else f": {answer.detail}"))


def _report_lost(code: int | None, stderr: IO[bytes]) -> int:
    """Print why the supervisor has left by itself; return the exit code."""
    stderr.seek(0)
    text = stderr.read().decode(errors="replace").strip()
    warn(text or f"bgsupervisor: the supervisor has left, exit code {code}; see logs/supervisor.log for the cause")
    return code if code is not None and code > 0 else 1
