"""`bgsupervisor cron`: the entry by which cron keeps a supervisor alive."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import click

from bgsupervisor.cli.display.output import warn
from bgsupervisor.cli.service_files import (
    CRON_D,
    CRONTAB,
    Installation,
    check_user,
    cron_quoted,
    fill,
    is_of,
    replace_file,
    user_option,
)
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.doctor.managers import cron_runs
from bgsupervisor.system.files import access_error
from bgsupervisor.system.users import user_name

__all__ = ["cron"]

CRON_D_FOLDER = Path("/etc/cron.d")
PROC = Path("/proc")
_CONTINUES = "a running supervisor continues until `bgsupervisor stop`"
CRONTAB_LIMIT_S = 30.0
"""Longest wait for the crontab program, which copies a small file, in seconds."""
_NO_CRONTAB = re.compile("no crontab|no such file", re.IGNORECASE)
"""The message of `crontab -l`, with exit code 1, for a user without a crontab."""
_OURS = " run --config "
"""Part of every entry; the line below our mark is only replaced if it has it."""


@click.command()
@click.option("--install", is_flag=True, help="Put it into your crontab, or with --cron-d into /etc/cron.d.")
@click.option("--uninstall", is_flag=True, help="Remove what --install has written; with --cron-d from /etc/cron.d.")
@click.option("--cron-d", "as_file", is_flag=True, help="A file for /etc/cron.d, which names the user.")
@user_option("The user to supervise as, with --cron-d; else the state directory's owner.")
@pass_session
def cron(session: Session, *, install: bool, uninstall: bool, as_file: bool, user: str | None) -> None:
    """Print, install or remove the entry by which cron keeps a supervisor alive.

    A second --install replaces the entry of this configuration and touches no other line; --uninstall removes it. A
    running supervisor continues.
    """
    if install and uninstall:
        raise click.UsageError("--install writes the entry and --uninstall removes it; give one of them")
    if user and not as_file:
        raise click.UsageError("a user's crontab has no user in it; --user goes with --cron-d")
    found = Installation.of(session.config(), warns=not uninstall)
    if uninstall and as_file:
        _remove_files(found, user)
        return
    user = user or found.owner
    text = fill(CRON_D if as_file else CRONTAB, found, user, cron_quoted)
    if uninstall:
        _edit_crontab(text, found, removes=True)
    elif not install:
        click.echo(text, nl=False)
    elif as_file:
        _write_file(text, found, user)
    else:
        _edit_crontab(text, found)


def _write_file(text: str, found: Installation, user: str) -> None:
    check_user(user)
    path = CRON_D_FOLDER / _file_name(user)
    try:
        replace_file(path, text, found)
    except OSError as error:
        hint = "install it as root, or into your own crontab without --cron-d"
        raise access_error(path, "write", error, hint) from error
    click.echo(f"wrote {path} (root's, 0644); {_outlook(user)}")
    _warn_without_daemon()


def _file_name(user: str) -> str:
    return f"bgsupervisor-{re.sub(r'[^A-Za-z0-9_-]', '_', user)}"  # cron ignores names with dots


def _remove_files(found: Installation, user: str | None) -> None:
    """Remove the files of this installation, of one user or of all."""
    pattern = "bgsupervisor-*" if user is None else _file_name(user)
    paths = [path for path in sorted(CRON_D_FOLDER.glob(pattern)) if is_of(path, found)]
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise access_error(path, "write", error, "remove it as root") from error
        click.echo(f"removed {path}; {_CONTINUES}")
    if not paths:
        click.echo(f"nothing to remove: {CRON_D_FOLDER} has no entry of {found.config}")


def _outlook(user: str) -> str:
    when = "once a cron daemon runs" if cron_runs(PROC) is False else "within a minute"
    return f"cron starts a supervisor as {user} {when}"


def _warn_without_daemon() -> None:
    if cron_runs(PROC) is False:
        warn(
            "warning: no cron daemon runs here, so the entry starts nothing; install and start one "
            "(Debian: `apt-get install cron`), or use `bgsupervisor systemd --install`"
        )


def _edit_crontab(text: str, found: Installation, *, removes: bool = False) -> None:
    program = shutil.which("crontab")
    if program is None and removes:
        click.echo("nothing to remove: there is no `crontab` program here")
        return
    if program is None:
        warn("there is no `crontab` program here; install cron, or print the entry without --install")
        raise click.exceptions.Exit(1)
    mark, line = text.splitlines()[-2:]
    old = _run_crontab([program, "-l"]).removesuffix("\n")
    lines = old.split("\n") if old else []
    kept, place = _without_entry(lines, mark, line)
    new = kept if removes else [*kept[:place], mark, line, *kept[place:]]
    if new != lines:
        _run_crontab([program, "-"], "".join(f"{one}\n" for one in new))
    user = user_name(os.geteuid())
    if removes:
        none = f"nothing to remove: the crontab of {user} has no entry of {found.config}"
        click.echo(none if new == lines else f"removed from the crontab of {user}; {_CONTINUES}")
        return
    done = "it is there already" if new == lines else "installed"
    click.echo(f"{done} in the crontab of {user}; {_outlook(user)}:\n{line}")
    _warn_without_daemon()
    if user != found.owner:
        warn(f"warning: {found.owner} owns {found.state_dir}; `run` refuses every other user")


def _without_entry(lines: list[str], mark: str, entry: str) -> tuple[list[str], int]:
    """Return *lines* without the entry, or an older one, and its mark; and its place, else the end."""
    kept: list[str] = []
    place = None
    before = ""
    for line in lines:
        if line in (mark, entry) or (before == mark and _OURS in line):
            place = len(kept) if place is None else place
        else:
            kept.append(line)
        before = line
    return kept, len(kept) if place is None else place


def _run_crontab(command: list[str], text: str = "") -> str:
    """Run the crontab program and return its output; nothing where there is no crontab yet."""
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
        cause = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        warn(f"the `crontab` program refused: {cause}; nothing was changed")
        raise click.exceptions.Exit(1)
    return answer.stdout
