"""The fingerprint of the code that a fork server loads: has it changed on disk since? Imports nothing of it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.system.files import replace_own

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bgsupervisor.config import Config

__all__ = [
    "Fingerprint",
    "code_fingerprint",
    "code_places",
    "loaded_places",
    "newer_code",
    "read_fingerprint",
    "write_fingerprint",
]

MAX_ENTRIES = 200_000
"""Largest number of files and folders that a fingerprint covers: half a second, which each minute can bear."""
LISTING_ENTRIES = 10_000
"""The same for a command that lists tasks: 30 ms. A larger place is not compared there."""
FINGERPRINT_MODE = 0o640
SUFFIXES = (".py", ".pyd", ".so")
INCOMPLETE = "?"
"""Ends the digest of a place that was not seen whole: too large, or with folders that this user may not read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """The state of code on disk at one moment.

    Attributes:
        digests: For each place, which is a file or a package's folder, a text that changes when path, size or time of
            a code file changes.
        package: The place of bgsupervisor itself.
        root: The root folder. In another container it is another one, and the same paths are other files there.
    """

    digests: Mapping[str, str]
    package: str
    root: str

    def is_outdated(self, config: Config) -> bool:
        """Return whether any place has changed, or the configuration names a place that is not in this fingerprint."""
        wanted = {str(place) for place in code_places(config)}
        return not wanted <= self.digests.keys() or any(
            _Scan().digest(place) != old for place, old in self.digests.items()
        )

    def extended(self, places: Iterable[str], *, since_ns: int) -> Fingerprint:
        """Return this fingerprint with more places; one changed after *since_ns* (st_ctime_ns) counts as changed."""
        found = dict(self.digests)
        for place in places:
            if place not in found:
                found[place] = _Scan().digest(place) if _Scan().changed_at_ns(place) <= since_ns else INCOMPLETE
        return dataclasses.replace(self, digests=found)


def code_fingerprint(config: Config) -> Fingerprint:
    """Return the fingerprint of the code that a configuration names.

    Looks at the packages of the configured modules, `setup` and `child_setup`, at the configuration file and its
    env_file, and at bgsupervisor itself. Blocks for reading folders: about 3 ms per 1000 code files.
    """
    digests = {str(place): _Scan().digest(str(place)) for place in code_places(config)}
    return Fingerprint(digests, str(_PACKAGE), _root())


def newer_code(file: Path) -> list[str]:
    """Return the names of the places whose code differs from the fingerprint in *file*; empty where nothing is known.

    Nothing is known in another container, of a place that this user may not read, or of one with more than
    LISTING_ENTRIES files and folders. bgsupervisor itself is left out: its upgrade needs another supervisor.
    """
    fingerprint = read_fingerprint(file)
    if fingerprint is None or fingerprint.root != _root():
        return []
    scan, found = _Scan(LISTING_ENTRIES), []
    for place, old in fingerprint.digests.items():
        if place == fingerprint.package or (old.endswith(INCOMPLETE) and old != INCOMPLETE):
            continue
        now = scan.digest(place)
        if now != old and not now.endswith(INCOMPLETE):
            found.append(Path(place).name)
    return found


def read_fingerprint(file: Path) -> Fingerprint | None:
    """Return the fingerprint of the code that was last loaded, or tried; None where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="ascii"))
        return Fingerprint(
            {str(place): str(text) for place, text in found["digests"].items()}, found["package"], found["root"]
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def write_fingerprint(file: Path, fingerprint: Fingerprint) -> int:
    """Write which code is being loaded, in one step; return the moment (st_ctime_ns).

    Raises:
        OSError: The file cannot be written.
    """
    replace_own(file, (json.dumps(dataclasses.asdict(fingerprint)) + "\n").encode("ascii"), FINGERPRINT_MODE)
    return file.stat().st_ctime_ns


def loaded_places() -> list[str]:
    """Return the places of all top-level packages and modules in this process that no package installer has made."""
    names = {name.partition(".")[0] for name in tuple(sys.modules)}
    found: set[str] = set()
    for name in names - _NOT_IMPORTED:
        facts = getattr(sys.modules.get(name), "__dict__", {})
        folders = facts.get("__path__") or ()
        try:
            found.update(str(one) for one in (folders or (facts.get("__file__"),)) if one and _is_own(str(one)))
        except TypeError:  # an application may put anything there
            continue
    return sorted(found)


_PACKAGE = Path(__file__).parents[1]
_NOT_IMPORTED = {"__main__", "__mp_main__", "bgsupervisor"}
_INSTALLED = ("site-packages", "dist-packages")
_LIBRARY = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})


def _is_own(place: str) -> bool:
    return Path(place).is_absolute() and not place.startswith(_LIBRARY) and not set(_INSTALLED) & set(Path(place).parts)


def _root() -> str:
    state = os.stat("/")  # noqa: PTH116 - as plain as it is needed
    return f"{state.st_dev}:{state.st_ino}"


def code_places(config: Config) -> Iterator[Path]:
    """Yield the folders of packages, and the single files, whose change changes the fingerprint."""
    yield from (path for path in (config.path, config.env_file) if path is not None)
    yield _PACKAGE
    names = [*config.tasks, *(path.partition(":")[0] for path in (config.setup, config.child_setup) if path)]
    for name in sorted({name.partition(".")[0] for name in names}):
        yield from _found(name, config)


def _found(name: str, config: Config) -> list[Path]:
    """Find a top-level package or module as the fork server will, without importing it."""
    spec = PathFinder.find_spec(name, [str(config.base_dir), *config.python_path])
    if spec is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


class _Scan:
    """One scan of the code files of places, at most *most* files and folders."""

    def __init__(self, most: int = MAX_ENTRIES) -> None:
        self._left = most
        self._whole = True

    def digest(self, place: str) -> str:
        """Return the digest of a place."""
        digest, self._whole = hashlib.sha256(), True
        for path, facts in self._files(place):
            words = f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ino}\n"
            digest.update(words.encode("utf-8", "surrogateescape"))
        return digest.hexdigest() + ("" if self._whole else INCOMPLETE)

    def changed_at_ns(self, place: str) -> int:
        """Return when a code file of a place was changed last (st_ctime_ns)."""
        return max((facts.st_ctime_ns for _, facts in self._files(place)), default=0)

    def _files(self, place: str) -> Iterator[tuple[str, os.stat_result]]:
        for path in self._tree(place):
            try:
                yield path, os.stat(path)  # noqa: PTH116 - a Path for each file takes longer than reading it
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                self._miss(error)

    def _tree(self, place: str) -> Iterator[str]:
        if not os.path.isdir(place):  # noqa: PTH112 - a Path's raises where the folder above may not be read
            self._left -= 1
            yield place
            return
        for root, folders, names in os.walk(place, onerror=self._miss):
            self._left -= len(folders) + len(names)
            if self._left < 0:
                self._whole = False
                return
            folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
            yield from (f"{root}{os.sep}{name}" for name in sorted(names) if name.endswith(SUFFIXES))

    def _miss(self, error: OSError) -> None:
        del error
        self._whole = False
