"""What application authors write: task classes, task functions, and what a body may ask and tell.

Knows no database and no process. A body that is called directly, outside a supervisor, runs like any function: its
progress goes nowhere and nobody cancels it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import inspect
import os
import sys
import threading
from collections.abc import Sized
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, ParamSpec, TypeVar, overload

from bgsupervisor import lookalikes
from bgsupervisor.errors import NotInTask, TaskDefinitionError
from bgsupervisor.ipc.messages import TaskOptions
from bgsupervisor.payload import Signature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Self, TypeAlias


__all__ = [
    "Context",
    "Definition",
    "FunctionTask",
    "Handle",
    "Task",
    "current",
    "definition_of",
    "definitions",
    "remarks",
    "task",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

MAX_TIMEOUT_S = 10 * 365 * 86_400.0
PERMITS_MAX = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Handle:
    """A requested task: its id, and whether this request created it (False: a live twin holds the unique key)."""

    id: int
    created: bool = True

    def __int__(self) -> int:
        return self.id


if TYPE_CHECKING:
    Awaited: TypeAlias = Handle | int


class Context:
    """What a body can ask and tell; this one serves a body that no supervisor runs.

    Attributes:
        id: The task's number; None outside a supervisor.
        attempt: Which try this is, from 1; 0 outside a supervisor.
        key: The key it was requested with.
    """

    id: int | None = None
    attempt: int = 0
    key: str | None = None

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt is to end; the next progress or track raises `Cancelled`."""
        return False

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the body is, in any unit: *done* of *total*, and one line of text.

        Cheap (some microseconds) and never blocks. Several times a second it reaches the row; what is said in between
        does so with the next heartbeat, and the last word with the end. Every call tells that the body gets on
        (`stall_s`), whatever the numbers.

        Raises:
            Cancelled: This attempt is to end.
        """

    def track(self, iterable: Iterable[T], total: float | None = None) -> Iterator[T]:
        """Yield the items, telling the progress after each; *total* is asked of `len` if it is not given.

        Raises:
            Cancelled: This attempt is to end.
        """
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self.progress(0, total)
        for count, item in enumerate(iterable, start=1):
            yield item
            self.progress(count, total)

    def reach(self, part: str, value: object = None) -> None:
        """Record a named part of this task, durably, with a JSON value, and wake whoever waits for it.

        Again overwrites the value. Parts are cleared when the task is retried. Blocks for one commit.

        Raises:
            Cancelled: This attempt is to end.
            DataInvalid, DataTooLarge: The value is not JSON, or too large.
        """

    def wait_for(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - whatever the other task has given
        """Wait until another task has reached a part, or has ended DONE; return the part's value, or the result.

        Returns at once if that has happened, also long ago. The other may run, wait, or not have started. Meanwhile
        this body's slot is given to others; it takes one again before it goes on, before any new task.

        Args:
            task: A handle or an id, or several: then a list of values in their order.
            part: Which part; None waits for the end.
            timeout_s: How long at most; None is no limit but the other's end.
            return_interrupted: With several tasks, put the PartNotReached of one that was interrupted in its place
                instead of raising the first.

        Raises:
            PartNotReached: The other has ended without reaching it, or was interrupted where its end was awaited.
            Deadlock: This wait would have closed a cycle.
            WaitTimeout, UnknownTask, Cancelled.
            NotInTask: No supervisor runs this body.
        """
        raise NotInTask("wait_for makes sense only in a body that a supervisor runs")

    async def wait_for_async(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - as wait_for
        """Wait like `wait_for`, while the body's event loop goes on."""
        wait = functools.partial(self.wait_for, task, part, timeout_s, return_interrupted=return_interrupted)
        return await _in_thread(wait)

    def lock(self, name: str, permits: int = 1, timeout_s: float | None = None) -> Lock:
        """Return a context manager that holds one of *permits* places of a lock; first come, first served.

        Works with `with` and `async with`; what it gives has `abandoned_by`, the task that died with this permit
        before, if one did. A holder that dies frees its permit in the transaction that records its end.

        Raises (when entered):
            LockHeld: This attempt holds it already.
            Deadlock, WaitTimeout, Cancelled, NotInTask: As `wait_for`.
        """
        return Lock(self, name, permits, timeout_s)

    def barrier(self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until *parties* tasks have arrived here; then all go on, and the barrier can be used again.

        Args:
            name: Of the barrier, within its scope.
            parties: How many go on together; a retried task counts once.
            scope: Whose barrier it is; None is the task that requested this one and its siblings.
            timeout_s: How long at most.

        Raises:
            BarrierBroken: Another participant died while it waited here, or not enough can come any more; says why.
            ValueError: No scope, and no task requested this one; or the others have named another number of parties.
            WaitTimeout, Cancelled, NotInTask: As `wait_for`.
        """
        raise NotInTask("barrier makes sense only in a body that a supervisor runs")

    async def barrier_async(
        self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Wait like `barrier`, while the body's event loop goes on."""
        await _in_thread(functools.partial(self.barrier, name, parties, scope=scope, timeout_s=timeout_s))

    def request(self, task: Any, data: Mapping[str, object] | None = None, **options: Any) -> Handle:  # noqa: ANN401 - those of Service.request
        """Request another task, with this one as its parent; arguments and errors as `Service.request`.

        Raises:
            NotInTask: No supervisor runs this body.
        """
        raise NotInTask("request makes sense only in a body that a supervisor runs; use a Service elsewhere")

    def _acquire(self, name: str, permits: int, timeout_s: float | None) -> int | None:
        raise NotInTask("lock makes sense only in a body that a supervisor runs")

    def _release(self, name: str) -> None:
        raise NotInTask("lock makes sense only in a body that a supervisor runs")

    def _rouse(self) -> None:
        """Have the threads that wait for this body look whether they still should."""


class Lock:
    """A place in a lock, held while the `with` block runs.

    Attributes:
        abandoned_by: The task that died while it held this permit, if that is why it was free.
    """

    def __init__(self, context: Context, name: str, permits: int, timeout_s: float | None) -> None:
        if isinstance(permits, bool) or not isinstance(permits, int) or not 0 < permits <= PERMITS_MAX:
            raise ValueError(f"permits is {permits!r}; it must be a whole number from 1 to {PERMITS_MAX}")
        self._context = context
        self._name = name
        self._permits = permits
        self._timeout_s = timeout_s
        self.abandoned_by: int | None = None
        self._held_by: int | None = None

    def __enter__(self) -> Self:
        self.abandoned_by = self._context._acquire(self._name, self._permits, self._timeout_s)  # noqa: SLF001 - its half
        self._held_by = os.getpid()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._held_by != os.getpid():
            return  # a copy that the body has forked leaves the block too; the original still holds the permit
        self._held_by = None
        self._context._release(self._name)  # noqa: SLF001 - as above

    async def __aenter__(self) -> Self:
        try:
            return await _in_thread(self.__enter__)
        except BaseException:
            if self._held_by is not None:  # it came just when the loop gave it up
                self.__exit__()
            raise

    async def __aexit__(self, *raised: object) -> None:
        await _in_thread(self.__exit__)


def checked_ids(awaited: Iterable[object]) -> list[int]:
    """Return the ids of tasks that are named by handles, records or ids.

    Raises:
        ValueError: One of them is something else, as a text or a truth value.
    """
    ids = []
    for one in awaited:
        id = one if isinstance(one, int) else getattr(one, "id", None)
        if isinstance(id, bool) or not isinstance(id, int):
            raise ValueError(f"{one!r} is not a task; give a handle or an id")  # noqa: TRY004 - as all bad arguments
        ids.append(id)
    return ids


class _Beside(NamedTuple):
    """What the thread of an async wait must know of its coroutine.

    Attributes:
        given_up: The loop has cancelled the coroutine, as asyncio.timeout does.
        alone: No other coroutine of the loop goes on beside it.
    """

    given_up: threading.Event
    alone: bool


_beside: contextvars.ContextVar[_Beside] = contextvars.ContextVar("bgsupervisor_beside")


def is_given_up() -> bool:
    """Whether the coroutine that this thread waits for was cancelled by its loop."""
    beside = _beside.get(None)
    return beside is not None and beside.given_up.is_set()


def waits_alone() -> bool:
    """Whether nothing of the body goes on beside the wait of this thread: not another coroutine, nor another thread.

    Of a wait in the main thread that is taken for granted: threads that a library has left idle do not count.
    """
    beside = _beside.get(None)
    return threading.current_thread() is threading.main_thread() if beside is None else beside.alone


async def _in_thread(call: Callable[[], T]) -> T:
    """Call what blocks in a thread of its own; a coroutine that is cancelled waits for the thread's end.

    Not in one of the loop's own pool: that has few, and who holds a lock must find one to give it back in.
    """
    import asyncio  # noqa: PLC0415 - 40 ms that only an async body pays
    from concurrent.futures import Future  # noqa: PLC0415 - as above

    beside = _Beside(threading.Event(), alone=len(asyncio.all_tasks()) == 1)
    answer: Future[T] = Future()

    def called() -> None:
        _beside.set(beside)
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the coroutine is to have it
            answer.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(called,), name="bgsupervisor wait", daemon=True).start()
    waiting = asyncio.wrap_future(answer)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        beside.given_up.set()
        _context._rouse()  # noqa: SLF001 - its half
        await asyncio.wait([waiting])
        if not waiting.cancelled():
            waiting.exception()  # it is told by the cancellation
        raise


_outside = Context()
_context: Context = _outside


def current() -> Context:
    """Return the context of the body that runs in this process, from any of its threads."""
    return _context


@contextlib.contextmanager
def entered(context: Context) -> Iterator[None]:
    """Make *context* the current one of this process while a body runs."""
    global _context  # noqa: PLW0603 - a child runs one body at a time, and its threads must see it too
    before, _context = _context, context
    try:
        yield
    finally:
        _context = before


class _Place(NamedTuple):
    """Where the source defines a task.

    Attributes:
        module: Its module's name.
        qualname: Of the class or function.
        line: Of its definition; None where it was made by other code, as a dataclass with slots is.
        execution: What importing made for this execution of the module; each reload makes another. None where there
            is no such object, as in a shell, where everything may be defined again.
    """

    module: str
    qualname: str
    line: int | None
    execution: object

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"

    def excludes(self, other: _Place) -> bool:
        """Whether a task that is defined here may not replace one of the same name that was defined there."""
        if (self.module, self.qualname) != (other.module, other.qualname):
            return True
        if self.execution is None or self.execution is not other.execution:
            return False
        return None not in (self.line, other.line) and self.line != other.line


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A task as the rest of the package sees it.

    Attributes:
        name: What rows call it.
        module: Where it is defined.
        body: The function to call with the data's keys as keywords, made anew for each attempt.
        place: Where it is defined.
        owner: The class, None for a function.
        options: What the supervisor must know, and which keys of the data are masked wherever data is shown.
    """

    name: str
    module: str
    body: Callable[[], Callable[..., Any]]
    function: Callable[..., Any]
    place: _Place
    owner: type[Task] | None
    options: TaskOptions

    @property
    def is_abstract(self) -> bool:
        """Whether it is a class with abstract methods: a base of others, of which no attempt can make an instance."""
        return self.owner is not None and inspect.isabstract(self.owner)

    @functools.cached_property
    def signature(self) -> Signature:
        """The data that the body takes.

        Raises:
            TaskDefinitionError: A parameter that no data can fill, a hint that cannot be read from JSON, or a class
                whose `__init__` needs arguments.
        """
        if self.owner is not None:
            _check_made_without_arguments(self.owner, self.name)
        return Signature.of(self.function, skip_self=self.owner is not None, owner=self.name)


_definitions: dict[str, Definition] = {}


def definitions() -> dict[str, Definition]:
    """Return all tasks that this process has loaded, by name; classes with abstract methods are none."""
    return {name: definition for name, definition in _definitions.items() if not definition.is_abstract}


def _define(definition: Definition) -> Definition:
    known = _definitions.get(definition.name)
    place = definition.place
    if known is not None and place.excludes(known.place):
        if str(place) == str(known.place):
            raise TaskDefinitionError(
                f"two tasks have the name {definition.name!r}: the one at line {place.line} would replace the one at "
                f"line {known.place.line}; rename one of them"
            )
        raise TaskDefinitionError(
            f"two tasks have the name {definition.name!r}: {known.place} and {place}; set `name` of one of them"
        )
    _definitions[definition.name] = definition
    return definition


def _line_of_class(module: str) -> int | None:
    """Return the line of the class statement that runs now, None where other code makes the class."""
    frame = sys._getframe(2)  # noqa: SLF001 - the caller of __init_subclass__; inspect's functions read files
    while frame.f_back is not None and frame.f_code.co_name in {"__new__", "__init_subclass__"}:
        frame = frame.f_back  # metaclasses and the application's own bases
    return frame.f_lineno if frame.f_globals.get("__name__") == module else None


def _execution_of(module: str) -> object:
    return getattr(sys.modules.get(module), "__spec__", None)


def _check_made_without_arguments(owner: type[Task], name: str) -> None:
    try:
        signature = inspect.signature(owner)
    except (TypeError, ValueError):  # a constructor in C, which says nothing
        return
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    ]
    if needed:
        raise TaskDefinitionError(
            f"{name}: __init__ needs {', '.join(needed)}, and each attempt makes its instance without arguments; "
            "give them defaults, or take them as parameters of run"
        )


def _check_returns(function: Callable[..., Any], qualified: str) -> None:
    """Refuse a body that only makes a generator: calling it would run none of its lines."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TaskDefinitionError(
            f"{qualified}: the body has `yield`, so calling it would run none of its lines; return a value instead, "
            "and call progress or track to report what is done"
        )


def _name(own: object, qualified: str) -> str:
    """Return the task's name: its own one, or the qualified name of what defines it."""
    if own is None:
        return qualified
    if not isinstance(own, str) or not own.strip():
        raise TaskDefinitionError(f"{qualified}: name is {own!r}; it must be a text")
    return own


def _options(
    owner: str, *, timeout_s: object, stall_s: object, memory_limit_bytes: object, secret: object
) -> TaskOptions:
    if memory_limit_bytes is not None and (
        isinstance(memory_limit_bytes, bool) or not isinstance(memory_limit_bytes, int) or memory_limit_bytes <= 0
    ):
        raise TaskDefinitionError(
            f"{owner}: memory_limit_bytes is {memory_limit_bytes!r}; it must be a whole number of bytes above 0"
        )
    return TaskOptions(
        timeout_s=_seconds(owner, "timeout_s", timeout_s),
        stall_s=_seconds(owner, "stall_s", stall_s),
        memory_limit_bytes=memory_limit_bytes,
        secret=_secret(owner, secret),
    )


def _seconds(owner: str, option: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TIMEOUT_S:
        raise TaskDefinitionError(f"{owner}: {option} is {value!r}; it must be a number of seconds above 0")
    return float(value)


def _secret(owner: str, secret: object) -> tuple[str, ...]:
    if isinstance(secret, str) or not isinstance(secret, list | tuple | set | frozenset):
        raise TaskDefinitionError(f'{owner}: secret is {secret!r}; it must be a tuple of names, as ("password",)')
    for key in secret:
        if not isinstance(key, str):
            raise TaskDefinitionError(f'{owner}: secret has {key!r}; it must be a tuple of names, as ("password",)')
    return tuple(secret)


class Task:
    """The base of task classes: subclass it in a configured module and define `run`.

    Attributes:
        name: What rows call it; "module:QualName" if it is not set. Set it to be free to move the class.
        timeout_s: How long an attempt may run, in seconds; None is for ever. While it is suspended does not count.
        stall_s: How long an attempt may go without a call of progress, track or reach, in seconds; None is for ever.
            Any such call counts, with the same numbers too. While it waits for others, or is suspended, does not count.
        memory_limit_bytes: Resident memory that the body and all it starts may use; None is no limit. Looked at
            twice a second, so a short peak may pass unseen.
        secret: Keys of the data that are masked where data is shown.
    """

    name: ClassVar[str | None] = None
    timeout_s: ClassVar[float | None] = None
    stall_s: ClassVar[float | None] = None
    memory_limit_bytes: ClassVar[int | None] = None
    secret: ClassVar[tuple[str, ...]] = ()

    run: Callable[..., Any]
    """The body: takes the data's keys as keyword arguments; what it returns is the result. May be `async`."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Record the class, unless it is a base of others that has no `run` of its own or inherited."""
        qualified = f"{cls.__module__}:{cls.__qualname__}"
        for keyword, value in kwargs.items():
            if keyword in lookalikes.OPTIONS or lookalikes.advice(keyword):
                raise TaskDefinitionError(f"{qualified}: {_how_to_set(keyword, value)}")
        super().__init_subclass__(**kwargs)
        function = inspect.getattr_static(cls, "run", None)
        if function is None:
            return
        if not inspect.isfunction(function):
            raise TaskDefinitionError(
                f"{qualified}: run must be a plain method, not a {type(function).__name__}; write def run(self, ...)"
            )
        _check_returns(function, f"{qualified}.run")
        name = _name(cls.__dict__.get("name"), qualified)
        cls.__definition = _define(
            Definition(
                name=name,
                module=cls.__module__,
                body=lambda: cls().run,
                function=function,
                place=_Place(
                    cls.__module__, cls.__qualname__, _line_of_class(cls.__module__), _execution_of(cls.__module__)
                ),
                owner=cls,
                options=_options(
                    name,
                    timeout_s=cls.timeout_s,
                    stall_s=cls.stall_s,
                    memory_limit_bytes=cls.memory_limit_bytes,
                    secret=cls.secret,
                ),
            )
        )

    __definition: ClassVar[Definition | None] = None

    @classmethod
    def definition(cls) -> Definition:
        """Return what the rest of the package knows of this class.

        Raises:
            TaskDefinitionError: The class has no `run`, or abstract methods.
        """
        definition: Definition | None = cls.__dict__.get("_Task__definition")
        if definition is None:
            raise TaskDefinitionError(f"{cls.__module__}:{cls.__qualname__} has no `run`, so it cannot be requested")
        if definition.is_abstract:
            raise TaskDefinitionError(f"{definition.name} has abstract methods, so it cannot be requested")
        return definition

    @property
    def id(self) -> int | None:
        """The task's number; None outside a supervisor."""
        return current().id

    @property
    def attempt(self) -> int:
        """Which try this is, from 1; 0 outside a supervisor."""
        return current().attempt

    @property
    def key(self) -> str | None:
        """The key it was requested with."""
        return current().key

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt is to end; the next progress or track raises `Cancelled`."""
        return current().cancel_requested

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the body is; see `Context.progress`."""
        current().progress(done, total, message)

    def track(self, iterable: Iterable[T], total: float | None = None) -> Iterator[T]:
        """Yield the items, telling the progress after each; see `Context.track`."""
        return current().track(iterable, total)

    def reach(self, part: str, value: object = None) -> None:
        """Record a named part of this task and wake whoever waits for it; see `Context.reach`."""
        current().reach(part, value)

    def wait_for(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - whatever the other task has given
        """Wait for a part, or the end, of another task; see `Context.wait_for`."""
        return current().wait_for(task, part, timeout_s, return_interrupted=return_interrupted)

    async def wait_for_async(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - as wait_for
        """Wait while the event loop goes on; see `Context.wait_for_async`."""
        return await current().wait_for_async(task, part, timeout_s, return_interrupted=return_interrupted)

    def lock(self, name: str, permits: int = 1, timeout_s: float | None = None) -> Lock:
        """Return a context manager that holds a permit of a lock; see `Context.lock`."""
        return current().lock(name, permits, timeout_s)

    def barrier(self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until so many tasks have arrived; see `Context.barrier`."""
        current().barrier(name, parties, scope=scope, timeout_s=timeout_s)

    async def barrier_async(
        self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Wait while the event loop goes on; see `Context.barrier_async`."""
        await current().barrier_async(name, parties, scope=scope, timeout_s=timeout_s)

    def request(self, task: Any, data: Mapping[str, object] | None = None, **options: Any) -> Handle:  # noqa: ANN401 - those of Service.request
        """Request another task, with this one as its parent; see `Context.request`."""
        return current().request(task, data, **options)


class FunctionTask(Generic[P, R]):
    """A function as a task; calling it runs it here, like the function itself."""

    def __init__(self, function: Callable[P, R], definition: Definition) -> None:
        self._function = function
        self._definition = definition
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the body here, in this process."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> str:
        """Be pickled by name, like the function: for a Pool in a body."""
        return self._function.__qualname__

    def __repr__(self) -> str:
        return f"<task {self._definition.name}>"

    def definition(self) -> Definition:
        """Return what the rest of the package knows of this function."""
        return self._definition


@overload
def task(function: Callable[P, R], /) -> FunctionTask[P, R]: ...
@overload
def task(
    *,
    name: str | None = None,
    timeout_s: float | None = None,
    stall_s: float | None = None,
    memory_limit_bytes: int | None = None,
    secret: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], FunctionTask[P, R]]: ...
def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout_s: float | None = None,
    stall_s: float | None = None,
    memory_limit_bytes: int | None = None,
    secret: tuple[str, ...] = (),
    **unknown: object,
) -> Any:
    """Make a task of a function; the options are those of `Task`.

    Raises:
        TaskDefinitionError: An option that there is not, or of a wrong type, a name that another task has, or not a
            function.
    """
    for keyword in unknown:
        hint = lookalikes.advice(keyword) or f"the options are {', '.join(lookalikes.OPTIONS)}"
        raise TaskDefinitionError(f"{keyword} is not an option of @task; {hint}")

    def decorate(function: Callable[..., Any]) -> FunctionTask[..., Any]:
        if not inspect.isfunction(function):
            instead = "subclass Task instead; a name is given as @task(name=...)"
            raise TaskDefinitionError(f"@task is for functions, not for {function!r}; {instead}")
        qualified = f"{function.__module__}:{function.__qualname__}"
        _check_is_no_method(function, qualified)
        _check_returns(function, qualified)
        own = _name(name, qualified)
        definition = Definition(
            name=own,
            module=function.__module__,
            body=lambda: function,
            function=function,
            place=_Place(
                function.__module__,
                function.__qualname__,
                function.__code__.co_firstlineno,
                _execution_of(function.__module__),
            ),
            owner=None,
            options=_options(
                own, timeout_s=timeout_s, stall_s=stall_s, memory_limit_bytes=memory_limit_bytes, secret=secret
            ),
        )
        return FunctionTask(function, _define(definition))

    return decorate if function is None else decorate(function)


def _check_is_no_method(function: Callable[..., Any], qualified: str) -> None:
    outer = function.__qualname__.rpartition(".")[0]
    first = next(iter(inspect.signature(function).parameters), None)
    if outer and not outer.endswith("<locals>") and first in {"self", "cls"}:
        raise TaskDefinitionError(
            f"@task is for functions, not for the method {qualified}, whose {first} no data can fill; "
            "move it out of its class, or subclass Task"
        )


def definition_of(what: object) -> Definition | None:
    """Return the definition of a task class, a task function or a loaded task's name; None for an unknown name.

    Raises:
        TaskDefinitionError: It is none of these, or a class that is only a base of others.
    """
    if isinstance(what, str):
        definition = _definitions.get(what)
        return None if definition is None or definition.is_abstract else definition
    if isinstance(what, FunctionTask) or (inspect.isclass(what) and issubclass(what, Task)):
        return what.definition()
    raise TaskDefinitionError(f"{what!r} is not a task: give a Task class, a function with @task, or a name as text")


# ---- What Python does not report -------------------------------------------------------------------------------


def remarks() -> list[str]:
    """Return a sentence for each thing in the loaded tasks that was probably meant otherwise; none is an error."""
    found: list[str] = []
    for cls in _subclasses(Task):
        found += _remarks_on_class(cls)
    for definition in definitions().values():
        found += _remarks_on_secret(definition)
    return found


def defines_tasks(module: str) -> bool:
    """Whether a loaded task was defined in *module* or below it."""
    return any(one.module == module or one.module.startswith(f"{module}.") for one in definitions().values())


def _subclasses(base: type[Task]) -> Iterator[type[Task]]:
    """Yield the classes below *base*, each once."""
    waiting, seen = [base], {base}
    while waiting:
        for cls in waiting.pop(0).__subclasses__():
            if cls not in seen:
                seen.add(cls)
                waiting.append(cls)
                yield cls


def _remarks_on_class(cls: type[Task]) -> Iterator[str]:
    qualified = f"{cls.__module__}:{cls.__qualname__}"
    has_run = inspect.getattr_static(cls, "run", None) is not None
    if not has_run and not cls.__subclasses__() and not inspect.isabstract(cls):
        yield f"{qualified} has no `run` and no subclass, so it is no task; define `run`, or remove it"
    own = {name: value for part in cls.__mro__ if _is_counted_for(cls, part) for name, value in vars(part).items()}
    for name, value in own.items():
        if name.startswith("_") or not isinstance(value, int | float | str | tuple | list | set | dict | None):
            continue
        if hasattr(Task, name) and name not in lookalikes.OPTIONS:
            yield f"{qualified}: the attribute `{name}` hides Task.{name}; rename it"
        elif hint := lookalikes.advice(name):
            yield f"{qualified}: `{name}` is not an option and has no effect; {hint}"


def _is_counted_for(cls: type[Task], part: type) -> bool:
    """Whether the attributes of *part* are looked at with *cls*: its own, and those that no task above it has."""
    return part is cls or not any(issubclass(base, part) for base in cls.__bases__ if issubclass(base, Task))


def _remarks_on_secret(definition: Definition) -> Iterator[str]:
    """Look for slips of the pen alone: a secret may be a key deep in the data."""
    try:
        signature = definition.signature
    except TaskDefinitionError:
        return  # a failure, which is reported
    for key in definition.options.secret:
        near = difflib.get_close_matches(key, signature.hints, n=1, cutoff=lookalikes.CLOSE)
        if key not in signature.hints and near:
            yield f"{definition.name}: secret names {key!r}, which is no parameter; did you mean {near[0]!r}?"


def base_named(name: str) -> type[Task] | None:
    """Return the loaded class of this name that cannot be requested because it is only a base, if there is one."""
    for cls in _subclasses(Task):
        if f"{cls.__module__}:{cls.__qualname__}" == name and definition_of(name) is None:
            return cls
    return None


def _how_to_set(keyword: str, value: object) -> str:
    if keyword in lookalikes.OPTIONS:
        return f"options are attributes, not keywords of the class; write {keyword} = {value!r} in its body"
    return f"{keyword} is not an option of a task; {lookalikes.advice(keyword)}"
