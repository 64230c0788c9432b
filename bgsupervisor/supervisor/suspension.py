"""Suspensions: which children to stop and to resume, and the signals for it, after the commit."""

from __future__ import annotations

import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from bgsupervisor.ledger.attempts import Suspension
from bgsupervisor.supervisor.termination import Stage
from bgsupervisor.system import process_tree, processes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.ledger.attempts import ControlRequest
    from bgsupervisor.supervisor.children import ChildHandle, Children

__all__ = ["Suspensions"]

log = logging.getLogger("bgsupervisor")


class Suspensions:
    """Decides which children to suspend. `suspend` stops them, after that has been committed."""

    def __init__(self, children: Children, clock: AttendedClock) -> None:
        self._children = children
        self._clock = clock

    def heed(self, requests: Iterable[ControlRequest]) -> None:
        """Note which attempts are requested to be suspended."""
        wanted = {request.attempt for request in requests if request.suspended}
        for attempt, child in self._children.by_attempt().items():
            child.to_be_suspended = attempt in wanted

    def enforce(self) -> None:
        """Mark the children to suspend after the commit; resume those that must run again, or must see their end."""
        for child in self._children:  # in most of hundreds there is nothing to see to
            if child.to_be_suspended or child.suspension.lasts:
                self._enforce(child)

    def suspend(self, child: ChildHandle) -> None:
        """Stop a child and all that it started; its row is committed."""
        if child.target is None or not child.suspension.lasts:
            return
        log.info("suspending PID %d and all that it started, until it is resumed", child.ref.pid)
        try:
            process_tree.signal_tree(child.target, signal.SIGSTOP)
        except OSError as error:
            log.error("cannot suspend PID %d: %s", child.ref.pid, error)  # noqa: TRY400 - the sentence says it

    def resume_for_the_database(self) -> None:
        """Resume suspended children while the database stays locked: one of them may hold the lock.

        It could not even be resumed by a request then. They are stopped again once the database can be written.
        """
        for child in self._children:
            if child.suspension.lasts and child.target is not None:
                with contextlib.suppress(OSError):
                    if processes.is_stopped(child.ref.pid):
                        log.warning("resuming PID %d: it may be holding the database lock", child.ref.pid)
                    process_tree.signal_tree(child.target, signal.SIGCONT)
                    child.suspension_unsaved = True

    def _enforce(self, child: ChildHandle) -> None:
        if child.dead_since is not None:
            return
        must_see = child.termination is not None and child.termination.stage < Stage.KILL
        wanted = child.to_be_suspended and child.end is None and not must_see
        if wanted and not child.suspension.lasts and child.termination is None and child.target is not None:
            since_mono = self._clock.machine_monotonic()
            child.suspension = Suspension(self._clock.now(), since_mono, child.suspension.total_s)
            child.suspension_unsaved = True
        elif not wanted and child.suspension.lasts and child.target is not None:
            # The other way round: were this supervisor to die in between, the next would do the same once more.
            with contextlib.suppress(OSError):
                process_tree.signal_tree(child.target, signal.SIGCONT)
                log.info("resuming PID %d", child.ref.pid)
                child.suspension = child.suspension.ended(self._clock.machine_monotonic())
                child.suspension_unsaved = child.attempt is not None
                child.got_on_at = self._clock.monotonic()
