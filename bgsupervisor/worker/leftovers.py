"""State that a body leaves in its own process: unwritten files, timers, changed settings. Knows no task and no table.

`docs/operating.md` lists what is written, what is undone, and what is left to the body.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import gc
import io
import locale
import multiprocessing.process
import os
import signal
import socket
import stat
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bgsupervisor.environment import restore_environment, variables
from bgsupervisor.worker import reporting
from bgsupervisor.worker.outcome import exit_code, exit_text

if sys.platform != "win32":  # a body on Windows loads this module too, and is not reused
    import resource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

__all__ = [
    "LEFTOVER_GRACE_S",
    "Surroundings",
    "end_like_python",
    "ending_copies",
    "flush_inherited",
    "note_inherited",
    "open_standard_streams",
    "run_exit_callbacks",
    "stop_timers",
    "write",
]

_BUFFERS: tuple[type[Any], ...] = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
"""The types that keep written data in memory, outermost first."""
_ARCHIVES = (
    ("tarfile", "TarFile"),
    ("zipfile", "ZipFile"),
    ("gzip", "GzipFile"),
    ("bz2", "BZ2File"),
    ("lzma", "LZMAFile"),
)
"""Modules and types whose files are complete only once they are closed, outermost first."""
LEFTOVER_GRACE_S = 2.0
"""Time between SIGTERM and SIGKILL for processes that a body left running, in seconds."""
STUCK_EXIT_S = 2.0
"""Time after grace_s at which a child ends whose exit callbacks keep the interpreter's lock, in seconds."""
_TIMERS = ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")

_inherited: list[weakref.ref[Any]] = []


# Files


class _Unbuffered(io.TextIOWrapper):
    """A stream without a buffer, so that it needs no flush."""


def _unbuffered(descriptor: int) -> io.TextIOWrapper:
    """Return a text stream without a buffer: printed text survives SIGKILL, also without a line end.

    Costs about 2 microseconds more per printed line than a line-buffered stream.
    """
    raw = io.FileIO(descriptor, "w", closefd=descriptor > 2)  # noqa: PLR2004 - a standard one outlives its streams
    return _Unbuffered(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


def open_standard_streams(out: int = 1, err: int = 2) -> None:
    """Replace stdout and stderr by unbuffered ones on these descriptors."""
    with contextlib.suppress(OSError):  # closed, as by `>&-`
        sys.stdout = _unbuffered(out)
    with contextlib.suppress(OSError):
        sys.stderr = _unbuffered(err)


def note_inherited() -> None:
    """Note the files that the import of the application opened, then exclude all that is loaded from collection.

    Afterwards `gc.get_objects` lists only newer objects, so that a search for open files takes microseconds:
    https://docs.python.org/3/library/gc.html#gc.freeze
    """
    gc.collect()
    _inherited[:] = [weakref.ref(one) for one in _instances(_BUFFERS) if not _is_over_archive(one)]
    gc.freeze()


def flush_inherited() -> None:
    """Write the buffers of inherited files before a fork; otherwise the child would write them again."""
    for file in _still_there():
        with contextlib.suppress(Exception):
            file.flush()


def write(*, quietly: bool = False, regular_only: bool = False) -> None:
    """Write the buffers of open files of this process, and close archives, which are complete only then.

    Files without a reference are closed, as by Python. Others stay open, so that exit callbacks can still write.
    Without open files this takes about 50 microseconds.

    Args:
        quietly: Ignore errors.
        regular_only: Leave out pipes, sockets and all else where writing may block without end.

    Raises:
        OSError: Something could not be written, as on a full disk; the error names the file.
        Exception: A file's own flush() or close() raised it.
    """
    errors: list[Exception] = []
    if _write_all(errors, regular_only=regular_only):
        gc.collect()  # a finalizer may write more; before, it might close a buffer under the text that belongs there
        _write_all(errors, regular_only=regular_only)
    if errors and not quietly:
        raise errors[0]


def _write_all(errors: list[Exception], *, regular_only: bool) -> bool:
    """Write the buffers of all open files; return whether this process has opened any."""
    own = [one for one in _instances(_writers()) if _is_open(one)]
    for one in [*_still_there(), *own]:
        name = None
        try:
            if not _is_open(one) or (regular_only and not _is_regular(one)):  # an archive closes the file below it
                continue
            name = _name_of(one)  # a file that failed to close may have none any more
            if isinstance(one, _BUFFERS):
                one.flush()
            else:
                one.close()
        except Exception as error:  # noqa: BLE001 - a file may be of any library
            errors.append(_naming(error, name))
    return bool(own)


def _writers() -> tuple[type[Any], ...]:
    text, *buffers = _BUFFERS
    return (text, *_loaded(_ARCHIVES), *buffers)


def _loaded(names: Iterable[tuple[str, str]]) -> Iterator[type[Any]]:
    for module, name in names:
        if module in sys.modules:
            yield getattr(sys.modules[module], name)


def _instances(types: tuple[type[Any], ...]) -> list[Any]:
    """Return the tracked objects of some types that are not frozen, in the order of these types."""
    objects = gc.get_objects()
    # By type(): isinstance would ask proxies and mocks for their __class__.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, types) and kind is not _Unbuffered}
    if not kinds:
        return []
    rank = {kind: next(at for at, one in enumerate(types) if issubclass(kind, one)) for kind in kinds}
    return sorted((one for one in objects if type(one) in kinds), key=lambda one: rank[type(one)])


def _still_there() -> list[Any]:
    return [file for reference in _inherited if (file := reference()) is not None]


def _is_over_archive(file: object) -> bool:
    """Whether a text stream writes into an archive: to flush that at each fork would spoil its compression."""
    return isinstance(getattr(file, "buffer", None), tuple(_loaded(_ARCHIVES)))


def _is_open(file: Any) -> bool:  # noqa: ANN401 - of several unrelated types
    """Whether a file is open for writing."""
    try:
        if file.closed if hasattr(file, "closed") else file.fp is None:  # the latter is ZipFile's
            return False
        return bool(file.writable() if hasattr(file, "writable") else file.mode != "r")
    except Exception:  # noqa: BLE001 - detached, not completely made, or of any library
        return False


def _is_regular(file: Any) -> bool:  # noqa: ANN401 - as above
    if not hasattr(file, "fileno"):
        file = getattr(file, "fp", None) or file.fileobj  # ZipFile's, TarFile's
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False


def _name_of(file: Any) -> str | None:  # noqa: ANN401 - as above
    """Return the name of an open file; before Python 3.13 BZ2File and LZMAFile have only that of the file below."""
    with contextlib.suppress(Exception):
        for one in (file, getattr(file, "_fp", None)):
            if name := getattr(one, "name", None) or getattr(one, "filename", None):
                return str(name)
    return None


def _naming(error: Exception, name: str | None) -> Exception:
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return error
    detail = f"{error.strerror}; the body left this file open, and the rest of it is not written"
    named: Exception = OSError(error.errno, detail) if name is None else OSError(error.errno, detail, name)
    return named.with_traceback(error.__traceback__)


# Copies


@contextlib.contextmanager
def ending_copies() -> Iterator[None]:
    """End a process that the block forked: only the original may report how the attempt ended."""
    pid, raised = os.getpid(), None
    try:
        yield
    except BaseException as error:
        raised = error
        raise
    finally:
        # guard: a copy that a body forked does not report for the attempt
        if os.getpid() != pid:
            end_like_python(raised)


def end_like_python(error: BaseException | None) -> NoReturn:
    """End a process that a body has forked as Python ends a program: message, threads, exit callbacks, files.

    The interpreter itself is not finalized: that would close connections that the copy shares with the original.

    Args:
        error: What the copy raised; None if it returned.
    """
    code = 1
    try:
        code = _print_error(error)
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - waits as the interpreter does
        children = multiprocessing.process._children  # type: ignore[attr-defined]  # noqa: SLF001 - as below
        children.intersection_update({one for one in children if one._parent_pid == os.getpid()})  # noqa: SLF001 - those of the original are not ended here
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # noqa: SLF001 - os._exit skips them
        write(quietly=True)
    finally:
        os._exit(code)


def _print_error(error: BaseException | None) -> int:
    """Print an uncaught exception on stderr, as Python does; return the exit code."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        text = exit_text(error)
        if text is not None:
            with contextlib.suppress(Exception):
                print(text, file=sys.stderr)  # noqa: T201 - as Python does
        return exit_code(error)
    with contextlib.suppress(BaseException):
        sys.excepthook(type(error), error, error.__traceback__)
    return 1


# Exit callbacks


def run_exit_callbacks(limit_s: float) -> None:
    """Flush error trackers, run exit callbacks and write open files; end the process after *limit_s*.

    Trackers come first, for a callback may hang, and once more, for a callback may have reported something.
    """
    limit = threading.Timer(limit_s, os._exit, args=(0,))
    limit.daemon = True
    limit.start()
    with contextlib.suppress(OSError):  # the timer needs the interpreter's lock, which C code may never give back
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(limit_s + STUCK_EXIT_S, exit=True, file=nowhere)
    for step in (reporting.flush, atexit._run_exitfuncs, reporting.flush):  # noqa: SLF001 - os._exit skips them, and bodies rely on them
        with contextlib.suppress(BaseException):
            step()
    write(quietly=True)


# Timers


def stop_timers() -> None:
    """Stop the timers of a body that has ended: a late SIGALRM would end this process."""
    if hasattr(signal, "setitimer"):  # not on Windows
        for timer in _TIMERS:
            signal.setitimer(getattr(signal, timer), 0)
    faulthandler.cancel_dump_traceback_later()


# Settings


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """The process-wide settings that the next body of this process should find."""

    folder: Path
    umask: int
    mask: frozenset[int]
    handlers: dict[int, Any]
    environment: dict[str, str]
    path: list[str]
    argv: list[str]
    filters: list[Any]
    locale: str
    socket_timeout_s: float | None
    collects: bool
    recursion_limit: int
    tracers: tuple[Any, Any]
    limits: list[tuple[int, int]]
    nice: int
    cpus: set[int]
    decimal: Any

    @classmethod
    def now(cls) -> Surroundings:
        """Return the present settings."""
        return cls(
            folder=Path.cwd(),
            umask=_umask(),
            mask=frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            handlers=_handlers(),
            environment=variables(),
            path=list(sys.path),
            argv=list(sys.argv),
            filters=list(warnings.filters),
            locale=locale.setlocale(locale.LC_ALL),
            socket_timeout_s=socket.getdefaulttimeout(),
            collects=gc.isenabled(),
            recursion_limit=sys.getrecursionlimit(),
            tracers=(sys.gettrace(), sys.getprofile()),
            limits=_limits(),
            nice=os.nice(0),
            cpus=os.sched_getaffinity(0),
            decimal=decimal.getcontext().copy() if (decimal := _decimal()) else None,
        )

    def restore(self) -> bool:
        """Restore the settings; return whether that was possible, so that another body can run here.

        Takes about 100 microseconds. Resource limits, the nice value and the allowed processors are compared
        only: a process without privileges can lower, but not always raise them.
        """
        if (_limits(), os.nice(0), os.sched_getaffinity(0)) != (self.limits, self.nice, self.cpus):
            return False
        if signal.sigpending():  # a signal that the body has blocked would end this process once it is let through
            return False
        try:
            os.chdir(self.folder)
            os.umask(self.umask)
            self._restore_signals()
            restore_environment(self.environment)
            self._restore_interpreter()
        except (OSError, ValueError, RecursionError, locale.Error):
            return False
        return True

    def _restore_signals(self) -> None:
        for number, handler in _handlers().items():
            if handler != self.handlers[number] and self.handlers[number] is not None:
                signal.signal(number, self.handlers[number])
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def _restore_interpreter(self) -> None:
        sys.path[:], sys.argv[:] = self.path, self.argv
        if warnings.filters != self.filters:
            warnings.resetwarnings()
            warnings.filters[:] = self.filters  # type: ignore[index]
        if locale.setlocale(locale.LC_ALL) != self.locale:
            locale.setlocale(locale.LC_ALL, self.locale)
        socket.setdefaulttimeout(self.socket_timeout_s)
        (gc.enable if self.collects else gc.disable)()
        sys.setrecursionlimit(self.recursion_limit)
        if (sys.gettrace(), sys.getprofile()) != self.tracers:
            sys.settrace(self.tracers[0])
            sys.setprofile(self.tracers[1])
        if (decimal := _decimal()) is not None:
            decimal.setcontext((self.decimal or decimal.DefaultContext).copy())


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _limits() -> list[tuple[int, int]]:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return [resource.getrlimit(getattr(resource, name)) for name in names]


def _decimal() -> ModuleType | None:
    return sys.modules.get("decimal")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
