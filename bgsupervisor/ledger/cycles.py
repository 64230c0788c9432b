"""Cycles in the wait-for graph: which tasks can never go on. Pure; knows no rows and no processes.

A task that waits goes on when *all* it waits for can happen. A lock's permit can come from *any* of its holders, and
a barrier needs several that come, so it is not enough to follow edges: a task is stuck only if no order of events
would ever let it go on.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

__all__ = ["WaitEdge", "cycle"]


@dataclasses.dataclass(frozen=True, slots=True)
class WaitEdge:
    """One thing that a task waits for: some of *sources* must bring it about.

    Attributes:
        what: For people, as 'part "loaded" of task 5'.
        sources: The tasks that can bring it about, one as often as it can; there are at least *needed*.
        needed: How many of them must.
    """

    what: str
    sources: Collection[int]
    needed: int = 1

    def can_come(self, stuck: Collection[int]) -> bool:
        """Whether enough of its sources are not *stuck*."""
        return sum(source not in stuck for source in self.sources) >= self.needed


def cycle(start: int, edges: Mapping[int, Iterable[WaitEdge]]) -> list[tuple[int, str]] | None:
    """Return the cycle that keeps *start* from ever going on, or None if it can still go on.

    Args:
        start: The task that is about to wait; its edges are among *edges*.
        edges: For each task that waits, or has not started and must come after others, all that it needs. A task that
            is not named runs or has ended, and so can bring about whatever is expected of it.

    Returns:
        (task, what it waits for) from the first task of the cycle round to the last, which waits for the first.
    """
    stuck = _stuck(edges)
    if start not in stuck:
        return None
    path: list[tuple[int, str]] = []
    places: dict[int, int] = {}
    task = start
    while task not in places:
        places[task] = len(path)
        edge = next(edge for edge in edges[task] if not edge.can_come(stuck))
        path.append((task, edge.what))
        behind = [source for source in edge.sources if source in stuck]
        if not behind:
            return path[-1:]  # too few can bring it about: a barrier that no other task can come to
        task = min(behind)
    return path[places[task] :]


def _stuck(edges: Mapping[int, Iterable[WaitEdge]]) -> set[int]:
    """Return the tasks that can never go on: remove those that can, until none is left that can."""
    stuck = set(edges)
    while True:
        free = {task for task in stuck if all(edge.can_come(stuck) for edge in edges[task])}
        if not free:
            return stuck
        stuck -= free
