"""Whether the code of an application has changed since the last call; loads nothing of it."""

from __future__ import annotations

import importlib.util
import logging
import threading
from typing import TYPE_CHECKING

from bgsupervisor.system.fingerprint import SUFFIXES, code_fingerprint, code_places

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config

__all__ = ["Changes"]

log = logging.getLogger("bgsupervisor")

POLL_S = 1.0
"""Interval between two fingerprints of the code where watchfiles is not installed, in seconds."""
NET_S = 10.0
"""The same beside watchfiles, which misses changes on a network file system."""
STOP_S = 2.0
"""Longest wait for the threads of watchfiles at the end, in seconds; they poll every 50 ms."""


class Changes:
    """Compares fingerprints of the code: when watchfiles reports that a file has changed, and now and then.

    Args:
        config: Names the modules, the folders and the files.
        clock: Tells when the next fingerprint is due.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        self._clock = clock
        self._fingerprint = code_fingerprint(config)
        self._touched, self._over = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._is_watched = importlib.util.find_spec("watchfiles") is not None
        self._due_at = clock.monotonic() + self._pause_s()
        if self._is_watched:
            self._watch(list(code_places(config)))

    def found(self, config: Config) -> bool:
        """Whether the code has changed since the last call. Reads folders, as `code_fingerprint` does."""
        if not self._touched.is_set() and self._clock.monotonic() < self._due_at:
            return False
        self._touched.clear()
        self._due_at = self._clock.monotonic() + self._pause_s()
        before, self._fingerprint = self._fingerprint, code_fingerprint(config)
        return before != self._fingerprint

    def close(self) -> None:
        """End the threads: one inside watchfiles when Python ends would abort the process."""
        self._over.set()
        for thread in self._threads:
            thread.join(STOP_S)

    def _pause_s(self) -> float:
        return NET_S if self._is_watched else POLL_S

    def _watch(self, places: Sequence[Path]) -> None:
        folders = {place for place in places if place.is_dir()}
        # A file that an editor replaces is another file: its folder is watched, without what lies below.
        files = set(places) - folders
        for watched, recursive in ((folders, True), ({file.parent for file in files}, False)):
            if not watched:  # no file is named where the configuration stands in the environment
                continue
            arguments = (sorted(watched), recursive, frozenset(map(str, files)))
            thread = threading.Thread(
                target=self._note_changes, args=arguments, name="bgsupervisor changes", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _note_changes(self, places: Sequence[Path], recursive: bool, files: frozenset[str]) -> None:
        import watchfiles  # noqa: PLC0415 - an extra

        def is_code(_: watchfiles.Change, path: str) -> bool:
            return path.endswith(SUFFIXES) or path in files

        watching = watchfiles.watch(
            *places, recursive=recursive, watch_filter=is_code, stop_event=self._over, raise_interrupt=False
        )
        try:
            for _ in watching:
                self._touched.set()
        except (OSError, RuntimeError) as error:  # such as the user's limit of inotify watches
            self._is_watched = False
            log.warning("cannot watch the code by watchfiles: %s; reading it every second", error)
