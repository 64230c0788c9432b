"""`bgsupervisor systemd`: the unit by which systemd keeps a supervisor alive."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from bgsupervisor.cli.service_files import (
    UNIT,
    Installation,
    check_user,
    fill,
    is_of,
    replace_file,
    unit_quoted,
    user_option,
)
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.errors import ConfigError
from bgsupervisor.system.files import access_error
from bgsupervisor.system.users import user_name

__all__ = ["systemd"]

SYSTEM_FOLDER = Path("/etc/systemd/system")
USER_FOLDER = Path("~/.config/systemd/user")
NAME = "bgsupervisor.service"
_REFUSED = re.compile(r"""["'\\$]""")


@click.command()
@click.option("--install", is_flag=True, help="Write it, as root into /etc/systemd/system, else for your own manager.")
@click.option("--uninstall", is_flag=True, help="Remove what --install has written, and the link that enables it.")
@user_option("The user to supervise as; else the state directory's owner.")
@pass_session
def systemd(session: Session, *, install: bool, uninstall: bool, user: str | None) -> None:
    """Print, install or remove the unit by which systemd keeps a supervisor alive.

    Users other than root install a unit of their own, in ~/.config/systemd/user. The commands to type next are
    printed, not run.
    """
    if install and uninstall:
        raise click.UsageError("--install writes the unit and --uninstall removes it; give one of them")
    found = Installation.of(session.config(), warns=not uninstall)
    if uninstall:
        _remove(found)
        return
    if _REFUSED.search(found.command[0]):
        raise ConfigError(f"systemd starts no program with quotes, backslashes or $ in its path: {found.command[0]}")
    if not install:
        click.echo(_unit(found, user or found.owner), nl=False)
    elif os.geteuid() == 0:
        _install(SYSTEM_FOLDER, found, user or found.owner)
    elif user:
        raise click.UsageError("only root can install a unit with a --user; leave it out to install one of your own")
    else:
        _install_own(USER_FOLDER.expanduser(), found)


def _install(folder: Path, found: Installation, user: str) -> None:
    check_user(user)
    _write(folder, _unit(found, user), found)
    click.echo(f"it supervises as {user}. Type next:\n  systemctl daemon-reload\n  systemctl enable --now bgsupervisor")


def _install_own(folder: Path, found: Installation) -> None:
    user = user_name(os.geteuid())
    _write(folder, _of_own_manager(_unit(found, user)), found)
    click.echo(
        f"it supervises as {user}, also while {user} is not logged in. Type next:\n"
        f"  loginctl enable-linger {user}\n  systemctl --user daemon-reload\n"
        "  systemctl --user enable --now bgsupervisor"
    )


def _unit(found: Installation, user: str) -> str:
    """Return the unit for a user; root keeps its capabilities, without which its tasks could not become other users."""
    unit = fill(UNIT, found, user, unit_quoted)
    return unit.replace("CapabilityBoundingSet=\n", "") if user == "root" else unit


def _write(folder: Path, text: str, found: Installation) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / NAME, text, found)
    except OSError as error:
        raise access_error(folder / NAME, "write", error, "print the unit without --install") from error
    click.echo(f"wrote {folder / NAME}")


def _remove(found: Installation) -> None:
    is_root = os.geteuid() == 0
    folder = SYSTEM_FOLDER if is_root else USER_FOLDER.expanduser()
    path = folder / NAME
    links = [link for link in sorted(folder.glob(f"*.wants/{NAME}")) if link.is_symlink()]
    try:
        if not path.exists():
            click.echo(f"nothing to remove: {path} is not there")
            return
        if not is_of(path, found):
            click.echo(f"nothing to remove: {path} is not of {found.config} and was not changed")
            return
        for one in (*links, path):
            one.unlink()
    except OSError as error:
        raise access_error(path, "write", error, "remove it as its owner") from error
    control = "systemctl" if is_root else "systemctl --user"
    click.echo("".join(f"removed {one}\n" for one in (path, *links)), nl=False)
    # The stop comes first, while systemd still has KillMode=process of the loaded unit.
    click.echo(f"a running unit continues; to stop it and keep its tasks, type:\n  {control} stop bgsupervisor")
    click.echo(f"then:\n  {control} daemon-reload")


def _of_own_manager(unit: str) -> str:
    """Return a unit for a user's own manager: it runs as that user, for another target, without hardening."""
    before, _, rest = unit.partition("# Hardening")
    unit = before + rest.partition("\n\n")[2]
    lines = unit.replace("WantedBy=multi-user.target", "WantedBy=default.target").splitlines()
    return "".join(f"{line}\n" for line in lines if not line.startswith(("User=", "# Whoever owns")))
