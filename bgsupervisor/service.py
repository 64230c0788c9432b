"""The calls of a web application: request tasks, ask for their status, wait, cancel, suspend, retry.

A Service opens nothing before its first call, may be shared by threads, and opens anew after a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from bgsupervisor import payload, registry, tasks
from bgsupervisor.arguments import (
    KEY_CHARS,
    RequestOptions,
    after_ids,
    check_bytes,
    checked_text,
    is_storable,
    key_text,
    limit_of,
    status_of,
    task_id,
)
from bgsupervisor.backings import Backing, Origin, isolated
from bgsupervisor.catalogue import SUPERVISOR_SILENT_S, Catalogue, Known, listed
from bgsupervisor.errors import (
    BgSupervisorError,
    Interrupted,
    NoStack,
    NotEnded,
    RequestRefused,
    TaskNotConfigured,
    UnknownTask,
    UnknownTaskName,
    WaitTimeout,
)
from bgsupervisor.ipc.sockets import send_datagram
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.requests import Request
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.task_context import Handle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from uuid import UUID

    import peewee

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.database.store import Store
    from bgsupervisor.ledger import Ledger
    from bgsupervisor.ledger.external import ExternalConnections
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.system.processes import ProcessHandle

    TaskLike = type[tasks.Task] | tasks.FunctionTask[..., Any] | str
    Key = str | int | UUID

__all__ = ["Service"]

log = logging.getLogger("bgsupervisor")

NOTIFY_KEYS = 100
"""Limit of the tasks that one wake-up names; waiters for the others poll within seconds."""
REACH_MODULES = 5000
"""Limit of the modules searched for a class; beyond it the class counts as loadable."""
WAIT_POLLS_S = (0.005, 0.01, 0.02, 0.05)
"""Intervals between the polls of `wait`, in seconds; the last one repeats."""
UNSUPERVISED_WARN_S = 180.0
"""Silence of all supervisors after which `request` warns, in seconds; cron would have started one by then."""
UNSUPERVISED_CHECK_S = 60.0
"""Least interval between two such checks and warnings, in seconds."""
CATALOGUE_AGE_S = 60.0
"""Age at which the catalogue of the supervisors is read again, in seconds."""
CATALOGUE_AGE_MISSED_S = 1.0
"""The same where it lacks a name: a supervisor may have loaded new code since."""
NAME_WARN_S = 60.0
"""Least interval between two warnings of one unknown name, in seconds."""
NAMES_WARNED_MAX = 1000
"""Limit of the names whose last warning is remembered."""


class Service:
    """Request tasks, and ask for those that were requested.

    Args:
        database: A URL as in the configuration, or a Peewee database of the application, whose open transaction a
            request then joins; None takes the configured one.
        config: The configuration file; None finds it as the command line does.
        unknown_names: What a request by a name means that no supervisor and no loaded module has: "warn" records it
            and logs a warning, "refuse" raises UnknownTaskName, "accept" records it silently. None takes the
            configured `unknown_names`.

    Raises:
        ConfigError: No configuration and no database, or a wrong value.

    Every method raises DatabaseError or AccessError if the database cannot be used, after at most busy_timeout_s.
    """

    def __init__(
        self,
        database: str | peewee.Database | None = None,
        *,
        config: str | Path | None = None,
        clock: Clock | None = None,
        unknown_names: Literal["warn", "refuse", "accept"] | None = None,
    ) -> None:
        self._origin = Origin(database, config, clock)
        self._own: Backing | None = None
        self._external_connections: ExternalConnections | None = None
        self._parent_id: int | None = None
        _ = self._backing  # raises here if the configuration is missing or wrong
        self._loadable: set[str] = set()
        self._unsupervised_check_at = 0.0
        self._unknown_names = unknown_names
        self._catalogue_read = (-math.inf, Catalogue())  # replaced as a whole, since threads share it
        self._names_warned: dict[str, float] = {}

    @classmethod
    def of_task(cls, config: Config, parent_id: int | None) -> Service:
        """Make the service of a running body: all it requests has that task as its parent."""
        service = cls(config.database, config=config.path)
        service._parent_id = parent_id
        service._store.limit_connections(config.state_dir)
        return service

    # Requests

    def request(
        self,
        task: TaskLike,
        data: Mapping[str, object] | None = None,
        *,
        run_at: datetime | None = None,
        delay_s: float | None = None,
        priority: int = 0,
        key: Key | None = None,
        unique: Key | bool | None = None,
        after: Sequence[Handle | int] | Handle | int | None = (),
        after_any_end: bool = False,
        connection: object | None = None,
    ) -> Handle:
        """Record a task and wake the supervisor; the task runs after this call has returned and its commit is durable.

        Args:
            task: A Task class, a @task function, or its name; what follows the colon is enough where it means one task.
            data: The body's keyword arguments; whatever msgspec can write as JSON.
            run_at: Not before this moment; an aware datetime.
            delay_s: Not before so many seconds from now, at least 0; instead of *run_at*.
            priority: Larger is sooner.
            key: The caller's own name for it (an invoice number, a user's id); any number of tasks may share one. A
                number or UUID is kept as its text.
            unique: A key that only one live task of this class may hold: one of its own, or True for *key*, or for
                the class if there is no key. The second request gets the first's handle, with created=False.
            after: A task, or several, that must be DONE before this one starts. If one of them is interrupted, this
                one becomes INTERRUPTED / DEPENDENCY, which names it.
            after_any_end: Start after they have ended, however.
            connection: Of the application, to the same database: the request becomes part of the transaction that is
                open there, or opens one as the application's own statements do; if the connection commits each of
                those by itself, it is one by itself. A Peewee database, Django's connection, an SQLAlchemy Session or
                Connection, or a connection of sqlite3, psycopg or psycopg2. Waiting for locks is limited by what is
                set there. With *after* no other process can end a task until that transaction ends: keep it short.

        Raises:
            DataInvalid: The data does not fit the body, or is not JSON; says which field.
            DataTooLarge: More than data_max_bytes.
            TaskNotConfigured: No supervisor could load this class.
            UnknownTaskName: No supervisor and no loaded module has a task of this name, where `unknown_names` says
                "refuse"; else that is a warning in the log.
            UnknownTask: A task in *after* does not exist.
            RequestRefused: An argument that cannot be, such as a run_at without time zone, or a *connection* to another
                database.
            LockedByCaller: A transaction of this very thread keeps the SQLite file locked, and was not given as
                *connection*.

        Blocks for one durable commit. Inside an open transaction of *connection*, or of a shared Peewee database, it is
        part of that transaction, and the supervisor is woken after its commit.
        """
        options = RequestOptions(
            run_at=run_at,
            delay_s=delay_s,
            priority=priority,
            key=key,
            unique=unique,
            after=after_ids(after),
            after_any_end=after_any_end,
        )
        return self._record(task, [data], options, connection)[0]

    def request_many(
        self,
        task: TaskLike,
        datas: Iterable[Mapping[str, object] | None],
        *,
        run_at: datetime | None = None,
        delay_s: float | None = None,
        priority: int = 0,
        key: Key | None = None,
        connection: object | None = None,
    ) -> list[Handle]:
        """Record one task per data in one transaction, all or none; as `request`, but without `unique` and `after`."""
        options = RequestOptions(run_at=run_at, delay_s=delay_s, priority=priority, key=key)
        return self._record(task, list(datas), options, connection)

    def _record(
        self,
        task: TaskLike,
        datas: Sequence[Mapping[str, object] | None],
        options: RequestOptions,
        connection: object | None,
    ) -> list[Handle]:
        name, definition = self._resolve(task)
        if definition is not None and not isinstance(task, str):
            self._check_loadable(definition)
        run_at = options.when(self._clock)
        requests = None if definition is None else self._requests(name, definition, datas, options, run_at)
        if not datas:
            return []
        with self._ledger_on(connection) as ledger:
            if requests is None:
                requests = self._requests(*self._found(name, ledger), datas, options, run_at)
            found = ledger.request_many(requests)
            with contextlib.suppress(BgSupervisorError):  # the tasks are recorded, whatever becomes of this check
                self._warn_if_unsupervised(ledger)
        return [Handle(id, created) for id, created in found]

    def _requests(
        self,
        name: str,
        definition: registry.Definition | None,
        datas: Sequence[Mapping[str, object] | None],
        options: RequestOptions,
        run_at: datetime | None,
    ) -> list[Request]:
        """Return one request per data, all checked and encoded."""
        key, unique_key = options.checked_key(), options.unique_key()
        if self._store.locks_rows:
            check_bytes(name, key, unique_key)
        return [
            Request(
                name=name,
                data=payload.encode_data(
                    data,
                    signature=None if definition is None else definition.signature,
                    limit_bytes=self._config.data_max_bytes,
                    name=name,
                    secret=() if definition is None else definition.options.secret,
                ),
                run_at=run_at,
                priority=options.checked_priority(),
                key=key,
                unique_key=unique_key,
                parent_id=self._parent_id,
                after=options.after,
                after_any_end=options.after_any_end,
            )
            for data in datas
        ]

    @contextlib.contextmanager
    def _ledger_on(self, connection: object | None) -> Iterator[Ledger]:
        """Give the ledger, on the application's connection if there is one; wake the supervisor after the commit."""
        backing = self._backing
        if connection is None:
            yield backing.ledger
            backing.ledger.store.database.after_commit(self._notify)
            return
        if backing.external is not None:
            yield backing.external(connection)
            return
        from bgsupervisor.ledger.external import ExternalConnections  # noqa: PLC0415 - only who lends a connection pays for it

        if self._external_connections is None:
            self._external_connections = ExternalConnections(self._store, self._config.table_prefix, self._clock)
        with self._external_connections.on(connection, self._notify) as ledger:
            yield ledger

    # Asking

    def status(self, task: TaskLike | Handle | int, *, key: Key | None = None) -> Status | None:
        """Return the status of the newest task of a class (and key), or of one task; None if there is none."""
        if not isinstance(task, str | type | tasks.FunctionTask):
            record = self._ledger.get(task_id(task))
        else:
            record = self._ledger.newest(self._name_of(task), key=key_text(key))
        return None if record is None else record.status

    def get(self, task: Handle | int, *, name: TaskLike | None = None, key: Key | None = None) -> TaskRecord | None:
        """Return a task as it is now, or None if it never existed or was pruned.

        Args:
            task: Which.
            name: It must be of this class, else None: for an id that came from a browser.
            key: It must have been requested with this key, else None: the check that it is this user's task.
        """
        record = self._ledger.get(task_id(task))
        if record is None or (name is not None and record.name != self._name_of(name)):
            return None
        if key is not None and record.key != key_text(key):
            return None
        if record.ended:
            return record
        waiting = record.status is Status.REQUEST
        return dataclasses.replace(
            record,
            position=self._ledger.position(record) if waiting else None,
            no_supervisor_since=self._no_supervisor_since(record),
        )

    def list(
        self,
        *,
        name: TaskLike | None = None,
        key: Key | None = None,
        status: Status | str | None = None,
        limit: int | None = 100,
    ) -> list[TaskRecord]:
        """Return the tasks that match all that is given, newest first, at most *limit* (None is no limit)."""
        return self._ledger.find(
            names=None if name is None else [self._name_of(name)],
            key=key_text(key),
            statuses=None if status is None else [status_of(status)],
            limit=limit_of(limit),
        )

    def counts(self, task: TaskLike | None = None) -> dict[Status, int]:
        """Return how many tasks (of a class) have each status, zeros included."""
        return self._ledger.counts(None if task is None else self._name_of(task))

    def wait(self, task: Handle | int, *, timeout_s: float) -> TaskRecord:
        """Block until the task has ended, at most *timeout_s*, and return it.

        Raises:
            UnknownTask: There is no such task.
            WaitTimeout: It has not ended by then; it goes on.
        """
        id = task_id(task)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or math.isnan(timeout_s):
            raise RequestRefused(f"timeout_s is {timeout_s!r}; it must be a number of seconds")
        deadline = self._clock.monotonic() + timeout_s
        polls = 0
        while True:
            status = self._ledger.status(id)
            if status is None:
                raise UnknownTask(id)
            if status.ended:
                return self._known(task)
            left = deadline - self._clock.monotonic()
            if left <= 0:
                raise WaitTimeout(f"task {id} has not ended within {timeout_s:g} s; it is {status} and goes on")
            self._clock.sleep(min(left, WAIT_POLLS_S[min(polls, len(WAIT_POLLS_S) - 1)]))
            polls += 1

    def result(self, task: Handle | int) -> Any:  # noqa: ANN401 - whatever the body returned
        """Return what the body returned, as JSON gives it back; never waits.

        Raises:
            UnknownTask: There is no such task.
            NotEnded: It has not ended; `wait` waits.
            Interrupted: It was cut off, and has no result; carries the reason.
        """
        record = self._known(task)
        if not record.ended:
            raise NotEnded(record.id, record.status)
        if record.status is Status.INTERRUPTED:
            raise Interrupted(record.id, record.reason or Reason.VANISHED, record.detail or "")
        return payload.decode_value(record.result)

    def stack(self, task: Handle | int) -> str:
        """Return the Python stacks of all threads of a running task, as faulthandler writes them; the task goes on.

        Only on the machine, in the container and as the user that the task runs on and as.

        Raises:
            UnknownTask: There is no such task.
            NoStack: It does not run, or its process cannot answer, or has not within 5 s; says why.

        Blocks for at most 5 s, usually for 0.1 s.
        """
        from bgsupervisor.system import stacks  # noqa: PLC0415 - only on Linux, and a web process seldom asks

        record = self._known(task)
        with self._process_of(record) as handle:
            return stacks.stack_of(handle, timeout_s=stacks.ANSWER_S, clock=self._clock)

    # Acting

    def cancel(self, task: Handle | int, *, by: str | None = None) -> TaskRecord:
        """Ask for a task's end and return it as it is now; an ended task is returned unchanged.

        A waiting task is INTERRUPTED / CANCELLED at once. A running one is asked, then signalled, by its supervisor;
        without one it waits for the next.

        Args:
            task: Which.
            by: Who asks, recorded with it.

        Raises:
            UnknownTask: There is no such task.
        """
        keys: list[str] = []
        record = self._ledger.cancel(task_id(task), by=checked_text("by", by or None), keys=keys)
        self._store.database.after_commit(functools.partial(self._notify, keys))
        return record

    def suspend(self, task: Handle | int, *, by: str | None = None) -> TaskRecord:
        """Ask the supervisor to suspend a running task, with all that it started, and return it as it is now.

        Its supervisor stops it (SIGSTOP) until `resume`; without one it waits for the next. It keeps its slot and its
        locks; its time limits do not run meanwhile. One that is suspended already is returned unchanged.

        Args:
            task: Which.
            by: Who asks, recorded with it.

        Raises:
            UnknownTask: There is no such task.
            NotSuspendable: It does not run, or is to end.
        """
        record = self._ledger.suspend(task_id(task), by=checked_text("by", by or None))
        self._store.database.after_commit(self._notify)
        return record

    def resume(self, task: Handle | int) -> TaskRecord:
        """Ask the supervisor to resume a suspended task, and return it as it is now; any other is returned unchanged.

        Raises:
            UnknownTask: There is no such task.
        """
        record = self._ledger.resume(task_id(task))
        self._store.database.after_commit(self._notify)
        return record

    def retry(self, task: Handle | int) -> TaskRecord:
        """Plan an INTERRUPTED task again, as it was requested, and return it.

        Raises:
            UnknownTask: There is no such task.
            NotRetryable: It is not INTERRUPTED.
            AlreadyLive: A live task holds its unique key.
        """
        record = self._ledger.retry(task_id(task))
        self._store.database.after_commit(self._notify)
        return record

    def close(self) -> None:
        """Close this thread's connection to a database of our own; the next call opens it again."""
        if self._store.owned:
            self._store.close()

    # Within

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._backing.config

    @property
    def ledger(self) -> Ledger:
        """The rows, for the command line."""
        return self._backing.ledger

    @property
    def _backing(self) -> Backing:
        in_tests = isolated(self._origin)
        if in_tests is not None:
            return in_tests
        if self._own is None:
            self._own = Backing.of(self._origin)
        return self._own

    @property
    def _config(self) -> Config:
        return self._backing.config

    @property
    def _ledger(self) -> Ledger:
        return self._backing.ledger

    @property
    def _store(self) -> Store:
        return self._backing.ledger.store

    @property
    def _clock(self) -> Clock:
        return self._backing.clock

    def _known(self, task: Handle | int) -> TaskRecord:
        record = self._ledger.get(task_id(task))
        if record is None:
            raise UnknownTask(task_id(task))
        return record

    def _process_of(self, record: TaskRecord) -> ProcessHandle:
        """Return the process of a running task. Raises NoStack where it cannot be had."""
        from bgsupervisor.system import processes  # noqa: PLC0415 - as above

        if record.status is not Status.START:
            kept = f"; `bgsupervisor show {record.id}` has what was kept when its time was up" if record.stack else ""
            raise NoStack(f"task {record.id} is not running, it is {record.status}{kept}")
        if record.suspended_at is not None:
            raise NoStack(
                f"task {record.id} is suspended and cannot answer; `bgsupervisor resume {record.id}` continues it",
                pid=record.pid,
            )
        if record.pid is None or record.pid_ns is None or record.start_ticks is None or record.boot_id is None:
            raise NoStack(f"task {record.id} runs in no process of its own")
        identity = processes.ProcessIdentity(
            record.host or "", record.boot_id, record.pid_ns, record.pid, record.start_ticks
        )
        found, handle = processes.open_process(identity)
        if handle is not None and found is processes.Verdict.ALIVE:
            if os.geteuid() != 0 or self._is_child(record.pid, record.start_ticks):
                return handle
            handle.close()
            raise NoStack(
                f"cannot ask PID {record.pid} for its stack: it has no log in the state directory, so the row may name "
                "a process that bgsupervisor did not start; ask as the user that supervises",
                pid=record.pid,
            )
        if handle is not None:
            handle.close()
        if found is processes.Verdict.DEAD:
            why = "its process has ended; a supervisor records how"
        else:
            why = f"it runs on another machine or in another container (host {record.host}); ask there"
        raise NoStack(f"task {record.id} shows no stack: {why}", pid=record.pid)

    def _is_child(self, pid: int, start_ticks: int) -> bool:
        """Return whether a process has a log in the state directory, and both belong to that folder's owner.

        Root could ask any process, and every user who may write the database may have written the row.
        """
        from bgsupervisor.system import logs, processes  # noqa: PLC0415 - a web process seldom asks

        folder = StateDir(self.config.state_dir)
        log = logs.process_log(folder.logs, pid, start_ticks)
        try:
            return folder.path.lstat().st_uid == log.lstat().st_uid == processes.owner_uid(pid)
        except OSError:
            return False

    def _resolve(self, task: TaskLike) -> tuple[str, registry.Definition | None]:
        definition = tasks.definition_of(task)
        if definition is not None:
            return definition.name, definition
        name = str(task)
        base = tasks.base_named(name)
        if base is not None:
            base.definition()  # raises, and says why
        if not name.strip() or len(name) > KEY_CHARS or "\0" in name or not is_storable(name):
            raise RequestRefused(f"the task name {name[:60]!r} cannot be; give module:QualName or the task's own name")
        return name, None

    def _name_of(self, task: TaskLike) -> str:
        """Return the full name of a task; a short name counts if it means one task only.

        Raises:
            UnknownTaskName: It means several.
        """
        name, definition = self._resolve(task)
        if definition is not None or ":" in name:
            return name
        known = self._known_names(self._ledger, CATALOGUE_AGE_S)
        meant = [] if name in known else known.meant_by(name)
        if len(meant) > 1:
            raise _ambiguous(name, meant)
        return meant[0] if meant else name

    def _found(self, name: str, ledger: Ledger) -> tuple[str, registry.Definition | None]:
        """Return the full name, and the definition where there is one here, of a name that is not loaded here.

        Raises:
            UnknownTaskName: It is not known, or means several tasks, and shall be refused.
        """
        with contextlib.suppress(BgSupervisorError):
            ledger.store.write_first()
        for age_s in (CATALOGUE_AGE_S, CATALOGUE_AGE_MISSED_S):
            known = self._known_names(ledger, age_s)
            if name in known:
                return name, None
        meant = [] if ":" in name else known.meant_by(name)
        if len(meant) == 1:
            return meant[0], tasks.definition_of(meant[0])
        answer = self._unknown_names or self._config.unknown_names
        objection = None if answer == "accept" else known.objection(name)
        if meant and answer != "accept":
            error = _ambiguous(name, meant)
        elif objection is not None:
            nearest = known.nearest(name)
            error = UnknownTaskName(objection, name=name, candidates=(nearest,) if nearest else ())
        else:
            return name, None
        if answer == "refuse":
            raise error
        self._warn_of_name(name, error)
        return name, None

    def _warn_of_name(self, name: str, error: UnknownTaskName) -> None:
        now = self._clock.monotonic()
        if now - self._names_warned.get(name, -math.inf) < NAME_WARN_S:
            return
        if len(self._names_warned) >= NAMES_WARNED_MAX:
            self._names_warned.clear()
        self._names_warned[name] = now
        log.warning("a task is requested that may never run: %s", error)

    def _known_names(self, ledger: Ledger, age_s: float) -> Known:
        """Return the names that are known here; the catalogue of the supervisors is at most *age_s* seconds old."""
        read_at, catalogue = self._catalogue_read
        now = self._clock.monotonic()
        if now - read_at > age_s:
            with contextlib.suppress(BgSupervisorError):  # what the caller asks for next meets it again
                catalogue = Catalogue.of(ledger.supervisors(), now=self._clock.now())
            self._catalogue_read = now, catalogue
        return Known(catalogue, self._config.tasks)

    def _check_loadable(self, definition: registry.Definition) -> None:
        """Refuse a class that no supervisor could load: it would stay REQUEST for ever."""
        module, configured = definition.module, self._config.tasks
        if module in self._loadable:
            return
        if module == "__main__" or not (
            not configured or _reaches(configured, module) or self._is_loaded_somewhere(definition.name)
        ):
            names = ", ".join(configured) or "none"
            raise TaskNotConfigured(
                f"{definition.name} is defined in {module}, which no supervisor would load; the configured task "
                f"modules are: {names}. Move it there, import it there, or add its module to `tasks`"
            )
        self._loadable.add(module)

    def _is_loaded_somewhere(self, name: str) -> bool:
        return any(name in payload.decode_value(one.catalogue) for one in self._ledger.supervisors())

    def _no_supervisor_since(self, record: TaskRecord) -> datetime | None:
        supervisors = self._ledger.supervisors()
        last = max((one.left_at or one.heartbeat_at for one in supervisors), default=record.requested_at)
        if supervisors and all(one.left_at is not None for one in supervisors):
            return last
        return last if self._clock.now() - last > timedelta(seconds=SUPERVISOR_SILENT_S) else None

    def _warn_if_unsupervised(self, ledger: Ledger) -> None:
        now = self._clock.monotonic()
        if now < self._unsupervised_check_at:
            return
        self._unsupervised_check_at = now + UNSUPERVISED_CHECK_S
        with ledger.store.looking():
            seen = max((one.heartbeat_at for one in ledger.supervisors()), default=None)
            since = ledger.oldest_due_at() if seen is None else seen
        if since is not None and (self._clock.now() - since).total_seconds() > UNSUPERVISED_WARN_S:
            log.warning(
                "tasks are requested, but no supervisor has been seen since %s; see that cron or systemd runs "
                "`bgsupervisor run` for this configuration",
                "ever" if seen is None else seen.isoformat(timespec="seconds"),
            )

    def _notify(self, keys: Sequence[str] = ()) -> None:
        send_datagram(StateDir(self._config.state_dir).wake, "\n".join(keys[:NOTIFY_KEYS]).encode())


def _ambiguous(name: str, meant: Sequence[str]) -> UnknownTaskName:
    return UnknownTaskName(
        f"the task name {name!r} means {len(meant)} tasks: {listed(meant)}; give one of these",
        name=name,
        candidates=tuple(meant),
    )


def _reaches(configured: Sequence[str], module: str) -> bool:
    """Return whether the configured modules have imported *module*: it, or something in it, stands in their names.

    Looks only at what is loaded in this process; a configured module that is not loaded is given the benefit.
    """
    seen, todo = set(), list(configured)
    while todo:
        name = todo.pop()
        if name == module:
            return True
        loaded = sys.modules.get(name)
        if name in seen:
            continue
        seen.add(name)
        if loaded is None:
            if name in configured:
                return True
            continue
        for value in list(vars(loaded).values()):
            near = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", None)
            if isinstance(near, str) and near not in seen and near.partition(".")[0] not in sys.stdlib_module_names:
                todo.append(near)
        if len(seen) > REACH_MODULES:
            return True
    return False
