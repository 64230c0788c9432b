"""Failpoints: named points between two durable facts, at which tests stop a process on purpose.

In production `at` does nothing: it costs one attribute look-up and reads neither environment nor files. Tests replace
it with a function that waits, in the supervisor, the fork server and the children alike. Then they kill or stop any of
these processes, and compare the rows at the end.
"""

from __future__ import annotations

__all__ = ["POINTS", "at"]

POINTS = {
    "supervisor.claiming": "claims are decided, not committed",
    "supervisor.claimed": "claims are committed, no assignment is sent",
    "supervisor.ordered": "a child has its assignment, the pass continues",
    "supervisor.ending": "an end is known, not committed",
    "supervisor.ended": "an end is committed, not acknowledged to its child",
    "supervisor.acknowledged": "the end is acknowledged to its child",
    "supervisor.unclaiming": "an unclaim is decided, not committed",
    "supervisor.unclaimed": "the unclaim is committed, memory is not updated",
    "supervisor.condemning": "the reason of a signal is decided, not committed",
    "supervisor.condemned": "the reason is committed, the signal not sent",
    "supervisor.struck": "the signal is sent",
    "supervisor.suspending": "the suspension of a body is committed, its processes are not stopped",
    "supervisor.granted": "a slot for a waiting body is committed, the body not notified",
    "supervisor.adopting": "the rows of running tasks are read, no child is adopted yet",
    "supervisor.adopted": "all children are adopted, nothing is written yet",
    "supervisor.reloading": "a new fork server is started, the old one not retired",
    "supervisor.reloaded": "the new fork server is accepted, the old one gets no more assignments",
    "supervisor.leaving": "it will leave, no process is notified",
    "forkserver.loaded": "the application is loaded, not reported to a supervisor",
    "forkserver.forked": "a child is forked, not watched and not reported",
    "forkserver.buried": "a child's exit is in the journal, not reported",
    "forkserver.told": "the exit is reported to the supervisor",
    "forkserver.striking": "it must kill a child while the database is away, the signal is not sent",
    "child.born": "it has sent nothing yet",
    "child.dialled": "it has a connection, its hello is not written",
    "child.ordered": "the assignment is read, the body's thread does not have it",
    "child.beginning": "the body's thread has its assignment, nothing is begun",
    "child.over": "the body has ended, nothing is reported",
    "child.reported": "the end is reported, not acknowledged",
    "child.recording": "no acknowledgement came, it will record its end itself",
    "child.recorded": "it has committed its end itself",
    "child.leaving": "its end is recorded, it will leave",
    "child.unclaiming": "it will leave and unclaim the task that it never began",
    "child.slot_given": "it waits, its released slot is committed, the supervisor not notified",
    "child.locked": "a lock is taken and committed, the body not notified",
    "child.unlocked": "a released lock is committed, no waiter is notified",
    "ledger.ended": "within the transaction of an end: the status is written, its locks are not released",
    "ledger.freed": "within the transaction of an end: its locks are released, nothing is committed",
}
"""Every point, as `process.moment`, and the situation there; any process that writes reaches those of the ledger."""


def at(point: str) -> None:
    """Do nothing at one of POINTS; tests replace this function."""
