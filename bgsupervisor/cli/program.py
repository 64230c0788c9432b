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

__all__ = ["main", "program", "report_error"]

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 and the signal's number."""
EXIT_USAGE = 2
EXIT_PIPE_CLOSED = 1
"""The reader of our output has left, as `head` does; click uses the same code where it notices first."""

_COMMANDS = (
    *("init", "run", "dev", "ps", "show", "why", "log", "stack", "request", "cancel", "suspend", "resume", "retry"),
    *("stop", "start", "reload", "prune", "migrate", "health", "check", "doctor", "cron", "systemd"),
)
"""In the order of the help; each is imported when it is called or described."""
_MODULES = {
    **dict.fromkeys(("cancel", "suspend", "resume", "retry"), "acting"),
    **dict.fromkeys(("stop", "start", "reload"), "stopping"),
}
"""The modules of commands that share one; any other command has a module of its name."""


class _Commands(click.Group):
    """The commands of `_COMMANDS`; each also takes --config after its own name, where people expect it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the same
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"bgsupervisor.cli.commands.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, cmd_name)
        if all(param.name != "config" for param in command.params):
            command.params.append(config_option())
        return command


@click.group(cls=_Commands, params=[config_option()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bgsupervisor", message="%(prog)s %(version)s")
@click.pass_context
def program(ctx: click.Context) -> None:
    """Background tasks for a web app: request them, supervise them, see how they end."""
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
        message = io.StringIO()
        error.show(message)  # it quotes what was typed
        say(message.getvalue().rstrip("\n"), err=True)
        code = error.exit_code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_PIPE_CLOSED
        _silence_output()
    except BgSupervisorError as error:
        code = report_error(error)
    except UnicodeEncodeError:
        code = EXIT_USAGE
        click.echo("bgsupervisor: an argument is not valid text in this locale's encoding", err=True)
    except OSError as error:
        code = 1
        _silence_output()
        with suppress(OSError):
            warn(f"bgsupervisor: {error}")
    sys.exit(code if isinstance(code, int) else 0)


def report_error(error: BgSupervisorError) -> int:
    """Print on stderr what is wrong, in one sentence; return the exit code."""
    warn(f"bgsupervisor: {error}")
    return error.exit_code


def _open_standard_streams() -> None:
    """Open descriptors 0 to 2 that a caller has closed: files that we open later must not become them."""
    descriptors.open_standard()
    sys.stdin = sys.stdin or open(_standard(0), closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout = sys.stdout or open(_standard(1), "w", closefd=False)  # noqa: SIM115 - as above
    sys.stderr = sys.stderr or open(_standard(2), "w", closefd=False)  # noqa: SIM115 - as above


def _standard(number: int) -> int:
    """Return a descriptor in place of a standard one, where the caller has closed that."""
    return os.open(os.devnull, os.O_RDWR) if descriptors.is_taken(number) else number


def _silence_output() -> None:
    """Discard the interpreter's last flush, since the reader has gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
