"""Task classes and task functions, as application authors write them.

Knows no database and no process. A body that is called directly, outside a supervisor, runs like any function: its
progress goes nowhere and it is never cancelled.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, TypeVar, overload

from bgsupervisor import lookalikes
from bgsupervisor.errors import TaskDefinitionError
from bgsupervisor.registry import (
    Definition,
    Place,
    check_returns,
    checked_options,
    define,
    definition_named,
    definitions,
    execution_of,
    line_of_class,
    name_for,
)
from bgsupervisor.task_context import Handle, Lock, current

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from bgsupervisor.task_context import Awaited


__all__ = [
    "FunctionTask",
    "Task",
    "definition_of",
    "remarks",
    "task",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Task:
    """The base of task classes: subclass it in a configured module and define `run`.

    Attributes:
        name: Its name in rows; "module:QualName" if it is not set. Set it to be free to move the class.
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
        check_returns(function, f"{qualified}.run")
        name = name_for(cls.__dict__.get("name"), qualified)
        cls.__definition = define(
            Definition(
                name=name,
                module=cls.__module__,
                body=lambda: cls().run,
                function=function,
                place=Place(
                    cls.__module__, cls.__qualname__, line_of_class(cls.__module__), execution_of(cls.__module__)
                ),
                owner=cls,
                options=checked_options(
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
        """Whether this attempt should end; the next progress or track raises `Cancelled`."""
        return current().cancel_requested

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Report the progress of the body; see `Context.progress`."""
        current().progress(done, total, message)

    def track(self, iterable: Iterable[T], total: float | None = None) -> Iterator[T]:
        """Yield the items, reporting the progress after each; see `Context.track`."""
        return current().track(iterable, total)

    def reach(self, part: str, value: object = None) -> None:
        """Record a named part of this task and wake the tasks that wait for it; see `Context.reach`."""
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
        """Wait while the event loop runs; see `Context.wait_for_async`."""
        return await current().wait_for_async(task, part, timeout_s, return_interrupted=return_interrupted)

    def lock(self, name: str, permits: int = 1, timeout_s: float | None = None) -> Lock:
        """Return a context manager that holds a permit of a lock; see `Context.lock`."""
        return current().lock(name, permits, timeout_s)

    def barrier(self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until *parties* tasks have arrived; see `Context.barrier`."""
        current().barrier(name, parties, scope=scope, timeout_s=timeout_s)

    async def barrier_async(
        self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Wait while the event loop runs; see `Context.barrier_async`."""
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
        check_returns(function, qualified)
        own = name_for(name, qualified)
        definition = Definition(
            name=own,
            module=function.__module__,
            body=lambda: function,
            function=function,
            place=Place(
                function.__module__,
                function.__qualname__,
                function.__code__.co_firstlineno,
                execution_of(function.__module__),
            ),
            owner=None,
            options=checked_options(
                own, timeout_s=timeout_s, stall_s=stall_s, memory_limit_bytes=memory_limit_bytes, secret=secret
            ),
        )
        return FunctionTask(function, define(definition))

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
        return definition_named(what)
    if isinstance(what, FunctionTask) or (inspect.isclass(what) and issubclass(what, Task)):
        return what.definition()
    raise TaskDefinitionError(f"{what!r} is not a task: give a Task class, a function with @task, or a name as text")


# ---- What Python does not report -------------------------------------------------------------------------------


def remarks() -> list[str]:
    """Return a sentence for each probable mistake in the loaded tasks; none is an error."""
    found: list[str] = []
    for cls in subclasses(Task):
        found += _remarks_on_class(cls)
    for definition in definitions().values():
        found += _remarks_on_secret(definition)
    return found


def defines_tasks(module: str) -> bool:
    """Return whether a loaded task was defined in *module* or below it."""
    return any(one.module == module or one.module.startswith(f"{module}.") for one in definitions().values())


def subclasses(base: type[Task]) -> Iterator[type[Task]]:
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
    """Return whether the attributes of *part* are checked with *cls*: its own, and those that no task above it has."""
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
    for cls in subclasses(Task):
        if f"{cls.__module__}:{cls.__qualname__}" == name and definition_of(name) is None:
            return cls
    return None


def _how_to_set(keyword: str, value: object) -> str:
    if keyword in lookalikes.OPTIONS:
        return f"options are attributes, not keywords of the class; write {keyword} = {value!r} in its body"
    return f"{keyword} is not an option of a task; {lookalikes.advice(keyword)}"
