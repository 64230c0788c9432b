"""How commands speak: JSON for programs on stdout, sentences for people on stderr."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from bgsupervisor.sanitize import clean, escaped

__all__ = ["print_json", "say", "to_json", "warn"]


def print_json(value: object) -> None:
    """Print *value* as JSON that people can read too, and that steers no terminal."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # half a surrogate pair, as the path of a file that is no UTF-8 has it
        text = json.dumps(msgspec.to_builtins(value), indent=2)
    click.echo(escaped(text))


def to_json(value: Any) -> Any:  # noqa: ANN401 - columns hold several kinds
    """Return a column's value as JSON has it; moments in UTC."""
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def say(text: str, *, err: bool = False) -> None:
    """Print lines of ours that may hold text of others; each is cleaned."""
    click.echo("\n".join(map(clean, text.split("\n"))), err=err)


def warn(sentence: str) -> None:
    """Say something on stderr that is no part of what was asked for."""
    click.echo(clean(sentence), err=True)
