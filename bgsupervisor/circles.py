"""Who can never go on: the graph of who waits for whom. Pure; knows no rows and no processes.

A task that waits goes on when *all* it waits for can happen. A lock's permit can come from *any* of its holders, so it
is not enough to follow edges: a task is stuck only if no order of events would ever let it go on.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Need", "circle"]


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """One thing that a task waits for: it can come from any of *sources*.

    Attributes:
        what: For people, as 'part "loaded" of task 5'.
        sources: The tasks that can bring it about; empty is something that comes by itself.
    """

    what: str
    sources: frozenset[int]


def circle(start: int, needs: Mapping[int, Iterable[Need]]) -> list[tuple[int, str]] | None:
    """Return the circle that keeps *start* from ever going on, or None if it can still go on.

    Args:
        start: The task that is about to wait; its needs are among *needs*.
        needs: For each task that waits, or has not started and must come after others, all that it needs. A task that
            is not named runs or has ended, and so can bring about whatever is expected of it.

    Returns:
        (task, what it waits for) from the first task of the circle round to the last, which waits for the first.
    """
    stuck = _stuck(needs)
    if start not in stuck:
        return None
    path: list[tuple[int, str]] = []
    places: dict[int, int] = {}
    task = start
    while task not in places:
        places[task] = len(path)
        need = next(need for need in needs[task] if need.sources and need.sources <= stuck)
        path.append((task, need.what))
        task = min(need.sources)
    return path[places[task] :]


def _stuck(needs: Mapping[int, Iterable[Need]]) -> set[int]:
    """Return the tasks that can never go on: take away whoever can, until nobody else can."""
    stuck = set(needs)
    while True:
        free = {task for task in stuck if all(not need.sources or need.sources - stuck for need in needs[task])}
        if not free:
            return stuck
        stuck -= free
