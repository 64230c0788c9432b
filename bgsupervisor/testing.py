"""A pytest plugin for applications: in a test every task is recorded, or run here, and no supervisor hears of it.

It is loaded wherever bgsupervisor is installed. Every `Service` of a test works on a fresh database of that test,
whatever it was made with; the fixture `bgsupervisor` is the `TaskBox` that shows what was requested and runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import socket
import tempfile
import threading
import weakref
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import peewee
import pytest

from bgsupervisor import __version__, payload, service, tasks
from bgsupervisor.bodies import Progress, end_of
from bgsupervisor.clock import SystemClock
from bgsupervisor.config import MIB, Config, load
from bgsupervisor.errors import AccessError, Cancelled, ConfigError, UnsupportedSystem
from bgsupervisor.ledger import Attempt, Batch, Claim, Ledger, Note
from bgsupervisor.models import Store, SupervisorRecord
from bgsupervisor.names import Catalogue, Known
from bgsupervisor.processes import ProcessIdentity, host_id, own_identity
from bgsupervisor.statuses import Status
from bgsupervisor.wire import End

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Generator, Iterator, Mapping, Sequence
    from datetime import datetime

    from bgsupervisor.ledger import Due, Request
    from bgsupervisor.models import TaskRecord
    from bgsupervisor.service import Backing, Key, Origin, TaskLike

__all__ = ["FakeClock", "TaskBox"]

log = logging.getLogger("bgsupervisor")

ISOLATION = "bgsupervisor_isolation"
"""The name of the ini option and of the marker."""
RUNS_MAX = 1000
"""`run_pending` without a limit gives up after so many tasks: one of them requests the next for ever."""
DEPTH_MAX = 50
"""So deep may tasks that run inline request each other."""
LISTED_MAX = 20
"""A failed assertion lists so many of the requested tasks, the newest."""
BUSY_TIMEOUT_S = 5.0
"""How long a thread of the test waits for another one that writes."""
PROBE = "bgsupervisor_requested"


class FakeClock:
    """The time of Services under test: the machine's, plus all that the test has advanced it by.

    Only bgsupervisor looks at it. It goes on by itself, so that a `run_at` of now is due now.
    """

    def __init__(self) -> None:
        self._system = SystemClock()
        self._ahead_s = 0.0

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return self._system.now() + timedelta(seconds=self._ahead_s)

    def monotonic(self) -> float:
        """Return seconds that only grow."""
        return self._system.monotonic() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let *seconds*, at least 0, pass at once; tasks that become due wait for `run_pending`.

        Raises:
            ValueError: Time goes forward only.
        """
        if not seconds >= 0:
            raise ValueError(f"the clock cannot be advanced by {seconds!r} seconds; give 0 or more")
        self._ahead_s += seconds

    def sleep(self, seconds: float) -> None:
        """Advance by *seconds* instead of blocking: `Service.wait` gives up at once when nothing is to come."""
        self.advance(seconds)


class TaskBox:
    """What a test requests: shows it, runs it in this process, and moves its time.

    The fixture `bgsupervisor` is one. It holds the database of one test, made when the first task is requested and
    deleted after the test. Bodies run here go the way of those that a supervisor runs: data is decoded and checked by
    the body's signature, the result is encoded, and each transition is one of the ledger's. Not simulated are time
    and memory limits, signals, logs, slots, `setup` and `child_setup`.

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
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._opened: Store | None = None
        self._data_max_bytes = MIB
        self._modules: set[str] = set()
        self._backings: weakref.WeakKeyDictionary[Origin, Backing] = weakref.WeakKeyDictionary()
        self._running: list[_Context] = []
        self._held: list[Exception] = []
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
        names, key = {name, *Known(Catalogue(), ()).meant_by(name)}, service.key_text(key)
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
                block if it ran after a commit; None takes the box's.
        """
        before = self.mode, self.raise_errors
        self.mode = "inline"
        self.raise_errors = before[1] if raise_errors is None else raise_errors
        try:
            yield
            self._raise_held()
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
            application = origin.database if isinstance(origin.database, peewee.Database) else None
            backing = service.Backing(config, self._ledger(application), self.clock)
            self._backings[origin] = backing
            self._data_max_bytes = config.data_max_bytes
            self._modules.update(config.tasks)
        return backing

    def _ledger(self, application: peewee.Database | None = None) -> _BoxLedger:
        return _BoxLedger(self, self._store(), application)

    def _store(self) -> Store:
        with self._lock:
            self._check_not_ended()
            if self._opened is None:
                url = f"sqlite:///{self._path() / 'tasks.db'}"
                self._opened = Store.open(url, "bgsupervisor_", busy_timeout_s=BUSY_TIMEOUT_S, durable=False)
            return self._opened

    def _path(self) -> Path:
        with self._lock:
            self._check_not_ended()
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="bgsupervisor-", ignore_cleanup_errors=True)
            return Path(self._folder.name)

    def _check_not_ended(self) -> None:
        if self._ended:
            raise RuntimeError("the test that this TaskBox belongs to has ended; ask for the fixture again")

    def _close(self) -> None:
        with self._lock:
            self._ended = True
            if self._opened is not None:
                self._opened.close()
            if self._folder is not None:
                self._folder.cleanup()

    # What the ledger tells

    def _recorded(self, ids: Sequence[int], application: peewee.Database | None, *, new: bool) -> None:
        """Run what was just requested or planned again if tasks run inline, but not before the caller's commit."""
        if application is None or not application.in_transaction():
            self._run_inline(ids)
            return
        self._uncommitted.append(_Uncommitted(ids, application, self._committed, new=new))

    def _committed(self, uncommitted: _Uncommitted) -> None:
        self._settle()
        self._uncommitted = [one for one in self._uncommitted if one is not uncommitted]
        try:
            self._run_inline(uncommitted.ids)
        except Exception as error:  # noqa: BLE001 - Peewee would try to roll back what it has committed
            self._held.append(error)

    def _raise_held(self) -> None:
        held, self._held = self._held, []
        for error in held:
            raise error

    def _settle(self) -> None:
        """Bring the rows to what is known here: progress of running bodies, and rollbacks of the application."""
        notes = {context.token: note for context in self._running if (note := context.take_note())}
        if notes:
            self._ledger().apply(Batch(notes=notes))
        gone = [one for one in self._uncommitted if one.is_rolled_back()]
        ids = [id for one in gone if one.new for id in one.ids]
        if ids:
            self._ledger().forget(ids)
        self._uncommitted = [one for one in self._uncommitted if one not in gone]

    def _cancel_asked(self, record: TaskRecord) -> None:
        for context in self._running:
            if context.id == record.id and record.cancel_requested_at is not None:
                context.ask_to_end(record.cancel_requested_by)

    # Running, one by one

    def _run_inline(self, ids: Collection[int]) -> None:
        if self.mode != "inline" or not ids:
            return
        if len(self._running) >= DEPTH_MAX:
            raise AssertionError(f"tasks that run inline request each other more than {DEPTH_MAX} deep")
        self._load_missing()
        for due in self._due(limit=self._ledger().counts()[Status.REQUEST]):
            if due.id in ids:
                self._run(due, raise_errors=None)

    def _due(self, *, limit: int) -> list[Due]:
        self._settle()
        return self._ledger().due(tasks.definitions(), limit=limit)

    def _load_missing(self) -> None:
        """Import the configured task modules when a waiting task is not loaded, as a nursery has done."""
        waiting = {record.name for record in self._ledger().find(statuses=[Status.REQUEST])}
        if waiting <= set(tasks.definitions()):
            return
        while self._modules:
            module = self._modules.pop()
            try:
                importlib.import_module(module)
            except ImportError as error:
                log.warning("the configured task module %s cannot be imported: %s", module, error)
        missing = waiting - set(tasks.definitions())
        if missing:
            log.warning("not loaded in this test, so not run: %s", ", ".join(sorted(missing)))

    def _run(self, due: Due, *, raise_errors: bool | None) -> None:
        ledger = self._ledger()
        with self._lock:
            taken = {context.slot for context in self._running}
            slot = next(number for number in range(len(taken) + 1) if number not in taken)
            claim = Claim(due, _identity(), slot, self.clock.monotonic())
            context = _Context(claim)
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

    def _perform(self, due: Due, context: _Context) -> tuple[End, BaseException | None]:
        definition = tasks.definitions()[due.name]
        try:
            data = payload.decode_data(due.data, definition.signature, name=due.name, secret=definition.options.secret)
            body = definition.body()
            with tasks.entered(context):
                value = body(**data)
                if inspect.iscoroutine(value):
                    value = _awaited(value)
            return End(result=payload.encode_result(value, limit_bytes=self._data_max_bytes)), None
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is its end
            return end_of(error, how="the body ended when it was asked"), error

    def _is_raised(self, error: BaseException, *, raise_errors: bool | None) -> bool:
        """Whether the test gets what the body raised: if it wants to, or if it was meant for the test run."""
        if isinstance(error, Cancelled):
            return False
        if not isinstance(error, (Exception, SystemExit)):
            return True  # KeyboardInterrupt, pytest.fail, pytest.skip
        return self.raise_errors if raise_errors is None else raise_errors


class _BoxLedger(Ledger):
    """The ledger of a box, which hears of what is requested; a living supervisor seems to be there.

    Args:
        box: Whose rows.
        store: Its database.
        application: The application's own database, if the Service was made with one: the rows are not in it, but a
            request counts from the commit of its open transaction on, and not after a rollback.
    """

    def __init__(self, box: TaskBox, store: Store, application: peewee.Database | None) -> None:
        super().__init__(store, box.clock)
        self._box = box
        self._application = application

    def request_many(self, requests: Sequence[Request]) -> list[tuple[int, bool]]:
        """Record requests; see `Ledger.request_many`."""
        self._box._settle()  # noqa: SLF001 - a part of the box
        found = super().request_many(requests)
        self._box._recorded([id for id, created in found if created], self._application, new=True)  # noqa: SLF001
        return found

    def forget(self, ids: Sequence[int]) -> None:
        """Delete requests that were rolled back where the application made them."""
        with self.store.writing():
            self._task.delete().where(self._task.id.in_(ids)).execute()

    def cancel(self, id: int, *, by: str | None, keys: list[str] | None = None) -> TaskRecord:
        """End a waiting task, ask a running one to end; see `Ledger.cancel`."""
        record = super().cancel(id, by=by, keys=keys)
        self._box._cancel_asked(record)  # noqa: SLF001
        return record

    def retry(self, id: int) -> TaskRecord:
        """Plan an interrupted task again; see `Ledger.retry`."""
        record = super().retry(id)
        self._box._recorded([id], self._application, new=False)  # noqa: SLF001
        return self.get(id) or record

    def get(self, id: int) -> TaskRecord | None:
        """Return a task; see `Ledger.get`."""
        self._box._settle()  # noqa: SLF001
        return super().get(id)

    def find(
        self,
        *,
        names: Collection[str] | None = None,
        key: str | None = None,
        statuses: Collection[Status] | None = None,
        limit: int | None = None,
    ) -> list[TaskRecord]:
        """Return tasks, newest first; see `Ledger.find`."""
        self._box._settle()  # noqa: SLF001
        return super().find(names=names, key=key, statuses=statuses, limit=limit)

    def status(self, id: int) -> Status | None:
        """Return a task's status; see `Ledger.status`."""
        self._box._settle()  # noqa: SLF001
        return super().status(id)

    def counts(self, name: str | None = None) -> dict[Status, int]:
        """Return how many tasks have each status; see `Ledger.counts`."""
        self._box._settle()  # noqa: SLF001
        return super().counts(name)

    def supervisors(self) -> list[SupervisorRecord]:
        """Return one that was seen just now, so that nothing warns of its absence; it vouches for no task."""
        who, now = _identity(), self._box.clock.now()
        return [
            SupervisorRecord(
                host=who.host,
                boot_id=who.boot_id,
                pid_ns=who.pid_ns,
                pid=who.pid,
                start_ticks=who.start_ticks,
                started_at=now,
                heartbeat_at=now,
                slots=16,
                version=__version__,
                catalogue="{}",
                code_error=None,
            )
        ]


class _Context(tasks.Context):
    """What a body that runs in a test can ask and tell."""

    def __init__(self, claim: Claim) -> None:
        self.token: Attempt = claim.attempt
        self.id = claim.due.id
        self.attempt = self.token.attempt
        self.key = claim.due.key
        self.slot = claim.slot
        self.last = self._noted = Progress()
        self._asked: Cancelled | None = None

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody has cancelled the task since it began."""
        return self._asked is not None

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the body is; see `Context.progress`."""
        self.last = self.last.then(done, total, message)
        if self._asked is not None:
            raise self._asked

    def ask_to_end(self, by: str | None) -> None:
        """Have the next progress raise."""
        self._asked = Cancelled("CANCELLED", by)

    def take_note(self) -> Note | None:
        """Return the progress that is not in the row yet."""
        if self.last == self._noted:
            return None
        self._noted = self.last
        done, total, message = self.last
        return Note(progress_done=done, progress_total=total, message=message)


class _Uncommitted:
    """What was requested inside a transaction of the application's database.

    That database holds the only reference to the callback until the commit, and a rollback drops it uncalled. The
    rollback of a savepoint drops nothing, but takes back the row of a temporary table that only this connection sees.
    """

    def __init__(
        self,
        ids: Sequence[int],
        database: peewee.Database,
        committed: Callable[[_Uncommitted], None],
        *,
        new: bool,
    ) -> None:
        self.ids = tuple(ids)
        self.new = new
        self.database = database
        self.thread = threading.get_ident()
        self._mark = os.urandom(8).hex()
        database.execute_sql(f"CREATE TEMP TABLE IF NOT EXISTS {PROBE} (mark TEXT)")
        database.execute_sql(f"INSERT INTO temp.{PROBE} VALUES (?)", (self._mark,))  # noqa: S608 - a constant
        heard = functools.partial(committed, self)
        self._heard = weakref.ref(heard)
        database.after_commit(heard)

    def is_rolled_back(self) -> bool:
        """Whether its transaction or savepoint was rolled back."""
        if self.thread != threading.get_ident() or self.database.is_closed():
            return self._heard() is None
        try:
            query = f"SELECT 1 FROM temp.{PROBE} WHERE mark = ?"  # noqa: S608 - a constant
            return self.database.execute_sql(query, (self._mark,)).fetchone() is None
        except peewee.OperationalError:  # the table itself was made within it
            return True


def _awaited(coroutine: Coroutine[Any, Any, object]) -> object:
    """Run a coroutine in a loop of its own; beside the loop of an asynchronous test that waits for it."""
    import asyncio  # noqa: PLC0415 - 30 ms that only such a body pays
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - the same

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _identity() -> ProcessIdentity:
    """Return who this process is; where no process table says so a stand-in that names its PID."""
    try:
        return own_identity(host_id(None))
    except (UnsupportedSystem, OSError):
        return ProcessIdentity(socket.gethostname(), "unknown", 0, os.getpid(), 0)


_configs: weakref.WeakKeyDictionary[Origin, Config] = weakref.WeakKeyDictionary()


def _config_of(origin: Origin) -> Config:
    """Return what a Service is configured with, but for places; the defaults where there is no configuration."""
    config = _configs.get(origin)
    if config is None:
        try:
            config = load(origin.config, database="sqlite:///tasks.db")
        except (ConfigError, AccessError) as error:
            log.warning("%s; tests go on with the defaults", error)
            config = Config(base_dir=Path())
        _configs[origin] = config
    return config


def _shown_data(name: str, text: str) -> str:
    definition = tasks.definition_of(name)
    value = payload.decode_value(text)
    secret = () if definition is None else definition.options.secret
    return msgspec.json.encode(payload.mask(value, secret) if isinstance(value, dict) else value).decode()


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


# What pytest calls


@contextlib.contextmanager
def _redirected(box: TaskBox | None) -> Iterator[None]:
    before = service.redirect
    service.redirect = None if box is None else box._backing  # noqa: SLF001 - the box is ours
    try:
        yield
    finally:
        service.redirect = before


@contextlib.contextmanager
def _in_use(box: TaskBox) -> Iterator[TaskBox]:
    try:
        with _redirected(box):
            yield box
            box._raise_held()  # noqa: SLF001 - the box is ours
    finally:
        box._close()  # noqa: SLF001 - the box is ours


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini option."""
    sentence = (
        "on: every test has its own bgsupervisor database, and no supervisor hears of it (default); off: none has"
    )
    parser.addini(ISOLATION, sentence, type="bool", default=True)


def pytest_configure(config: pytest.Config) -> None:
    """Isolate what happens outside tests too: imports, fixtures of modules and sessions."""
    config.addinivalue_line(
        "markers", f'{ISOLATION}(state): "on" or "off", for this test, whatever the ini option says'
    )
    if config.getini(ISOLATION):
        outside = contextlib.ExitStack()
        outside.enter_context(_in_use(TaskBox()))
        config.add_cleanup(outside.close)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked "off" reach the real database, with all of its fixtures."""
    marker = item.get_closest_marker(ISOLATION)
    if marker is None or marker.args != ("off",):
        return (yield)
    with _redirected(None):
        return (yield)


@pytest.fixture(autouse=True)
def _bgsupervisor_isolation(request: pytest.FixtureRequest) -> None:
    """Have every test isolated, unless the ini option or a marker says otherwise."""
    marker = request.node.get_closest_marker(ISOLATION)
    if marker is not None and marker.args not in (("on",), ("off",)):
        pytest.fail(f'the marker {ISOLATION} takes "on" or "off"; it was given {marker.args!r}')
    if marker.args == ("on",) if marker else request.config.getini(ISOLATION):
        request.getfixturevalue("bgsupervisor")


@pytest.fixture
def bgsupervisor() -> Iterator[TaskBox]:
    """The tasks of this test; a test that asks for it is isolated in any case."""
    with _in_use(TaskBox()) as box:
        yield box
