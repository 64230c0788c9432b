"""What really happened: the lines of bodies, producers and chaos, in the order of the machine's monotonic clock.

Knows no rows. The files stand beside the database, so that no defect of the ledger can touch them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Attempted", "Entry", "Line", "Oracle"]

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Attempted:
    """One try at a task."""

    id: int
    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One deed of chaos: *what* was done to *whom*, from *at* until *until* (monotonic)."""

    what: str
    whom: str
    at: float
    until: float
    pid: int = 0
    ticks: int = 0
    task: int = 0


class Oracle:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self._lines = folder / "oracle.jsonl"
        self._chaos = folder / "chaos.jsonl"
        self._lock = threading.Lock()
        self.entries: list[Entry] = []

    def say(self, what: str, **facts: object) -> None:
        """Tell a line, as bodies do."""
        line = json.dumps({"what": what, "at": time.monotonic(), **facts}).encode() + b"\n"
        file = os.open(self._lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def note(self, entry: Entry) -> None:
        """Tell a deed of chaos."""
        with self._lock:
            self.entries.append(entry)
            with self._chaos.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(entry)) + "\n")

    def lines(self) -> list[Line]:
        """Return what was told, in the order in which it was written."""
        if not self._lines.exists():
            return []
        return [json.loads(line) for line in self._lines.read_text(encoding="utf-8").splitlines()]
