"""The tasks of the demo: index the Python files of a folder."""

from __future__ import annotations

import ast
import hashlib
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgsupervisor import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_INDEXED = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
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
    """Tell whether a file or folder belongs to what is indexed: not hidden, not installed, not a link to a folder."""
    hidden = entry.name.startswith(".") or entry.name in NOT_INDEXED
    return not hidden and not (entry.is_symlink() and entry.is_dir())


class IndexPackage(Task):
    """Read every Python file of some packages; count what is in them and hash their contents."""

    timeout_s = 300

    def run(self, root: str, names: list[str], passes: int = 1, *, skip_broken: bool = True) -> dict[str, Any]:
        """Index *names*, files and folders of the folder *root*.

        *passes* is how often each file is parsed; the fastest counts, as in `timeit`. A file that Python cannot parse
        ends the task, or is only counted if *skip_broken* is set.
        """
        files = [file for name in names for file in python_files(Path(root, name))]
        found = {"files": 0, "bytes": 0, "lines": 0, "functions": 0, "classes": 0, "broken": 0, "parse_s": 0.0}
        digest = hashlib.sha256()
        for file in self.track(files):
            content = file.read_bytes()
            digest.update(os.fsencode(file.relative_to(root)) + b" %d\n" % len(content))
            digest.update(content)
            found["files"] += 1
            found["bytes"] += len(content)
            found["lines"] += len(content.splitlines())
            try:
                tree, parse_s = parse(content, file.name, passes)
            except NOT_PARSABLE:
                if not skip_broken:
                    raise
                found["broken"] += 1
                continue
            found["parse_s"] += parse_s
            for node in ast.walk(tree):
                found["functions"] += isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                found["classes"] += isinstance(node, ast.ClassDef)
        return {**found, "digest": digest.hexdigest()}


class CheckDigests(Task):
    """Read the same files again and again, and see that their contents stay the same.

    Unhurried on purpose: the demo kills it long before its end.
    """

    timeout_s = 300

    def run(self, root: str, names: list[str], rounds_s: int = 240) -> int:
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
