"""Whose a descriptor is: one of the fork server's own, which no child may have, or one of the application.

A number identifies nothing by itself: once it is closed, the kernel gives it to the next file. So each descriptor of
ours is noted with what it leads to when it is opened, and closed in a child only if it still leads there. All others
belong to the application, however, whenever and by whichever thread they were opened, and stay. Knows no processes.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Own", "is_taken", "keeping_output", "open_standard", "redirect", "take_inherited_pipes"]

STANDARD = range(3)
"""stdin, stdout and stderr."""
FOLDER = "/proc/self/fd"
_OUTPUTS = {1: "stdout", 2: "stderr"}


class Identity(NamedTuple):
    """The file behind a descriptor.

    Device and inode alone would not do: all epolls and eventfds share one inode, and before Linux 6.9 (pidfs) all
    pidfds did.
    """

    device: int
    inode: int
    name: str


class Own:
    """The descriptors that a fork server has opened for itself, each with what it led to then."""

    def __init__(self) -> None:
        self._known: dict[int, Identity] = {}

    def note(self, *numbers: int) -> None:
        """Take descriptors down as ours; call this as soon as they are open."""
        for number in numbers:
            identity = identity_of(number)
            if identity is not None:
                self._known[number] = identity

    def forget(self, *numbers: int) -> None:
        """Strike out descriptors that are closed, or about to be."""
        for number in numbers:
            self._known.pop(number, None)

    def close(self) -> None:
        """Close, in a child, its copies of what is ours, and nothing that has taken over a number since."""
        for number, identity in self._known.items():
            if identity_of(number) == identity:
                os.close(number)
        self._known.clear()


def identity_of(number: int) -> Identity | None:
    """Return what a descriptor leads to, None if it is closed."""
    try:
        found = os.fstat(number)
        return Identity(found.st_dev, found.st_ino, os.readlink(f"{FOLDER}/{number}"))  # noqa: PTH115 - no path
    except OSError:
        return None


def numbers() -> list[int]:
    """Return the numbers of all open descriptors, none where the system is not Linux; one may be closed by now."""
    try:
        listed = [int(name) for name in os.listdir(FOLDER)]  # noqa: PTH208 - as plain as it is needed
    except OSError:
        return []
    return [number for number in listed if identity_of(number) is not None]  # the listing had a descriptor too


def take_inherited_pipes() -> list[int]:
    """Return the pipes that this process got from its parent, and keep programs that it starts from getting them.

    Python closes at exec all that it opens (PEP 446), so what is not closed there has come through one. Call this
    before any code of the application: a library in C may open pipes otherwise.
    """
    found = [number for number in numbers() if number not in STANDARD and _came_through_exec(number)]
    for number in found:
        os.set_inheritable(number, False)
    return found


def open_standard() -> None:
    """Open /dev/null as each of the descriptors 0 to 2 that is closed, also for programs started from here.

    Otherwise the next file that is opened would take such a number, and get what is printed.
    """
    for number in STANDARD:
        if not _is_open(number):
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            if opened == number:
                os.set_inheritable(number, True)
            else:  # another thread has just taken it
                os.close(opened)


def is_taken(number: int) -> bool:
    """Return whether a file has taken the number of a standard descriptor that was closed.

    A standard descriptor outlives exec; a file that Python opens does not (PEP 446).
    """
    try:
        return not os.get_inheritable(number)
    except OSError:
        return False


@contextlib.contextmanager
def keeping_output() -> Iterator[None]:
    """Restore stdout and stderr after the block, also if an import in it closes or redirects them.

    Where the import closes all descriptors there is no way back, and what is printed afterwards is lost.
    """
    before = {number: identity for number in _OUTPUTS if (identity := identity_of(number)) is not None}
    copies = {number: os.dup(number) for number in before}
    try:
        yield
    finally:
        open_standard()
        for number, copy in copies.items():
            is_whole = identity_of(copy) == before[number]
            if identity_of(number) not in (before[number], identity_of(copy)):  # a file that is renamed gets another
                way_back = copy if is_whole else os.open(os.devnull, os.O_WRONLY)
                stream = open(way_back, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115, PTH123 - for the life of the process
                setattr(sys, _OUTPUTS[number], stream)
            elif is_whole:
                os.close(copy)


def redirect(source: int, number: int) -> int:
    """Point a standard descriptor to where *source* leads; return the number that leads there.

    The number is a new one where a file has taken the standard number, which stays that file's.
    """
    if is_taken(number):
        return os.dup(source)
    os.dup2(source, number)
    return number


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _came_through_exec(number: int) -> bool:
    with contextlib.suppress(OSError):
        return os.get_inheritable(number) and stat.S_ISFIFO(os.fstat(number).st_mode)
    return False
