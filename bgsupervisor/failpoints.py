"""Named points between two durable facts, at which tests stop a process on purpose; knows nothing else.

In production `at` is a call that does nothing: one look-up of an attribute; no environment and no file is read. Tests
put a function of their own in its place, in the supervisor, the fork server and the children alike, which waits there;
then they kill or stop whom they like, and look at what the rows say in the end.
"""

from __future__ import annotations

__all__ = ["POINTS", "at"]

POINTS = {
    "supervisor.claiming": "claims are decided, not committed",
    "supervisor.claimed": "claims are committed, no order has been sent",
    "supervisor.ordered": "a child has its order, the pass goes on",
    "supervisor.ending": "an end is known, not committed",
    "supervisor.ended": "an end is committed, its child not told",
    "supervisor.acknowledged": "its child has been told",
    "supervisor.unclaiming": "a claim is to be given back, not committed",
    "supervisor.unclaimed": "it is committed, not taken in",
    "supervisor.condemning": "the reason of a signal is decided, not committed",
    "supervisor.condemned": "it is committed, the signal not sent",
    "supervisor.struck": "the signal is sent",
    "supervisor.suspending": "that a body is suspended is committed, it is not stopped",
    "supervisor.granted": "a slot given back to a waiting body is committed, the body not told",
    "supervisor.adopting": "the rows of running tasks are read, nobody is adopted yet",
    "supervisor.adopted": "all are adopted, nothing is written yet",
    "supervisor.reloading": "a new fork server is started, the old one not retired",
    "supervisor.reloaded": "the new fork server is let in, the old one has its orders no more",
    "supervisor.leaving": "it is to leave, nobody has been told",
    "forkserver.loaded": "the application is loaded, no supervisor has been told",
    "forkserver.forked": "a child is forked, not watched and not told of",
    "forkserver.buried": "a child's exit is learnt and written down, nobody has been told",
    "forkserver.told": "the supervisor has been told of it",
    "forkserver.striking": "it is to kill a child while the database is away, the signal is not sent",
    "child.born": "nothing is said yet",
    "child.dialled": "it has a connection, its hello is not written",
    "child.ordered": "the order is read, the body's thread has not got it",
    "child.beginning": "the body's thread has its order, nothing is begun",
    "child.over": "the body has ended, nothing is reported",
    "child.reported": "the end is reported, not acknowledged",
    "child.recording": "nobody has acknowledged, it is to record its end itself",
    "child.recorded": "it has committed its end itself",
    "child.leaving": "its end is recorded, it is to leave",
    "child.unclaiming": "it is to leave and to give back what it never began",
    "child.slot_given": "it waits, its slot is given back and committed, the supervisor not told",
    "child.locked": "a lock is taken and committed, the body not told",
    "child.unlocked": "a lock is given back and committed, nobody has been notified",
    "ledger.ended": "within the transaction of an end: the status is written, the holds are not free",
    "ledger.freed": "within the transaction of an end: the holds are free, nothing is committed",
}
"""Every point, and what is the case there: `process.moment`; those of the ledger are reached by whoever writes."""


def at(point: str) -> None:
    """Do nothing at one of POINTS; tests replace this function."""
