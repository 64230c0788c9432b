"""The journal of a fork server: the exits that no supervisor has acknowledged as recorded.

The file is its record in the state directory. A fork server writes before it reaps, so that there is no moment at which
only its memory knows how a child ended: it may be stopped or killed at any of them.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor.ipc.messages import Exited, ProcessRef
from bgsupervisor.system.files import open_own, read_own, replace_own

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["begin", "keep", "read", "write"]

RECORD_MODE = 0o640

LARGE_BYTES = 64 * 1024
"""A record that has grown beyond this is written anew, with what is still needed of it."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Exited).decode


def begin(record: Path) -> None:
    """Make an empty record; where that is impossible it is made with the first exit."""
    with contextlib.suppress(OSError):
        os.close(open_own(record, os.O_WRONLY | os.O_CREAT, RECORD_MODE))


def write(record: Path, exited: Exited) -> None:
    """Add an exit; where that is impossible (a full disk) memory must do.

    It needs to survive processes, not the machine: after a power cut the reason is another one.
    """
    with contextlib.suppress(OSError):
        descriptor = open_own(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, RECORD_MODE)
        try:
            os.write(descriptor, _encode(exited) + b"\n")
        finally:
            os.close(descriptor)


def read(record: Path) -> dict[ProcessRef, Exited]:
    """Return the exits of a record; none if it is gone or another user's. A line that was cut off is passed over."""
    found = {}
    with contextlib.suppress(OSError):
        for line in read_own(record, RECORD_MODE).splitlines():
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                exited = _decode(line)
                found[exited.ref] = exited
    return found


def keep(record: Path, exits: Collection[Exited]) -> None:
    """Forget the others: they are in the rows. A small record is only emptied, once nothing in it is needed."""
    with contextlib.suppress(OSError):
        if not exits:
            with os.fdopen(open_own(record, os.O_WRONLY, RECORD_MODE), "wb") as file:
                file.truncate(0)
        elif record.stat().st_size > LARGE_BYTES:
            replace_own(record, b"".join(_encode(exited) + b"\n" for exited in exits), RECORD_MODE)
