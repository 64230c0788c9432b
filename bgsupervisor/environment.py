"""The environment variables of this process; the only module that reads or sets them."""

# ruff: noqa: TID251 - this is the module that reads the environment

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.clock import read_time_zone
from bgsupervisor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "mark_tests",
    "restore_environment",
    "take_notify_socket",
    "tests_of",
    "variable",
    "variables",
    "wants_no_colour",
    "working_folder",
]

_TESTS_VARIABLE = "_BGSUPERVISOR_TESTS"
"""Holds PID and folder of a process that runs tests; a program started there has another parent, and ignores it."""


def working_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the working folder, by the name that the shell knows it under where that is true.

    Raises:
        ConfigError: It is gone or cannot be read.
    """
    environ = os.environ if environ is None else environ
    named = Path(os.path.normpath(environ.get("PWD", "")))
    with suppress(OSError):
        if named.is_absolute() and named.samefile("."):
            return named
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working folder is gone or cannot be read ({error.strerror}); "
            f"change to another, or name the configuration with --config or BGSUPERVISOR_CONFIG and an absolute path"
        ) from error


def take_notify_socket() -> str | None:
    """Take the service manager's socket out of the environment, where bodies would inherit it; None without one."""
    for name in ("WATCHDOG_PID", "WATCHDOG_USEC"):
        os.environ.pop(name, None)
    return os.environ.pop("NOTIFY_SOCKET", None) or None


def variables() -> dict[str, str]:
    """Return the environment variables of this process."""
    return dict(os.environ)


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def set_default(name: str, value: str) -> None:
    """Set an environment variable of this process that is not set yet."""
    os.environ.setdefault(name, value)


def restore_environment(wanted: Mapping[str, str]) -> None:
    """Replace the environment variables of this process, and read its time zone anew, if any differs."""
    if os.environ == wanted:
        return
    os.environ.clear()
    os.environ.update(wanted)
    read_time_zone()


def mark_tests(folder: Path | None) -> None:
    """Say in the environment that this process is isolated for tests, which multiprocessing's children of it read.

    Args:
        folder: Where the tests keep what they need on disk; None takes the mark away.
    """
    if folder is None:
        os.environ.pop(_TESTS_VARIABLE, None)
    else:
        os.environ[_TESTS_VARIABLE] = f"{os.getpid()}:{folder}"


def tests_of(pid: int) -> Path | None:
    """Return the folder of the tests that the process *pid* runs; None if it has not marked our environment."""
    marked, _, folder = os.environ.get(_TESTS_VARIABLE, "").partition(":")
    return Path(folder) if marked == str(pid) else None


def wants_no_colour() -> bool:
    """Return whether the user wants text without colours everywhere (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))
