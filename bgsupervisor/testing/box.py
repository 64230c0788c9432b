"""The tasks of one test, in a database of its own: what was requested, and running it in the test's process.

Knows no test framework, and not when a test begins or ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import tempfile
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import peewee

from bgsupervisor import arguments, backings, mismatch, payload, registry, task_context, tasks
from bgsupervisor.catalogue import Catalogue, Known
from bgsupervisor.config import Config, load
from bgsupervisor.database.store import Store
from bgsupervisor.errors import AccessError, Cancelled, ConfigError
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger.attempts import Batch, Claim
from bgsupervisor.ledger.external import recognised
from bgsupervisor.options import MIB
from bgsupervisor.statuses import Status
from bgsupervisor.testing.bodies import BoxContext, identity, run_coroutine
from bgsupervisor.testing.clock import FakeClock
from bgsupervisor.testing.commits import Mark, Outcome, mark, outcomes
from bgsupervisor.testing.folders import remove, run_folder
from bgsupervisor.testing.rows import BoxLedger
from bgsupervisor.worker.outcome import result_of_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from bgsupervisor.backings import Backing, Origin
    from bgsupervisor.ledger import Ledger
    from bgsupervisor.ledger.attempts import DueTask
    from bgsupervisor.ledger.external import ExternalConnection
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Key, TaskLike

__all__ = ["FakeClock", "TaskBox"]

log = logging.getLogger("bgsupervisor")

RUNS_MAX = 1000
"""Limit of the tasks of `run_pending` without a limit: they may request each other for ever."""
INLINE_DEPTH_MAX = 50
"""Limit of the depth in which tasks that run inline request each other."""
LISTED_MAX = 20
"""Limit of the requested tasks that a failed assertion lists, the newest."""
WRITER_WAIT_S = 5.0
"""Limit of the wait of one thread of the test for another that writes, in seconds."""


class TaskBox:
    """The requests of a test: list them, run them in this process, and advance their time.

    pytest's fixture `bgsupervisor` is one, and `self.bgsupervisor` of a `TaskBoxTestCase`. It holds the database of
    one test, made when the first task is requested and deleted after the test. Bodies run here go the way of those
    that a supervisor runs: data is decoded and checked by the body's signature, the result is encoded, and each
    transition is one of the ledger's. Not simulated are time and memory limits, signals, logs, slots, `setup` and
    `child_setup`.

    Attributes:
        clock: The time of all Services of the test.
        mode: "record" leaves what is requested to `run_pending`. "inline" runs a task that is due while it is
            requested, before `request` returns, or after the commit where the request is part of an application's
            transaction; what is due later waits for `run_pending`.
        raise_errors: Whether an exception of a body that runs here is raised in the test as well; the row holds it in
            any case.
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.mode: Literal["record", "inline"] = "record"
        self.raise_errors = False
        self._lock = threading.RLock()
        self._ended = False
        self._folder: tuple[Path, int] | None = None
        self._opened: Store | None = None
        self._data_max_bytes = MIB
        self._modules: set[str] = set()
        self._backings: weakref.WeakKeyDictionary[Origin, Backing] = weakref.WeakKeyDictionary()
        self._running: list[BoxContext] = []
        self._raised: list[Exception] = []
        self._uncommitted: list[_Uncommitted] = []

    # What was requested

    @property
    def requested(self) -> list[TaskRecord]:
        """All tasks that this test and the bodies run in it have requested, as they are now, the oldest first.

        What is part of a transaction that is still open is among them; what was rolled back is not.
        """
        return self._ledger().find()[::-1]

    def assert_requested(
        self,
        task: TaskLike,
        *,
        data: Mapping[str, object] | None = None,
        key: Key | None = None,
        times: int | None = None,
    ) -> list[TaskRecord]:
        """Fail unless a task was requested; return the records that match, the oldest first.

        Args:
            task: A Task class, a @task function, or its name.
            data: All of its data, compared as JSON; None is any.
            key: Its key; None is any.
            times: How often, 0 included; None is at least once.

        Raises:
            AssertionError: It was not; lists what was requested, without secrets.
        """
        __tracebackhide__ = True
        definition = tasks.definition_of(task)
        name = str(task) if definition is None else definition.name
        requested = self.requested
        names, key = {name, *Known(Catalogue(), ()).meant_by(name)}, arguments.key_text(key)
        found = [one for one in requested if one.name in names and (key is None or one.key == key)]
        wanted = name if key is None else f"{name} with key {key!r}"
        if data is not None:
            text = payload.encode_data(data, signature=None, limit_bytes=self._data_max_bytes, name=name)
            found = [one for one in found if payload.decode_value(one.data) == payload.decode_value(text)]
            wanted += f" with data {_shown_data(name, text)}"
        if len(found) == times or (times is None and found):
            return found
        often = "at least once" if times is None else f"{times} times"
        raise AssertionError(f"expected {wanted} {often}, not {len(found)} times; {_listed(requested)}")

    def assert_nothing_requested(self) -> None:
        """Fail if any task was requested.

        Raises:
            AssertionError: Lists what was requested, without secrets.
        """
        __tracebackhide__ = True
        requested = self.requested
        if requested:
            raise AssertionError(f"expected no task; {_listed(requested)}")

    # Running it

    def run_pending(self, *, limit: int | None = None, raise_errors: bool | None = None) -> list[TaskRecord]:
        """Run what is due, in this process, in the order of a supervisor, with all that becomes due by it.

        A task whose class is not loaded stays REQUEST, as it does with a supervisor; the configured task modules are
        imported to find it.

        Args:
            limit: Run at most so many and leave the others; None runs all.
            raise_errors: Whether to raise a body's exception, after its end was recorded, and leave the others;
                None takes the box's `raise_errors`.

        Returns:
            The records of the tasks that ran, as they ended, in that order.

        Raises:
            AssertionError: More than RUNS_MAX ran without a *limit*; a task seems to request itself.
        """
        ran: list[TaskRecord] = []
        self._load_missing()
        while (limit is None or len(ran) < limit) and (due := self._due(limit=1)):
            if len(ran) >= RUNS_MAX and limit is None:
                raise AssertionError(
                    f"{RUNS_MAX} tasks have run and {due[0].name} is due again; tasks seem to request each other "
                    "without end. Give a limit to run some of them"
                )
            self._run(due[0], raise_errors=raise_errors)
            ran += [record for record in [self._ledger().get(due[0].id)] if record is not None]
        return ran

    @contextlib.contextmanager
    def inline(self, *, raise_errors: bool | None = None) -> Iterator[None]:
        """Run tasks when they are requested, as `mode` "inline" does, within this block.

        Args:
            raise_errors: Whether a body's exception is raised by the `request` that ran it, or at the end of the
                block if it ran after a commit, several as an ExceptionGroup; None takes the box's.
        """
        before = self.mode, self.raise_errors
        self.mode = "inline"
        self.raise_errors = before[1] if raise_errors is None else raise_errors
        try:
            yield
            self._settle()
            self._raise_errors()
        finally:
            self.mode, self.raise_errors = before

    # What Services work with

    def _backing(self, origin: Origin) -> Backing:
        backing = self._backings.get(origin)
        if backing is None:
            found = _config_of(origin)
            folder = self._path()
            config = dataclasses.replace(
                found, database=f"sqlite:///{folder / 'tasks.db'}", state_dir=folder / ".bgsupervisor"
            )
            ledger = self._ledger(functools.partial(_joined, origin.database))
            backing = backings.Backing(config, ledger, self.clock, self._on)
            self._backings[origin] = backing
            self._data_max_bytes = config.data_max_bytes
            self._modules.update(config.tasks)
        return backing

    def _on(self, connection: object) -> Ledger:
        """Return the ledger for requests on a connection of the application: in the box, but of its transaction."""
        return self._ledger(functools.partial(recognised, connection))

    def _ledger(self, external: Callable[[], ExternalConnection | None] = lambda: None) -> BoxLedger:
        return BoxLedger(self, self._store(), external)

    def _store(self) -> Store:
        with self._lock:
            self._check_not_ended()
            if self._opened is None:
                url = f"sqlite:///{self._path() / 'tasks.db'}"
                self._opened = Store.open(url, "bgsupervisor_", busy_timeout_s=WRITER_WAIT_S, durable=False)
            return self._opened

    def _path(self) -> Path:
        with self._lock:
            self._check_not_ended()
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="box-", dir=run_folder())), os.getpid()
            return self._folder[0]

    def _check_not_ended(self) -> None:
        if self._ended:
            raise RuntimeError("the test that this TaskBox belongs to has ended; ask for the fixture again")

    def _close(self) -> None:
        with self._lock:
            self._ended = True
            if self._opened is not None:
                self._opened.close()
            if self._folder is not None:
                remove(*self._folder)

    # Events of the ledger

    def _recorded(self, ids: Sequence[int], external: ExternalConnection | None, *, new: bool) -> None:
        """Run what was just requested or planned again if tasks run inline, but not before the caller's commit."""
        if not ids:
            return
        try:
            trace = None if external is None else mark(external.raw, run_folder())
        except Exception:
            if new:
                self._ledger().forget(ids)
            raise
        if external is None or trace is None:
            self._run_inline(ids)
            return
        uncommitted = _Uncommitted(tuple(ids), trace, new)
        with self._lock:
            self._uncommitted.append(uncommitted)
        if external.after_commit is not None:
            external.after_commit(functools.partial(self._committed, uncommitted))

    def _committed(self, uncommitted: _Uncommitted) -> None:
        """Treat a transaction as committed, as the framework reports; in Django's TestCase it never is."""
        if self._ended:
            return
        self._settle()
        with self._lock:
            if uncommitted not in self._uncommitted:
                return
            self._uncommitted.remove(uncommitted)
        self._run_committed(uncommitted)

    def _run_committed(self, uncommitted: _Uncommitted) -> None:
        try:
            self._run_inline(uncommitted.ids)
        except Exception as error:  # noqa: BLE001 - Peewee would try to roll back what it has committed
            self._raised.append(error)

    def _raise_errors(self) -> None:
        raised, self._raised = self._raised, []
        if len(raised) > 1:
            raise ExceptionGroup(f"{len(raised)} tasks that ran after a commit raised", raised)
        if raised:
            raise raised[0]

    def _settle(self) -> None:
        """Bring the rows to what is known here: progress of running bodies, and rollbacks of the application."""
        telemetry = {context.token: note for context in self._running if (note := context.take_note())}
        if telemetry:
            self._ledger().apply(Batch(telemetry=telemetry))
        with self._lock:
            found = outcomes(one.mark for one in self._uncommitted)
            known = [(one, found[one.mark]) for one in self._uncommitted]
            lost = [id for one, outcome in known if outcome is Outcome.ROLLED_BACK and one.new for id in one.ids]
            if lost:
                self._ledger().forget(lost)
            self._uncommitted = [one for one, outcome in known if outcome is Outcome.OPEN]
        for one in [one for one, outcome in known if outcome is Outcome.COMMITTED]:
            self._run_committed(one)

    def _cancel_asked(self, record: TaskRecord) -> None:
        for context in self._running:
            if context.id == record.id and record.cancel_requested_at is not None:
                context.ask_to_end(record.cancel_requested_by)

    # Running, one by one

    def _run_inline(self, ids: Collection[int]) -> None:
        if self.mode != "inline" or not ids:
            return
        if len(self._running) >= INLINE_DEPTH_MAX:
            raise AssertionError(f"tasks that run inline request each other more than {INLINE_DEPTH_MAX} deep")
        self._load_missing()
        for due in self._due(limit=self._ledger().counts()[Status.REQUEST]):
            if due.id in ids:
                self._run(due, raise_errors=None)

    def _due(self, *, limit: int) -> list[DueTask]:
        self._settle()
        return self._ledger().due(registry.definitions(), limit=limit)

    def _load_missing(self) -> None:
        """Import the configured task modules when a waiting task is not loaded, as a fork server has done."""
        waiting = {record.name for record in self._ledger().find(statuses=[Status.REQUEST])}
        if waiting <= set(registry.definitions()):
            return
        while self._modules:
            module = self._modules.pop()
            try:
                importlib.import_module(module)
            except ImportError as error:
                log.warning("the configured task module %s cannot be imported: %s", module, error)
        missing = waiting - set(registry.definitions())
        if missing:
            log.warning("not loaded in this test, so not run: %s", ", ".join(sorted(missing)))

    def _run(self, due: DueTask, *, raise_errors: bool | None) -> None:
        ledger = self._ledger()
        with self._lock:
            taken = {context.slot for context in self._running}
            slot = next(number for number in range(len(taken) + 1) if number not in taken)
            claim = Claim(due, identity(), slot, self.clock.monotonic())
            context = BoxContext(claim)
            self._running.append(context)
        try:
            if not ledger.apply(Batch(claims=[claim])).claimed:
                return
            end, error = self._perform(due, context)
            done, total, message = context.last
            ledger.end(
                claim.attempt,
                msgspec.structs.replace(end, progress_done=done, progress_total=total, message=message),
            )
        finally:
            self._running.remove(context)
        if error is not None and self._is_raised(error, raise_errors=raise_errors):
            raise error

    def _perform(self, due: DueTask, context: BoxContext) -> tuple[AttemptResult, BaseException | None]:
        definition = registry.definitions()[due.name]
        try:
            data = payload.decode_data(due.data, definition.signature, name=due.name, secret=definition.options.secret)
            body = definition.body()
            with task_context.entered(context):
                value = body(**data)
                if inspect.iscoroutine(value):
                    value = run_coroutine(value)
            return AttemptResult(result=payload.encode_result(value, limit_bytes=self._data_max_bytes)), None
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is its end
            return result_of_exception(error, how="the body ended when it was asked"), error

    def _is_raised(self, error: BaseException, *, raise_errors: bool | None) -> bool:
        """Return whether the test gets the exception of a body: on request, or if it concerns the test run."""
        if isinstance(error, Cancelled):
            return False
        if not isinstance(error, (Exception, SystemExit)):
            return True  # KeyboardInterrupt, pytest.fail, pytest.skip
        return self.raise_errors if raise_errors is None else raise_errors


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Uncommitted:
    """Tasks that were requested, or planned again, in a transaction of the application that may still be open."""

    ids: tuple[int, ...]
    mark: Mark
    new: bool


def _joined(database: object) -> ExternalConnection | None:
    """Return the open transaction of the Peewee database that a Service was made with, None if there is none."""
    if isinstance(database, peewee.Database) and database.in_transaction():
        return recognised(database)
    return None


_configs: weakref.WeakKeyDictionary[Origin, Config] = weakref.WeakKeyDictionary()


def _config_of(origin: Origin) -> Config:
    """Return what a Service is configured with, but for places; the defaults where there is no configuration."""
    config = _configs.get(origin)
    if config is None:
        try:
            config = load(origin.config, database="sqlite:///tasks.db", any_owner=True)
        except (ConfigError, AccessError) as error:
            log.warning("%s; tests go on with the defaults", error)
            config = Config(base_dir=Path())
        _configs[origin] = config
    return config


def _shown_data(name: str, text: str) -> str:
    definition = tasks.definition_of(name)
    value = payload.decode_value(text)
    secret = () if definition is None else definition.options.secret
    return msgspec.json.encode(mismatch.mask(value, secret) if isinstance(value, dict) else value).decode()


def _listed(requested: Sequence[TaskRecord]) -> str:
    if not requested:
        return "nothing was requested"
    lines = [f"requested were {len(requested)}:"]
    if len(requested) > LISTED_MAX:
        lines.append(f"  ... {len(requested) - LISTED_MAX} older ones ...")
    for one in requested[-LISTED_MAX:]:
        key = "" if one.key is None else f" key={one.key!r}"
        reason = "" if one.reason is None else f" {one.reason}: {one.detail}"
        lines.append(f"  {one.id}. {one.name} {_shown_data(one.name, one.data)}{key} {one.status}{reason}")
    return "\n".join(lines)
