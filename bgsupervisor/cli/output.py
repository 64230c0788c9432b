"""How commands speak: JSON for programs on stdout, sentences for people on stderr."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from bgsupervisor.cli.text import clean

__all__ = ["print_json", "to_json", "warn"]


def print_json(value: object) -> None:
    """Print *value* as JSON that people can read too."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def to_json(value: Any) -> Any:  # noqa: ANN401 - columns hold several kinds
    """Return a column's value as JSON has it; moments in UTC."""
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def warn(sentence: str) -> None:
    """Say something on stderr that is no part of what was asked for."""
    click.echo(clean(sentence), err=True)
