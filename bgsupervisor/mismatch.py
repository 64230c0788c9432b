"""Messages about data that does not fit a body, without its secrets."""

from __future__ import annotations

import inspect
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import msgspec

from bgsupervisor.errors import DataInvalid
from bgsupervisor.signatures import Signature, types_in

__all__ = ["Misfit", "Steps", "Subject", "mask", "masked_value", "short"]

SHOWN_MAX = 60
"""Characters of a refused value that a message shows."""
MASK = "***"
Steps = tuple[str | int, ...]
_ANY_KEY = "[...]"  # msgspec's word for "below some key of a mapping"
_PYTHON_WORDS = {"array": "list", "object": "dict", "null": "None"}
_INDEXED: tuple[type[Any], ...] = (Mapping, list, tuple)
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`(?P<path>\$[^`]*)`)?", re.DOTALL)
_PATH_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]|(?P<any_key>\[\.\.\.\])")
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_EXPECTED = re.compile(r"Expected (`[^`]+`.*?)(?:, got `\w+`)?", re.DOTALL)
_INVALID = re.compile(r"Invalid (UUID|RFC3339 encoded \w+|ISO8601 duration|decimal string|base64 encoded string)")


def mask(data: Mapping[str, Any], secret: Collection[str]) -> dict[str, Any]:
    """Return a copy of *data* with "***" for the values of *secret* keys, at any depth."""
    return {key: MASK if key in secret else masked_value(value, secret) for key, value in data.items()}


def masked_value(value: object, secret: Collection[str]) -> object:
    """Return a copy of any value, as `mask` does."""
    if isinstance(value, Mapping):
        return mask(value, secret)
    if isinstance(value, (list, tuple)):
        return [masked_value(item, secret) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of messages, and the keys whose values they never show."""

    words: str
    secret: Collection[str] = ()

    def refused(self, steps: Steps, detail: str) -> DataInvalid:
        """Return the error for the value at *steps*."""
        path = self.path(steps)
        return DataInvalid(f"{self.words} is invalid: {path} {detail}", field=path)

    def path(self, steps: Steps) -> str:
        """Return "$.ids[0]"; it ends at a secret key, below which keys are secrets too."""
        path = "$"
        for step in steps:
            if isinstance(step, int):
                path += f"[{step}]"
            else:
                path += f".{step}" if step.isidentifier() else f"[{short(step)}]"
            if step in self.secret:
                break
        return path


@dataclass(slots=True)
class Misfit:
    """One sentence of msgspec's about data that does not fit, and what it leaves out: the value and its key."""

    sentence: str
    tree: Any
    signature: Signature
    subject: Subject
    given: object

    def error(self) -> DataInvalid:
        """Return the error: the path, the expected type and the value that came."""
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

    def _steps(self, path: str) -> Steps:
        steps: Steps = ()
        for step in _PATH_STEP.finditer(path):
            if step["any_key"]:
                steps = (*steps, self._key_at_fault(_at(self.tree, steps)))
            else:
                steps = (*steps, step["name"] or int(step["index"]))
        return steps

    def _key_at_fault(self, mapping: object) -> str:
        """Return the first key with which the decoder raises its message; by halving, as mappings may be large."""
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

    def _mismatch(self, what: str, steps: Steps, *, about_key: bool) -> str:
        came = f"{self._received(steps, about_key=about_key)} came{self._declared(steps)}"
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

    def _hint_of(self, steps: Steps) -> str:
        if steps and steps[0] in self.signature.hints:
            return inspect.formatannotation(self.signature.hints[str(steps[0])])
        return "a mapping of the body's parameters"

    def _declared(self, steps: Steps) -> str:
        return f" ({steps[0]}: {self._hint_of(steps)})" if steps else ""

    def _choices(self, steps: Steps) -> str:
        """Return the allowed values, if the parameter's hint has only one set of them."""
        enums = [
            tuple(member.value for member in info.cls) if isinstance(info, msgspec.inspect.EnumType) else info.values
            for info in types_in(self.signature.hints[str(steps[0])])
            if isinstance(info, (msgspec.inspect.EnumType, msgspec.inspect.LiteralType))
        ]
        return "one of " + ", ".join(map(repr, enums[0])) if len(enums) == 1 else "one of the allowed values"

    def _hides(self, steps: Steps) -> bool:
        secret = self.subject.secret
        value = _at(self.tree, steps)
        return bool(secret) and (
            not steps or any(step in secret for step in steps) or masked_value(value, secret) != value
        )

    def _received(self, steps: Steps, *, about_key: bool) -> str:
        if about_key:
            return f"str {short(steps[-1])}"
        value = _at(self.tree, steps)
        given = value if self.given is None else _at(self.given, steps, otherwise=value)
        if given is None:
            return "None"
        hidden = not steps or any(step in self.subject.secret for step in steps)
        shown = MASK if self.subject.secret and hidden else short(masked_value(value, self.subject.secret))
        return f"{type(given).__qualname__} {shown}"


def _at(value: Any, steps: Steps, *, otherwise: object = None) -> Any:  # noqa: ANN401 - of any kind
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


def short(value: object) -> str:
    """Return a value as Python writes it, at most SHOWN_MAX characters."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN_MAX else shown[: SHOWN_MAX - 3] + "..."
