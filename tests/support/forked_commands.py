"""Run `python -m bgsupervisor ...` in forks of an interpreter that has imported the package: a tenth of a start's time.

The interpreter is started once per test process. Each command is a process of its own, with its own arguments,
environment, folder and standard streams. What a fork cannot take over stays a real start: see `can_run`.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import re
import resource
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path

READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "TZ", "PSYCOPG")
"""Beginnings of the variables that an interpreter or a library reads as it starts."""
MESSAGE_BYTES = 65536
ENVIRONMENT_BYTES = 16384
PAUSING = str(Path(__file__).parent / "pausing")
"""The one folder of PYTHONPATH whose `sitecustomize` a fork runs too."""
KILL_WAIT_S = 10
ENV_START = 47
"""Place of env_start after the name in /proc/PID/stat, which proc(5) counts as field 50."""
FREE_NUMBER = 500
"""Above all descriptors of a process that has only begun."""
NOT_PRELOADED = {"dev", "development", "elsewhere", "load_check"}


# ---- In the test's process -------------------------------------------------------------------------------------


class ForkedCommand:
    """A command that runs; the part of `subprocess.Popen` that tests use."""

    def __init__(self, server, arguments, *, cwd, env, streams, supervises=False):
        self.args = arguments
        self.returncode = None
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = [one if isinstance(one, int) else one.fileno() for one in (*streams, theirs)]
            server.send({"arguments": arguments, "cwd": str(cwd), "env": env, "supervises": supervises}, descriptors)
        self.pid = int(self._answers.recv(64))
        self._pidfd = None
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    def poll(self):
        """Return its exit code, or None while it lives."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._take(self._answers.recv(64, socket.MSG_DONTWAIT))
        return self.returncode

    def wait(self, timeout=None):
        """Return its exit code; wait for it at most *timeout* seconds."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self._take(self._answers.recv(64))
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def send_signal(self, number):
        """Send it a signal, unless it has ended."""
        if self.poll() is None and self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _take(self, answer):
        self.returncode = int(answer)  # an empty one: the server has died
        self._answers.close()
        if self._pidfd is not None:
            os.close(self._pidfd)

    def __del__(self):
        if self.returncode is None and hasattr(self, "_pidfd"):
            self._answers.close()
            if self._pidfd is not None:
                os.close(self._pidfd)


class Server:
    """The interpreter that forks, as the test's process sees it."""

    def __init__(self, environment):
        self._owner = os.getpid()
        self._inherited = _inherited()
        self._environment = _read_at_start(environment)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            room = {"ROOM": "x" * ENVIRONMENT_BYTES}  # for what the table of processes is to show of a fork
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd="/",
                env={**environment, **room},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        from support.left_behind import SHARED  # a plugin of pytest, which the server itself must not load

        SHARED.add(self._process.pid)

    def can_run(self, env):
        """Return whether a fork does here what a start does: limits, users and what interpreters read are the same."""
        return (
            self._owner == os.getpid()
            and self._process.poll() is None
            and "COVERAGE_PROCESS_START" not in env
            and _read_at_start(env) == self._environment
            and _inherited() == self._inherited
        )

    def send(self, request, descriptors):
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        self._socket.sendmsg([json.dumps(request).encode()], [rights])

    def close(self):
        """End it; what it has started lives on."""
        if self._owner == os.getpid():
            self._socket.close()
            self._process.wait(KILL_WAIT_S)

    def run(self, arguments, *, cwd, env, timeout, input=""):
        """Run one command to its end; return the finished process, with its texts, as `subprocess.run` does."""
        with contextlib.ExitStack() as files, selectors.DefaultSelector() as readers:
            stdin, writer = os.pipe()
            assert len(input) < select.PIPE_BUF  # what a pipe takes without anyone reading
            os.write(writer, input.encode())
            os.close(writer)
            ends = [os.pipe() for _ in range(2)]
            for reader, _ in ends:
                files.callback(os.close, reader)
                readers.register(reader, selectors.EVENT_READ, io.BytesIO())
            texts = [readers.get_key(reader).data for reader, _ in ends]
            streams = [stdin, *(writer for _, writer in ends)]
            try:
                command = ForkedCommand(self, arguments, cwd=cwd, env=env, streams=streams)
            finally:
                for one in streams:
                    os.close(one)
            deadline = time.monotonic() + timeout
            while readers.get_map():
                ready = readers.select(max(0, deadline - time.monotonic()))
                for key, _ in ready:
                    key.data.write(read := os.read(key.fd, MESSAGE_BYTES))
                    if not read:
                        readers.unregister(key.fd)
                if not ready and time.monotonic() >= deadline:
                    command.kill()
                    command.wait(KILL_WAIT_S)
                    raise subprocess.TimeoutExpired(arguments, timeout)
            code = command.wait(max(0.1, deadline - time.monotonic()))
        return subprocess.CompletedProcess(arguments, code, *(_text(one) for one in texts))


def _text(written):
    written.seek(0)
    return io.TextIOWrapper(written).read()


def _read_at_start(environment):
    read = {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}
    path = read.pop("PYTHONPATH", "").split(os.pathsep)
    return read, [folder for folder in path if folder not in ("", PAUSING)]


def _inherited():
    """Return what a process takes over from its parent besides environment, folder and streams."""
    kept = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "CapEff", "NoNewPrivs", "Cpus_allowed_list")
    own = Path("/proc/self")
    status = [line for line in (own / "status").read_text().splitlines() if line.partition(":")[0] in kept]
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    namespaces = [one.readlink() for one in sorted((own / "ns").iterdir())]
    return status, limits, namespaces, (own / "cgroup").read_text(), (own / "oom_score_adj").read_text()


# ---- In the interpreter that forks -----------------------------------------------------------------------------


def _preload():
    """Import what commands import, and nothing that they leave out where it is not needed."""
    import bgsupervisor.cli

    for module in pkgutil.walk_packages(bgsupervisor.cli.__path__, "bgsupervisor.cli."):
        if module.name.rpartition(".")[2] not in NOT_PRELOADED:
            importlib.import_module(module.name)
    importlib.import_module("bgsupervisor.supervisor.loop")


def _serve(requests):
    """Fork for each request; return in the forked process, with the request, and never in this one."""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not requests:
                    _report(selector, key)
                    continue
                message, rights, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 8)
                if not message:
                    os._exit(0)
                *streams, answers = rights
                pid = os.fork()
                if pid == 0:
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    return json.loads(message)
                pidfd = os.pidfd_open(pid)
                answer = socket.socket(fileno=answers)
                answer.send(str(pid).encode())
                selector.register(pidfd, selectors.EVENT_READ, (pid, answer))
                for stream in streams:
                    os.close(stream)
    raise AssertionError


def _report(selector, key):
    pid, answer = key.data
    _, status = os.waitpid(pid, 0)
    with answer, contextlib.suppress(OSError):
        answer.send(str(os.waitstatus_to_exitcode(status)).encode())
    selector.unregister(key.fd)
    os.close(key.fd)


def _become(request):
    """Make of this fork what a start would have: nothing of the server's is left in it."""
    import multiprocessing.process

    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.chdir(request["cwd"])
    _set_environment(request["env"])
    _open_streams()
    arguments = request["arguments"]
    sys.argv[:] = [arguments[0], *arguments[3:]]
    sys.orig_argv[:] = arguments
    sys.path[0] = request["cwd"]
    if PAUSING in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        sys.path.insert(1, PAUSING)
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    multiprocessing.process.current_process().authkey = os.urandom(32)


def _set_environment(environment):
    """Take an environment, and have the table of processes show it: tests find processes by what stands there."""
    os.environ.clear()
    os.environ.update(environment)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first, end = map(int, fields[ENV_START : ENV_START + 2])
    written = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    if len(written) < end - first:
        ctypes.memset(first, 0, end - first)
        ctypes.memmove(first, written, len(written))


def _open_streams():
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, name)
        made = open(number, mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        made.reconfigure(line_buffering=number == 2 or made.isatty())
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)


def _fork_embryo():
    """Have the first process that this one spawns be a fork as well, made now, while nothing has happened in it.

    A supervisor spawns its fork server so: a child of its own, which has nothing but what the spawning names.
    """
    import multiprocessing.util

    orders, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _be_spawned(orders)
    orders.close()
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_embryo(path, command, descriptors):
        if "--multiprocessing-fork" not in [os.fsdecode(word) for word in command]:
            return spawn(path, command, descriptors)
        multiprocessing.util.spawnv_passfds = spawn
        numbers = [0, 1, 2, *descriptors]
        order = {"command": command, "cwd": str(Path.cwd()), "env": dict(os.environ), "numbers": numbers}
        with ours:
            socket.send_fds(ours, [json.dumps(order, default=os.fsdecode).encode()], numbers)
        return pid

    multiprocessing.util.spawnv_passfds = spawn_embryo


def _be_spawned(orders):
    """Wait for the order, and do what an interpreter does that multiprocessing has spawned."""
    from multiprocessing.spawn import spawn_main

    message, rights, _, _ = socket.recv_fds(orders, MESSAGE_BYTES, 16)
    orders.close()
    if not message:
        os._exit(0)
    order = json.loads(message)
    high = [fcntl.fcntl(right, fcntl.F_DUPFD, FREE_NUMBER) for right in rights]
    os.closerange(3, FREE_NUMBER)
    for number, right in zip(order["numbers"], high, strict=True):
        os.dup2(right, number, inheritable=number < 3)
        os.close(right)
    os.chdir(order["cwd"])
    _set_environment(order["env"])
    _open_streams()
    *_, code, flag = order["command"]
    sys.argv[:] = ["-c", flag]
    sys.orig_argv[:] = order["command"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    _leave(lambda: spawn_main(**{name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", code)}))


def _leave(run):
    """Run a program and leave as interpreters do, without taking all modules apart, which takes as long."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as an interpreter's last resort does
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    _preload()
    gc.collect()
    gc.freeze()
    try:
        request = _serve(socket.socket(fileno=int(sys.argv[1])))
    except KeyboardInterrupt:
        os._exit(0)
    _become(request)
    if request["supervises"]:
        _fork_embryo()
    _leave(lambda: runpy.run_module("bgsupervisor", run_name="__main__", alter_sys=True))
