"""`bgsupervisor check`: the configuration with the origin of each value, and whether the task modules load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from bgsupervisor.cli.display.output import counted, print_json, say, warn
from bgsupervisor.cli.display.traces import folded
from bgsupervisor.cli.load_check import load_apart
from bgsupervisor.cli.session import Session, json_option, pass_session
from bgsupervisor.config import remarks
from bgsupervisor.sanitize import clean
from bgsupervisor.sizes import number, size

if TYPE_CHECKING:
    from bgsupervisor.cli.load_check import Answer
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import LoadFailure

__all__ = ["check"]

LOAD_LIMIT_S = 120.0
"""Longest wait for the application to load, in seconds."""


@click.command()
@click.option("--full", is_flag=True, help="Every frame of a traceback, also those of libraries.")
@json_option("One object.")
@pass_session
def check(session: Session, *, full: bool, as_json: bool) -> None:
    """Show the configuration, load the modules.

    Each value is followed by where it came from. The modules are loaded in a process of its own, as the fork server
    would. Leaves with 1 if one fails or may cost data, or none is named.
    """
    config = session.config()
    if not as_json:
        _print_configuration(config)
    answer = load_apart(config, limit_s=LOAD_LIMIT_S)
    answer = msgspec.structs.replace(answer, warnings=[*remarks(config), *answer.warnings])
    if as_json:
        print_json(_object(config, answer))
    else:
        _print_tasks(answer)
    for danger in answer.dangers:
        warn(f"DANGER: {danger}")
    for warning in answer.warnings:
        warn(f"warning: {warning}")
    for failure in () if as_json else answer.failures:
        _print_failure(failure, config, full=full)
    raise click.exceptions.Exit(bool(answer.failures or answer.dangers) or not config.tasks)


def _print_configuration(config: Config) -> None:
    rows = config.describe()
    names = max(len(name) for name, _, _ in rows)
    for name, value, origin in rows:
        say(f"{name:<{names}} = {clean(msgspec.json.encode(value).decode())}  ({origin})")


def _print_tasks(answer: Answer) -> None:
    say(f"\n{counted(len(answer.tasks), 'task')}")
    for name, options in sorted(answer.tasks.items()):
        text = ", ".join(f"{key} {_option(key, value)}" for key, value in msgspec.to_builtins(options).items())
        say(f"  {clean(name)}{f'  ({clean(text)})' if text else ''}")


def _option(key: str, value: Any) -> str:  # noqa: ANN401 - options are of several kinds
    if key.endswith("_bytes"):
        return size(value)
    return " and ".join(value) if isinstance(value, tuple | list) else number(value)


def _print_failure(failure: LoadFailure, config: Config, *, full: bool) -> None:
    warn(f"{failure.kind} {failure.module} failed to load:")
    text = failure.error.rstrip()
    for line in (text if full else folded(text, config)).splitlines():
        say(f"  {line}", err=True)


def _object(config: Config, answer: Answer) -> dict[str, Any]:
    return {
        "config": {name: {"value": value, "origin": origin} for name, value, origin in config.describe()},
        **msgspec.to_builtins(answer),
    }
