"""`bgsupervisor init`: write a configuration to start from."""

from __future__ import annotations

from pathlib import Path

import click

from bgsupervisor.cli.display.output import say
from bgsupervisor.config import template
from bgsupervisor.config_files import FILE_NAME
from bgsupervisor.errors import ConfigError
from bgsupervisor.system.files import access_error

__all__ = ["init"]


@click.command()
def init() -> None:
    """Write a commented bgsupervisor.toml into this folder."""
    path = Path(FILE_NAME)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        raise ConfigError(f"{path.absolute()} exists already and was not changed; edit it, or move it away") from None
    except OSError as error:
        raise access_error(path.absolute(), "create", error, "choose another folder") from error
    say(f"wrote {path.absolute()}; name the modules of your tasks in it, and check it with `bgsupervisor check`")
    say("then start `bgsupervisor run`, and see your tasks with `bgsupervisor ps`")
