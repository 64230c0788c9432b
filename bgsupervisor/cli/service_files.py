"""The entries that keep a supervisor alive: the shipped templates of cron and systemd, filled in.

Paths go in as they were named, never resolved, so that a `current` link to the newest release stays one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.display.output import warn
from bgsupervisor.environment import working_folder
from bgsupervisor.errors import ConfigError
from bgsupervisor.system.users import user_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.config import Config

__all__ = [
    "CRONTAB",
    "CRON_D",
    "UNIT",
    "Installation",
    "check_user",
    "cron_quoted",
    "fill",
    "is_of",
    "marker",
    "replace_file",
    "unit_quoted",
    "user_option",
]

CRONTAB, CRON_D, UNIT = "cron/bgsupervisor.crontab", "cron/bgsupervisor.cron.d", "systemd/bgsupervisor.service"

# Examples in the templates that `fill` replaces.
_EXAMPLE_COMMAND = "/srv/myapp/venv/bin/bgsupervisor"
_EXAMPLE_CONFIG = "/srv/myapp/current/bgsupervisor.toml"
_EXAMPLE_USER = "deploy"

_SCRIPT = "bgsupervisor"
_UNIT_SAFE = re.compile(r"[\w@%+:,./-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Installation:
    """What an entry names.

    Attributes:
        command: The words that start this program.
        config: The configuration file, absolute.
        state_dir: The state directory.
        owner: The user to supervise as: the state directory's owner, or the configuration file's before that exists.
    """

    command: tuple[str, ...]
    config: Path
    state_dir: Path
    owner: str

    @classmethod
    def of(cls, config: Config, *, warns: bool = True) -> Installation:
        """Return what an entry for a configuration names; warn of settings that it would lack.

        Raises:
            ConfigError: There is no configuration file, or a path cannot stand in an entry.
        """
        if config.path is None:
            raise ConfigError(
                "an entry needs a configuration file to name; write one with `bgsupervisor init`, "
                "because cron and systemd do not have this environment"
            )
        here = ", ".join(key for key, origin in config.origins.items() if re.fullmatch(r"environment \w+", origin))
        if here and warns:
            missing = f"{here} came from the environment, which cron and systemd do not have"
            warn(f"warning: {missing}; write it into {config.path}, or into its env_file")
        found = cls(_command(), config.path, config.state_dir, _owner(config.state_dir, config.path))
        for text in (*found.command, str(found.config)):
            if not text.isprintable():
                raise ConfigError(f"the path {text!r} cannot stand in an entry; rename it")
        return found


def marker(config: Path) -> str:
    """Return the comment by which an entry for a configuration is found again."""
    return f"# bgsupervisor: {config}"


def fill(template: str, found: Installation, user: str, quote: Callable[[str], str]) -> str:
    """Return a template with the paths and the user of an installation in place of the examples.

    Args:
        template: CRONTAB, CRON_D or UNIT.
        found: What to name.
        user: The user to supervise as.
        quote: Quotes any text as one word; comments are not quoted.
    """
    examples = {_EXAMPLE_COMMAND: found.command, _EXAMPLE_CONFIG: (str(found.config),), _EXAMPLE_USER: (user,)}

    def filled(line: str) -> str:
        is_comment = line.startswith("#")  # in which the user's name is an ordinary word
        written = str if is_comment else quote
        there = [re.escape(example) for example in examples if not (is_comment and example == _EXAMPLE_USER)]
        return re.sub("|".join(there), lambda example: " ".join(written(word) for word in examples[example[0]]), line)

    return "".join(f"{filled(line)}\n" for line in _text(template).splitlines())


def cron_quoted(word: str) -> str:
    r"""Return *word* for a crontab's command: quoted for the shell, and with a backslash before each %.

    cron removes that backslash before the shell sees it, but not one that another backslash precedes.
    """
    return shlex.quote(word).replace("\\%", "\\''%").replace("%", "\\%")


def unit_quoted(word: str) -> str:
    """Return *word* for a unit's command line: % and $ are doubled, other special characters are quoted."""
    text = word.replace("%", "%%").replace("$", "$$")
    if _UNIT_SAFE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def user_option(help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option --user of the commands that write entries."""
    return click.option("--user", metavar="NAME", callback=_check_word, help=help)


def check_user(user: str) -> None:
    """Refuse a user that this machine does not have; cron and systemd would fail silently."""
    import pwd  # noqa: PLC0415 - absent on Windows, where this module must import

    try:
        pwd.getpwnam(user)
    except KeyError:
        raise click.BadParameter(f"this machine has no user {user}", param_hint="--user") from None


def is_of(path: Path, found: Installation) -> bool:
    """Return whether a file is an entry of this installation.

    Raises:
        OSError: It cannot be read.
    """
    return marker(found.config) in path.read_text(encoding="utf-8", errors="replace").splitlines()


def replace_file(path: Path, text: str, found: Installation) -> None:
    """Write an entry's file in one step, 0644 whatever the umask, in place of an older one of this installation.

    Raises:
        ConfigError: A file of that name is another installation's, or not ours.
        OSError: It cannot be written.
    """
    if path.exists() and not is_of(path, found):
        raise ConfigError(
            f"{path} is not of {found.config} and was not changed; print this entry without --install, "
            "and write it under another name"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _text(template: str) -> str:
    """Return a template; an installed package holds it, a working copy has it beside the package."""
    package = Path(__file__).parents[1]
    installed = package / "_deploy" / template
    return (installed if installed.exists() else package.parent / template).read_text(encoding="utf-8")


def _command() -> tuple[str, ...]:
    """Return the console script, by the name it was called by where that is a path; else Python and our module."""
    script = Path(sys.executable).with_name(_SCRIPT)
    if not script.is_file():
        return (sys.executable, "-m", "bgsupervisor")
    called = Path(os.path.normpath(working_folder() / sys.argv[0]))
    is_script = called.name == _SCRIPT and called.is_file() and called.samefile(script)
    return (str(called if is_script else script),)


def _owner(state_dir: Path, config: Path) -> str:
    with contextlib.suppress(OSError):
        return user_name(state_dir.stat().st_uid)
    return user_name(config.stat().st_uid)


def _check_word(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001 - click's
    if value is not None and not re.fullmatch(r"[\w.@-]+\$?", value):
        raise click.BadParameter(f"{value!r} is not a user's name")
    return value
