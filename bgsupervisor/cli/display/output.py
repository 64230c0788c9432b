"""Output of commands: JSON for programs on stdout, sentences for people on stderr."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from bgsupervisor.sanitize import clean, escaped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bgsupervisor.ipc.statedir import StopMark

__all__ = ["by", "counted", "jsonable", "print_json", "say", "stopped_by", "to_json", "warn"]


def print_json(value: object) -> None:
    """Print *value* as indented JSON that cannot control a terminal."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # half a surrogate pair, as in the path of a file that is not UTF-8
        text = json.dumps(msgspec.to_builtins(value), indent=2)
    click.echo(escaped(text))


def to_json(value: Any) -> Any:  # noqa: ANN401 - columns hold several kinds
    """Return a column's value as JSON has it; moments in UTC."""
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def jsonable(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns as JSON has them."""
    return {name: to_json(value) for name, value in columns.items()}


def say(text: str, *, err: bool = False) -> None:
    """Print lines that may hold text of others; each is cleaned."""
    click.echo("\n".join(map(clean, text.split("\n"))), err=err)


def warn(sentence: str) -> None:
    """Print a sentence on stderr, beside the output that was requested."""
    click.echo(clean(sentence), err=True)


def by(user: str | None) -> str:
    """Return " by jana", or "" for a user that is not known."""
    return f" by {clean(user)}" if user else ""


def counted(count: int, noun: str) -> str:
    """Return "1 task" or "2 tasks"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def stopped_by(mark: StopMark) -> str:
    """Return the sentence about a stop that stands."""
    return f"stopped by {mark.by} at {mark.at}; `bgsupervisor start` allows it again"
