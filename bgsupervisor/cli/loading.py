"""Loads the application in a process of its own and says what came of it; `bgsupervisor check` starts it.

The configuration comes pickled on stdin, the answer goes as JSON to stdout; what the application prints goes to stderr.
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
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor.wire import LoadFailure, TaskOptions

if TYPE_CHECKING:
    from bgsupervisor.config import Config

__all__ = ["Answer", "load_apart", "main"]


class Answer(msgspec.Struct, frozen=True):
    """What loading the application came to."""

    tasks: dict[str, TaskOptions]
    failures: list[LoadFailure]
    warnings: list[str]


def load_apart(config: Config, *, limit_s: float) -> Answer:
    """Load the application as a nursery would, in a new process, which has ended when this returns.

    A process that does not answer within *limit_s* seconds is killed; that is one of the answer's failures.
    """
    with tempfile.TemporaryFile() as answered:
        process = subprocess.Popen(
            [sys.executable, "-m", "bgsupervisor.cli.loading"],
            stdin=subprocess.PIPE,
            stdout=answered,
            start_new_session=True,
        )
        told = "the process that loads it ended with exit code {{}} before it could tell"
        try:
            process.communicate(pickle.dumps(config), timeout=limit_s)
        except subprocess.TimeoutExpired:
            told = f"it was not loaded within {limit_s:g} s"
        finally:
            _end(process)
        answered.seek(0)
        text = answered.read()
    try:
        return msgspec.json.decode(text, type=Answer)
    except msgspec.DecodeError:
        return Answer({}, [LoadFailure(", ".join(config.tasks), told.format(process.returncode))], [])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, and what the application started in its session; not reaped yet, its number is its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Load the application that stdin describes; leaves without waiting for threads that it started."""
    config: Config = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - our own parent wrote it
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    logging.getLogger("bgsupervisor").addHandler(logging.NullHandler())  # the answer tells it
    from bgsupervisor import tasks  # noqa: PLC0415 - only this process needs them
    from bgsupervisor.nursery import load_application  # noqa: PLC0415 - the same

    loaded = load_application(config)
    catalogue = {name: definition.options for name, definition in tasks.definitions().items()}
    with os.fdopen(answer_fd, "wb") as answer:
        answer.write(msgspec.json.encode(Answer(catalogue, loaded.failures, loaded.warnings)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
