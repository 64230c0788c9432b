"""Who is there beside chaos: cron starts supervisors, producers request tasks, an observer and a prober watch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from bgsupervisor import BgSupervisorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torture.arena import Arena
    from torture.database import Connection

__all__ = ["Cron", "Observer", "Prober", "Producer"]

NOTED_S = 0.2
"""A writer that waits for so long is a sign that somebody holds the database."""

RECENT_S = 5.0
"""An end becomes visible at most so long after the moment that its row names."""


class Cron:
    """Starts `bgsupervisor run` again and again, sometimes two at once, sometimes though there is one."""

    def __init__(self, arena: Arena, seed: str) -> None:
        self._arena = arena
        self._random = random.Random(f"{seed}/cron")

    def run(self, until: Callable[[], bool]) -> None:
        """Go on until *until* says so."""
        next_at, needless_at = time.monotonic(), time.monotonic() + 2
        while not until():
            self._arena.reap()
            now, living = time.monotonic(), self._arena.living()
            if living and now < needless_at:
                next_at = max(next_at, now + self._random.uniform(0, 0.5))
            elif now >= next_at or living:
                for _ in range(1 if self._random.random() < 0.8 else 2):
                    self._arena.start_supervisor()
                next_at = now + self._random.uniform(0.2, 1.0)
                needless_at = now + self._random.uniform(2, 6)
            time.sleep(0.02)

    def keep_one(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Have one supervisor live until *until* says so; False if that takes longer than *limit_s*."""
        deadline, next_at = time.monotonic() + limit_s, 0.0
        while not until():
            self._arena.reap()
            now = time.monotonic()
            if not self._arena.living() and now >= next_at:
                self._arena.start_supervisor()
                next_at = now + 1
            if now > deadline:
                return False
            time.sleep(0.05)
        return True


class Producer:
    """Requests tasks of all kinds over the real API, and tells the oracle what was acknowledged."""

    def __init__(self, arena: Arena, seed: str, number: int, *, backlog: int) -> None:
        self._arena = arena
        self._random = random.Random(f"{seed}/producer {number}")
        self._numbers = itertools.count(number * 10_000_000)
        self._name = f"producer {number}"
        self._backlog = backlog
        self._others: list[tuple[int, int]] = []
        self.requested = 0
        self.kinds: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {
            "quick": (dict, 30),
            "sleeper": (lambda: {"seconds": self._seconds(0.6)}, 20),
            "boom": (lambda: {"seconds": self._seconds(0.1)}, 3),
            "leaver": (lambda: {"how": self._random.choice(("sys.exit", "zero", "seven", "true", "false"))}, 4),
            "suicide": (lambda: {"number": int(self._random.choice((signal.SIGKILL, signal.SIGSEGV)))}, 2),
            "daemon": (lambda: {"seconds": self._seconds(0.3)}, 3),
            "copier": (dict, 2),
            "locker": (self._locks, 10),
            "printer": (lambda: {"kilobytes": self._random.choice((10, 300, 2000))}, 3),
            "stubborn": (lambda: {"seconds": self._seconds(2.0)}, 2),
            "hog": (lambda: {"millions": self._random.choice((5, 20))}, 1),
            "late": (lambda: {"ignoring": self._random.random() < 0.5}, 1),
            "parts": (lambda: {"seconds": self._seconds(0.4)}, 6),
            "parent": (lambda: {"count": self._random.randint(1, 3)}, 2),
            "waiter": (dict, 8),
            "participant": (dict, 2),
        }

    def run(self, until: Callable[[], bool]) -> None:
        """Request until *until* says so, never more than the backlog ahead."""
        while not until():
            waiting = "SELECT COUNT(*) FROM bgsupervisor_task WHERE status = 'REQUEST'"
            with contextlib.suppress(self._arena.database.error, BgSupervisorError):
                if self._arena.database.rows(waiting)[0][0] < self._backlog:
                    self._request_some()
            time.sleep(self._random.uniform(0.005, 0.1))

    def _request_some(self) -> None:
        kinds, weights = list(self.kinds), [weight for _, weight in self.kinds.values()]
        for _ in range(self._random.randint(1, 4)):
            kind = self._random.choices(kinds, weights)[0]
            if kind == "participant":
                self._request_parties()
            elif kind == "waiter":
                self._request_waiter()
            else:
                made = self._request(kind, self.kinds[kind][0](), **self._options())
                if kind == "parts" and made is not None:
                    self._others = [*self._others[-5:], made]

    def _options(self) -> dict[str, Any]:
        chance = self._random.random()
        if chance < 0.08:
            return {"unique": f"{self._name} {self._random.randrange(3)}"}
        if chance < 0.11 and self._others:
            return {"after": [self._random.choice(self._others)[0]]}
        return {"priority": self._random.choice((0, 0, 0, 1, -1))}

    def _request_parties(self) -> None:
        parties, scope = self._random.choice((2, 3)), f"{self._name} {next(self._numbers)}"
        for _ in range(parties):
            self._request("participant", {"scope": scope, "parties": parties})

    def _request_waiter(self) -> None:
        if self._others:
            other, expected = self._random.choice(self._others)
            part = self._random.choice(("first", None))
            self._request("waiter", {"other": other, "part": part, "expected": expected})

    def _request(self, kind: str, data: dict[str, Any], **options: Any) -> tuple[int, int] | None:
        n, oracle = next(self._numbers), self._arena.oracle
        try:
            handle = self._arena.service.request(f"bodies:{kind}", {"n": n, **data}, **options)
        except BgSupervisorError as error:
            oracle.say("refused", error=type(error).__name__, text=str(error))
            return None
        oracle.say("ack", task=handle.id, created=handle.created, n=n, kind=kind, **options)
        self.requested += 1
        return (handle.id, n) if handle.created else None

    def _seconds(self, most: float) -> float:
        return round(self._random.uniform(0, most), 3)

    def _locks(self) -> dict[str, Any]:
        names = self._random.sample(("one", "other", "two"), self._random.choice((1, 1, 2, 3)))
        return {"names": names, "seconds": self._seconds(0.1)}


@dataclasses.dataclass(slots=True)
class Observer:
    """Reads rows all the time, and keeps when it first saw an end.

    Attributes:
        done: When each attempt was first seen to be DONE (monotonic), by (task, attempt).
        interrupted: When each interrupted attempt was first seen in its table.
        longest_look_s: The longest time between two looks: how late this machine lets anybody be.
    """

    arena: Arena
    done: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    interrupted: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    longest_look_s: float = 0.0
    _last_interruption: int = 0

    def run(self, until: Callable[[], bool]) -> None:
        """Look until *until* says so."""
        last = time.monotonic()
        while not until():
            with contextlib.suppress(self.arena.database.error), self.arena.database.connection() as connection:
                while not until():
                    self._look(connection)
                    now = time.monotonic()
                    self.longest_look_s, last = max(self.longest_look_s, now - last), now
                    time.sleep(0.02)

    def _look(self, connection: Connection) -> None:
        query = "SELECT id, task_id, attempt FROM bgsupervisor_interruption WHERE id > ? ORDER BY id"
        for id, task, attempt in connection.rows(query, self._last_interruption):
            self._last_interruption = id
            self.interrupted.setdefault((task, attempt), time.monotonic())
        recently = datetime.now(UTC) - timedelta(seconds=RECENT_S)
        query = "SELECT id, attempt FROM bgsupervisor_task WHERE status = 'DONE' AND ended_at >= ?"
        for task, attempt in connection.rows(query, f"{recently:%Y-%m-%d %H:%M:%S.%f}+00:00"):
            self.done.setdefault((task, attempt), time.monotonic())


@dataclasses.dataclass(slots=True)
class Prober:
    """Asks for the write lock again and again, and keeps when it was not to be had.

    Not only chaos holds it: whoever is stopped in the middle of a transaction does as well.
    """

    arena: Arena
    away: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def run(self, until: Callable[[], bool]) -> None:
        """Ask until *until* says so."""
        while not until():
            asked_at = time.monotonic()
            while not self._had() and not until():
                time.sleep(0.05)
            had_at = time.monotonic()
            if had_at - asked_at > NOTED_S:
                self.away.append((asked_at, had_at))
            time.sleep(0.1)

    def _had(self) -> bool:
        database = self.arena.database
        with contextlib.suppress(database.error), database.connection(timeout_s=60) as connection, connection.alone():
            return True
        return False
