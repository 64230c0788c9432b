"""The nursery: loads the application once, forks children on order, and learns how each one died.

It is the parent of all children, so it alone sees exit codes and signals; it keeps them until a supervisor has
acknowledged them. It has no threads and no database connection of ours, and it outlives the supervisor. Knows no table.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import inspect
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import traceback
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, NoReturn

from bgsupervisor import (
    child,
    cleaning,
    connections,
    descriptors,
    exits,
    inherited,
    leftovers,
    pauses,
    processes,
    reporting,
    tasks,
    wire,
)
from bgsupervisor.bodies import storable
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import apply_env_file, is_postgres, sqlite_path
from bgsupervisor.errors import WireError
from bgsupervisor.inherited import Dispositions
from bgsupervisor.linux import die_with_parent, set_child_subreaper
from bgsupervisor.processes import Exit, ProcessIdentity
from bgsupervisor.stamp import loaded_places
from bgsupervisor.statedir import StateDir, connect, inode_of, is_another
from bgsupervisor.titles import set_title
from bgsupervisor.wire import REDIAL_S, Channel, Exited, LoadFailure, Redial, Who

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.statuses import Reason

__all__ = ["Loaded", "Nursery", "import_what_children_need", "load_application", "main", "strays_of_this_process"]

log = logging.getLogger("bgsupervisor")

LONELY_S = 10.0
"""A nursery without children leaves when no supervisor has come for this long: the next one starts its own."""
EXITS_KEPT_S = 86_400.0
"""But it keeps exits that nobody has acknowledged for a day, so that a late supervisor still learns the truth."""
STRAY_ROUNDS = 20
"""How often in a row strays are looked for; each round kills all it sees, and a stray may fork meanwhile."""
STRAY_LOOK_S = 1.0
"""While a stray that was killed has not gone (uninterruptible sleep), it is looked at so often."""
SIGNAL_TAKEN = "importing the application set what {} does, {}; it has been set back. Set it in `child_setup`"


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """What loading the application came to.

    Attributes:
        failures: What could not be loaded, and why.
        warnings: Sentences about what will not work as it seems to.
        dangers: Those among the warnings that are about data that may be lost.
        handlers: What the application has set for signals, by number.
    """

    failures: list[LoadFailure]
    warnings: list[str]
    dangers: list[str]
    handlers: dict[int, Any] = dataclasses.field(default_factory=dict)

    def catalogue(self) -> dict[str, wire.TaskOptions]:
        """Return the options of each task that can run, by name.

        A task whose signature failed stays REQUEST, and so does one of a module that raised after defining it.
        """
        failed = {failure.module for failure in self.failures}
        known = tasks.definitions().items()
        return {name: one.options for name, one in known if name not in failed and one.module in sys.modules}


def main(config: Config) -> NoReturn:
    """Live as a nursery; never returns."""
    try:
        _die_with_the_supervisor()
        os.setsid()
        set_title("fork server")
        set_child_subreaper()
        leftovers.open_standard_streams()
        inherited.leave_unheeded()
        Nursery(config, SystemClock()).live()
    except BaseException as error:  # noqa: BLE001 - whatever it was, the next nursery is started when this one is gone
        print("the fork server crashed:", *cleaning.trace_lines(error), sep="\n", file=sys.stderr, flush=True)  # noqa: T201 - into the log
    finally:
        os._exit(1)  # multiprocessing's own exit would join all children, deaf but with the connection open


def load_application(config: Config) -> Loaded:
    """Import the application as its bodies will see it: environment, path, folder, `setup`, then the task modules.

    A module that fails does not keep the others from loading; what failed, and why, is returned.
    """
    apply_env_file(config)
    for folder in reversed((str(config.base_dir), *config.python_path)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    os.chdir(config.base_dir)
    imports = connections.Imports(None if is_postgres(config.database) else sqlite_path(config.database))
    before = Dispositions.now()
    with _outliving_the_import():
        failures, without_tasks = _load(config, imports)
    connections.close_reopening()
    handlers = Dispositions.now().changed_since(before)
    remarks = [*without_tasks, *tasks.remarks()]
    if config.start_method == "spawn":  # then children inherit nothing
        return Loaded(failures, [*remarks, *_give_up_taken_streams()], [], handlers)
    found = [*_warnings(), *_taken(handlers), *remarks, *imports.warnings(supervised=False), *_give_up_taken_streams()]
    return Loaded(failures, found, imports.warnings(supervised=True), handlers)


def _load(config: Config, imports: connections.Imports) -> tuple[list[LoadFailure], list[str]]:
    """Return what failed to load, and sentences about modules without tasks."""
    if config.setup:
        failure = _try_load(config.setup, lambda: child.call_by_path(str(config.setup)), kind="setup")
        imports.attribute(config.setup)
        if failure is not None:
            return [failure], []
    failures: list[LoadFailure] = []
    without_tasks = []
    for module in config.tasks:
        known = len(tasks.definitions())
        failure = _try_load(module, functools.partial(importlib.import_module, module))
        imports.attribute(module)
        if failure is not None:
            failures.append(failure)
        elif len(tasks.definitions()) == known and not tasks.defines_tasks(module):
            without_tasks.append(f"the module {module} defines no task; correct `tasks`, or import its tasks in it")
    for definition in tasks.definitions().values():
        failure = _try_load(definition.name, functools.partial(getattr, definition, "signature"), kind="task")
        if failure is not None:
            failures.append(failure)
    return failures, without_tasks


@contextlib.contextmanager
def _outliving_the_import() -> Iterator[None]:
    """Use no descriptor any more that the application has closed at its import, as daemons do."""
    tracker = _tracker_number()
    identity = None if tracker is None else descriptors.identity_of(tracker)
    yield
    descriptors.open_standard()
    if tracker is not None and tracker == _tracker_number() and descriptors.identity_of(tracker) != identity:
        # multiprocessing would write to whatever has the number now.
        resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]  # noqa: SLF001
        resource_tracker._resource_tracker._pid = None  # type: ignore[attr-defined]  # noqa: SLF001
        resource_tracker.ensure_running()


def import_what_children_need() -> None:
    """Import all that a child uses once its body has begun: by then a deploy may have replaced the files."""
    modules = ["asyncio"] if any(_is_async(one) for one in tasks.definitions().values()) else []
    ours = ("bgsupervisor.migrations", "bgsupervisor.service", "bgsupervisor.gate")
    for module in ("psutil", "sqlite3", *ours, *modules):
        importlib.import_module(module)


def strays_of_this_process(known: set[int]) -> list[int]:
    """Return the PIDs of this process's children that are neither *known* nor multiprocessing's resource tracker.

    They were reparented to it, a child subreaper, because what had started them died.
    """
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)  # noqa: SLF001
    return [pid for pid in _own_children() if pid not in known and pid != tracker]


def _try_load(name: str, load: Callable[[], object], *, kind: str = "module") -> LoadFailure | None:
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a module may raise anything, sys.exit included
        trace = storable("".join(traceback.format_exception(error)))
        lines = traceback.format_exception_only(error)
        said = "".join(lines[-1:] if isinstance(error, SyntaxError) else lines)  # before it come file and line
        log.error("%s failed to load: %s", name, " ".join(said.split()))  # noqa: TRY400 - the trace goes to `check`
        return LoadFailure(name, trace[-8000:], kind)
    return None


def _give_up_taken_streams() -> list[str]:
    """Print nothing into files that the application has opened in the place of stdout and stderr; return warnings."""
    found = []
    for number, name in ((1, "stdout"), (2, "stderr")):
        if descriptors.is_taken(number):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for the life of the process
            found.append(
                f"importing the application closed {name} and opened a file in its place; what is printed outside of "
                "bodies is lost"
            )
    return found


def _warnings() -> list[str]:
    found = []
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        found.append(
            f"importing the application started {len(others)} thread(s): {', '.join(others[:5])}; a body may hang "
            'on a lock that such a thread holds. Start it in `child_setup`, or set start_method = "spawn"'
        )
    return found


def _taken(handlers: Mapping[int, Any]) -> list[str]:
    return [SIGNAL_TAKEN.format(number.name, use) for number, use in inherited.OURS.items() if number in handlers]


def _die_with_the_supervisor() -> None:
    """Until the application is loaded, end with the supervisor: an import that hangs would live on for nobody.

    Another supervisor starts a fork server of its own, and there are no children yet.
    """
    die_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it has died before
        os._exit(1)


class Nursery:
    """One loop: hear orders, fork, watch children die, report."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._identity = processes.own_identity(processes.host_id(config.host))
        self._who = Who(self._identity.pid, self._identity.start_ticks)
        self._state_dir = StateDir(config.state_dir)
        self._record = self._state_dir.nursery_path(self._who.pid, self._who.start_ticks)
        self._channel: Channel | None = None
        self._dialled: int | None = None
        self._children: dict[int, _Forked] = {}
        self._exits: dict[Who, Exited] = {}
        self._seen: set[Who] = set()
        self._retired = False
        self._leave = False
        self._stray_left = False
        self._own = descriptors.Own()
        self._note_inherited()
        signal.signal(signal.SIGCHLD, _note)
        exits.begin(self._record)
        reporting.prepare()
        self._loaded = load_application(config)
        die_with_parent(0)
        inherited.take_back_signals(self._loaded.handlers)
        processes.raise_descriptor_limit()  # only now: children get back the limit that the application may have set
        self._poll = select.poll()
        # Only now: an application may close at its import whatever is open, as daemons do.
        self._wake_read, self._wake_write = socket.socketpair()
        self._listen_to_deaths()
        self._places = loaded_places()
        set_title("fork server")  # the application may have set its own
        import_what_children_need()
        self._application_pids = set(processes.descendants(self._who.pid))
        leftovers.note_inherited()  # what is loaded stays shared with the children: the collector leaves it alone
        self._redial = Redial(clock)  # only now: loading may take longer than a nursery bears to be alone
        pauses.at("nursery.loaded")

    def live(self) -> NoReturn:
        """Serve until there is nothing left to serve; never returns."""
        while not self._is_over():
            self._dial()
            self._rest()
            self._hear()
            self._bury()
            self._sweep_strays()
        with contextlib.suppress(OSError):
            self._record.unlink()
        os._exit(0)

    def _note_inherited(self) -> None:
        """Note the pipes of multiprocessing by which the supervisor and this process see each other's death."""
        parent = multiprocessing.parent_process()
        pipes = {*descriptors.take_inherited_pipes(), *([] if parent is None else [parent.sentinel])}
        self._own.note(*(number for number in pipes if number != _tracker_number()))

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
            wire.NurseryHello(
                version=wire.PROTOCOL_VERSION,
                who=self._who,
                catalogue=self._loaded.catalogue(),
                failures=self._loaded.failures,
                warnings=self._loaded.warnings,
                dangers=self._loaded.dangers,
                children=[forked.who for forked in self._children.values()],
                exits=list(self._exits.values()),
                places=self._places,
            )
        )

    def _rest(self) -> None:
        timeout_s = None if self._channel is not None else self._redial.wait_s() or REDIAL_S
        if self._stray_left:
            timeout_s = STRAY_LOOK_S if timeout_s is None else min(timeout_s, STRAY_LOOK_S)
        if self._channel is not None:
            self._poll.modify(self._channel, select.POLLIN | (select.POLLOUT if self._channel.unsent_bytes else 0))
        self._ready = {descriptor for descriptor, _ in self._poll.poll(None if timeout_s is None else timeout_s * 1000)}
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _hear(self) -> None:
        channel = self._channel
        if channel is None:
            return
        replaced = is_another(self._state_dir.control, self._dialled)  # the old supervisor may be stopped for ever
        if channel.fileno() not in self._ready and not replaced:
            return
        channel.flush()
        try:
            messages = channel.receive()
        except WireError as error:
            log.warning("the supervisor speaks another protocol: %s", error)
            channel.closed = True
            messages = []
        for message in messages:
            self._redial.heard()
            self._take(message)
        if channel.closed or replaced:
            self._poll.unregister(channel)
            self._own.forget(channel.fileno())
            channel.close()
            self._channel = None
            self._redial.lost()

    def _take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Spawn):
            self._fork(message.count)
        elif isinstance(message, wire.ExitsSeen):
            for who in message.whos:
                self._exits.pop(who, None)
            self._seen.update(forked.who for forked in self._children.values() if forked.who in message.whos)
            exits.keep(self._record, self._exits.values())
        elif isinstance(message, wire.KillOrder):
            self._kill(message)
        elif isinstance(message, wire.Retire):
            self._retired = True
        elif isinstance(message, wire.Leave):
            self._retired = self._leave = True

    def _bury(self) -> None:
        """Learn how children died. From the pidfd: multiprocessing's sentinel stays silent while grandchildren live."""
        for descriptor in self._ready & self._children.keys():
            forked = self._children.pop(descriptor)
            self._poll.unregister(descriptor)
            exited = _exit_of(forked, descriptor)
            self._own.forget(descriptor, *_pipes_of(forked.process))
            os.close(descriptor)
            if not forked.left_in_order.value and forked.who not in self._seen:
                self._exits[forked.who] = exited
                exits.write(self._record, exited)
            self._seen.discard(forked.who)
            _ = forked.process.exitcode  # only now is it reaped; join would wait for its sentinel, see above
            with contextlib.suppress(ValueError):  # reaped by another, so multiprocessing takes it for alive
                forked.process.close()  # without it every later start gets slower
            self._stray_left = True
            pauses.at("nursery.buried")
            if self._channel is not None:
                self._channel.send(exited)
                pauses.at("nursery.told")

    def _sweep_strays(self) -> None:
        """Kill what a dead task left: it was reparented to us, and we did not fork it."""
        if not self._stray_left and self._wake_read.fileno() not in self._ready:
            return
        for _ in range(STRAY_ROUNDS):
            strays = self._strays()
            if not strays:
                break
            for pid in strays:
                processes.kill_child(pid)
        self._stray_left = bool(self._strays())

    def _strays(self) -> list[int]:
        return strays_of_this_process({forked.who.pid for forked in self._children.values()} | self._application_pids)

    def _is_over(self) -> bool:
        if self._children:
            return False
        if self._leave:
            return True
        if self._exits:  # somebody must still be told
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
                    self._channel.send(wire.SpawnFailed(count - done, str(error)))
                return

    def _fork_one(self) -> None:
        leftovers.flush_inherited()
        context: Any = multiprocessing.get_context(self._config.start_method)
        spawns = self._config.start_method == "spawn"
        held, left_in_order = (context.RawValue(ctypes.c_byte, 0) for _ in range(2))
        birth = child.Birth(
            config=self._config,
            nursery=self._who,
            not_its_own=descriptors.Own() if spawns else self._own,
            handlers={} if spawns else self._loaded.handlers,
            load=spawns,
            held=held,
            left_in_order=left_in_order,
        )
        process = context.Process(target=child.main, args=(birth,), daemon=False, name="bgsupervisor child")
        process.start()
        pauses.at("nursery.forked")
        with contextlib.ExitStack() as undo:
            undo.callback(_undo_start, process)
            pidfd = os.pidfd_open(process.pid)
            undo.callback(os.close, pidfd)
            ticks = processes.start_ticks(process.pid)
            undo.pop_all()
        processes.restore_descriptor_limit(process.pid)
        self._own.note(pidfd, *_pipes_of(process))
        forked = _Forked(process, Who(process.pid, -1 if ticks is None else ticks), left_in_order)
        self._children[pidfd] = forked
        self._poll.register(pidfd, select.POLLIN)
        if self._channel is not None:
            self._channel.send(wire.Spawned(forked.who))
        held.value = 1

    def _kill(self, order: wire.KillOrder) -> None:
        for descriptor, forked in self._children.items():
            if forked.who == order.who:
                forked.ordered = order.reason
                pauses.at("nursery.striking")
                identity = ProcessIdentity(
                    self._identity.host,
                    self._identity.boot_id,
                    self._identity.pid_ns,
                    order.who.pid,
                    order.who.start_ticks,
                )
                try:
                    with processes.ProcessHandle(identity, os.dup(descriptor)) as handle:
                        processes.signal_tree(handle, order.signal)
                except OSError as error:  # no descriptor left; the supervisor's next step comes anyway
                    log.error("cannot send signal %d to PID %d: %s", order.signal, order.who.pid, error)  # noqa: TRY400 - the sentence says it


@dataclasses.dataclass(slots=True)
class _Forked:
    process: Any
    who: Who
    left_in_order: Any
    ordered: Reason | None = None


def _note(number: int, frame: object) -> None:
    """Do nothing: the wake-up descriptor has already ended the rest."""


def _undo_start(process: Any) -> None:  # noqa: ANN401 - of any start method
    """End a child of which nobody would ever hear."""
    process.kill()
    process.join(processes.KILL_WAIT_S)
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
    return Exited(who=forked.who, exit_code=exit.exit_code, signal=exit.signal, ordered=forked.ordered)


def _tracker_number() -> int | None:
    return getattr(resource_tracker._resource_tracker, "_fd", None)  # noqa: SLF001


def _pipes_of(process: Any) -> tuple[int, ...]:  # noqa: ANN401 - of any start method
    """Return this process's ends of the two pipes that multiprocessing has made for a child."""
    return tuple(process._popen.finalizer._args)  # noqa: SLF001 - it has no name for one of them


def _is_async(definition: tasks.Definition) -> bool:
    return inspect.iscoroutinefunction(definition.function)


def _own_children() -> list[int]:
    try:
        with open(f"/proc/self/task/{threading.main_thread().native_id}/children", encoding="ascii") as file:  # noqa: PTH123
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:  # a kernel without these lists
        with contextlib.suppress(OSError):
            return processes.children(os.getpid())
    except OSError:  # no descriptor left: who does not know kills nobody
        pass
    return []
