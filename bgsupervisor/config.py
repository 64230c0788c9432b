"""Configuration: found, read, checked.

A value comes from the first that has one: argument or flag, environment (BGSUPERVISOR_<KEY>, then the same names
in `env_file`), file, default. Paths are made absolute against the configuration file's folder and never resolved
through symlinks, so that a `current` link to the newest release stays one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from bgsupervisor import environment
from bgsupervisor.environment import working_folder
from bgsupervisor.errors import AccessError, ConfigError
from bgsupervisor.system.files import access_error
from bgsupervisor.system.users import own_user, user_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "OPTIONS",
    "Config",
    "Option",
    "apply_env_file",
    "dangers",
    "distrust",
    "env_file_values",
    "is_postgres",
    "load",
    "masked",
    "remarks",
    "shown",
    "sqlite_path",
    "template",
]

FILE_NAME = "bgsupervisor.toml"
PROJECT_FILE_NAME = "pyproject.toml"
CONFIG_VARIABLE = "BGSUPERVISOR_CONFIG"

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

DEFAULT = "default"
_T = TypeVar("_T")
_SQLITE = "sqlite:///"
_POSTGRES = ("postgresql://", "postgres://")
_HOW_POSTGRES = "write postgresql://user:password@host/database, with what is special in a password as %40 (for @)"
_INVENTED = re.compile(r"BGSUPERVISOR_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_\w+)?)")
"""What Kubernetes sets for a service that is called bgsupervisor:
https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables"""
_CLOSE = 0.75
"""From this ratio of difflib on another name is offered: SLOTS for SLOT, but not HOST for PORT."""
_SHOWN_CHARACTERS = 60
"""A wrong value is quoted up to so many characters."""


# ---- What kinds of value there are -----------------------------------------------------------------------------


def _text(pattern: str) -> Callable[[object], str]:
    """Return a check that lets through only text that matches *pattern* as a whole."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return check


def _texts(pattern: str) -> Callable[[object], tuple[str, ...]]:
    """Return a check that lets through only lists of text that matches *pattern*."""
    check = _text(pattern)

    def check_all(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(check(item) for item in value)

    return check_all


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _size(value: object) -> int:
    if not isinstance(value, str):
        return _count(value)
    match = re.fullmatch(r"([0-9]{1,15}) ?(KiB|MiB|GiB)?", value.strip())
    if not match:
        raise ValueError
    return int(match[1]) * {None: 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}[match[2]]


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _path(value: object) -> Path:
    return Path(_text(_NOT_EMPTY)(os.fspath(value) if isinstance(value, os.PathLike) else value))


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


class _Kind(NamedTuple):
    """A kind of value: how to name it in a sentence, how to check it, how to read it from text."""

    expected: str
    check: Callable[[object], object]
    parse: Callable[[str], object] = str


_SWITCHES = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}
_NOT_EMPTY = r"[^\0]+"
_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"

_KINDS = {
    "text": _Kind("text that is not empty", _text(_NOT_EMPTY)),
    "url": _Kind("an address such as sqlite:///bgsupervisor.db", _text(_NOT_EMPTY)),
    "prefix": _Kind(
        "at most 32 letters, digits and underscores, no digit first", _text(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
    ),
    "callable": _Kind('a function as "package.module:name"', _text(f"{_MODULE}:{_MODULE}")),
    "method": _Kind('"fork" or "spawn"', _text("fork|spawn")),
    "modules": _Kind('a list of modules such as "myapp.tasks"', _texts(_MODULE), _split),
    "path": _Kind("a path", _path),
    "paths": _Kind("a list of paths", _texts(_NOT_EMPTY), _split),
    "count": _Kind("a whole number", _count, int),
    "seconds": _Kind("a number of seconds", _number, float),
    "ending": _Kind('"leave", "drain" or "kill"', _text("leave|drain|kill")),
    "answer": _Kind('"warn", "refuse" or "accept"', _text("warn|refuse|accept")),
    "switch": _Kind("true or false", _switch, _SWITCHES.__getitem__),
    "days": _Kind("a number of days", _number, float),
    "bytes": _Kind('a size such as 1048576 or "1 MiB"', _size),
}


# ---- The table of options --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One key of the configuration.

    Attributes:
        name: The key; a name that ends in _s is in seconds, in _bytes in bytes.
        type: The kind of its value, a word such as "count", "seconds" or "path".
        default: As written in a file; paths are not absolute yet.
        help: One sentence.
        minimum: The least that is allowed, None where there is no order.
        maximum: The most that is allowed.
        example: What the template shows where the default says nothing.
    """

    name: str
    type: str
    default: object
    help: str
    minimum: float | None = None
    maximum: float | None = None
    example: object = None

    @property
    def unit(self) -> str:
        """Return "seconds", "days", "bytes" or "" where the value has no unit."""
        return self.type if self.type in {"seconds", "days", "bytes"} else ""

    @property
    def variable(self) -> str:
        """Return the name of the environment variable."""
        return _variable(self.name)

    @property
    def expected(self) -> str:
        """Return the allowed values as words, such as "a whole number from 1 to 1000"."""
        expected = _KINDS[self.type].expected
        if self.minimum is None or self.maximum is None:
            return expected
        return f"{expected} from {self._written(self.minimum)} to {self._written(self.maximum)}"

    @property
    def default_text(self) -> str:
        """Return the default as a file would have it, "" where there is none."""
        return "" if self.default is None else self._literal(self.default)

    @property
    def example_text(self) -> str:
        """Return what the template shows, as a file would have it."""
        return self._literal(self.default if self.example is None else self.example)

    def _literal(self, value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return "[" + ", ".join(f'"{item}"' for item in value) + "]"
        written = self._written(value)
        return written if re.fullmatch(r"[0-9.]+", written) else f'"{written}"'

    def _written(self, value: object) -> str:
        """Return *value* as people write it: 10, 0.5, 1 MiB."""
        if not isinstance(value, int | float):
            return str(value)
        if self.type == "bytes":
            for size_bytes, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
                if value >= size_bytes and value % size_bytes == 0:
                    return f"{value // size_bytes} {unit}"
        return str(value).removesuffix(".0")


def _option(
    type: str,
    default: _T,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    example: object = None,
) -> _T:
    """Return a dataclass field that is a row of OPTIONS as well."""
    facts = {"type": type, "help": help, "minimum": minimum, "maximum": maximum, "example": example}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A configuration that was checked; `load` makes it, with every path absolute. Can be pickled.

    The fields with an `_option` are the keys that users write; the others say where those came from.

    Attributes:
        base_dir: The configuration file's folder, or the working folder where there is no file; the working folder
            of bodies.
        path: The configuration file, None where there is none.
        origins: For each key where its value came from: "default", "file /x/bgsupervisor.toml",
            "environment BGSUPERVISOR_SLOTS" or "--slots".
    """

    database: str = _option(
        "url",
        "sqlite:///bgsupervisor.db",
        "The database of the tasks; three slashes for a path relative to this file, four for an absolute one; or "
        "postgresql://user:password@host/database.",
    )
    table_prefix: str = _option(
        "prefix",
        "bgsupervisor_",
        "How the names of all our tables begin; two prefixes are two installations that never see each other.",
    )
    tasks: tuple[str, ...] = _option(
        "modules", (), "The modules that hold your tasks, imported by the fork server.", example=("myapp.tasks",)
    )
    setup: str | None = _option(
        "callable", None, "Called once in the fork server, before the modules are imported.", example="django:setup"
    )
    child_setup: str | None = _option(
        "callable", None, "Called in each child, before the body.", example="myapp.tasks:connect"
    )
    slots: int = _option(
        "count", 16, "How many bodies run at once on this host; also spelled threads.", minimum=1, maximum=1000
    )
    spares: int = _option(
        "count",
        2,
        "How many children are started ahead of need, so that a task begins at once.",
        minimum=0,
        maximum=100,
    )
    reuse: int = _option("count", 1, "How many attempts one child runs before it leaves.", minimum=1, maximum=1_000_000)
    max_waiting: int = _option(
        "count",
        256,
        "How many waiting bodies may give their slot to others; beyond that a waiter keeps its slot.",
        minimum=0,
        maximum=10_000,
    )
    state_dir: Path = _option(  # noqa: RUF009 - it returns a dataclass field
        "path",
        Path(".bgsupervisor"),
        "The folder of lock, sockets and logs; by default beside the SQLite file, or this file.",
    )
    heartbeat_s: float = _option("seconds", 5.0, "How often a child says that it lives.", minimum=0.05, maximum=3600)
    grace_s: float = _option(
        "seconds",
        10.0,
        "How long a task that is to end may take, before SIGTERM and again before SIGKILL.",
        minimum=0,
        maximum=86400,
    )
    keep_days: float = _option(
        "days", 14.0, "How long ended tasks and their logs are kept; 0 keeps them for ever.", minimum=0, maximum=36500
    )
    data_max_bytes: int = _option(
        "bytes", MIB, "The largest data or result of a task, encoded.", minimum=KIB, maximum=64 * MIB
    )
    log_max_bytes: int = _option(
        "bytes", 10 * MIB, "The largest log of a task; beyond it the middle is cut out.", minimum=16 * KIB, maximum=GIB
    )
    busy_timeout_s: float = _option(
        "seconds", 5.0, "How long a call waits for a locked database.", minimum=0, maximum=3600
    )
    unknown_names: Literal["warn", "refuse", "accept"] = _option(
        "answer",
        "warn",
        "What becomes of a request by a name that is not known; accept such names while new code is on its way.",
    )
    start_method: Literal["fork", "spawn"] = _option(
        "method",
        "fork",
        "How children start; spawn is slower, and right where imports leave threads or connections behind.",
    )
    auto_reload: bool = _option(
        "switch", True, "Whether a `run` from cron that finds changed code has the living supervisor load it."
    )
    on_term: Literal["leave", "drain", "kill"] = _option(
        "ending",
        "leave",
        "What SIGTERM to the supervisor means: leave the tasks running, wait for them, or end them.",
    )
    env_file: Path | None = _option(  # noqa: RUF009 - it returns a dataclass field
        "path", None, "A file of KEY=VALUE lines, read into the environment before your code.", example=".env"
    )
    python_path: tuple[str, ...] = _option(
        "paths", (), "More folders to import from; this file's folder always comes first."
    )
    host: str | None = _option(
        "text", None, "The name of this machine in the database; by default its machine id.", example="web1"
    )
    lease_s: float = _option(
        "seconds",
        30.0,
        "A container (another PID namespace) silent for so long is lost; at least twice heartbeat_s.",
        minimum=0.1,
        maximum=86400,
    )
    base_dir: Path
    path: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def describe(self) -> list[tuple[str, object, str]]:
        """Return key, value and origin of every option, for people and for JSON; passwords in addresses are masked."""
        return [(o.name, _plain(getattr(self, o.name)), self.origins.get(o.name, DEFAULT)) for o in OPTIONS]


OPTIONS = tuple(Option(name=f.name, default=f.default, **f.metadata) for f in fields(Config) if f.metadata)
"""Every key: drives defaults, checks, the template and the documentation."""

_ENV_FILE = next(option for option in OPTIONS if option.name == "env_file")
_ALIASES = {"slots": "threads"}
_SPELLINGS = {o.name: (o.name, _ALIASES[o.name]) if o.name in _ALIASES else (o.name,) for o in OPTIONS}
_KEYS = tuple(key for spellings in _SPELLINGS.values() for key in spellings)


# ---- Loading ---------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Where values may come from, with the origin that a key of it has."""

    values: Mapping[str, object]
    origin: Callable[[str], str]
    is_text: bool = False
    is_hidden: bool = False


def load(
    path: Path | str | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    database: str | None = None,
    any_owner: bool = False,
) -> Config:
    """Find, read and check the configuration.

    The file is *path*, else what BGSUPERVISOR_CONFIG names, else the first found upwards from the working folder:
    bgsupervisor.toml, or a pyproject.toml with a table [tool.bgsupervisor]. A file that was named is trusted. One that
    was found is refused unread where another user than root may have written it, or may put code beside it.

    Args:
        path: The configuration file, relative to the working folder.
        flags: Values from the command line by key; None means not given. Text is converted as the environment's is.
        environ: The environment, by default this process's. Variables that are set but empty count as absent;
            those that are no key are left alone, since container managers invent some.
        cwd: The working folder, by default this process's: $PWD where it names the same folder, since that keeps
            symlinks.
        database: The address of the database; it wins over everything.
        any_owner: Whether a file that was found may belong to any user, as that of the application of which the
            caller is part; it must still not lie where everybody may write.

    Raises:
        ConfigError: No file and no database was named, the file is missing or no TOML, a key is unknown, a value is
            of the wrong type or out of range, the working folder is gone, or a file that was found is not trusted.
        AccessError: The file, or a folder on the way to it, may not be read.

    Blocks for reading two small files at most. Changes nothing.
    """
    environ = environment.variables() if environ is None else environ
    named = path or environ.get(CONFIG_VARIABLE)
    file, base_dir = _locate(named, cwd, environ, any_owner=any_owner)
    sources = _sources(file, base_dir, flags=flags or {}, environ=environ, database=database)
    if not file and not any(source.values.get("database") for source in sources):
        raise ConfigError(_nothing_found(base_dir))
    picked = {option.name: _pick(option, sources) for option in OPTIONS}
    values = {key: value for key, (value, _) in picked.items()}
    origins = {key: origin for key, (_, origin) in picked.items()}
    _check_lease(values, origins)
    config = Config(**_placed(values, origins, base_dir), base_dir=base_dir, path=file, origins=origins)
    if file and not named and not any_owner:
        for named_there in (config.env_file, *(Path(folder) / "*" for folder in config.python_path)):
            if named_there:
                _check_trust(named_there, "named in a configuration found")
    return config


def _sources(
    file: Path | None, base_dir: Path, *, flags: Mapping[str, object], environ: Mapping[str, str], database: str | None
) -> list[_Source]:
    """Return where values come from, the strongest first."""
    _refuse_unknown(flags, "the command line")
    sources = [
        _Source({"database": database}, "argument {}".format),
        _Source(flags, lambda key: "--" + key.replace("_", "-"), is_text=True),
        _Source(_keys_in(environ), lambda key: f"environment {_variable(key)}", is_text=True),
    ]
    if file:
        sources.append(_Source(_file_values(file), lambda _: f"file {file}"))
    env_file, _ = _pick(_ENV_FILE, sources)
    if env_file:
        env_path = _absolute(env_file, base_dir)
        values = {key: value for key, value in _keys_in(_parse_env(env_path)).items() if key != _ENV_FILE.name}
        origin = lambda key: f"environment {_variable(key)} in {env_path}"  # noqa: E731 - as its neighbours
        sources.insert(3, _Source(values, origin, is_text=True, is_hidden=True))
    return sources


def _pick(option: Option, sources: list[_Source]) -> tuple[Any, str]:
    """Return the value of *option*, checked, and its origin."""
    for source in sources:
        given = [key for key in _SPELLINGS[option.name] if source.values.get(key) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} mean the same, keep one ({source.origin(given[0])})")
        if given:
            return _checked(option, source, given[0]), source.origin(given[0])
    return option.default, DEFAULT


def _checked(option: Option, source: _Source, key: str) -> object:
    value = source.values[key]
    kind = _KINDS[option.type]
    if source.is_text and isinstance(value, str):
        with suppress(ValueError, KeyError):
            value = kind.parse(value.strip())
    with suppress(ValueError, TypeError, OverflowError):
        checked: Any = kind.check(value)
        if option.minimum is None or option.maximum is None or option.minimum <= checked <= option.maximum:
            return checked
    shown = "what it is (not shown)" if source.is_hidden else masked(repr(value))[:_SHOWN_CHARACTERS]
    hint = "" if source.is_hidden else _hint(option, value)
    raise ConfigError(f"{key} must be {option.expected}, not {shown}{hint} ({source.origin(key)})")


def _hint(option: Option, value: object) -> str:
    """Return what to write for modules that are named as one text, or by their files; "" for all else."""
    if option.type != "modules":
        return ""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ""
    meant = [re.sub(r"\.py$", "", name.strip().removeprefix("./")).replace("/", ".") for name in names]
    if not meant or not all(re.fullmatch(_MODULE, name) for name in meant):
        return ""
    return f"; did you mean {option.name} = {json.dumps(meant, ensure_ascii=False)}?"


def remarks(config: Config, *, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> list[str]:
    """Return a sentence for each thing in the configuration that was probably meant otherwise; none is an error.

    Args:
        config: The configuration that is in force.
        environ: The environment, by default this process's.
        cwd: The working folder, as for `load`.

    Blocks for reading the configuration files upwards from the working folder, and `env_file`.
    """
    environ = environment.variables() if environ is None else environ
    found = [*_unknown_variables(environ, "the environment")]
    with suppress(ConfigError):  # whether it can be read was checked when it was loaded; it may have changed since
        found += _unknown_variables(env_file_values(config), str(config.env_file))
    found += [
        f"{other} is ignored, because {config.path} is in force; remove one, or name the one to use with --config"
        for other in _ignored_files(config, environ, cwd)
    ]
    twice = sorted({module for module in config.tasks if config.tasks.count(module) > 1})
    found += [
        f"tasks names {module} twice ({config.origins.get('tasks', DEFAULT)}); once is enough" for module in twice
    ]
    if not config.tasks:
        found.append("no task modules are configured; name them in `tasks`")
    return [*found, *_slashes(config)]


def _unknown_variables(environ: Mapping[str, str], where: str) -> Iterator[str]:
    prefix = _variable("")
    known = {*map(_variable, _KEYS), CONFIG_VARIABLE}
    for variable in sorted(environ):
        if not variable.startswith(prefix) or variable in known or _INVENTED.fullmatch(variable):
            continue
        key = variable.removeprefix(prefix).lower()
        nearest = [_variable(one) for one in difflib.get_close_matches(key, (*_KEYS, "config"), n=1, cutoff=_CLOSE)]
        hint = f"did you mean {nearest[0]}?" if nearest else "`bgsupervisor check` lists the settings"
        yield f"{where} has {variable}, which is no setting and has no effect; {hint}"


def _ignored_files(config: Config, environ: Mapping[str, str], cwd: Path | None) -> Iterator[Path]:
    """Yield the other configurations that a search from the working folder meets, the nearest first."""
    if config.path is None:
        return
    with suppress(ConfigError):
        start = Path(os.path.normpath(cwd.absolute())) if cwd else working_folder(environ)
        for folder in (start, *start.parents):
            for name in (FILE_NAME, PROJECT_FILE_NAME):
                file = folder / name
                if file != config.path and _is_configuration(file):
                    yield file


def _is_configuration(file: Path) -> bool:
    """Return whether *file* would have been taken; False for one that cannot be read."""
    with suppress(ConfigError, AccessError):
        if not _is_there(file) or distrust(file) is not None:
            return False
        return file.name == FILE_NAME or _project_table(file) is not None
    return False


def _slashes(config: Config) -> Iterator[str]:
    """Yield a word about three slashes before what looks like an absolute path."""
    if is_postgres(config.database):
        return
    path = sqlite_path(config.database)
    with suppress(ValueError, OSError):
        inner = path.relative_to(config.base_dir)
        absolute = Path("/") / inner
        if len(inner.parts) > 1 and not path.parent.is_dir() and absolute.parent.is_dir():
            yield (
                f"the folder {path.parent} of the database does not exist, and {absolute.parent} does; did you mean "
                f"{_SQLITE}{absolute}, with four slashes? ({config.origins.get('database', DEFAULT)})"
            )


def _check_lease(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    lease_s, heartbeat_s = values["lease_s"], values["heartbeat_s"]
    if lease_s < 2 * heartbeat_s:
        raise ConfigError(
            f"lease_s is {lease_s:g} ({origins['lease_s']}) and must be at least twice heartbeat_s, which is "
            f"{heartbeat_s:g} ({origins['heartbeat_s']}); else a living host could be taken for lost"
        )


def _placed(values: Mapping[str, Any], origins: Mapping[str, str], base_dir: Path) -> dict[str, Any]:
    """Return *values* with every path absolute."""
    database, state_base = values["database"], base_dir
    try:
        if is_postgres(database):
            _check_postgres(database)
        else:
            path = _absolute(sqlite_path(database), base_dir)
            database = f"{_SQLITE}{path}"
            state_base = path.parent if origins["state_dir"] == DEFAULT else base_dir
    except ConfigError as error:
        raise ConfigError(f"{error} ({origins['database']})") from None
    return {
        **values,
        "database": database,
        "state_dir": _absolute(values["state_dir"], state_base),
        "env_file": values["env_file"] and _absolute(values["env_file"], base_dir),
        "python_path": tuple(str(_absolute(folder, base_dir)) for folder in values["python_path"]),
    }


def is_postgres(url: str) -> bool:
    """Whether an address is one of PostgreSQL."""
    return url.startswith(_POSTGRES)


def shown(url: str) -> str:
    """Return how to name a database to people: its file, or its address without the password."""
    return masked(url) if is_postgres(url) else str(sqlite_path(url))


def _check_postgres(url: str) -> None:
    """See that an address of PostgreSQL can be read; what is wrong is told without quoting it, for the password's sake.

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
    file = url.removeprefix(_SQLITE)
    if file == url or not file:
        raise ConfigError("database names no file; write sqlite:///relative.db or sqlite:////absolute.db")
    if ":memory:" in file:
        raise ConfigError("database cannot be in memory, because tasks run in other processes; name a file")
    if "?" in file:
        raise ConfigError("database takes no options after a question mark; leave them out")
    return Path(file)


def _absolute(path: Path | str, base_dir: Path) -> Path:
    """Join and tidy up, by the letters alone: symlinks stay."""
    return Path(os.path.normpath(base_dir / path))


# ---- Finding and reading the file ------------------------------------------------------------------------------


def _locate(
    named: Path | str | None, cwd: Path | None, environ: Mapping[str, str], *, any_owner: bool
) -> tuple[Path | None, Path]:
    """Return the configuration file, if there is one, and the folder that relative paths start from."""
    if named and Path(named).is_absolute():
        file = Path(os.path.normpath(named))
        return file, file.parent
    start = Path(os.path.normpath(cwd.absolute())) if cwd else working_folder(environ)
    found = _absolute(named, start) if named else _search(start, any_owner=any_owner)
    return found, found.parent if found else start


def _search(start: Path, *, any_owner: bool) -> Path | None:
    """Return the nearest configuration file, looking upwards from *start*; an untrusted one is refused unread."""
    for folder in (start, *start.parents):
        for file in (folder / FILE_NAME, folder / PROJECT_FILE_NAME):
            if _is_there(file):
                _check_trust(file, "found", any_owner=any_owner)
                if file.name == FILE_NAME or _project_table(file) is not None:
                    return file
    return None


def _check_trust(file: Path, how: str, *, any_owner: bool = False) -> None:
    why = distrust(file, any_owner=any_owner)
    if why is not None:
        raise ConfigError(
            f"cannot use {file}, {how} upwards from the working folder: {why}; if you trust it, name the configuration "
            f"with --config or {CONFIG_VARIABLE}"
        )


def distrust(file: Path, *, any_owner: bool = False) -> str | None:
    """Return why a configuration that was found is refused, None where it is trusted; see `dangers`.

    Args:
        file: The configuration, or a file that it names.
        any_owner: Whether another user's file is trusted, if not everybody may have put it there.
    """
    if any_owner and hasattr(os, "geteuid"):
        with suppress(OSError):
            if {file.lstat().st_uid, file.stat().st_uid} <= {0, os.geteuid()}:
                return None
    return next((danger.told for danger in dangers(file) if danger.is_of_all or not any_owner), None)


class Danger(NamedTuple):
    """How another user may have written a file: everybody may, or a folder or link belongs to one."""

    is_of_all: bool
    told: str


def dangers(file: Path) -> Iterator[Danger]:
    """Yield how a user other than this one and root may have written *file*, or may put code beside it.

    Looks at the file, at all folders above it, and at what links among them lead to; a file that is not there is
    judged by its folders. What a group may write counts as its owner's, who has chosen the group. In a sticky folder,
    such as /tmp, others cannot replace a file, but they can put code beside it.
    """
    if not hasattr(os, "geteuid"):
        return  # Windows has neither users by number nor modes
    mine = {0, os.geteuid()}
    ways = (file, Path(os.path.realpath(file)), Path(os.path.realpath(file.parent)) / file.name)
    beside = {ways[0].parent, ways[2].parent}
    for path in dict.fromkeys(one for way in ways for one in (way, *way.parents)):
        try:
            link, found = path.lstat(), path.stat()
        except OSError:
            continue  # that it is missing or closed is told when it is read
        for uid in {link.st_uid, found.st_uid} - mine:
            yield Danger(False, f"{path} belongs to user {user_name(uid)}, and this is user {own_user()}")
        is_kept = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and path not in beside
        if found.st_mode & stat.S_IWOTH and not is_kept:
            yield Danger(True, f"every user may write {path}")


def _is_there(file: Path) -> bool:
    """Tell whether *file* exists, also as a link that leads nowhere: that is told when it is read."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        hint = f"name the configuration with --config or {CONFIG_VARIABLE}, or change to another folder"
        raise access_error(file.parent, "read", error, hint) from error
    return True


def _nothing_found(start: Path) -> str:
    folders = ", ".join(str(folder) for folder in (start, *start.parents))
    return (
        f"no configuration: neither {FILE_NAME} nor a {PROJECT_FILE_NAME} with [tool.bgsupervisor] is in {folders}; "
        f"write one with `bgsupervisor init`, name one with --config or {CONFIG_VARIABLE}, "
        f"or name a database with {_variable('database')}"
    )


def _file_values(file: Path) -> dict[str, object]:
    values = _project_table(file) if file.name == PROJECT_FILE_NAME else _toml(file)
    if values is None:
        raise ConfigError(f"{file} has no table [tool.bgsupervisor]; add it, or write {FILE_NAME} beside it")
    if file.name != PROJECT_FILE_NAME and "tool" in values:
        raise ConfigError(f"{file}: keys stand at the top here, without the line [tool.bgsupervisor]")
    _refuse_unknown(values, str(file))
    return values


def _project_table(file: Path) -> dict[str, object] | None:
    """Return the table [tool.bgsupervisor] of a pyproject.toml, None where it has none."""
    tool = _toml(file).get("tool")
    table = tool.get("bgsupervisor") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{file}: tool.bgsupervisor must be a table; write [tool.bgsupervisor] and keys below it")
    return table


def _toml(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(_read(file))
    except tomllib.TOMLDecodeError as error:
        match = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(error), re.DOTALL)
        what, where = (match[1], f", line {match[2]}") if match else (str(error), "")
        raise ConfigError(f"{file}{where}: not valid TOML: {what}") from None


def _read(file: Path) -> str:
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


def _refuse_unknown(values: Mapping[str, object], where: str) -> None:
    for key in values:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key.lower(), _KEYS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(_KEYS)}"
            raise ConfigError(f"{where}: unknown key {key}; {hint}")


# ---- The environment and its file ------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"(?:export\s+)?(?P<key>[A-Za-z_][A-Za-z0-9_]*)\s*=(?P<value>.*)")
_QUOTED = re.compile(r"""(?:'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)")\s*(?:\#.*)?""")
_ESCAPES = {"n": "\n", "t": "\t"}


def env_file_values(config: Config) -> dict[str, str]:
    """Return what `env_file` says, {} where there is none; never show these values.

    Lines are KEY=VALUE, after an optional `export`. A value in single quotes is taken as it is, one in double
    quotes may contain escapes (a backslash and n, t, a quote ...), one without quotes ends before ` #`. Nothing is
    interpolated, nothing goes over several lines.

    Raises:
        ConfigError: The file is missing or has a line that is none of these.
        AccessError: This user may not read it.
    """
    return _parse_env(config.env_file) if config.env_file else {}


def apply_env_file(config: Config) -> None:
    """Put what `env_file` says into this process's environment; variables that are set already stay.

    Raises:
        ConfigError: The file is missing or has a line that is not KEY=VALUE.
        AccessError: This user may not read it.
    """
    for key, value in env_file_values(config).items():
        environment.set_default(key, value)


def _parse_env(file: Path) -> dict[str, str]:
    values = {}
    for number, line in enumerate(_read(file).split("\n"), start=1):
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


def _variable(key: str) -> str:
    return f"BGSUPERVISOR_{key.upper()}"


def _keys_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that *environ* has a value for."""
    return {key: environ[_variable(key)] for key in _KEYS if environ.get(_variable(key))}


# ---- Showing ---------------------------------------------------------------------------------------------------


def template() -> str:
    """Return the bgsupervisor.toml that `bgsupervisor init` writes: every key with its default, commented out."""
    lines = [
        "# bgsupervisor: relative paths start from this file's folder. The environment wins over this file",
        "# (BGSUPERVISOR_SLOTS=4), and flags win over both.",
    ]
    for option in OPTIONS:
        comment = "" if option.name == "tasks" else "# "
        lines += ["", f"# {option.help}", f"# ({option.expected})", f"{comment}{option.name} = {option.example_text}"]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> object:
    """Return *value* as JSON can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return masked(str(value)) if isinstance(value, str | Path) else value


def masked(text: str) -> str:
    """Return *text* with the password of an address in it made unreadable."""
    text = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", text)
    return re.sub(r"([?&](?:ssl)?password=)[^&\s'\"]*", r"\1***", text)
