"""`bgsupervisor cron`: the entry by which cron keeps a supervisor alive."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import click

from bgsupervisor.cli.entries import (
    CRON_D,
    CRONTAB,
    Installation,
    check_user,
    cron_quoted,
    fill,
    replace_file,
    user_option,
)
from bgsupervisor.cli.output import warn
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.statedir import access_error, user_name

__all__ = ["cron"]

CRON_D_FOLDER = Path("/etc/cron.d")
CRONTAB_LIMIT_S = 30.0
"""The crontab program copies a small file."""
_NO_CRONTAB = re.compile("no crontab|no such file", re.IGNORECASE)
"""What `crontab -l` says, with exit code 1, to whoever has none yet."""
_OURS = " run --config "
"""What stands in every entry; the line below our mark is only replaced if it does."""


@click.command()
@click.option("--install", is_flag=True, help="Put it into your crontab, or with --cron-d into /etc/cron.d.")
@click.option("--cron-d", "as_file", is_flag=True, help="A file for /etc/cron.d, which names the user.")
@user_option("Who supervises, with --cron-d; else the state directory's owner.")
@pass_session
def cron(session: Session, *, install: bool, as_file: bool, user: str | None) -> None:
    """Print, or install, the entry by which cron keeps a supervisor alive.

    A second --install replaces the entry of this configuration and touches no other line.
    """
    if user and not as_file:
        raise click.UsageError("a user's crontab has no user in it; --user goes with --cron-d")
    found = Installation.of(session.config())
    user = user or found.owner
    text = fill(CRON_D if as_file else CRONTAB, found, user, cron_quoted)
    if not install:
        click.echo(text, nl=False)
    elif as_file:
        _write_file(text, found, user)
    else:
        _edit_crontab(text, found)


def _write_file(text: str, found: Installation, user: str) -> None:
    check_user(user)
    path = CRON_D_FOLDER / f"bgsupervisor-{re.sub(r'[^A-Za-z0-9_-]', '_', user)}"  # cron passes over names with dots
    try:
        replace_file(path, text, found)
    except OSError as error:
        hint = "install it as root, or into your own crontab without --cron-d"
        raise access_error(path, "write", error, hint) from error
    click.echo(f"wrote {path} (root's, 0644); cron starts a supervisor as {user} within a minute")


def _edit_crontab(text: str, found: Installation) -> None:
    program = shutil.which("crontab")
    if program is None:
        warn("there is no `crontab` program here; install cron, or print the entry without --install")
        raise click.exceptions.Exit(1)
    mark, line = text.splitlines()[-2:]
    old = _ask([program, "-l"]).removesuffix("\n")
    new = "\n".join(_with_entry(old.split("\n") if old else [], mark, line))
    if new != old:
        _ask([program, "-"], f"{new}\n")
    done = "it is there already" if new == old else "installed"
    user = user_name(os.geteuid())
    click.echo(f"{done} in the crontab of {user}; cron starts a supervisor as {user} within a minute:\n{line}")
    if user != found.owner:
        warn(f"warning: {found.owner} owns {found.state_dir}; `run` refuses every other user")


def _with_entry(lines: list[str], mark: str, entry: str) -> list[str]:
    """Return *lines* with the entry and its mark in the place of their older selves, or at the end."""
    kept: list[str] = []
    place = None
    before = ""
    for line in lines:
        if line in (mark, entry) or (before == mark and _OURS in line):
            place = len(kept) if place is None else place
        else:
            kept.append(line)
        before = line
    place = len(kept) if place is None else place
    return [*kept[:place], mark, entry, *kept[place:]]


def _ask(command: list[str], text: str = "") -> str:
    """Run the crontab program and return what it prints; nothing where there is no crontab yet."""
    answer = subprocess.run(
        command,
        input=text,
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=CRONTAB_LIMIT_S,
    )
    if answer.returncode != 0 and not _NO_CRONTAB.search(answer.stderr):
        told = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        warn(f"the `crontab` program refused: {told}; nothing was changed")
        raise click.exceptions.Exit(1)
    return answer.stdout
