"""`bgsupervisor run`: becomes the supervisor, or leaves at once if there is one."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

from bgsupervisor import __version__
from bgsupervisor.cli.display.output import stopped_by, warn
from bgsupervisor.cli.session import Session, own_state_dir, pass_session
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import remarks
from bgsupervisor.environment import take_notify_socket
from bgsupervisor.errors import BgSupervisorError, ConfigError, UnsupportedSystem
from bgsupervisor.ipc.lock import LOOP_STUCK_S, Lock
from bgsupervisor.ipc.statedir import StopMark
from bgsupervisor.sanitize import LineFormatter, trace_lines
from bgsupervisor.system import descriptors
from bgsupervisor.system.files import access_error
from bgsupervisor.system.fingerprint import read_fingerprint
from bgsupervisor.system.logs import leave_dead_output, open_for_append
from bgsupervisor.system.oom import INITIAL_PID_NAMESPACE
from bgsupervisor.system.processes import pid_namespace
from bgsupervisor.system.sd_notify import Notifier
from bgsupervisor.system.users import AS_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.statedir import StateDir

__all__ = ["run", "supervise"]

LOCK_RETRY_S = 1.0
"""Interval between tries of a lock that another supervisor holds, under a service manager, in seconds."""
HANG_CHECK_S = 1.5
"""Wait before a lock file that looks old is read again, in seconds: after sleep a supervisor touches it within one."""
TAKE_OVER_S = 5.0
"""Longest wait for a supervisor of another installation, which leaves within a second, in seconds."""
PROGRAM = f"{sys.prefix} {__version__}"
"""The name of this installation: a supervisor of another virtualenv or version cannot load its code."""
STOPPED_EXIT = 100
"""Exit code during a stop, for a service manager: the unit names it, so that it does not try again."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@click.command()
@click.option("--burst", is_flag=True, help="Leave once nothing runs and nothing is due.")
@click.option("--slots", type=int, help="How many bodies run at once; wins over the configuration.")
@click.option("--on-term", type=click.Choice(["leave", "drain", "kill"]), help="What SIGTERM means; wins likewise.")
@click.option(
    "--log-to-stderr",
    is_flag=True,
    help="Log to stderr too, as on a terminal, under systemd and as a container's PID 1.",
)
@pass_session
def run(session: Session, *, burst: bool, slots: int | None, on_term: str | None, log_to_stderr: bool) -> None:
    """Supervise: start tasks, watch them, record their ends.

    Leaves at once, with success, if a supervisor is already running. Its log is logs/supervisor.log in the state
    directory.
    """
    from bgsupervisor.cli.program import EXIT_INTERRUPTED, report_error  # noqa: PLC0415 - the program imports us

    if session.test_config() is not None:
        raise ConfigError(
            "cannot supervise: this process runs tests, whose tasks are isolated; run them with run_pending(), "
            "or turn the isolation off for this test"
        )
    try:
        load = functools.partial(session.config, slots=slots, on_term=on_term)
        code = supervise(load, burst=burst, log_to_stderr=log_to_stderr)
    except BgSupervisorError as error:
        code = report_error(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a bug of ours; an ordinary exit would wait for the fork server and its children
        click.echo("\n".join([f"bgsupervisor: it crashed with {type(error).__name__}:", *trace_lines(error)]), err=True)
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Leave without multiprocessing's own exit, which would wait for the fork server; that one must live on."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def supervise(load: Callable[[], Config], *, burst: bool, log_to_stderr: bool = False) -> int:
    """Supervise until a signal or a stop; return the exit code. The caller must leave by os._exit.

    Args:
        load: Loads the configuration; called again for each reload.
        burst: Leave when nothing is due and nothing runs.
        log_to_stderr: Log to stderr too, also where nothing is known to collect it.
    """
    if not sys.platform.startswith("linux"):
        raise UnsupportedSystem(
            f"supervising needs Linux (pidfd, the process table, child subreapers); this is {sys.platform}. "
            "`bgsupervisor dev` runs tasks here, with fewer promises"
        )
    notifier = Notifier(take_notify_socket())  # out of the environment: bodies must not reach the service manager
    config, clock = load(), SystemClock()
    state_dir = own_state_dir(config)
    lock = Lock(state_dir.lock, clock, program=PROGRAM)
    mark = StopMark.read(state_dir.stop_mark)
    if mark is None and not lock.acquire():
        if notifier.listened_to:
            mark = _wait_for_lock(lock, state_dir, notifier, clock)
        elif not _takes_over(lock, config):
            return _leave_it_to_the_other(lock, config, state_dir, clock)
    if mark is not None:
        if sys.stderr.isatty():
            warn(stopped_by(mark))
        return STOPPED_EXIT if notifier.listened_to else 0
    lock.touch()
    from bgsupervisor.supervisor.loop import Supervisor  # noqa: PLC0415 - only the one that supervises pays for it

    has_terminal = sys.stdout.isatty() or sys.stderr.isatty()
    shown = log_to_stderr or notifier.listened_to or _is_first_in_container() or has_terminal
    with (_shown_log if shown else _own_log)(state_dir.own_log):
        logging.getLogger("peewee").setLevel(logging.WARNING)
        for remark in [*([AS_ROOT] if os.geteuid() == 0 else []), *remarks(config)]:
            logging.getLogger("bgsupervisor").warning("%s", remark)
        supervisor = Supervisor(config, state_dir=state_dir, lock=lock, notifier=notifier, reread=load, burst=burst)
        return supervisor.run()


def _wait_for_lock(lock: Lock, state_dir: StateDir, notifier: Notifier, clock: Clock) -> StopMark | None:
    """Under a service manager, stand by until the other supervisor (cron's) has gone; return a stop mark if set."""
    notifier.ready(f"standing by: another supervisor is running, PID {lock.holder()}")
    is_reported = False
    while True:
        notifier.alive()
        clock.sleep(LOCK_RETRY_S)
        mark = StopMark.read(state_dir.stop_mark)
        if mark is not None or lock.acquire():
            return mark
        hanging = None if is_reported else _hanging(lock)
        if hanging is not None:
            is_reported = True
            warn(hanging)
            notifier.ready(f"standing by: {hanging}")


def _hanging(lock: Lock) -> str | None:
    """Return a sentence about the supervisor that holds the lock, if its loop does not turn any more."""
    age_s = lock.age_s()
    if age_s is None or age_s <= LOOP_STUCK_S:
        return None
    return (
        f"the supervisor with PID {lock.holder()} holds the lock but has shown no sign of life for {age_s:.0f} s; "
        "check it, and end it if it hangs"
    )


def _takes_over(lock: Lock, config: Config) -> bool:
    """Replace a living supervisor of another virtualenv or version, whose tasks live on."""
    age_s = lock.age_s()
    if not config.auto_reload or age_s is None or age_s > LOOP_STUCK_S or not lock.is_of_another_program():
        return False
    return lock.take_over(wait_s=TAKE_OVER_S)


def _leave_it_to_the_other(lock: Lock, config: Config, state_dir: StateDir, clock: Clock) -> int:
    """Leave, but request a reload of code that a deploy has changed, and report a supervisor that hangs."""
    if _hanging(lock) is not None:
        clock.sleep(HANG_CHECK_S)
        hanging = _hanging(lock)
        if hanging is not None:
            warn(hanging)
            return 1
    fingerprint = read_fingerprint(state_dir.fingerprint) if config.auto_reload else None
    if fingerprint is not None and fingerprint.is_outdated(config):
        from bgsupervisor.cli.control_client import ask_to_reload  # noqa: PLC0415 - after a deploy only

        with contextlib.suppress(OSError):
            ask_to_reload(state_dir, force=False).close()
    if sys.stderr.isatty():
        click.echo(f"a supervisor is already running, PID {lock.holder()}", err=True)
    return 0


def _is_first_in_container() -> bool:
    """Whether this is PID 1, or was started by a container's small init: its stderr is the container's log."""
    return os.getpid() == 1 or (os.getppid() == 1 and pid_namespace() != INITIAL_PID_NAMESPACE)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to stderr as long as it can be read; the log file has the same lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(sys.stderr)
        self._path = path
        self._is_gone = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless the terminal was closed: what is printed goes to the log file from then on."""
        self._is_gone = self._is_gone or leave_dead_output(self._path)
        if not self._is_gone:
            super().emit(record)


@contextlib.contextmanager
def _shown_log(path: Path) -> Iterator[None]:
    """Log to stderr and to *path*; what is printed, also by the application while it loads, stays on stderr."""
    logging.raiseExceptions = False  # a full disk: stderr has the line, and needs no traceback with each
    in_file = logging.StreamHandler(os.fdopen(_opened(path), "a", encoding="utf-8"))
    _log_to(_Stderr(path), in_file)
    try:
        yield
    except Exception as error:  # the caller prints it on stderr
        trace = None if isinstance(error, BgSupervisorError) else (type(error), error, error.__traceback__)
        in_file.handle(logging.LogRecord("bgsupervisor", logging.ERROR, "", 0, str(error), None, trace))
        raise
    finally:
        leave_dead_output(path)


@contextlib.contextmanager
def _own_log(path: Path) -> Iterator[None]:
    """Send stdout and stderr to *path*; errors that end it reach the old stderr too."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    old_stderr = os.dup(2)  # not inherited: fork server and children must not keep cron's pipe open
    _redirect(path)
    _log_to(logging.StreamHandler(sys.stderr))
    try:
        yield
    except BgSupervisorError as error:
        logging.getLogger("bgsupervisor").error("%s", error)  # noqa: TRY400 - a sentence, no traceback
        sys.stderr.flush()
        os.dup2(old_stderr, 2)
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            os.write(old_stderr, f"bgsupervisor: it crashed with {type(error).__name__}; see {path}\n".encode())
        raise
    finally:
        os.close(old_stderr)


def _log_to(*handlers: logging.Handler) -> None:
    for handler in handlers:
        handler.setFormatter(LineFormatter(LOG_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=handlers)


def _redirect(path: Path) -> None:
    log_fd = _opened(path)
    for number in (1, 2):
        if not descriptors.is_taken(number):
            os.dup2(log_fd, number)
    os.close(log_fd)


def _opened(path: Path) -> int:
    try:
        return open_for_append(path)
    except OSError as error:
        raise access_error(path, "write", error, "give this user the right, or free some space") from error
