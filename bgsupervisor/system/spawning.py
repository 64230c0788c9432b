"""What a process is started with: its working folder and its limit of open files."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["in_root_folder", "raise_descriptor_limit", "restore_descriptor_limit"]

_soft_limit: int | None = None
"""The soft limit of open files that this process was started with, once it has raised its own."""


@contextlib.contextmanager
def in_root_folder() -> Iterator[None]:
    """Make the root folder the working folder for the block, because a new Python imports from there first.

    Returns also to a folder that was deleted meanwhile; stays in the root folder where the old one may not be entered.
    """
    with contextlib.ExitStack() as way_back:
        with contextlib.suppress(OSError):
            here = os.open(".", os.O_PATH | os.O_CLOEXEC)
            way_back.callback(os.close, here)
            way_back.callback(os.fchdir, here)
        os.chdir("/")
        yield


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of open files to the hard one: each child costs it three descriptors.

    Its children inherit the new limit: see `restore_descriptor_limit`.
    """
    import resource  # noqa: PLC0415 - absent on Windows, where this module must import

    global _soft_limit  # noqa: PLW0603 - of the process, as the limit is
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _soft_limit = soft


def restore_descriptor_limit(pid: int) -> None:
    """Restore in a new child the limit that this process was started with; does nothing if it was not raised.

    Programs that use select(2), or that close every possible descriptor, count on the low limit.
    """
    if _soft_limit is not None and sys.platform == "linux":
        import resource  # noqa: PLC0415 - absent on Windows, where this module must import

        with contextlib.suppress(OSError, ValueError):  # the child is gone already
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (_soft_limit, hard))
