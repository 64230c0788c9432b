"""Has Python look as it does on a system that is not Linux, named by ELSEWHERE in the environment: darwin or win32.

Python imports this file at its start when its folder is on PYTHONPATH, in children that multiprocessing spawns too. What
such a system lacks is hidden from the package: modules, functions, and all that stands in /proc. What other systems
have in ways of their own (psutil, subprocess, multiprocessing's spawn) is loaded before, and works as Linux has it.
"""

import builtins
import ctypes
import io
import multiprocessing.connection
import multiprocessing.managers
import multiprocessing.popen_spawn_posix
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.spawn
import multiprocessing.util
import os
import select
import signal
import socket
import sys
import types

# What Linux has and both others lack.
NOT_ELSEWHERE = {
    os: "pidfd_open eventfd eventfd_read eventfd_write memfd_create waitid pipe2 splice sched_getaffinity",
    select: "epoll",
    signal: "pidfd_send_signal",
    socket: "SO_PEERCRED MSG_NOSIGNAL SOCK_CLOEXEC SOCK_NONBLOCK",
}
# What Windows lacks besides. SIGKILL, WNOHANG and waitpid stay: multiprocessing's POSIX half, which runs here, needs them.
NOT_ON_WINDOWS = {
    os: "fork forkpty geteuid getuid getgid getegid setsid killpg getpgid register_at_fork O_DIRECTORY O_CLOEXEC "
    "O_NONBLOCK fchmod statvfs ST_RDONLY pwrite pread SEEK_DATA SEEK_HOLE sysconf mkfifo",
    socket: "AF_UNIX",
    select: "poll",
    signal: "SIGHUP SIGCHLD SIGUSR1 SIGUSR2 SIGURG pthread_sigmask set_wakeup_fd SIGSTOP SIGCONT",
}
MODULES_NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "syslog", "tty", "pty", "readline"}


class Hide:
    """Finds none of the modules that are not there."""

    def find_spec(self, name, path=None, target=None):
        if name in MODULES_NOT_ON_WINDOWS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def remove(names_of):
    for module, names in names_of.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)


def without_proc(function):
    """Return a function that finds nothing in /proc, for all but psutil and the modules of Python itself."""

    def found(path, *arguments, **options):
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith("/proc"):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("psutil"):
                raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        return function(path, *arguments, **options)

    return found


def pretend(platform):
    for module in (os, io, builtins):
        for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
            if hasattr(module, name):
                setattr(module, name, without_proc(getattr(module, name)))
    remove(NOT_ELSEWHERE)
    ctypes.CDLL = None
    # Multiprocessing asks for the system again when it starts a process; it is to go on as here.
    real = types.ModuleType("sys")
    real.__dict__.update(sys.__dict__)
    if platform == "win32":
        for module in (
            multiprocessing.spawn,
            multiprocessing.util,
            multiprocessing.process,
            multiprocessing.connection,
        ):
            module.sys = Platform()
        remove(NOT_ON_WINDOWS)
        sys.meta_path.insert(0, Hide())
        for name in MODULES_NOT_ON_WINDOWS:
            sys.modules.pop(name, None)
    sys.platform = platform


class Platform:
    """The module sys as multiprocessing sees it."""

    platform = "linux"

    def __getattr__(self, name):
        return getattr(sys, name)

    def __setattr__(self, name, value):
        setattr(sys, name, value)


if os.environ.get("ELSEWHERE"):
    pretend(os.environ["ELSEWHERE"])
