"""The configuration file and env_file: found, checked for trust and read; knows no option."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.environment import working_folder
from bgsupervisor.errors import ConfigError
from bgsupervisor.file_trust import distrust
from bgsupervisor.options import variable_of
from bgsupervisor.system.files import access_error

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "absolute_path",
    "check_trust",
    "file_values",
    "is_there",
    "locate",
    "nothing_found",
    "parse_env",
    "project_table",
]

FILE_NAME = "bgsupervisor.toml"
PROJECT_FILE_NAME = "pyproject.toml"
CONFIG_VARIABLE = "BGSUPERVISOR_CONFIG"


def absolute_path(path: Path | str, base_dir: Path) -> Path:
    """Join and normalize a path by its letters alone: symlinks stay."""
    return Path(os.path.normpath(base_dir / path))


def locate(
    named: Path | str | None, cwd: Path | None, environ: Mapping[str, str], *, any_owner: bool
) -> tuple[Path | None, Path]:
    """Return the configuration file, if there is one, and the folder that relative paths start from."""
    if named and Path(named).is_absolute():
        file = Path(os.path.normpath(named))
        return file, file.parent
    start = Path(os.path.normpath(cwd.absolute())) if cwd else working_folder(environ)
    found = absolute_path(named, start) if named else _search(start, any_owner=any_owner)
    return found, found.parent if found else start


def _search(start: Path, *, any_owner: bool) -> Path | None:
    """Return the nearest configuration file, looking upwards from *start*; an untrusted one is refused unread."""
    for folder in (start, *start.parents):
        for file in (folder / FILE_NAME, folder / PROJECT_FILE_NAME):
            if is_there(file):
                check_trust(file, "found", any_owner=any_owner)
                if file.name == FILE_NAME or project_table(file) is not None:
                    return file
    return None


def check_trust(file: Path, how: str, *, any_owner: bool = False) -> None:
    """Refuse a file that another user may have written; *how* says how it was met.

    Raises:
        ConfigError: It is not trusted; says why.
    """
    why = distrust(file, any_owner=any_owner)
    if why is not None:
        raise ConfigError(
            f"cannot use {file}, {how} upwards from the working folder: {why}; if you trust it, name the configuration "
            f"with --config or {CONFIG_VARIABLE}"
        )


def is_there(file: Path) -> bool:
    """Return whether *file* exists, also as a link that leads nowhere: reading it reports that."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        hint = f"name the configuration with --config or {CONFIG_VARIABLE}, or change to another folder"
        raise access_error(file.parent, "read", error, hint) from error
    return True


def nothing_found(start: Path) -> str:
    """Return the message for a missing configuration, with the folders that were searched."""
    folders = ", ".join(str(folder) for folder in (start, *start.parents))
    return (
        f"no configuration: neither {FILE_NAME} nor a {PROJECT_FILE_NAME} with [tool.bgsupervisor] is in {folders}; "
        f"write one with `bgsupervisor init`, name one with --config or {CONFIG_VARIABLE}, "
        f"or name a database with {variable_of('database')}"
    )


def file_values(file: Path) -> dict[str, object]:
    """Read the keys of a configuration file.

    Raises:
        ConfigError: It is missing, no TOML, or has no keys where they belong.
        AccessError: It may not be read.
    """
    values = project_table(file) if file.name == PROJECT_FILE_NAME else read_toml(file)
    if values is None:
        raise ConfigError(f"{file} has no table [tool.bgsupervisor]; add it, or write {FILE_NAME} beside it")
    if file.name != PROJECT_FILE_NAME and "tool" in values:
        raise ConfigError(f"{file}: keys stand at the top here, without the line [tool.bgsupervisor]")
    return values


def project_table(file: Path) -> dict[str, object] | None:
    """Return the table [tool.bgsupervisor] of a pyproject.toml, None where it has none."""
    tool = read_toml(file).get("tool")
    table = tool.get("bgsupervisor") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{file}: tool.bgsupervisor must be a table; write [tool.bgsupervisor] and keys below it")
    return table


def read_toml(file: Path) -> dict[str, object]:
    """Parse a TOML file; a ConfigError names the line that is wrong."""
    try:
        return tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(error), re.DOTALL)
        what, where = (match[1], f", line {match[2]}") if match else (str(error), "")
        raise ConfigError(f"{file}{where}: not valid TOML: {what}") from None


def read_text(file: Path) -> str:
    """Read a file of UTF-8 text, without its byte order mark; raises ConfigError or AccessError."""
    try:
        return file.read_text(encoding="utf-8").removeprefix("\ufeff")
    except PermissionError as error:
        raise access_error(file, "read", error, "give that user the right to read it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{file} does not exist; correct its name, or create it") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error


_ASSIGNMENT = re.compile(r"(?:export\s+)?(?P<key>[A-Za-z_][A-Za-z0-9_]*)\s*=(?P<value>.*)")
_QUOTED = re.compile(r"""(?:'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)")\s*(?:\#.*)?""")
_ESCAPES = {"n": "\n", "t": "\t"}


def parse_env(file: Path) -> dict[str, str]:
    """Read the lines KEY=VALUE of a file; see `config.env_file_values`."""
    values = {}
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _ASSIGNMENT.fullmatch(text)
        value = _unquoted(match["value"]) if match else None
        if match is None or value is None or "\0" in value:
            raise ConfigError(f"{file}, line {number}: expected KEY=VALUE, with quotes closed on the same line")
        values[match["key"]] = value
    return values


def _unquoted(text: str) -> str | None:
    """Return the value that *text*, all after the equals sign, stands for; None where quotes are not closed."""
    if text.lstrip()[:1] not in {"'", '"'}:
        return re.sub(r"\s#.*", "", text).strip()
    match = _QUOTED.fullmatch(text.strip())
    if not match:
        return None
    if match["double"] is None:
        return match["single"]
    return re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), match["double"])
