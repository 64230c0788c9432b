"""`bgsupervisor dev`: run tasks in this terminal while they are written, load changed code, print what they do."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.session import Session, pass_session

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Interrupts", "dev"]


@click.command()
@click.option("--slots", type=int, help="How many bodies run at once; wins over the configuration.")
@pass_session
def dev(session: Session, *, slots: int | None) -> None:
    """Run tasks in this terminal, for development.

    Prints what tasks print and how they end, and loads changed code. Ctrl-C ends it, and the running tasks with it
    (INTERRUPTED / STOPPED); Ctrl-C again kills them. Nothing stays behind.
    """
    interrupts = Interrupts()
    if sys.platform.startswith("linux"):
        from bgsupervisor.cli.dev.linux import Development  # noqa: PLC0415 - one of the two

        code = Development(session, slots, interrupts).run()
    else:
        from bgsupervisor.cli.dev.elsewhere import develop_elsewhere  # noqa: PLC0415 - the other

        code = develop_elsewhere(session, slots, interrupts)
    raise click.exceptions.Exit(code)


class Interrupts:
    """Counts Ctrl-C, SIGTERM and the end of the terminal: the first ends `dev`, another one kills.

    Attributes:
        count: How many have come.
    """

    def __init__(self) -> None:
        self.count = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                signal.signal(getattr(signal, name), self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1
