"""Addresses of databases: which kind, which file, and how to show one without its password."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from bgsupervisor.errors import ConfigError

__all__ = ["check_postgres", "is_postgres", "masked", "shown", "sqlite_path"]

SQLITE = "sqlite:///"
_POSTGRES = ("postgresql://", "postgres://")
_HOW_POSTGRES = "write postgresql://user:password@host/database, with what is special in a password as %40 (for @)"


def is_postgres(url: str) -> bool:
    """Return whether an address is one of PostgreSQL."""
    return url.startswith(_POSTGRES)


def shown(url: str) -> str:
    """Return how to name a database to people: its file, or its address without the password."""
    return masked(url) if is_postgres(url) else str(sqlite_path(url))


def check_postgres(url: str) -> None:
    """Check an address of PostgreSQL; the error never quotes it, because of the password.

    Raises:
        ConfigError: It has no name of a database, or a character that must be written with a percent sign.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError(f"database is an address of PostgreSQL that cannot be read; {_HOW_POSTGRES}") from None
    if not parts.path.strip("/") or parts.fragment or "@" in parts.path:
        raise ConfigError(f"database names no database of the PostgreSQL server; {_HOW_POSTGRES}")


def sqlite_path(url: str) -> Path:
    """Return the file of an SQLite address, as written: sqlite:///relative or sqlite:////absolute.

    Percent signs mean themselves.

    Raises:
        ConfigError: Another kind of database, no file, a database in memory, or options after a question mark.
    """
    scheme, colon, _ = url.partition(":")
    if scheme != "sqlite" or not colon:
        kind = f"{scheme!r} is not supported" if colon else "it names no kind of database"
        raise ConfigError(
            f"database must be an address such as sqlite:///bgsupervisor.db; {kind}, only sqlite and postgresql are"
        )
    file = url.removeprefix(SQLITE)
    if file == url or not file:
        raise ConfigError("database names no file; write sqlite:///relative.db or sqlite:////absolute.db")
    if ":memory:" in file:
        raise ConfigError("database cannot be in memory, because tasks run in other processes; name a file")
    if "?" in file:
        raise ConfigError("database takes no options after a question mark; leave them out")
    return Path(file)


def masked(text: str) -> str:
    """Return *text* with the password of an address in it made unreadable."""
    text = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", text)
    return re.sub(r"([?&](?:ssl)?password=)[^&\s'\"]*", r"\1***", text)
