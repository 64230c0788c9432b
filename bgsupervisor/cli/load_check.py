"""Loads the application in a process of its own and reports the result; `bgsupervisor check` starts it.

The configuration and the path of a file for the answer come pickled on stdin; the answer is JSON. What the application
prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor.clock import SystemClock
from bgsupervisor.ipc.messages import LoadFailure, TaskOptions

if TYPE_CHECKING:
    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config

__all__ = ["Answer", "load_apart", "main", "python_command"]


POLL_S = 0.02


class Answer(msgspec.Struct, frozen=True):
    """The result of loading the application."""

    tasks: dict[str, TaskOptions]
    failures: list[LoadFailure]
    warnings: list[str]
    dangers: list[str]


def load_apart(config: Config, *, limit_s: float) -> Answer:
    """Load the application as a fork server would, in a new process, which has ended when this returns.

    A process that does not answer within *limit_s* seconds is killed; that is one of the answer's failures.
    """
    with tempfile.NamedTemporaryFile() as answered:
        process = subprocess.Popen(
            python_command("from bgsupervisor.cli.load_check import main; main()"),
            stdin=subprocess.PIPE,
            stdout=2,
            start_new_session=True,
        )
        in_time = False
        try:
            _hand_over(process, config, answered.name)
            in_time = _ended_in_time(process, limit_s, SystemClock())
        finally:
            _end(process)
        text = answered.read()
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(text, type=Answer)
    error = f"the process that loads it ended with exit code {process.returncode} before it could report"
    if not in_time:
        error = f"it was not loaded within {limit_s:g} s"
    name, kind = (", ".join(config.tasks), "modules") if config.tasks else (str(config.setup), "setup")
    return Answer({}, [LoadFailure(name, error, kind)], [], [])


def python_command(code: str) -> list[str]:
    """Return the command that runs *code* in another Python with this one's path; arguments may follow.

    The path is set before anything is imported: else both -c and -m import from the working folder, which any user
    may own.
    """
    path = [str(folder) for folder in sys.path]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; sys.argv[0] = 'bgsupervisor'; {code}"]


def _hand_over(process: subprocess.Popen[bytes], config: Config, answer: str) -> None:
    assert process.stdin is not None  # noqa: S101 - a pipe was requested
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(pickle.dumps((config, answer, os.getpid())))


def _ended_in_time(process: subprocess.Popen[bytes], limit_s: float, clock: Clock) -> bool:
    """Wait without reaping: the number of the process, and of its group, stays its own until `_end`."""
    deadline = clock.monotonic() + limit_s
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if clock.monotonic() >= deadline:
            return False
        clock.sleep(POLL_S)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, and what the application started in its session; then reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Load the application that stdin describes; leaves without waiting for threads that it started."""
    if sys.platform.startswith("linux"):
        from bgsupervisor.system.syscalls import die_with_parent  # noqa: PLC0415 - only this process needs it

        die_with_parent(signal.SIGKILL)  # an import that hangs should not outlive the command that is killed meanwhile
    config, answer, parent = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - our own parent wrote it
    if os.getppid() != parent:  # the parent has died before
        os._exit(1)
    logging.getLogger("bgsupervisor").addHandler(logging.NullHandler())  # the answer has its messages
    from bgsupervisor.worker.application import load_application  # noqa: PLC0415 - only this process needs it

    loaded = load_application(config)
    result = Answer(loaded.catalogue(), loaded.failures, loaded.warnings, loaded.dangers)
    Path(answer).write_bytes(msgspec.json.encode(result))  # opened only now: an import may close whatever is open
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
