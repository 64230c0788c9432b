"""An interrupted run ends what it has started, some of which chaos may have stopped."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["CODE", "heed"]

CODE = 130
"""The exit code of an interrupted run, as shells have it for Ctrl-C."""
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heed() -> None:
    """Raise KeyboardInterrupt, once, at Ctrl-C, SIGTERM and SIGHUP; one that is ignored stays so."""
    for number in INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    for other in INTERRUPTS:
        signal.signal(other, signal.SIG_IGN)  # the end of all processes is not interrupted
    raise KeyboardInterrupt(signal.Signals(number).name)
