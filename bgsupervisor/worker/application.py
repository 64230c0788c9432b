"""Loading the application: environment, path, `setup` and the task modules; forks nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import sys
import threading
import traceback
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from bgsupervisor import registry, tasks
from bgsupervisor.addresses import is_postgres, sqlite_path
from bgsupervisor.config import apply_env_file
from bgsupervisor.ipc.messages import LoadFailure
from bgsupervisor.system import descriptors
from bgsupervisor.worker import inherited, shared_connections
from bgsupervisor.worker.inherited import Dispositions
from bgsupervisor.worker.outcome import storable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bgsupervisor.config import Config
    from bgsupervisor.ipc import messages

__all__ = ["Loaded", "import_what_children_need", "load_application"]

log = logging.getLogger("bgsupervisor")

SIGNAL_TAKEN = "importing the application set what {} does, {}; it has been set back. Set it in `child_setup`"


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """The result of loading the application.

    Attributes:
        failures: Modules and tasks that failed to load, and why.
        warnings: Sentences about parts that do not work as they seem to.
        dangers: The warnings about data that may be lost.
        handlers: Signal handlers that the application set, by number.
    """

    failures: list[LoadFailure]
    warnings: list[str]
    dangers: list[str]
    handlers: dict[int, Any] = dataclasses.field(default_factory=dict)

    def catalogue(self) -> dict[str, messages.TaskOptions]:
        """Return the options of each task that can run, by name.

        A task whose signature failed stays REQUEST, and so does one of a module that raised after defining it.
        """
        failed = {failure.module for failure in self.failures}
        known = registry.definitions().items()
        return {name: one.options for name, one in known if name not in failed and one.module in sys.modules}


def load_application(config: Config) -> Loaded:
    """Import the application as its bodies will see it: environment, path, folder, `setup`, then the task modules.

    The other modules load even if one fails.
    """
    apply_env_file(config)
    for folder in reversed((str(config.base_dir), *config.python_path)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    os.chdir(config.base_dir)
    imports = shared_connections.Imports(None if is_postgres(config.database) else sqlite_path(config.database))
    before = Dispositions.now()
    with _outliving_the_import():
        failures, without_tasks = _load(config, imports)
    shared_connections.close_reopening()
    handlers = Dispositions.now().changed_since(before)
    remarks = [*without_tasks, *tasks.remarks()]
    if config.start_method == "spawn":  # then children inherit nothing
        return Loaded(failures, [*remarks, *_give_up_taken_streams()], [], handlers)
    found = [*_warnings(), *_taken(handlers), *remarks, *imports.warnings(supervised=False), *_give_up_taken_streams()]
    return Loaded(failures, found, imports.warnings(supervised=True), handlers)


def _load(config: Config, imports: shared_connections.Imports) -> tuple[list[LoadFailure], list[str]]:
    """Return what failed to load, and sentences about modules without tasks."""
    if config.setup:
        failure = _try_load(config.setup, lambda: call_by_path(str(config.setup)), kind="setup")
        imports.attribute(config.setup)
        if failure is not None:
            return [failure], []
    failures: list[LoadFailure] = []
    without_tasks = []
    for module in config.tasks:
        known = len(registry.definitions())
        failure = _try_load(module, functools.partial(importlib.import_module, module))
        imports.attribute(module)
        if failure is not None:
            failures.append(failure)
        elif len(registry.definitions()) == known and not tasks.defines_tasks(module):
            without_tasks.append(f"the module {module} defines no task; correct `tasks`, or import its tasks in it")
    for definition in registry.definitions().values():
        failure = _try_load(definition.name, functools.partial(getattr, definition, "signature"), kind="task")
        if failure is not None:
            failures.append(failure)
    return failures, without_tasks


@contextlib.contextmanager
def _outliving_the_import() -> Iterator[None]:
    """Replace descriptors that the import of the application closes, as daemons do."""
    tracker = tracker_number()
    identity = None if tracker is None else descriptors.identity_of(tracker)
    yield
    descriptors.open_standard()
    if tracker is not None and tracker == tracker_number() and descriptors.identity_of(tracker) != identity:
        # multiprocessing would write to whatever has the number now.
        resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]  # noqa: SLF001
        resource_tracker._resource_tracker._pid = None  # type: ignore[attr-defined]  # noqa: SLF001
        resource_tracker.ensure_running()


def import_what_children_need() -> None:
    """Import all that a child needs after its body has begun: a deploy may have replaced the files by then."""
    modules = ["asyncio"] if any(_is_async(one) for one in registry.definitions().values()) else []
    ours = ("bgsupervisor.database.migrations", "bgsupervisor.service", "bgsupervisor.database.connection_limit")
    for module in ("psutil", "sqlite3", *ours, *modules):
        importlib.import_module(module)


def _try_load(name: str, load: Callable[[], object], *, kind: str = "module") -> LoadFailure | None:
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a module may raise anything, sys.exit included
        trace = storable("".join(traceback.format_exception(error)))
        lines = traceback.format_exception_only(error)
        detail = "".join(lines[-1:] if isinstance(error, SyntaxError) else lines)  # before it come file and line
        log.error("%s failed to load: %s", name, " ".join(detail.split()))  # noqa: TRY400 - the trace goes to `check`
        return LoadFailure(name, trace[-8000:], kind)
    return None


def _give_up_taken_streams() -> list[str]:
    """Print nothing into files that the application opened in place of stdout and stderr; return warnings."""
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


def tracker_number() -> int | None:
    return getattr(resource_tracker._resource_tracker, "_fd", None)  # noqa: SLF001


def _is_async(definition: registry.Definition) -> bool:
    return inspect.iscoroutinefunction(definition.function)


def call_by_path(path: str) -> object:
    """Import and call a "module:callable" of the configuration."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in (name or "setup").split("."):
        found = getattr(found, part)
    return found()
