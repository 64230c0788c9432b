"""Data and results as JSON text, checked against a body's signature; knows no database and no process."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

import msgspec

from bgsupervisor.errors import DataTooLarge
from bgsupervisor.mismatch import Misfit, Steps, Subject, short
from bgsupervisor.sizes import compared

if TYPE_CHECKING:
    from bgsupervisor.signatures import Signature

__all__ = ["NESTING_MAX", "decode_data", "decode_value", "encode_data", "encode_result"]

NESTING_MAX = 200
"""Levels of lists and mappings in data and results; far below the recursion limit of their decoders."""


_INERT = frozenset({int, bool, NoneType})
_CONTAINERS = frozenset({dict, list, tuple})


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
            surrogate, nested deeper than NESTING_MAX, or no fit for the signature.
        DataTooLarge: The text would exceed *limit_bytes*.
    """
    subject = Subject(f"data for {name}", secret)
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
    return _fit(text, signature, Subject(f"data for {name}", secret))


def encode_result(value: object, *, limit_bytes: int) -> str:
    """Return what a body returned as JSON text; None is "null".

    Args:
        value: What the body returned.
        limit_bytes: The most that the UTF-8 text may take (data_max_bytes).

    Raises:
        DataInvalid: Not JSON, NaN, infinity, a lone surrogate, or nested deeper than NESTING_MAX.
        DataTooLarge: The text would exceed *limit_bytes*.
    """
    return _to_json(value, Subject("the result"), limit_bytes=limit_bytes)


def decode_value(text: str | None) -> Any:  # noqa: ANN401 - JSON holds any of six kinds
    """Return what *text* holds, as plain Python values; None (no text) is None.

    Raises:
        DataInvalid: *text* is not JSON.
    """
    return None if text is None else _parse(text, Subject("the stored value"))


# A body's signature


# From Python to JSON


class _FaultError(Exception):
    """The cause why a value is no JSON, found by the walk over it."""

    def __init__(self, steps: Steps, detail: str) -> None:
        super().__init__(detail)
        self.steps = steps
        self.detail = detail


def _as_dict(data: object, subject: Subject) -> dict[str, object]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        detail = f"must be a mapping of the body's parameters, but is a {type(data).__qualname__}"
        raise subject.refused((), detail)
    for key in data:
        if not isinstance(key, str):
            raise subject.refused((), f"must have str keys, but has the {type(key).__qualname__} {short(key)}")
    return dict(data)


def _to_json(value: object, subject: Subject, *, limit_bytes: int) -> str:
    try:
        plain = _plain(value)
        _walk(plain)
        text = msgspec.json.encode(plain)
    except RecursionError:
        raise subject.refused(_deep_step(value), _TOO_DEEP) from None
    except _FaultError as fault:
        raise subject.refused(fault.steps, fault.detail) from None
    except (TypeError, ValueError, OverflowError) as error:
        steps, detail = _culprit(value) or ((), f"cannot be held by JSON: {error}")
        raise subject.refused(steps, detail) from None
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


_TOO_DEEP = f"is nested deeper than {NESTING_MAX} levels, or refers to itself"


def _walk(plain: object) -> None:
    """Raise _FaultError where *plain* is no JSON: msgspec silently writes NaN as null.

    Level by level, so that depth is counted and costs no recursion.
    """
    kind = type(plain)
    if kind not in _CONTAINERS | _INERT and (detail := _leaf_fault(plain)):
        raise _FaultError((), detail)
    level: list[tuple[Steps, Any]] = [((), plain)] if kind in _CONTAINERS else []
    for _ in range(NESTING_MAX):
        if not level:
            return
        level = [deeper for steps, container in level for deeper in _check_items(steps, container)]
    if level:
        raise _FaultError(level[0][0][:1], _TOO_DEEP)


_Container = dict[str, object] | list[object] | tuple[object, ...]


def _check_items(steps: Steps, container: _Container) -> list[tuple[Steps, Any]]:
    """Return the containers directly inside *container*, having checked its leaves and keys."""
    found: list[tuple[Steps, Any]] = []
    pairs: Any = container.items() if isinstance(container, dict) else enumerate(container)
    for step, item in pairs:
        kind = type(item)
        if kind in _CONTAINERS:
            found.append(((*steps, step), item))
        elif kind not in _INERT and (detail := _leaf_fault(item)):
            raise _FaultError((*steps, step), detail)
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


def _culprit(value: object) -> tuple[Steps, str] | None:
    """Return where msgspec met what it cannot encode and what it is, or None if it can encode *value*."""
    try:
        _plain(value)
    except (TypeError, ValueError, OverflowError):
        for step, child in _children(value):
            if found := _culprit(child):
                return (step, *found[0]), found[1]
        detail = _foreign(value)
        return (), "has a key that is neither text nor a number" if isinstance(value, dict) else detail
    return None


def _deep_step(value: object) -> Steps:
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


def _parse(text: str, subject: Subject) -> Any:  # noqa: ANN401 - JSON holds any of six kinds
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, TypeError) as error:
        raise subject.refused((), f"is not JSON: {_why_malformed(error)}") from None
    except RecursionError:
        raise subject.refused((), _TOO_DEEP) from None


def _why_malformed(error: Exception) -> str:
    """Return a cause without the text itself, which may hold secrets."""
    return "it holds a lone surrogate" if isinstance(error, UnicodeError) else str(error)


def _fit(text: str, signature: Signature, subject: Subject, *, given: object = None) -> dict[str, Any]:
    """Return *text* as keyword arguments; *given* is what it was encoded from, where it is at hand."""
    try:
        struct = signature.decoder.decode(text)
    except msgspec.ValidationError as error:
        raise Misfit(str(error), _parse(text, subject), signature, subject, given).error() from None
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


def _extra(text: str, signature: Signature, subject: Subject) -> dict[str, Any]:
    extra = {key: value for key, value in _parse(text, subject).items() if key not in signature.attributes}
    if signature.self_name is not None and signature.self_name in extra:
        raise subject.refused((signature.self_name,), "is the body's own instance, not data")
    return extra
