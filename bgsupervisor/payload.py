"""Data and results as JSON text, checked against a body's signature; knows no database and no process."""

from __future__ import annotations

import inspect
import math
import re
import typing
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_type_hints

import msgspec

from bgsupervisor.errors import DataInvalid, DataTooLarge, TaskDefinitionError
from bgsupervisor.sizes import compared

__all__ = ["DEPTH_MAX", "MASK", "Signature", "decode_data", "decode_value", "encode_data", "encode_result", "mask"]

DEPTH_MAX = 200
"""Levels of lists and mappings in data and results; far from the recursion limit of whoever decodes them."""

SHOWN_MAX = 60
"""Characters of a refused value that a message shows."""

MASK = "***"

_Steps = tuple[str | int, ...]
_ANY_KEY = "[...]"  # msgspec's word for "below some key of a mapping"
_PYTHON_WORDS = {"array": "list", "object": "dict", "null": "None"}
_INERT = frozenset({int, bool, NoneType})
_CONTAINERS = frozenset({dict, list, tuple})
_INDEXED: tuple[type[Any], ...] = (Mapping, list, tuple)
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`(?P<path>\$[^`]*)`)?", re.DOTALL)
_PATH_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]|(?P<any_key>\[\.\.\.\])")
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_EXPECTED = re.compile(r"Expected (`[^`]+`.*?)(?:, got `\w+`)?", re.DOTALL)
_INVALID = re.compile(r"Invalid (UUID|RFC3339 encoded \w+|ISO8601 duration|decimal string|base64 encoded string)")


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


def encode_data(
    data: Mapping[str, object] | None,
    *,
    signature: Signature | None,
    limit_bytes: int,
    name: str,
    secret: Collection[str] = (),
) -> str:
    """Return *data* as JSON text that `decode_data` can read.

    Args:
        data: The body's parameters by name; None is the same as {}.
        signature: What they must fit; None where the task's class is not loaded.
        limit_bytes: The most that the UTF-8 text may take (data_max_bytes).
        name: The task's name, for messages.
        secret: Keys whose values no message may show.

    Raises:
        DataInvalid: Not a mapping with str keys, not JSON (its path and type are named), NaN, infinity, a lone
            surrogate, nested deeper than DEPTH_MAX, or no fit for the signature.
        DataTooLarge: The text would exceed *limit_bytes*.
    """
    subject = _Subject(f"data for {name}", secret)
    given = _as_dict(data, subject)
    text = _to_json(given, subject, limit_bytes=limit_bytes)
    if signature is not None:
        _fit(text, signature, subject, given=given)
    return text


def decode_data(text: str, signature: Signature, *, name: str, secret: Collection[str] = ()) -> dict[str, Any]:
    """Return the keyword arguments for a body: the keys in *text* only, typed by the body's annotations.

    Args:
        text: A row's data, by whomever it was written.
        signature: The body's.
        name: The task's name, for messages.
        secret: Keys whose values no message may show.

    Raises:
        DataInvalid: *text* is not JSON, not a JSON object, or does not fit the signature.
    """
    return _fit(text, signature, _Subject(f"data for {name}", secret))


def encode_result(value: object, *, limit_bytes: int) -> str:
    """Return what a body returned as JSON text; None is "null".

    Args:
        value: What the body returned.
        limit_bytes: The most that the UTF-8 text may take (data_max_bytes).

    Raises:
        DataInvalid: Not JSON, NaN, infinity, a lone surrogate, or nested deeper than DEPTH_MAX.
        DataTooLarge: The text would exceed *limit_bytes*.
    """
    return _to_json(value, _Subject("the result"), limit_bytes=limit_bytes)


def decode_value(text: str | None) -> Any:  # noqa: ANN401 - JSON holds any of six kinds
    """Return what *text* holds, as plain Python values; None (no text) is None.

    Raises:
        DataInvalid: *text* is not JSON.
    """
    return None if text is None else _parse(text, _Subject("the stored value"))


def mask(data: Mapping[str, Any], secret: Collection[str]) -> dict[str, Any]:
    """Return a copy of *data* with "***" for the values of *secret* keys, at any depth."""
    return {key: MASK if key in secret else _masked(value, secret) for key, value in data.items()}


def _masked(value: object, secret: Collection[str]) -> object:
    if isinstance(value, Mapping):
        return mask(value, secret)
    if isinstance(value, (list, tuple)):
        return [_masked(item, secret) for item in value]
    return value


# A body's signature


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
        foreign = [info.cls for info in _types_in(read) if isinstance(info, msgspec.inspect.CustomType)]
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


def _types_in(hint: object) -> Iterator[msgspec.inspect.Type]:
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


# From Python to JSON


class _FaultError(Exception):
    """What keeps a value from being JSON, found by the walk over it."""

    def __init__(self, steps: _Steps, told: str) -> None:
        super().__init__(told)
        self.steps = steps
        self.told = told


@dataclass(frozen=True, slots=True)
class _Subject:
    """What messages speak of, and which of its keys they keep to themselves."""

    words: str
    secret: Collection[str] = ()

    def refused(self, steps: _Steps, told: str) -> DataInvalid:
        path = self.path(steps)
        return DataInvalid(f"{self.words} is invalid: {path} {told}", field=path)

    def path(self, steps: _Steps) -> str:
        """Return "$.ids[0]"; it ends at a secret key, below which keys are secrets too."""
        path = "$"
        for step in steps:
            if isinstance(step, int):
                path += f"[{step}]"
            else:
                path += f".{step}" if step.isidentifier() else f"[{_short(step)}]"
            if step in self.secret:
                break
        return path


def _as_dict(data: object, subject: _Subject) -> dict[str, object]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        told = f"must be a mapping of the body's parameters, but is a {type(data).__qualname__}"
        raise subject.refused((), told)
    for key in data:
        if not isinstance(key, str):
            raise subject.refused((), f"must have str keys, but has the {type(key).__qualname__} {_short(key)}")
    return dict(data)


def _to_json(value: object, subject: _Subject, *, limit_bytes: int) -> str:
    try:
        plain = _plain(value)
        _walk(plain)
        text = msgspec.json.encode(plain)
    except RecursionError:
        raise subject.refused(_deep_step(value), _TOO_DEEP) from None
    except _FaultError as fault:
        raise subject.refused(fault.steps, fault.told) from None
    except (TypeError, ValueError, OverflowError) as error:
        steps, told = _culprit(value) or ((), f"cannot be held by JSON: {error}")
        raise subject.refused(steps, told) from None
    if len(text) > limit_bytes:
        found, allowed = compared(len(text), limit_bytes)
        raise DataTooLarge(
            f"{subject.words} is too large: {found}, but data_max_bytes allows {allowed}; "
            "keep the bulk elsewhere and pass where it is, or raise data_max_bytes",
            size_bytes=len(text),
            limit_bytes=limit_bytes,
        )
    return text.decode()


def _plain(value: object) -> object:
    return msgspec.to_builtins(value, str_keys=True, enc_hook=_without_subclass)


def _without_subclass(value: object) -> object:
    """Return a str, int or float for an instance of their subclasses, which msgspec leaves to its user."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError


_TOO_DEEP = f"is nested deeper than {DEPTH_MAX} levels, or refers to itself"


def _walk(plain: object) -> None:
    """Raise _FaultError where *plain* is not what JSON can hold: msgspec writes NaN as null, without a word.

    Level by level, so that depth is counted and costs no recursion.
    """
    kind = type(plain)
    if kind not in _CONTAINERS | _INERT and (told := _leaf_fault(plain)):
        raise _FaultError((), told)
    level: list[tuple[_Steps, Any]] = [((), plain)] if kind in _CONTAINERS else []
    for _ in range(DEPTH_MAX):
        if not level:
            return
        level = [deeper for steps, container in level for deeper in _look_at(steps, container)]
    if level:
        raise _FaultError(level[0][0][:1], _TOO_DEEP)


_Container = dict[str, object] | list[object] | tuple[object, ...]


def _look_at(steps: _Steps, container: _Container) -> list[tuple[_Steps, Any]]:
    """Return the containers directly inside *container*, having checked its leaves and keys."""
    found: list[tuple[_Steps, Any]] = []
    pairs: Any = container.items() if isinstance(container, dict) else enumerate(container)
    for step, item in pairs:
        kind = type(item)
        if kind in _CONTAINERS:
            found.append(((*steps, step), item))
        elif kind not in _INERT and (told := _leaf_fault(item)):
            raise _FaultError((*steps, step), told)
        if type(step) is str and not step.isascii() and _leaf_fault(step):
            raise _FaultError((*steps, step), "has a key that holds a lone surrogate")
    return found


def _leaf_fault(item: object) -> str | None:
    if isinstance(item, float):
        return None if math.isfinite(item) else f"is {item}, which JSON cannot hold"
    if not isinstance(item, str):
        return _foreign(item)
    if item.isascii():
        return None
    try:
        item.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at character {error.start}, which is no Unicode text"
    return None


def _foreign(value: object) -> str:
    return f"is a {type(value).__qualname__}, which JSON cannot hold; pass plain values, or an id to load it by"


def _culprit(value: object) -> tuple[_Steps, str] | None:
    """Return where msgspec met what it cannot encode and what it is, or None if it can encode *value*."""
    try:
        _plain(value)
    except (TypeError, ValueError, OverflowError):
        for step, child in _children(value):
            if found := _culprit(child):
                return (step, *found[0]), found[1]
        told = _foreign(value)
        return (), "has a key that is neither text nor a number" if isinstance(value, dict) else told
    return None


def _deep_step(value: object) -> _Steps:
    """Return the first step towards what is nested too deeply."""
    for step, child in _children(value):
        try:
            _plain(child)
        except RecursionError:
            return (step,)
    return ()


def _children(value: object) -> Iterator[tuple[str | int, object]]:
    if isinstance(value, Mapping):
        yield from ((key if isinstance(key, int) else str(key), child) for key, child in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from enumerate(value)
    elif is_dataclass(value):
        yield from ((field.name, getattr(value, field.name, None)) for field in fields(value))
    elif isinstance(value, msgspec.Struct):
        yield from ((name, getattr(value, name)) for name in value.__struct_fields__)


# From JSON to Python


def _parse(text: str, subject: _Subject) -> Any:  # noqa: ANN401 - JSON holds any of six kinds
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, TypeError) as error:
        raise subject.refused((), f"is not JSON: {_why_malformed(error)}") from None
    except RecursionError:
        raise subject.refused((), _TOO_DEEP) from None


def _why_malformed(error: Exception) -> str:
    """Return a cause without the text itself, which may hold secrets."""
    return "it holds a lone surrogate" if isinstance(error, UnicodeError) else str(error)


def _fit(text: str, signature: Signature, subject: _Subject, *, given: object = None) -> dict[str, Any]:
    """Return *text* as keyword arguments; *given* is what it was encoded from, where it is at hand."""
    try:
        struct = signature.decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _Misfit(str(error), _parse(text, subject), signature, subject, given).told() from None
    except (msgspec.DecodeError, UnicodeError, TypeError, RecursionError):
        _parse(text, subject)
        raise subject.refused((), "cannot be decoded") from None
    known = {
        name: value
        for name, attribute in signature.attributes.items()
        if (value := getattr(struct, attribute)) is not msgspec.UNSET
    }
    extra = _extra(text, signature, subject) if signature.accepts_extra else {}
    if extra and signature.extra_hint not in (Any, object):
        return _fit(text, signature.with_extra(extra), subject, given=given)
    return known | extra


def _extra(text: str, signature: Signature, subject: _Subject) -> dict[str, Any]:
    extra = {key: value for key, value in _parse(text, subject).items() if key not in signature.attributes}
    if signature.self_name is not None and signature.self_name in extra:
        raise subject.refused((signature.self_name,), "is the body's own instance, not data")
    return extra


@dataclass(slots=True)
class _Misfit:
    """One sentence of msgspec's about data that does not fit, and what it leaves out: the value and its key."""

    sentence: str
    tree: Any
    signature: Signature
    subject: _Subject
    given: object

    def told(self) -> DataInvalid:
        match = _MESSAGE.fullmatch(self.sentence)
        what, path, about_key = (match["what"], match["path"] or "$", match["key"]) if match else ("", "$", None)
        steps = self._steps(path + _ANY_KEY if about_key else path)
        if any(step in self.subject.secret for step in steps):
            return self.subject.refused(steps, self._mismatch("", steps, about_key=False))
        if missing := _MISSING.fullmatch(what):
            steps = (*steps, missing[1])
            return self.subject.refused(steps, f"is missing{self._declared(steps)}")
        if unknown := _UNKNOWN.fullmatch(what):
            return self.subject.refused((*steps, unknown[1]), self._unknown(unknown[1], top=not steps))
        return self.subject.refused(steps, self._mismatch(what, steps, about_key=bool(about_key)))

    def _steps(self, path: str) -> _Steps:
        steps: _Steps = ()
        for step in _PATH_STEP.finditer(path):
            if step["any_key"]:
                steps = (*steps, self._key_at_fault(_at(self.tree, steps)))
            else:
                steps = (*steps, step["name"] or int(step["index"]))
        return steps

    def _key_at_fault(self, mapping: object) -> str:
        """Return the first key with which the decoder says what it said; by halving, as mappings may be large."""
        if not isinstance(mapping, dict):
            return "..."
        pairs = list(mapping.items())

        def refused_with(count: int) -> bool:
            mapping.clear()
            mapping.update(pairs[:count])
            try:
                self.signature.decoder.decode(msgspec.json.encode(self.tree))
            except msgspec.ValidationError as error:
                return str(error) == self.sentence
            return False

        index = bisect_left(range(1, len(pairs) + 1), True, key=refused_with)
        mapping.update(pairs)
        return str(pairs[index][0]) if index < len(pairs) else "..."

    def _unknown(self, key: str, *, top: bool) -> str:
        if not top:
            return "is not a known field"
        near = get_close_matches(key, self.signature.hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(self.signature.hints) or "none"
        return f"is not a parameter of the body{hint} (its parameters: {known})"

    def _mismatch(self, what: str, steps: _Steps, *, about_key: bool) -> str:
        came = f"{self._came(steps, about_key=about_key)} came{self._declared(steps)}"
        must = "must have a key that is" if about_key else "must be"
        if wanted := _EXPECTED.fullmatch(what):
            return f"{must} {_in_python(wanted[1])}, but {came}"
        if wanted := _INVALID.fullmatch(what):
            return f"{must} a valid {wanted[1]}, but {came}"
        if what.startswith("Invalid enum value"):
            return f"{must} {self._choices(steps)}, but {came}"
        expected = self._hint_of(steps)
        reason = "" if self._hides(steps) or not what else f": {what}"  # a validator's text may quote a secret
        return f"{must} {expected}, but {came}{reason}"

    def _hint_of(self, steps: _Steps) -> str:
        if steps and steps[0] in self.signature.hints:
            return inspect.formatannotation(self.signature.hints[str(steps[0])])
        return "a mapping of the body's parameters"

    def _declared(self, steps: _Steps) -> str:
        return f" ({steps[0]}: {self._hint_of(steps)})" if steps else ""

    def _choices(self, steps: _Steps) -> str:
        """Return the allowed values, if the parameter's hint has only one set of them."""
        enums = [
            tuple(member.value for member in info.cls) if isinstance(info, msgspec.inspect.EnumType) else info.values
            for info in _types_in(self.signature.hints[str(steps[0])])
            if isinstance(info, (msgspec.inspect.EnumType, msgspec.inspect.LiteralType))
        ]
        return "one of " + ", ".join(map(repr, enums[0])) if len(enums) == 1 else "one of the allowed values"

    def _hides(self, steps: _Steps) -> bool:
        secret = self.subject.secret
        value = _at(self.tree, steps)
        return bool(secret) and (not steps or any(step in secret for step in steps) or _masked(value, secret) != value)

    def _came(self, steps: _Steps, *, about_key: bool) -> str:
        if about_key:
            return f"str {_short(steps[-1])}"
        value = _at(self.tree, steps)
        given = value if self.given is None else _at(self.given, steps, otherwise=value)
        if given is None:
            return "None"
        hidden = not steps or any(step in self.subject.secret for step in steps)
        shown = MASK if self.subject.secret and hidden else _short(_masked(value, self.subject.secret))
        return f"{type(given).__qualname__} {shown}"


def _at(value: Any, steps: _Steps, *, otherwise: object = None) -> Any:  # noqa: ANN401 - of any kind
    try:
        for step in steps:
            value = value[step] if isinstance(value, _INDEXED) else getattr(value, str(step))
    except (LookupError, AttributeError, TypeError):
        return otherwise
    return value


def _in_python(wanted: str) -> str:
    """Return msgspec's "`array | null` of length 2" in Python's words."""
    return re.sub(
        r"`([^`]*)`", lambda found: re.sub(r"\w+", lambda word: _PYTHON_WORDS.get(word[0], word[0]), found[1]), wanted
    )


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_MAX else shown[: SHOWN_MAX - 3] + "..."
