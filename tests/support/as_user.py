"""Run a piece of a test as another user, in a forked child; only root can."""

from __future__ import annotations

import fcntl  # noqa: F401 - another user may be unable to read this Python's folder, so it is loaded before
import os
import pwd
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = pwd.getpwnam("nobody").pw_uid

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_nobody(act):
    """Return what *act*() returns, or the text of what it raises, as the user nobody."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            said = str(act())
        except BaseException as error:  # noqa: BLE001 - the parent compares whatever it was
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@contextmanager
def open_folder():
    """Make a folder that every user may enter and read; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
