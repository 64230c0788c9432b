"""The tasks of the demo: index the Python files of a folder, and report on all that was indexed."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgsupervisor import PartNotReached, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_INDEXED = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
DIGEST_PERMITS = 2
"""So many of the tasks that take turns work at once."""
COLUMNS = ("files", "lines", "functions", "classes", "broken", "parse_s")
NOT_PARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def python_files(path: Path) -> Iterator[Path]:
    """Yield the Python files of a folder in order, or the file itself; never through a link to a folder."""
    if not path.is_dir():
        if path.suffix == ".py" and path.is_file():
            yield path
        return
    for entry in sorted(path.iterdir()):
        if is_indexed(entry):
            yield from python_files(entry)


def is_indexed(entry: Path) -> bool:
    """Return whether a file or folder belongs to the index: not hidden, not installed, not a link to a folder."""
    hidden = entry.name.startswith(".") or entry.name in NOT_INDEXED
    return not hidden and not (entry.is_symlink() and entry.is_dir())


class IndexPackage(Task):
    """Read every Python file of some packages; count what is in them and hash their contents."""

    timeout_s = 300

    def run(
        self, root: str, names: list[str], passes: int = 1, *, skip_broken: bool = True, takes_turns: bool = False
    ) -> dict[str, Any]:
        """Index *names*, files and folders of the folder *root*.

        *passes* is how often each file is parsed; the fastest counts, as in `timeit`. A file that Python cannot parse
        ends the task, or is only counted if *skip_broken* is set. With *takes_turns* at most DIGEST_PERMITS work at
        once.
        """
        with self.lock("digest", permits=DIGEST_PERMITS) if takes_turns else contextlib.nullcontext():
            files = [file for name in names for file in python_files(Path(root, name))]
            scanned = scan(Path(root), files)
            self.reach("scanned", scanned)  # the report need not wait for the parser
            return {**scanned, **self.count(files, passes, skip_broken=skip_broken)}

    def count(self, files: list[Path], passes: int, *, skip_broken: bool) -> dict[str, float]:
        found = {"functions": 0, "classes": 0, "broken": 0, "parse_s": 0.0}
        for file in self.track(files):
            try:
                tree, parse_s = parse(file.read_bytes(), file.name, passes)
            except NOT_PARSABLE:
                if not skip_broken:
                    raise
                found["broken"] += 1
                continue
            found["parse_s"] += parse_s
            for node in ast.walk(tree):
                found["functions"] += isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                found["classes"] += isinstance(node, ast.ClassDef)
        return found


class Report(Task):
    """Wait for what others have scanned, then for their ends, and add up; whoever is interrupted is named."""

    timeout_s = 300

    def run(self, packages: list[tuple[str, int]]) -> dict[str, Any]:
        """Report on *packages*, each a name and the task that indexes it."""
        ids = [id for _, id in packages]
        parts = self.wait_for(ids, part="scanned", return_interrupted=True)
        scanned = [part for part in parts if not isinstance(part, PartNotReached)]
        self.progress(message=f"{sum(part['lines'] for part in scanned):,} lines scanned; parsing goes on")
        found, missing = {}, {}
        for (name, _), end in zip(packages, self.wait_for(ids, return_interrupted=True), strict=True):
            if isinstance(end, PartNotReached):
                missing[name] = str(end)
            else:
                found[name] = end
        total = {column: sum(one[column] for one in found.values()) for column in COLUMNS}
        return {"scanned": len(scanned), "packages": found, "total": total, "missing": missing}


class CheckDigests(Task):
    """Read the same files again and again, and see that their contents stay the same.

    Unhurried on purpose: the demo kills it long before its end.
    """

    timeout_s = 300

    def run(self, root: str, names: list[str], rounds_s: int = 240) -> int:
        self.progress(0, rounds_s, "waits for its turn")
        with self.lock("digest", permits=DIGEST_PERMITS):
            return self.check(root, names, rounds_s)

    def check(self, root: str, names: list[str], rounds_s: int) -> int:
        files = [file for name in names for file in python_files(Path(root, name))]
        began_s = time.perf_counter()
        rounds, first = 0, None
        while (elapsed_s := time.perf_counter() - began_s) < rounds_s:
            self.progress(elapsed_s, rounds_s, f"round {rounds + 1}")
            digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
            first = first or digests
            if digests != first:
                raise ValueError(f"a file changed in round {rounds + 1}")
            rounds += 1
        return rounds


def scan(root: Path, files: list[Path]) -> dict[str, Any]:
    """Return how many files, bytes and lines these are, and the SHA-256 of their names and contents."""
    size_bytes = lines = 0
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(os.fsencode(file.relative_to(root)) + b" %d\n" % len(content))
        digest.update(content)
        size_bytes += len(content)
        lines += len(content.splitlines())
    return {"files": len(files), "bytes": size_bytes, "lines": lines, "digest": digest.hexdigest()}


def parse(content: bytes, name: str, passes: int = 1) -> tuple[ast.Module, float]:
    """Return the syntax tree of a file and the CPU seconds of the fastest of *passes* parses."""
    times_s = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(passes):
            began_s = time.process_time()
            tree = ast.parse(content, name)
            times_s.append(time.process_time() - began_s)
    return tree, min(times_s)
