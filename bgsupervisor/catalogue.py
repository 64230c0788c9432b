"""Which tasks are known by name: loaded in this process, or in the catalogue of a supervisor. Imports nothing.

A name that is not known may be short (what follows the colon), mistyped, or of a release that is still to come.
"""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from bgsupervisor import registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from bgsupervisor.ledger.records import SupervisorRecord

__all__ = ["SUPERVISOR_SILENT_S", "Catalogue", "Known", "listed", "names_of"]

SUPERVISOR_SILENT_S = 45.0
"""Three missed beats: no supervisor is alive."""
LOADING_S = 60.0
"""A supervisor that is younger and has no tasks yet may still be loading them, so none is called missing."""
CANDIDATES_SHOWN = 5
"""Limit of the names that a sentence lists."""


def names_of(one: SupervisorRecord, *, now: datetime) -> frozenset[str] | None:
    """Return the names of the tasks that a supervisor has loaded; None while it may still be loading them."""
    names = frozenset(json.loads(one.catalogue))
    is_loading = not names and one.code_error is None and now - one.started_at < timedelta(seconds=LOADING_S)
    return None if is_loading else names


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The tasks that the supervisors have loaded, as their rows show.

    Attributes:
        living: The names that those seen of late have; None where there is none, or one of them still loads its own.
        seen: The names that any of them has, also those that have left.
        failed: The modules that one of the living failed to load.
    """

    living: frozenset[str] | None = None
    seen: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, supervisors: Iterable[SupervisorRecord], *, now: datetime) -> Catalogue:
        """Read the catalogues of the supervisors that were last seen on each host."""
        found = [(one, names_of(one, now=now)) for one in supervisors]
        silent = timedelta(seconds=SUPERVISOR_SILENT_S)
        alive = [(one, names) for one, names in found if one.left_at is None and now - one.heartbeat_at <= silent]
        errors = [failure for one, _ in alive if one.code_error for failure in json.loads(one.code_error)]
        modules = [failure["module"] for failure in errors]
        # An error before the first module, as of `setup`, leaves a catalogue empty, which is no evidence about names.
        known = [names for one, names in alive if names is not None and (names or one.code_error is None)]
        return cls(
            living=frozenset().union(*known) if alive and len(known) == len(alive) else None,
            seen=frozenset().union(*(names or () for _, names in found)),
            failed=frozenset(module for module in modules if module),  # without one it is a warning about data
        )


class Known:
    """The names that are known now.

    Args:
        catalogue: What the supervisors have loaded.
        configured: The configured task modules.
    """

    def __init__(self, catalogue: Catalogue, configured: Sequence[str]) -> None:
        self._catalogue = catalogue
        self._configured = configured
        here = registry.definitions()
        self._own_modules = {*configured, *(definition.module for definition in here.values())}
        self._current = frozenset(here) | (catalogue.living or frozenset())

    def __contains__(self, name: str) -> bool:
        return name in self._current

    def meant_by(self, short: str) -> list[str]:
        """Return the full names whose part after the colon is *short*; of what has left only where nothing lives."""
        for names in (self._current, self._catalogue.seen):
            found = sorted(name for name in names if name.partition(":")[2] == short)
            if found:
                return found
        return []

    def objection(self, name: str) -> str | None:
        """Return why no supervisor is expected to run *name*, which is not known; None where too little is known."""
        lacking = self._lacking(name)
        if lacking is None:
            return None
        nearest = self.nearest(name)
        return f"{lacking}; did you mean {nearest}?" if nearest else f"{lacking}; `bgsupervisor check` lists all tasks"

    def nearest(self, name: str) -> str | None:
        """Return the known name that is most like *name*."""
        names = self._current or self._catalogue.seen
        spelled = {one.partition(":")[2]: one for one in names if ":" in one} if ":" not in name else {}
        spelled |= {one: one for one in names}
        found = difflib.get_close_matches(name, spelled, n=1)
        return spelled[found[0]] if found else None

    def _lacking(self, name: str) -> str | None:
        module = name.partition(":")[0] if ":" in name else name.rpartition(".")[0]
        if self._catalogue.living is not None and module not in self._catalogue.failed:
            return f"no supervisor has a task named {name!r}"
        if module in self._own_modules and _is_loaded(module):
            return f"the module {module} defines no task named {name!r}"
        if self._configured and all(_is_loaded(one) for one in self._configured):
            return f"the configured task modules define no task named {name!r}"
        return None


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them, the last ones counted where there are many."""
    more = len(names) - CANDIDATES_SHOWN
    return ", ".join(names[:CANDIDATES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _is_loaded(module: str) -> bool:
    """Return whether this process has imported a module to its end."""
    loaded = sys.modules.get(module)
    return loaded is not None and not getattr(getattr(loaded, "__spec__", None), "_initializing", False)
