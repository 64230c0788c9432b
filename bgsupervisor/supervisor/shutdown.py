"""Why a supervisor admits nothing more, ends what runs, or leaves: signals, the stop mark, a replaced lock file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bgsupervisor.ipc.statedir import StopMark
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.termination import Stage

if TYPE_CHECKING:
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.lock import Lock
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.supervisor.children import ChildHandle, Children
    from bgsupervisor.supervisor.termination import Terminations

__all__ = ["Shutdown"]

log = logging.getLogger("bgsupervisor")


class Shutdown:
    """Each attribute is None, or the reason as a sentence.

    Attributes:
        draining: Why nothing more is admitted.
        killing: Why running attempts are ended.
        leaving: Why the loop ends after this pass.
        exit_code: The exit code of the supervisor's process.
    """

    def __init__(
        self, config: Config, state_dir: StateDir, lock: Lock, children: Children, terminations: Terminations
    ) -> None:
        self.config = config
        self._state_dir = state_dir
        self._lock = lock
        self._children = children
        self._terminations = terminations
        self.draining: str | None = None
        self.killing: str | None = None
        self.leaving: str | None = None
        self.exit_code = 0
        self._stop_mode = ""
        self._interrupts = 0

    @property
    def stays(self) -> bool:
        """Whether the supervisor goes on supervising."""
        return self.draining is None and self.leaving is None

    def on_sigterm(self) -> None:
        """Do what `on_term` says; leave at the second one."""
        self.begin(self.config.on_term if self.draining is None else "leave", "SIGTERM came")

    def on_interrupt(self) -> None:
        """Wait for what runs at the first Ctrl-C, end it at the second, kill it at the third."""
        self.draining = self.draining or "Ctrl-C was pressed"
        self._interrupts += 1
        self._end_by_interrupt(self._children.running())

    def heed_stop_mark(self) -> bool:
        """Do what `bgsupervisor stop` asks for; return True if `bgsupervisor start` has lifted its mark."""
        mark = StopMark.read(self._state_dir.stop_mark)
        if mark is None and self._stop_mode:
            self._stop_mode, self.draining, self.killing = "", None, None
            log.info("the stop was lifted, going on")
            return True
        if mark is not None and mark.mode != self._stop_mode:
            self._stop_mode = mark.mode
            self.begin(mark.mode, f"stopped by {mark.by}")
        return False

    def end_running(self) -> None:
        """End all running attempts if that was requested; in each pass, for some may have been adopted only now."""
        if self.killing is None:
            return
        for child in self._children.running():
            if child.end is None and child.termination is None:
                why = f"the supervisor was told to stop and kill ({self.killing})"
                self._terminations.begin(child, Reason.STOPPED, why)

    def is_replaced(self) -> bool:
        """See whether another may supervise: one that was stopped for long must not start tasks in its slots."""
        # guard: a supervisor whose lock was replaced leaves
        if not self._lock.is_intact():
            self.leaving = "the lock file was replaced; whoever holds the new one supervises"
            return True
        return False

    def begin(self, mode: str, why: str) -> None:
        """Leave now and let bodies live ("leave"), or admit nothing more, and wait for them or end them."""
        if mode == "leave":
            self.leaving = why
            return
        self.draining = why
        self.killing = why if mode == "kill" else None
        running = self._children.running()
        log.info("%s: admitting nothing more, %d running", why, len(running))
        suspended = [str(child.attempt.id) for child in running if child.attempt is not None and child.suspension.lasts]
        if suspended and mode == "drain":
            log.warning("waiting for suspended tasks until they are resumed or cancelled: %s", ", ".join(suspended))

    def _end_by_interrupt(self, running: list[ChildHandle]) -> None:
        if self._interrupts == 1 and running:
            names = ", ".join(f"{child.attempt.id} ({child.name})" for child in running if child.attempt is not None)
            log.warning("still running: %s; leaving when they have ended. Ctrl-C again ends them", names)
        elif self._interrupts > 1:
            stage = Stage.TERM if self._interrupts == 2 else Stage.KILL  # noqa: PLR2004 - the second Ctrl-C
            for child in running:
                why = "the supervisor was told to stop and kill (Ctrl-C)"
                self._terminations.begin(child, Reason.STOPPED, why, stage=stage)
