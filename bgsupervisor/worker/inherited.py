"""State that a child has from the import of the application, and what it makes anew; knows no task and no table.

Random numbers, exit callbacks and signal handlers. A forked child has a copy of them all; a spawned child loads the
application itself.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing.util
import random
import signal
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "OURS",
    "Dispositions",
    "forget_exit_callbacks",
    "leave_unheeded",
    "reseed",
    "set_signals",
    "take_back_signals",
]


def _there(*names: str) -> tuple[signal.Signals, ...]:
    """Return the signals of these names that this system has; a body on Windows loads this module too."""
    return tuple(signal.Signals[name] for name in names if hasattr(signal, name))


_USES = {
    "SIGTERM": "by which a task is asked to end",
    "SIGCHLD": "by which the fork server hears of dead children",
    "SIGURG": "by which a task is asked for its stack",
}
OURS = {number: _USES[number.name] for number in _there(*_USES)}
"""Signals that an application cannot keep, and their uses."""
RESET = _there("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2")
"""Signals that have their default effect in a child unless the application has set them."""
UNHEEDED = _there("SIGINT", "SIGHUP")
"""Signals that do nothing to a fork server, whatever they do in a child."""


class Dispositions(NamedTuple):
    """The effect of each signal on this process, as Python and the kernel know it."""

    handlers: dict[int, Any]
    caught: int

    @classmethod
    def now(cls) -> Dispositions:
        """Return the present effects."""
        return cls({number: signal.getsignal(number) for number in signal.valid_signals()}, _caught())

    def changed_since(self, before: Dispositions) -> dict[int, Any]:
        """Return handlers that were set since *before*, by number; None is a handler in C, as faulthandler's."""
        python = {number: now for number, now in self.handlers.items() if now != before.handlers[number]}
        in_c = self.caught & ~before.caught
        return python | {number: None for number in self.handlers if in_c >> (number - 1) & 1 and number not in python}


def leave_unheeded() -> None:
    """Make SIGINT and SIGHUP do nothing here; by a handler, so that a SIG_IGN of the application is seen."""
    for number in UNHEEDED:
        signal.signal(number, _do_nothing)


def take_back_signals(application: Mapping[int, Any]) -> None:
    """Reset, in a fork server, the handlers that the application set for its children; a handler in C stays."""
    for number in (*UNHEEDED, signal.SIGTERM):
        if application.get(number) is not None:
            signal.signal(number, _do_nothing if number in UNHEEDED else signal.SIG_DFL)


def set_signals(application: Mapping[int, Any]) -> None:
    """Set the signals of a new child: as the import set them (*application*), all others to their default."""
    for number in RESET:
        if number not in application or number in OURS:
            signal.signal(number, signal.SIG_DFL)
        elif application[number] is not None:
            signal.signal(number, application[number])


def reseed() -> None:
    """Seed the global random generators of this process; otherwise all children draw the same numbers.

    CPython seeds `random` after a fork, numpy does not seed its own. numpy is not imported for this.
    """
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        with contextlib.suppress(AttributeError):  # its import has failed half-way
            numpy_random.seed()


def forget_exit_callbacks() -> None:
    """Forget the exit callbacks that were registered before the fork, weakref.finalize included.

    A callback may delete what all children share: a temporary folder, a PID file, a lock. It does not show whether it
    belongs to one process or to many, so one rule serves all. Callbacks of the body run. Error trackers are flushed by
    name (`reporting.flush`).
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # noqa: SLF001 - the public way reaches one's own only
        finalizer.atexit = False
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]  # noqa: SLF001 - the next finalizer, a body's own, registers anew
    atexit._clear()  # noqa: SLF001 - as multiprocessing does for its own children from 3.13 on
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]  # noqa: SLF001 - ends managers and pools of the body


def _do_nothing(number: int, frame: object) -> None:
    pass


def _caught() -> int:
    """Return the signals that have a handler, as a mask of bits; 0 where there is no such table."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0)
