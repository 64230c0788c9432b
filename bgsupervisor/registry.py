"""The tasks that this process has loaded, with their options and signatures."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from bgsupervisor.errors import TaskDefinitionError
from bgsupervisor.ipc.messages import TaskOptions
from bgsupervisor.signatures import Signature

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.tasks import Task

__all__ = [
    "Definition",
    "Place",
    "check_returns",
    "checked_options",
    "define",
    "definition_named",
    "definitions",
    "execution_of",
    "line_of_class",
    "name_for",
]

MAX_TIMEOUT_S = 10 * 365 * 86_400.0


class Place(NamedTuple):
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

    def excludes(self, other: Place) -> bool:
        """Return whether a task that is defined here may not replace one of the same name that was defined there."""
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
    place: Place
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


def definition_named(name: str) -> Definition | None:
    """Return the loaded task of this name; None if there is none or its class is abstract."""
    definition = _definitions.get(name)
    return None if definition is None or definition.is_abstract else definition


def define(definition: Definition) -> Definition:
    """Record a task; a later definition at the same place replaces the earlier one.

    Raises:
        TaskDefinitionError: Another task has this name.
    """
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


def line_of_class(module: str) -> int | None:
    """Return the line of the class statement that runs now, None where other code makes the class."""
    frame = sys._getframe(2)  # noqa: SLF001 - the caller of __init_subclass__; inspect's functions read files
    while frame.f_back is not None and frame.f_code.co_name in {"__new__", "__init_subclass__"}:
        frame = frame.f_back  # metaclasses and the application's own bases
    return frame.f_lineno if frame.f_globals.get("__name__") == module else None


def execution_of(module: str) -> object:
    """Return the object that importing made for this execution of a module, None if there is none."""
    return getattr(sys.modules.get(module), "__spec__", None)


def _check_made_without_arguments(owner: type[Task], name: str) -> None:
    try:
        signature = inspect.signature(owner)
    except (TypeError, ValueError):  # a constructor in C, which has no signature
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


def check_returns(function: Callable[..., Any], qualified: str) -> None:
    """Refuse a body that only makes a generator: calling it would run none of its lines."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TaskDefinitionError(
            f"{qualified}: the body has `yield`, so calling it would run none of its lines; return a value instead, "
            "and call progress or track to report what is done"
        )


def name_for(own: object, qualified: str) -> str:
    """Return the task's name: its own one, or the qualified name of what defines it."""
    if own is None:
        return qualified
    if not isinstance(own, str) or not own.strip():
        raise TaskDefinitionError(f"{qualified}: name is {own!r}; it must be a text")
    return own


def checked_options(
    owner: str, *, timeout_s: object, stall_s: object, memory_limit_bytes: object, secret: object
) -> TaskOptions:
    """Return the options of a task, checked.

    Raises:
        TaskDefinitionError: One has a wrong type or value.
    """
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
