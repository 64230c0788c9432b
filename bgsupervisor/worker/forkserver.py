"""The fork server: loads the application once, forks children on request, and learns how each one died.

As the parent of all children it alone sees exit codes and signals, and keeps them until a supervisor acknowledges
them. It has no threads and no database connection of ours, and outlives the supervisor. Knows no table.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, NoReturn

from bgsupervisor import failpoints, sanitize
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import WireError
from bgsupervisor.ipc import exit_journal, messages
from bgsupervisor.ipc.channel import REDIAL_S, Channel, Redial
from bgsupervisor.ipc.messages import Exited, ProcessRef
from bgsupervisor.ipc.sockets import connect
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.system import descriptors, process_tree, processes, spawning
from bgsupervisor.system.files import inode_of, is_another
from bgsupervisor.system.fingerprint import loaded_places
from bgsupervisor.system.processes import Exit, ProcessIdentity
from bgsupervisor.system.syscalls import die_with_parent, set_child_subreaper
from bgsupervisor.system.titles import set_title
from bgsupervisor.worker import child, inherited, leftovers, reporting
from bgsupervisor.worker.application import import_what_children_need, load_application, tracker_number

if TYPE_CHECKING:
    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.statuses import Reason

__all__ = ["ForkServer", "main", "strays_of_this_process"]

log = logging.getLogger("bgsupervisor")

LONELY_S = 10.0
"""Time without a supervisor after which a fork server without children leaves, in seconds."""
EXITS_KEPT_S = 86_400.0
"""Time for which it keeps unacknowledged exits, in seconds, so that a late supervisor still learns the truth."""
STRAY_ROUNDS = 20
"""Rounds of killing strays; each kills all that it finds, and a stray may fork meanwhile."""
STRAY_POLL_S = 1.0
"""Interval of checks for a killed stray that is still there (uninterruptible sleep), in seconds."""


def main(config: Config) -> NoReturn:
    """Run as a fork server; never return."""
    try:
        _die_with_the_supervisor()
        os.setsid()
        set_title("fork server")
        set_child_subreaper()
        leftovers.open_standard_streams()
        inherited.leave_unheeded()
        ForkServer(config, SystemClock()).live()
    except BaseException as error:  # noqa: BLE001 - whatever it was, the supervisor starts the next fork server
        print("the fork server crashed:", *sanitize.trace_lines(error), sep="\n", file=sys.stderr, flush=True)  # noqa: T201 - into the log
    finally:
        os._exit(
            1
        )  # multiprocessing's own exit would join all children, and keep the connection open without reading it


def strays_of_this_process(known: set[int]) -> list[int]:
    """Return the PIDs of this process's children that are neither *known* nor multiprocessing's resource tracker.

    The process that started them died, so they were reparented to this one, a child subreaper.
    """
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)  # noqa: SLF001
    return [pid for pid in _own_children() if pid not in known and pid != tracker]


def _die_with_the_supervisor() -> None:
    """End with the supervisor until the application is loaded: an import that hangs would go on without use.

    Another supervisor starts its own fork server, and there are no children yet.
    """
    # guard: a loading fork server dies with its supervisor
    die_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it has died before
        os._exit(1)


class ForkServer:
    """One loop: read messages, fork, watch children die, report."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._identity = processes.own_identity(processes.host_id(config.host))
        self._ref = ProcessRef(self._identity.pid, self._identity.start_ticks)
        self._state_dir = StateDir(config.state_dir)
        self._record = self._state_dir.fork_server_path(self._ref.pid, self._ref.start_ticks)
        self._channel: Channel | None = None
        self._dialled: int | None = None
        self._children: dict[int, _Forked] = {}
        self._exits: dict[ProcessRef, Exited] = {}
        self._seen: set[ProcessRef] = set()
        self._retired = False
        self._leave = False
        self._stray_left = False
        self._own = descriptors.Own()
        self._note_inherited()
        signal.signal(signal.SIGCHLD, _note)
        exit_journal.begin(self._record)
        reporting.prepare()
        self._loaded = load_application(config)
        die_with_parent(0)
        inherited.take_back_signals(self._loaded.handlers)
        spawning.raise_descriptor_limit()  # only now: children get back the limit that the application may have set
        self._poll = select.poll()
        # Only now: the import of an application may close all that is open, as daemons do.
        self._wake_read, self._wake_write = socket.socketpair()
        self._listen_to_deaths()
        self._places = loaded_places()
        set_title("fork server")  # the application may have set its own
        import_what_children_need()
        self._application_pids = set(process_tree.descendants(self._ref.pid))
        leftovers.note_inherited()  # what is loaded stays shared with the children: the collector leaves it alone
        self._redial = Redial(clock)  # only now: loading may take longer than a fork server bears to be alone
        failpoints.at("forkserver.loaded")

    def live(self) -> NoReturn:
        """Serve until no child and no exit is left; never return."""
        while not self._is_over():
            self._dial()
            self._rest()
            self._read_messages()
            self._reap()
            self._sweep_strays()
        with contextlib.suppress(OSError):
            self._record.unlink()
        os._exit(0)

    def _note_inherited(self) -> None:
        """Note the pipes of multiprocessing by which the supervisor and this process see each other's death."""
        parent = multiprocessing.parent_process()
        pipes = {*descriptors.take_inherited_pipes(), *([] if parent is None else [parent.sentinel])}
        self._own.note(*(number for number in pipes if number != tracker_number()))

    def _listen_to_deaths(self) -> None:
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
            self._own.note(end.fileno())
        self._poll.register(self._wake_read, select.POLLIN)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note)

    # The loop's verbs

    def _dial(self) -> None:
        if self._channel is not None or self._redial.wait_s() > 0:
            return
        self._dialled = inode_of(self._state_dir.control)
        try:
            sock = connect(self._state_dir.path, "control.sock", socket.SOCK_STREAM)
        except OSError:
            return
        self._own.note(sock.fileno())
        self._channel = Channel(sock)
        self._poll.register(self._channel, select.POLLIN)
        self._redial.connected()
        self._channel.send(
            messages.ForkServerHello(
                version=messages.PROTOCOL_VERSION,
                ref=self._ref,
                catalogue=self._loaded.catalogue(),
                failures=self._loaded.failures,
                warnings=self._loaded.warnings,
                dangers=self._loaded.dangers,
                children=[forked.ref for forked in self._children.values()],
                exits=list(self._exits.values()),
                places=self._places,
            )
        )

    def _rest(self) -> None:
        timeout_s = None if self._channel is not None else self._redial.wait_s() or REDIAL_S
        if self._stray_left:
            timeout_s = STRAY_POLL_S if timeout_s is None else min(timeout_s, STRAY_POLL_S)
        if self._channel is not None:
            self._poll.modify(self._channel, select.POLLIN | (select.POLLOUT if self._channel.unsent_bytes else 0))
        self._ready = {descriptor for descriptor, _ in self._poll.poll(None if timeout_s is None else timeout_s * 1000)}
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _read_messages(self) -> None:
        channel = self._channel
        if channel is None:
            return
        replaced = is_another(self._state_dir.control, self._dialled)  # the old supervisor may stay stopped
        if channel.fileno() not in self._ready and not replaced:
            return
        channel.flush()
        try:
            received = channel.receive()
        except WireError as error:
            log.warning("the supervisor speaks another protocol: %s", error)
            channel.closed = True
            received = []
        for message in received:
            self._redial.heard()
            self._take(message)
        if channel.closed or replaced:
            self._poll.unregister(channel)
            self._own.forget(channel.fileno())
            channel.close()
            self._channel = None
            self._redial.lost()

    def _take(self, message: messages.Message) -> None:
        if isinstance(message, messages.Spawn):
            self._fork(message.count)
        elif isinstance(message, messages.ExitsSeen):
            for ref in message.refs:
                self._exits.pop(ref, None)
            self._seen.update(forked.ref for forked in self._children.values() if forked.ref in message.refs)
            exit_journal.keep(self._record, self._exits.values())
        elif isinstance(message, messages.Kill):
            self._kill(message)
        elif isinstance(message, messages.Retire):
            self._retired = True
        elif isinstance(message, messages.Leave):
            self._retired = self._leave = True

    def _reap(self) -> None:
        """Learn how children died, from pidfds: multiprocessing's sentinel stays silent while grandchildren live."""
        for descriptor in self._ready & self._children.keys():
            forked = self._children.pop(descriptor)
            self._poll.unregister(descriptor)
            exited = _exit_of(forked, descriptor)
            self._own.forget(descriptor, *_pipes_of(forked.process))
            os.close(descriptor)
            if not forked.left_in_order.value and forked.ref not in self._seen:
                # guard: an exit is kept until it is acknowledged
                self._exits[forked.ref] = exited
                # guard: an exit is written to disk before it is forgotten
                exit_journal.write(self._record, exited)
            self._seen.discard(forked.ref)
            _ = forked.process.exitcode  # reaps it only now; join would wait for its sentinel, see above
            with contextlib.suppress(ValueError):  # reaped by another, so multiprocessing takes it for alive
                forked.process.close()  # without it every later start gets slower
            self._stray_left = True
            failpoints.at("forkserver.buried")
            if self._channel is not None:
                self._channel.send(exited)
                failpoints.at("forkserver.told")

    def _sweep_strays(self) -> None:
        """Kill processes of dead tasks: those that were reparented to this process, which did not fork them."""
        if not self._stray_left and self._wake_read.fileno() not in self._ready:
            return
        for _ in range(STRAY_ROUNDS):
            strays = self._strays()
            if not strays:
                break
            # guard: strays of dead bodies are killed
            for pid in strays:
                process_tree.kill_child(pid)
        self._stray_left = bool(self._strays())

    def _strays(self) -> list[int]:
        return strays_of_this_process({forked.ref.pid for forked in self._children.values()} | self._application_pids)

    def _is_over(self) -> bool:
        if self._children:
            return False
        if self._leave:
            return True
        if self._exits:  # a supervisor must still hear of them
            return self._redial.alone_s() >= EXITS_KEPT_S
        return self._retired or self._redial.alone_s() >= LONELY_S

    # Work

    def _fork(self, count: int) -> None:
        for done in range(count):
            try:
                self._fork_one()
            except OSError as error:
                log.error("cannot fork a child: %s", error)  # noqa: TRY400 - the sentence says it
                if self._channel is not None:
                    self._channel.send(messages.SpawnFailed(count - done, str(error)))
                return

    def _fork_one(self) -> None:
        leftovers.flush_inherited()
        context: Any = multiprocessing.get_context(self._config.start_method)
        spawns = self._config.start_method == "spawn"
        watched, left_in_order = (context.RawValue(ctypes.c_byte, 0) for _ in range(2))
        spec = child.ChildSpec(
            config=self._config,
            fork_server=self._ref,
            not_its_own=descriptors.Own() if spawns else self._own,
            handlers={} if spawns else self._loaded.handlers,
            load=spawns,
            watched=watched,
            left_in_order=left_in_order,
        )
        process = context.Process(target=child.main, args=(spec,), daemon=False, name="bgsupervisor child")
        process.start()
        failpoints.at("forkserver.forked")
        with contextlib.ExitStack() as undo:
            undo.callback(_undo_start, process)
            pidfd = os.pidfd_open(process.pid)
            undo.callback(os.close, pidfd)
            ticks = processes.start_ticks(process.pid)
            undo.pop_all()
        spawning.restore_descriptor_limit(process.pid)
        self._own.note(pidfd, *_pipes_of(process))
        forked = _Forked(process, ProcessRef(process.pid, -1 if ticks is None else ticks), left_in_order)
        self._children[pidfd] = forked
        self._poll.register(pidfd, select.POLLIN)
        if self._channel is not None:
            self._channel.send(messages.Spawned(forked.ref))
        watched.value = 1

    def _kill(self, termination: messages.Kill) -> None:
        for descriptor, forked in self._children.items():
            if forked.ref == termination.ref:
                forked.intended = termination.reason
                failpoints.at("forkserver.striking")
                identity = ProcessIdentity(
                    self._identity.host,
                    self._identity.boot_id,
                    self._identity.pid_ns,
                    termination.ref.pid,
                    termination.ref.start_ticks,
                )
                try:
                    with processes.ProcessHandle(identity, os.dup(descriptor)) as handle:
                        process_tree.signal_tree(handle, termination.signal)
                except OSError as error:  # no descriptor left; the supervisor's next step comes anyway
                    log.error("cannot send signal %d to PID %d: %s", termination.signal, termination.ref.pid, error)  # noqa: TRY400 - the sentence says it


@dataclasses.dataclass(slots=True)
class _Forked:
    process: Any
    ref: ProcessRef
    left_in_order: Any
    intended: Reason | None = None


def _note(number: int, frame: object) -> None:
    """Do nothing: the wake-up descriptor has already ended the poll."""


def _undo_start(process: Any) -> None:  # noqa: ANN401 - of any start method
    """End a child that could not be watched."""
    process.kill()
    process.join(process_tree.KILL_WAIT_S)
    with contextlib.suppress(ValueError):
        process.close()


def _exit_of(forked: _Forked, pidfd: int) -> Exited:
    """Return how a dead child ended, and leave it unreaped."""
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:  # a later start() of multiprocessing has reaped it, or the application
        info = None
    if info is not None:
        exit = Exit.from_waitid(info)
    else:
        code = forked.process.exitcode
        exit = Exit(None, None) if code is None else Exit.from_multiprocessing(code)
    return Exited(ref=forked.ref, exit_code=exit.exit_code, signal=exit.signal, ordered=forked.intended)


def _pipes_of(process: Any) -> tuple[int, ...]:  # noqa: ANN401 - of any start method
    """Return this process's ends of the two pipes that multiprocessing has made for a child."""
    return tuple(process._popen.finalizer._args)  # noqa: SLF001 - it has no name for one of them


def _own_children() -> list[int]:
    try:
        with open(f"/proc/self/task/{threading.main_thread().native_id}/children", encoding="ascii") as file:  # noqa: PTH123
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:  # a kernel without these lists
        with contextlib.suppress(OSError):
            return process_tree.children(os.getpid())
    except OSError:  # no descriptor left: without a list nothing is killed
        pass
    return []
