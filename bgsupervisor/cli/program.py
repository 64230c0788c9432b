"""The program: its commands, loaded when they are called, and how errors become one sentence and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys
from contextlib import suppress
from typing import NoReturn

import click

from bgsupervisor import __version__
from bgsupervisor.cli.display.output import say, warn
from bgsupervisor.cli.session import Session, config_option
from bgsupervisor.errors import BgSupervisorError
from bgsupervisor.system import descriptors

__all__ = ["main", "program", "tell_error"]

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 and the signal's number."""
EXIT_USAGE = 2
EXIT_PIPE_CLOSED = 1
"""Whoever read our output has left, as `head` does; click leaves so too where it is the first to notice."""

_COMMANDS = {
    "init": "bgsupervisor.cli.commands.init:init",
    "run": "bgsupervisor.cli.commands.run:run",
    "dev": "bgsupervisor.cli.commands.dev:dev",
    "ps": "bgsupervisor.cli.commands.ps:ps",
    "show": "bgsupervisor.cli.commands.show:show",
    "why": "bgsupervisor.cli.commands.why:why",
    "log": "bgsupervisor.cli.commands.log:log",
    "stack": "bgsupervisor.cli.commands.stack:stack",
    "request": "bgsupervisor.cli.commands.request:request",
    "cancel": "bgsupervisor.cli.commands.acting:cancel",
    "suspend": "bgsupervisor.cli.commands.acting:suspend",
    "resume": "bgsupervisor.cli.commands.acting:resume",
    "retry": "bgsupervisor.cli.commands.acting:retry",
    "stop": "bgsupervisor.cli.commands.stopping:stop",
    "start": "bgsupervisor.cli.commands.stopping:start",
    "reload": "bgsupervisor.cli.commands.stopping:reload",
    "prune": "bgsupervisor.cli.commands.prune:prune",
    "migrate": "bgsupervisor.cli.commands.migrate:migrate",
    "health": "bgsupervisor.cli.commands.health:health",
    "check": "bgsupervisor.cli.commands.check:check",
    "doctor": "bgsupervisor.cli.commands.doctor:doctor",
    "cron": "bgsupervisor.cli.commands.cron:cron",
    "systemd": "bgsupervisor.cli.commands.systemd:systemd",
}
"""In the order of the help; each is imported when it is called or described."""


class _Commands(click.Group):
    """The commands of `_COMMANDS`; each also takes --config after its own name, where people look for it first."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the same
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        if all(param.name != "config" for param in command.params):
            command.params.append(config_option())
        return command


@click.group(cls=_Commands, params=[config_option()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bgsupervisor", message="%(prog)s %(version)s")
@click.pass_context
def program(ctx: click.Context) -> None:
    """Background tasks for a web app: request them, supervise them, see what became of them."""
    ctx.ensure_object(Session)


def main() -> NoReturn:
    """Run the command that the arguments name, and leave with its exit code.

    0 is success, 1 a failure, 2 wrong usage, 3 configuration or schema, 130 Ctrl-C.
    """
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = program.main(prog_name="bgsupervisor", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)  # what was typed stands in it
        say(told.getvalue().rstrip("\n"), err=True)
        code = error.exit_code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_PIPE_CLOSED
        _silence_output()
    except BgSupervisorError as error:
        code = tell_error(error)
    except UnicodeEncodeError:
        code = EXIT_USAGE
        click.echo("bgsupervisor: an argument is no valid text in this locale's encoding", err=True)
    except OSError as error:
        code = 1
        _silence_output()
        with suppress(OSError):
            warn(f"bgsupervisor: {error}")
    sys.exit(code if isinstance(code, int) else 0)


def tell_error(error: BgSupervisorError) -> int:
    """Say on stderr what is wrong, in one sentence; return the exit code."""
    warn(f"bgsupervisor: {error}")
    return error.exit_code


def _open_standard_streams() -> None:
    """Have descriptors 0 to 2 lead somewhere: a caller may have closed them, and what we open must not become them."""
    descriptors.open_standard()
    sys.stdin = sys.stdin or open(_standard(0), closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout = sys.stdout or open(_standard(1), "w", closefd=False)  # noqa: SIM115 - as above
    sys.stderr = sys.stderr or open(_standard(2), "w", closefd=False)  # noqa: SIM115 - as above


def _standard(number: int) -> int:
    """Return a descriptor to read from or print to, where the caller has closed the usual one."""
    return os.open(os.devnull, os.O_RDWR) if descriptors.is_taken(number) else number


def _silence_output() -> None:
    """Have the interpreter's last flush go nowhere, since nobody reads any more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
