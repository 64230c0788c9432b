"""Has Python look as it does where ELSEWHERE in the environment says: on darwin or win32.

Python imports this file at its start when its folder is on PYTHONPATH, in children that multiprocessing spawns too.
What such a system lacks is hidden from the package: modules, functions, system calls, and all that stands in /proc.
What other systems have in ways of their own (psutil, subprocess, multiprocessing's spawn) is loaded before, and works
as Linux has it.
"""

import builtins
import ctypes
import functools
import importlib
import io
import os
import select
import signal
import socket
import sys

LOADED_BEFORE = (
    "asyncio click concurrent.futures.thread inspect logging.handlers msgspec pathlib peewee playhouse.migrate psutil "
    "rich.console selectors shutil sqlite3 subprocess tempfile watchfiles "
    "multiprocessing.connection multiprocessing.context "
    "multiprocessing.managers multiprocessing.popen_spawn_posix multiprocessing.process multiprocessing.reduction "
    "multiprocessing.resource_sharer multiprocessing.resource_tracker multiprocessing.spawn multiprocessing.util"
)
# What Linux has and both others lack.
NOT_ELSEWHERE = {
    os: "pidfd_open eventfd eventfd_read eventfd_write memfd_create waitid pipe2 splice sched_getaffinity",
    select: "epoll",
    signal: "pidfd_send_signal",
    socket: "SO_PEERCRED MSG_NOSIGNAL SOCK_CLOEXEC SOCK_NONBLOCK",
}
# What Windows lacks besides. What multiprocessing needs here stays: SIGKILL, waitpid, pthread_sigmask.
NOT_ON_WINDOWS = {
    os: "fork forkpty geteuid getuid getgid getegid setsid killpg getpgid register_at_fork O_DIRECTORY O_CLOEXEC "
    "O_NONBLOCK fchmod statvfs ST_RDONLY pwrite pread SEEK_DATA SEEK_HOLE sysconf mkfifo",
    socket: "AF_UNIX",
    select: "poll",
    signal: "SIGHUP SIGCHLD SIGUSR1 SIGUSR2 SIGURG set_wakeup_fd SIGSTOP SIGCONT",
}
MODULES_NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "syslog", "tty", "pty", "readline"}


class Hide:
    """Finds none of the modules that are not there."""

    def find_spec(self, name, *_):
        if name in MODULES_NOT_ON_WINDOWS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Platform:
    """The module sys as multiprocessing sees it: it asks for the system again when it starts a process."""

    platform = "linux"

    def __getattr__(self, name):
        return getattr(sys, name)

    def __setattr__(self, name, value):
        setattr(sys, name, value)


def remove(names_of):
    for module, names in names_of.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)


def without_proc(function):
    """Return a function that finds nothing in /proc, for all but psutil."""

    def found(path, *arguments, **options):
        is_path = isinstance(path, str | bytes | os.PathLike)
        if is_path and os.fsdecode(path).startswith("/proc"):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("psutil"):
                raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        return function(path, *arguments, **options)

    return found


def pretend(platform):
    parts = {name: importlib.import_module(name) for name in LOADED_BEFORE.split()}
    for module in (os, io, builtins):
        for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
            if hasattr(module, name):
                setattr(module, name, without_proc(getattr(module, name)))
    remove(NOT_ELSEWHERE)
    ctypes.CDLL = None
    if platform == "win32":
        for name in ("spawn", "util", "process", "connection", "popen_spawn_posix"):
            parts[f"multiprocessing.{name}"].sys = Platform()
        socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)  # a Pipe has named pipes on Windows
        remove(NOT_ON_WINDOWS)
        sys.meta_path.insert(0, Hide())
        for name in MODULES_NOT_ON_WINDOWS:
            sys.modules.pop(name, None)
    sys.platform = platform


if os.environ.get("ELSEWHERE"):
    pretend(os.environ["ELSEWHERE"])
