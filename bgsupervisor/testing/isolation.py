"""Which database the Services of a process work with while it runs tests.

A process that was isolated once stays so until it ends: threads and exit handlers outlive the last test.
"""

from __future__ import annotations

import contextlib
import functools
import os
import unittest
from typing import TYPE_CHECKING, Any

from bgsupervisor import backings, environment
from bgsupervisor.testing.box import TaskBox
from bgsupervisor.testing.folders import made, run_folder, share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bgsupervisor.backings import Backing, Origin

__all__ = ["TaskBoxTestCase", "in_use", "isolate", "isolate_worker", "isolation_off", "switch_off"]

_outside: dict[int, TaskBox] = {}
"""The box for what happens outside tests, by PID. A fork has its own and leaves its parent's connections open."""
_boxed: set[str] = set()
"""Methods of `unittest.TestCase` that give the test a box."""


def isolate(*, test_cases: bool = True) -> None:
    """Keep all Services of this process, made before or later, away from the real database and supervisor.

    One line in `tests/__init__.py`, or at the top of a test module, is enough for unittest. From then on each test has
    a database of its own, and what happens outside tests goes to a database that no test reads. Nothing ends it
    before the process ends; `isolation_off` is for the test that starts a supervisor of its own.

    Args:
        test_cases: Whether each test of a `unittest.TestCase` gets a `TaskBox`; pytest has its fixture for that.
    """
    run_folder()  # now, so that forks share it: a killed one removes nothing
    if backings.redirect in (None, _own):
        backings.redirect = _of_outside
    if test_cases:
        _box_test_cases()
    _mark()


def isolate_worker(folder: Path) -> None:
    """Isolate a process that multiprocessing has spawned from one that runs tests, whose folder is *folder*."""
    share(folder)
    isolate()


@contextlib.contextmanager
def isolation_off() -> Iterator[None]:
    """Let Services reach the real database and supervisor within this block, or within the function it decorates."""
    with _redirected(_own):
        yield


def switch_off() -> None:
    """Let Services reach the real database unless a single test says otherwise, also under Django's runner."""
    backings.redirect = _own
    _mark()


@contextlib.contextmanager
def in_use(box: TaskBox) -> Iterator[TaskBox]:
    """Give *box* to all Services within this block, and close it."""
    try:
        with _redirected(box._backing):  # noqa: SLF001 - the box is ours
            yield box
    finally:
        box._close()  # noqa: SLF001 - the same


class TaskBoxTestCase(unittest.TestCase):
    """A test case whose `self.bgsupervisor` is the TaskBox of the running test.

    It is a base class for unittest, and a mixin that stands before Django's: `class Orders(TaskBoxTestCase, TestCase)`.
    The first class that is made of it isolates the process, as `isolate` does.
    """

    def __init_subclass__(cls, **named: Any) -> None:  # noqa: ANN401 - of other bases
        super().__init_subclass__(**named)
        if backings.redirect is None:
            isolate()

    @property
    def bgsupervisor(self) -> TaskBox:
        """The tasks of the running test."""
        box = _current()
        if box is None:
            raise RuntimeError("self.bgsupervisor belongs to a running test; it is not there in setUpClass")
        return box

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        """Run the test with a box; see `unittest.TestCase.run`."""
        with _box_of(self):
            return super().run(result)

    def debug(self) -> None:
        """Run the test with a box, without collecting errors; see `unittest.TestCase.debug`."""
        with _box_of(self):
            super().debug()


def _current() -> TaskBox | None:
    owner = getattr(backings.redirect, "__self__", None)
    return owner if isinstance(owner, TaskBox) else None


def _own(origin: Origin) -> None:
    """Leave a Service with what it was made with."""


def _of_outside(origin: Origin) -> Backing:
    box = _outside.get(os.getpid()) or _outside.setdefault(os.getpid(), TaskBox())
    return box._backing(origin)  # noqa: SLF001 - the box is ours


@contextlib.contextmanager
def _redirected(to: Callable[[Origin], Backing | None]) -> Iterator[None]:
    before = backings.redirect
    backings.redirect = to
    _mark()
    try:
        yield
    finally:
        backings.redirect = before
        _mark()


def _mark() -> None:
    """Let processes that multiprocessing spawns from this one know whether it is isolated; a fork knows by itself."""
    is_isolated = backings.redirect not in (None, _own)
    if is_isolated:
        run_folder()
    environment.mark_tests(made() if is_isolated else None)


def _mark_fork() -> None:
    if backings.redirect not in (None, _own):
        environment.mark_tests(made())  # the mark of the parent has its PID


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_mark_fork)


@contextlib.contextmanager
def _box_of(case: unittest.TestCase) -> Iterator[None]:
    """Give a test its box, unless it has one already: pytest's fixture, or a test case that runs within a test."""
    if _current() is not None:
        yield
        return
    with in_use(TaskBox()) as box:
        case.addCleanup(box._raise_errors)  # noqa: SLF001 - a cleanup, so that it is an error of this test
        yield


def _box_test_cases() -> None:
    """Give each test of any `unittest.TestCase` a box from now on; only there is it known where a test begins."""
    for name in {"run", "debug"} - _boxed:
        _boxed.add(name)
        setattr(unittest.TestCase, name, _with_box(getattr(unittest.TestCase, name)))


def _with_box(method: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(method)
    def run(self: unittest.TestCase, *arguments: object, **named: object) -> object:
        if backings.redirect is not _of_outside:  # the test has a box, or isolation is off for it
            return method(self, *arguments, **named)
        with _box_of(self):
            return method(self, *arguments, **named)

    return run
