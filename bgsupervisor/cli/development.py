"""`bgsupervisor dev` on Linux: the parent of an ordinary supervisor, which prints what its tasks do."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING

import click
import msgspec

from bgsupervisor.cli.code_changes import Changes
from bgsupervisor.cli.control_client import ask_to_reload, await_reload
from bgsupervisor.cli.display.following import Following, Lines, echo, tell_failures
from bgsupervisor.cli.display.output import warn
from bgsupervisor.cli.load_check import python_command
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import shown
from bgsupervisor.errors import BgSupervisorError, Unkillable, WireError
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.messages import LoadFailure
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.system import processes
from bgsupervisor.system.logs import Reader
from bgsupervisor.system.syscalls import die_with_parent, set_child_subreaper

if TYPE_CHECKING:
    from pathlib import Path

    from bgsupervisor.cli.commands.dev import Interrupts
    from bgsupervisor.cli.session import Session
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.channel import Channel
    from bgsupervisor.ipc.messages import Reloaded
    from bgsupervisor.ledger.records import SupervisorRecord
    from bgsupervisor.service import Service

__all__ = ["Development"]

LOOK_S = 0.1
"""Interval between two looks at rows and logs, in seconds."""
RELOAD_S = 120.0
"""Longest wait for the answer to a reload, in seconds; importing a large application takes less."""
END_S = 30.0
"""How long after two grace_s the supervisor has to leave, in seconds."""
LEAVE_S = 3.0
"""How long what a supervisor leaves behind has to end by itself, in seconds; idle processes need milliseconds."""
KILL_LOOK_S = 0.3
"""Interval between the signals that have a supervisor kill its tasks, in seconds: it counts them one by one."""
LOG_NAME = "supervisor.log"
_MAIN = "from bgsupervisor.cli import main; main()"
_NO_NEWS = re.compile(r"^\d{4}-\d\d-\d\d \S+ (INFO|DEBUG) |\bWARNING this is root\b|\bfailed to load\b| task ended: ")
"""Lines of the supervisor's log that are not shown: what failed to load, and how tasks ended, is shown in full.

That it is root's says `run`, where it matters: development in a container is often root's.
"""


class Development:
    """Supervises in the foreground, for one developer.

    Args:
        session: Names the configuration.
        slots: How many bodies run at once; None takes the configured number.
        interrupts: Says when to end.
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

    def live(self) -> int:
        """Run until Ctrl-C, or until the supervisor has gone; return the exit code."""
        obstacle = self._obstacle()
        if obstacle is not None:
            warn(f"bgsupervisor: {obstacle}")
            return 1
        set_child_subreaper()  # what the supervisor leaves behind, however it ends, becomes a child of this process
        for _ in self._log.new(self._log_path):
            pass  # what is there is old
        with contextlib.closing(self._session.service()) as service, tempfile.TemporaryFile() as said:
            following = Following(service, echo)
            supervisor = self._start(said)
            changes = None
            try:
                modules = ", ".join(self._config.tasks) or "no modules (name them in `tasks`)"
                place = f"{shown(self._config.database)}, {self._config.slots} slots"
                echo(f"developing {modules} on {place}; Ctrl-C ends it, with the running tasks")
                changes = Changes(self._config, self._clock)
                while supervisor.poll() is None and not self._interrupts.count:
                    self._look(following)
                    self._keep_loaded(service, changes, supervisor.pid)
                    self._rest()
                wanted = self._interrupts.count > 0
                self._end(supervisor, following)
            finally:
                if changes is not None:
                    changes.close()
                self._leave_nothing(supervisor)
            self._look(following)
            following.close()
            return 0 if wanted else _tell_lost(supervisor.returncode, said)

    def _obstacle(self) -> str | None:
        """Return why this process cannot supervise here now, as a sentence."""
        self._state_dir.create()
        self._state_dir.check_owner()
        self._state_dir.check_private()
        mark = StopMark.read(self._state_dir.stop_mark)
        if mark is not None:
            return f"cannot supervise: stopped by {mark.by} at {mark.at}; `bgsupervisor start` allows it again"
        lock = Lock(self._state_dir.lock, self._clock)
        pid = lock.holder()
        if lock.acquire():
            lock.close()
            return None
        named, kill = (f", PID {pid}", f" or `kill {pid}`") if pid is not None else ("", "")
        return (
            f"cannot supervise: a supervisor is already running{named}; end it with Ctrl-C, `systemctl stop`{kill} "
            "(cron starts another within a minute)"
        )

    def _start(self, said: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start an ordinary supervisor; what it says before it has its own log file goes to *said*."""
        named = ["--config", str(self._session.config_path)] if self._session.config_path else []
        slots = [] if self._slots is None else ["--slots", str(self._slots)]
        return subprocess.Popen(
            [*python_command(_MAIN), *named, "run", "--on-term", "kill", *slots],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C is for this process, which passes it on
            preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),  # noqa: PLW1509 - no threads yet
        )

    def _look(self, following: Following) -> None:
        with contextlib.suppress(BgSupervisorError):  # the supervisor complains of the database in its log
            following.look()
        for piece in self._log.new(self._log_path):
            for line in self._log_lines.of(piece):
                if not _NO_NEWS.search(line):
                    echo(f"{click.style('supervisor |', dim=True)} {line}")

    def _log_path(self) -> Path:
        return self._state_dir.logs / LOG_NAME

    # Loading

    def _keep_loaded(self, service: Service, changes: Changes, pid: int) -> None:
        """See that the supervisor has the code as it now is; its first load, of no task, may never show in its row."""
        if not self._has_loaded:
            self._tell_first_load(service, pid)
        if changes.found(self._config):
            self._ask_to_reload()

    def _tell_first_load(self, service: Service, pid: int) -> None:
        """Say what the supervisor has loaded, as soon as its row says it."""
        with contextlib.suppress(BgSupervisorError):
            row = next((row for row in service.ledger.supervisors() if row.pid == pid), None)
            if row is None:
                return
            failures, count = _loaded(row)
            if not count and not failures and self._config.tasks:
                return  # a row of an earlier moment
            self._has_loaded = True
            tell_failures([one for one in failures if one.module], self._config)  # the log has warnings about data
            echo(f"loaded {count} task{'s' * (count != 1)}")

    def _ask_to_reload(self) -> None:
        echo("the code has changed; loading it")
        if self._channel is not None:
            self._channel.close()
        try:
            self._channel = ask_to_reload(self._state_dir, force=False)
        except OSError as error:
            self._channel = None
            echo(f"cannot load it: the supervisor does not listen ({error.strerror}); save again")
            return
        self._answer_by = self._clock.monotonic() + RELOAD_S

    def _rest(self) -> None:
        """Wait for the next look; for an answer to a reload, if one is due."""
        if self._channel is None:
            self._clock.sleep(LOOK_S)
            return
        answer, why = None, "the supervisor has not answered; see logs/supervisor.log"
        try:
            answer = await_reload(self._channel, timeout_s=LOOK_S, clock=self._clock)
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
            _tell_reload(answer, self._config)

    # Ending

    def _end(self, supervisor: subprocess.Popen[bytes], following: Following) -> None:
        """End the supervisor and its tasks; another Ctrl-C kills them."""
        running = following.running()
        if supervisor.poll() is None:
            names = ", ".join(f"{record.id} ({record.name})" for record in running)
            echo(f"ending {names}; Ctrl-C again kills" if names else "ending")
            supervisor.send_signal(signal.SIGTERM)
        kill_at, seen = 0.0, min(self._interrupts.count, 1)  # another one may have come while this was printed
        deadline = self._clock.monotonic() + 2 * self._config.grace_s + END_S
        while supervisor.poll() is None:
            if self._clock.monotonic() >= deadline:  # it is stopped, or waits for a database that is away
                warn("bgsupervisor: the supervisor does not leave; killing it and all that it started")
                supervisor.kill()
                supervisor.wait()
                break
            self._look(following)
            if self._interrupts.count > seen and self._clock.monotonic() >= kill_at:
                supervisor.send_signal(signal.SIGINT)
                kill_at = self._clock.monotonic() + KILL_LOOK_S
            self._clock.sleep(LOOK_S)

    def _leave_nothing(self, supervisor: subprocess.Popen[bytes]) -> None:
        """Wait for what is left to go, and end what does not: idle children, fork server, wait manager."""
        if supervisor.poll() is None:  # an error of ours
            supervisor.terminate()
        deadline = self._clock.monotonic() + LEAVE_S
        while _reap() and self._clock.monotonic() < deadline:
            self._clock.sleep(LOOK_S / 10)
        with contextlib.suppress(Unkillable):
            processes.end_descendants(os.getpid(), grace_s=LEAVE_S, clock=self._clock)


def _reap() -> bool:
    """Reap dead children; return whether any live."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _loaded(row: SupervisorRecord) -> tuple[list[LoadFailure], int]:
    """Return what failed to load in a supervisor, and how many tasks it has; nothing of what is no JSON of ours."""
    failures, catalogue = list[LoadFailure](), dict[str, object]()
    with contextlib.suppress(msgspec.MsgspecError):
        failures = msgspec.json.decode(row.code_error or "[]", type=list[LoadFailure])
    with contextlib.suppress(msgspec.MsgspecError):
        catalogue = msgspec.json.decode(row.catalogue, type=dict[str, object])
    return failures, len(catalogue)


def _tell_reload(answer: Reloaded, config: Config) -> None:
    tell_failures(answer.failures, config)
    if answer.done:
        echo(click.style(answer.detail, fg="green"))
    else:
        echo(click.style("the old code goes on", fg="yellow") + ("" if answer.failures else f": {answer.detail}"))


def _tell_lost(code: int | None, said: IO[bytes]) -> int:
    """Say that the supervisor has gone by itself; return the exit code."""
    said.seek(0)
    words = said.read().decode(errors="replace").strip()
    if words:
        warn(words)
    else:
        warn(f"bgsupervisor: the supervisor has left, exit code {code}; logs/{LOG_NAME} says why")
    return code if code is not None and code > 0 else 1
