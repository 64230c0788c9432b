"""The signature of a body as a decoder of the JSON object that fills its parameters."""

from __future__ import annotations

import inspect
import typing
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import msgspec

from bgsupervisor.errors import TaskDefinitionError

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

__all__ = ["Signature", "types_in"]


@dataclass(frozen=True, slots=True, eq=False)
class Signature:
    """The parameters of a body, as a decoder of the JSON object that fills them.

    Attributes:
        hints: Each parameter's resolved annotation, by name; Any where there is none.
        attributes: The decoded struct's attribute for each parameter; never a user's name, which may clash.
        accepts_extra: Whether the body takes **kwargs, so that unknown keys are allowed.
        extra_hint: The resolved annotation of **kwargs, for each unknown key; Any where there is none.
        self_name: The parameter that the caller fills itself, or None; never a key of data.
        decoder: Reads JSON text into that struct; an absent key is UNSET, so that Python's own default applies.
    """

    hints: Mapping[str, object]
    attributes: Mapping[str, str]
    accepts_extra: bool
    extra_hint: object
    self_name: str | None
    decoder: msgspec.json.Decoder[Any]

    @classmethod
    def of(cls, function: Callable[..., object], *, skip_self: bool, owner: str) -> Signature:
        """Read the signature of *function*; takes about 100 microseconds, so keep it.

        Args:
            function: The body: a function, or a method as it stands in its class.
            skip_self: The first parameter is the instance, which data does not fill.
            owner: The task's name, for messages.

        Raises:
            TaskDefinitionError: A parameter cannot be passed by name (positional-only, *args), its annotation
                cannot be resolved, or is of a type that cannot be read from JSON.
        """
        where = f"{owner}: {getattr(function, '__qualname__', repr(function))}()"
        self_name, parameters = _named_parameters(function, skip_self=skip_self, where=where)
        named = {parameter.name: parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        hints = {name: _hint(function, parameter, where=where) for name, parameter in named.items()}
        optional = {name for name, parameter in named.items() if parameter.default is not parameter.empty}
        accepts_extra = len(named) < len(parameters)
        extra_hint: object = Any
        if accepts_extra:
            extra_hint = _hint(function, parameters[-1], where=where)  # Python allows **kwargs as the last one only
            if typing.get_origin(extra_hint) is typing.Unpack:
                more, may_lack = _keys_of(extra_hint)
                hints, optional, accepts_extra = hints | more, optional | may_lack, False
        attributes, decoder = _decoder_for(hints, optional, accepts_extra=accepts_extra)
        return cls(hints, attributes, accepts_extra, extra_hint, self_name, decoder)

    def with_extra(self, keys: Collection[str]) -> Signature:
        """Return this signature with some keys of **kwargs as parameters of their own, so that their hint applies."""
        hints = {**self.hints, **dict.fromkeys(keys, self.extra_hint)}
        attributes, decoder = _decoder_for(hints, set(hints), accepts_extra=True)
        return replace(self, hints=hints, attributes=attributes, decoder=decoder)


def _decoder_for(
    hints: Mapping[str, object], optional: Collection[str], *, accepts_extra: bool
) -> tuple[dict[str, str], msgspec.json.Decoder[Any]]:
    """Return the attribute of each parameter, and the decoder of a struct that has these attributes."""
    attributes = {name: f"p{number}" for number, name in enumerate(hints)}
    struct = msgspec.defstruct(
        "Data",
        [
            (attributes[name], hint, msgspec.UNSET) if name in optional else (attributes[name], hint)
            for name, hint in hints.items()
        ],
        kw_only=True,
        forbid_unknown_fields=not accepts_extra,
        rename={attribute: name for name, attribute in attributes.items()},
    )
    return attributes, msgspec.json.Decoder(struct)


def _keys_of(unpacked: object) -> tuple[dict[str, object], set[str]]:
    """Return the keys of **kwargs: Unpack[...] with their hints, and those that may be absent (PEP 692)."""
    (mapping,) = typing.get_args(unpacked)
    hints, may_lack = {}, set()
    for name, hint in get_type_hints(mapping, include_extras=True).items():
        mark = typing.get_origin(hint)
        if mark in {typing.Required, typing.NotRequired}:
            (hint,) = typing.get_args(hint)  # noqa: PLW2901 - without its mark
        # Python itself does not see a mark in quotes: https://docs.python.org/3/library/typing.html#typing.TypedDict
        if mark is typing.NotRequired or (mark is not typing.Required and name in mapping.__optional_keys__):
            may_lack.add(name)
        hints[name] = hint
    return hints, may_lack


def _named_parameters(
    function: Callable[..., object], *, skip_self: bool, where: str
) -> tuple[str | None, list[inspect.Parameter]]:
    """Return the name of the instance's parameter and those that data fills."""
    parameters = list(inspect.signature(function).parameters.values())
    self_name = None
    if skip_self:
        if not parameters or parameters[0].kind not in {
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        }:
            raise TaskDefinitionError(f"{where} has no parameter for its instance; write self as the first one")
        self_name = parameters.pop(0).name
    for parameter in parameters:
        if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL}:
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            raise TaskDefinitionError(
                f"{where} takes '{star}{parameter.name}' by position, but data is passed by name; "
                "make it a plain parameter, without / and *"
            )
    return self_name, parameters


def _hint(function: Callable[..., object], parameter: inspect.Parameter, *, where: str) -> object:
    """Return the resolved annotation of *parameter*, which msgspec can decode."""
    if parameter.annotation is parameter.empty:
        return Any
    hint = _resolved(function, parameter, where=where)
    try:
        (read,) = typing.get_args(hint) if typing.get_origin(hint) is typing.Unpack else (hint,)
        foreign = [info.cls for info in types_in(read) if isinstance(info, msgspec.inspect.CustomType)]
        msgspec.json.Decoder(read)
    except Exception as error:  # a model's own code may raise anything
        raise TaskDefinitionError(_undecodable(where, parameter, hint, str(error))) from error
    for cls in foreign:
        if cls is not object:  # object means any value, as Any does
            raise TaskDefinitionError(_undecodable(where, parameter, hint, f"{cls.__qualname__} is no JSON type"))
    return hint


def _undecodable(where: str, parameter: inspect.Parameter, hint: object, why: str) -> str:
    return (
        f"{where}: the parameter {parameter.name!r} has the hint {inspect.formatannotation(hint)}, which cannot be "
        f"read from JSON: {why}; use a plain type, a dataclass, or pass an id and load the object in the body"
    )


def _resolved(function: Callable[..., object], parameter: inspect.Parameter, *, where: str) -> object:
    def holder() -> None:
        """Carry one annotation, so that a bad one of another parameter or of the return does not matter."""

    body = inspect.unwrap(function)
    holder.__annotations__ = {parameter.name: parameter.annotation}
    try:
        return get_type_hints(holder, getattr(body, "__globals__", {}), _closure(body), include_extras=True)[
            parameter.name
        ]
    except Exception as error:  # a hint in quotes is code
        raise TaskDefinitionError(
            f"{where}: the hint {parameter.annotation!r} of the parameter {parameter.name!r} cannot be resolved: "
            f"{error}; import its names at run time, not only under TYPE_CHECKING"
        ) from error


def _closure(body: Callable[..., object]) -> dict[str, object]:
    """Return the enclosing function's names that *body* uses: where its locally defined types are found."""
    found: dict[str, object] = {}
    if inspect.isfunction(body):
        for name, cell in zip(body.__code__.co_freevars, body.__closure__ or (), strict=True):
            with suppress(ValueError):  # not assigned yet
                found[name] = cell.cell_contents
    return found


def types_in(hint: object) -> Iterator[msgspec.inspect.Type]:
    """Yield every type that *hint* is made of, once each; types may refer to themselves."""
    seen: set[int] = set()
    waiting: list[object] = [msgspec.inspect.type_info(hint)]
    while waiting:
        info = waiting.pop()
        if isinstance(info, tuple):
            waiting.extend(info)
        elif isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(info) not in seen:
            seen.add(id(info))
            waiting.extend(getattr(info, name) for name in info.__struct_fields__)
            if isinstance(info, msgspec.inspect.Type):
                yield info
