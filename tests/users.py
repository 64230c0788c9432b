"""Two users who share a group, as processes of their own; only root can have them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

WEB, DEPLOY, COMMON = 33, 65534, 54321
"""www-data, nobody, and a group that needs no name."""
PACKAGES = ("bgsupervisor", "click", "msgspec", "peewee", "playhouse", "psutil")


def as_user(uid, command, *, cwd="/", umask=0o022, groups=(COMMON,), environment=None, **options):
    """Start a program as another user, with nothing of root's."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", **(environment or {})}
    return subprocess.Popen(
        [str(word) for word in command],
        user=uid,
        group=uid,
        extra_groups=list(groups),
        umask=umask,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        **options,
    )


def ask_as(uid, command, **options):
    """Run a program as another user to its end; return the finished process, with its texts."""
    process = as_user(uid, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    said, complained = process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


@pytest.fixture(scope="session")
def their_python():
    """Yield the path of a Python that every user may run and the environment that has it find our packages.

    Where this one lies in a folder that is closed to others, its files are linked into an open one.
    """
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), sysconfig.get_path("purelib")])}
    with contextlib.suppress(OSError):
        if (
            ask_as(
                DEPLOY, [sys.executable, "-c", "import bgsupervisor.cli.run, psutil"], environment=environment
            ).returncode
            == 0
        ):
            yield sys.executable, environment
            return
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield _linked(folder), {"PYTHONPATH": str(folder / "packages"), "LD_LIBRARY_PATH": str(folder / "lib")}
    finally:
        shutil.rmtree(folder)


def _linked(folder):
    python = Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    (folder / "bin").mkdir()
    _link(python, folder / "bin" / version)
    unneeded = ("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages", "config-*")
    shutil.copytree(
        library,
        folder / "lib" / version,
        copy_function=_link,
        ignore=lambda where, names: shutil.ignore_patterns(*unneeded)(where, names) if Path(where) == library else [],
    )
    for shared in library.parent.glob("libpython*.so*"):
        _link(shared, folder / "lib" / shared.name)
    (folder / "packages").mkdir()
    for name in PACKAGES:
        origin = Path(find_spec(name).origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, folder / "packages" / name, copy_function=_link)
        else:
            _link(origin, folder / "packages" / origin.name)
    return folder / "bin" / version


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
