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
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bgsupervisor import environment
from bgsupervisor.addresses import SQLITE, check_postgres, is_postgres, masked, sqlite_path
from bgsupervisor.config_files import (
    CONFIG_VARIABLE,
    FILE_NAME,
    PROJECT_FILE_NAME,
    absolute_path,
    check_trust,
    file_values,
    is_there,
    locate,
    nothing_found,
    parse_env,
    project_table,
)
from bgsupervisor.environment import working_folder
from bgsupervisor.errors import AccessError, ConfigError
from bgsupervisor.file_trust import distrust
from bgsupervisor.options import GIB, KIB, KINDS, MIB, MODULE, Option, option, variable_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "OPTIONS",
    "Config",
    "apply_env_file",
    "env_file_values",
    "load",
    "remarks",
    "template",
]


DEFAULT = "default"
_INVENTED = re.compile(r"BGSUPERVISOR_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_\w+)?)")
"""Variables that Kubernetes sets for a service with the name bgsupervisor:
https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables"""
SIMILAR = 0.75
"""Ratio of difflib from which another name is suggested: SLOTS for SLOT, but not HOST for PORT."""
_SHOWN_CHARACTERS = 60
"""Limit of the quotation of a wrong value, in characters."""


# ---- The table of options --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A configuration that was checked; `load` makes it, with every path absolute. Can be pickled.

    The fields with an `option` are the keys that users write; the others are the origin of those.

    Attributes:
        base_dir: The configuration file's folder, or the working folder where there is no file; the working folder
            of bodies.
        path: The configuration file, None where there is none.
        origins: For each key where its value came from: "default", "file /x/bgsupervisor.toml",
            "environment BGSUPERVISOR_SLOTS" or "--slots".
    """

    database: str = option(
        "url",
        "sqlite:///bgsupervisor.db",
        "The database of the tasks; three slashes for a path relative to this file, four for an absolute one; or "
        "postgresql://user:password@host/database.",
    )
    table_prefix: str = option(
        "prefix",
        "bgsupervisor_",
        "How the names of all our tables begin; two prefixes are two installations that never see each other.",
    )
    tasks: tuple[str, ...] = option(
        "modules", (), "The modules that hold your tasks, imported by the fork server.", example=("myapp.tasks",)
    )
    setup: str | None = option(
        "callable", None, "Called once in the fork server, before the modules are imported.", example="django:setup"
    )
    child_setup: str | None = option(
        "callable", None, "Called in each child, before the body.", example="myapp.tasks:connect"
    )
    slots: int = option(
        "count", 16, "How many bodies run at once on this host; also spelled threads.", minimum=1, maximum=1000
    )
    spares: int = option(
        "count",
        2,
        "How many children are started ahead of need, so that a task begins at once.",
        minimum=0,
        maximum=100,
    )
    reuse: int = option("count", 1, "How many attempts one child runs before it leaves.", minimum=1, maximum=1_000_000)
    max_waiting: int = option(
        "count",
        256,
        "How many waiting bodies may give their slot to others; beyond that a waiter keeps its slot.",
        minimum=0,
        maximum=10_000,
    )
    state_dir: Path = option(  # noqa: RUF009 - it returns a dataclass field
        "path",
        Path(".bgsupervisor"),
        "The folder of lock, sockets and logs; by default beside the SQLite file, or this file.",
    )
    heartbeat_s: float = option("seconds", 5.0, "How often a child says that it lives.", minimum=0.05, maximum=3600)
    grace_s: float = option(
        "seconds",
        10.0,
        "How long a task that is to end may take, before SIGTERM and again before SIGKILL.",
        minimum=0,
        maximum=86400,
    )
    keep_days: float = option(
        "days", 14.0, "How long ended tasks and their logs are kept; 0 keeps them for ever.", minimum=0, maximum=36500
    )
    data_max_bytes: int = option(
        "bytes", MIB, "The largest data or result of a task, encoded.", minimum=KIB, maximum=64 * MIB
    )
    log_max_bytes: int = option(
        "bytes", 10 * MIB, "The largest log of a task; beyond it the middle is cut out.", minimum=16 * KIB, maximum=GIB
    )
    busy_timeout_s: float = option(
        "seconds", 5.0, "How long a call waits for a locked database.", minimum=0, maximum=3600
    )
    unknown_names: Literal["warn", "refuse", "accept"] = option(
        "answer",
        "warn",
        "What becomes of a request by a name that is not known; accept such names while new code is on its way.",
    )
    start_method: Literal["fork", "spawn"] = option(
        "method",
        "fork",
        "How children start; spawn is slower, and right where imports leave threads or connections behind.",
    )
    auto_reload: bool = option(
        "switch", True, "Whether a `run` from cron that finds changed code has the living supervisor load it."
    )
    on_term: Literal["leave", "drain", "kill"] = option(
        "ending",
        "leave",
        "What SIGTERM to the supervisor means: leave the tasks running, wait for them, or end them.",
    )
    env_file: Path | None = option(  # noqa: RUF009 - it returns a dataclass field
        "path", None, "A file of KEY=VALUE lines, read into the environment before your code.", example=".env"
    )
    python_path: tuple[str, ...] = option(
        "paths", (), "More folders to import from; this file's folder always comes first."
    )
    host: str | None = option(
        "text", None, "The name of this machine in the database; by default its machine id.", example="web1"
    )
    lease_s: float = option(
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
    """A place that values come from, with the function that names the origin of a key."""

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
    file, base_dir = locate(named, cwd, environ, any_owner=any_owner)
    sources = _sources(file, base_dir, flags=flags or {}, environ=environ, database=database)
    if not file and not any(source.values.get("database") for source in sources):
        raise ConfigError(nothing_found(base_dir))
    picked = {option.name: _pick(option, sources) for option in OPTIONS}
    values = {key: value for key, (value, _) in picked.items()}
    origins = {key: origin for key, (_, origin) in picked.items()}
    _check_lease(values, origins)
    config = Config(**_placed(values, origins, base_dir), base_dir=base_dir, path=file, origins=origins)
    if file and not named and not any_owner:
        for named_there in (config.env_file, *(Path(folder) / "*" for folder in config.python_path)):
            if named_there:
                check_trust(named_there, "named in a configuration found")
    return config


def _sources(
    file: Path | None, base_dir: Path, *, flags: Mapping[str, object], environ: Mapping[str, str], database: str | None
) -> list[_Source]:
    """Return the sources of values, the strongest first."""
    _refuse_unknown(flags, "the command line")
    sources = [
        _Source({"database": database}, "argument {}".format),
        _Source(flags, lambda key: "--" + key.replace("_", "-"), is_text=True),
        _Source(_keys_in(environ), lambda key: f"environment {variable_of(key)}", is_text=True),
    ]
    if file:
        in_file = file_values(file)
        _refuse_unknown(in_file, str(file))
        sources.append(_Source(in_file, lambda _: f"file {file}"))
    env_file, _ = _pick(_ENV_FILE, sources)
    if env_file:
        env_path = absolute_path(env_file, base_dir)
        values = {key: value for key, value in _keys_in(parse_env(env_path)).items() if key != _ENV_FILE.name}
        origin = lambda key: f"environment {variable_of(key)} in {env_path}"  # noqa: E731 - as its neighbours
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
    kind = KINDS[option.type]
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
    """Suggest a list for modules that are named as one text, or by their files; "" for all else."""
    if option.type != "modules":
        return ""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ""
    meant = [re.sub(r"\.py$", "", name.strip().removeprefix("./")).replace("/", ".") for name in names]
    if not meant or not all(re.fullmatch(MODULE, name) for name in meant):
        return ""
    return f"; did you mean {option.name} = {json.dumps(meant, ensure_ascii=False)}?"


def remarks(config: Config, *, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> list[str]:
    """Return a sentence for each probable mistake in the configuration; none is an error.

    Args:
        config: The configuration that is in force.
        environ: The environment, by default this process's.
        cwd: The working folder, as for `load`.

    Blocks for reading the configuration files upwards from the working folder, and `env_file`.
    """
    environ = environment.variables() if environ is None else environ
    found = [*_unknown_variables(environ, "the environment")]
    with suppress(ConfigError):  # it was readable when it was loaded, and may have changed since
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
    prefix = variable_of("")
    known = {*map(variable_of, _KEYS), CONFIG_VARIABLE}
    for variable in sorted(environ):
        if not variable.startswith(prefix) or variable in known or _INVENTED.fullmatch(variable):
            continue
        key = variable.removeprefix(prefix).lower()
        nearest = [variable_of(one) for one in difflib.get_close_matches(key, (*_KEYS, "config"), n=1, cutoff=SIMILAR)]
        hint = f"did you mean {nearest[0]}?" if nearest else "`bgsupervisor check` lists the settings"
        yield f"{where} has {variable}, which is no setting and has no effect; {hint}"


def _ignored_files(config: Config, environ: Mapping[str, str], cwd: Path | None) -> Iterator[Path]:
    """Yield the other configurations above the working folder, the nearest first."""
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
    """Return whether the search would accept *file*; False for one that cannot be read."""
    with suppress(ConfigError, AccessError):
        if not is_there(file) or distrust(file) is not None:
            return False
        return file.name == FILE_NAME or project_table(file) is not None
    return False


def _slashes(config: Config) -> Iterator[str]:
    """Yield a remark if an address has three slashes before what looks like an absolute path."""
    if is_postgres(config.database):
        return
    path = sqlite_path(config.database)
    with suppress(ValueError, OSError):
        inner = path.relative_to(config.base_dir)
        absolute = Path("/") / inner
        if len(inner.parts) > 1 and not path.parent.is_dir() and absolute.parent.is_dir():
            yield (
                f"the folder {path.parent} of the database does not exist, and {absolute.parent} does; did you mean "
                f"{SQLITE}{absolute}, with four slashes? ({config.origins.get('database', DEFAULT)})"
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
            check_postgres(database)
        else:
            path = absolute_path(sqlite_path(database), base_dir)
            database = f"{SQLITE}{path}"
            state_base = path.parent if origins["state_dir"] == DEFAULT else base_dir
    except ConfigError as error:
        raise ConfigError(f"{error} ({origins['database']})") from None
    return {
        **values,
        "database": database,
        "state_dir": absolute_path(values["state_dir"], state_base),
        "env_file": values["env_file"] and absolute_path(values["env_file"], base_dir),
        "python_path": tuple(str(absolute_path(folder, base_dir)) for folder in values["python_path"]),
    }


def _refuse_unknown(values: Mapping[str, object], where: str) -> None:
    for key in values:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key.lower(), _KEYS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(_KEYS)}"
            raise ConfigError(f"{where}: unknown key {key}; {hint}")


def env_file_values(config: Config) -> dict[str, str]:
    """Return the values of `env_file`, {} without one; never show these values.

    Lines are KEY=VALUE, after an optional `export`. A value in single quotes is literal; one in double quotes may
    contain escapes (a backslash and n, t, a quote ...); one without quotes ends before ` #`. No interpolation, no
    value over several lines.

    Raises:
        ConfigError: The file is missing or has a line that is none of these.
        AccessError: This user may not read it.
    """
    return parse_env(config.env_file) if config.env_file else {}


def apply_env_file(config: Config) -> None:
    """Put the values of `env_file` into this process's environment; variables that are set already stay.

    Raises:
        ConfigError: The file is missing or has a line that is not KEY=VALUE.
        AccessError: This user may not read it.
    """
    for key, value in env_file_values(config).items():
        environment.set_default(key, value)


def _keys_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that *environ* has a value for."""
    return {key: environ[variable_of(key)] for key in _KEYS if environ.get(variable_of(key))}


# ---- Showing ---------------------------------------------------------------------------------------------------


def template() -> str:
    """Return the bgsupervisor.toml that `bgsupervisor init` writes: every key with its default, commented out."""
    lines = [
        "# bgsupervisor: relative paths start from this file's folder. The environment wins over this file",
        "# (BGSUPERVISOR_SLOTS=4), and flags win over both.",
    ]
    for one in OPTIONS:
        comment = "" if one.name == "tasks" else "# "
        lines += ["", f"# {one.help}", f"# ({one.expected})", f"{comment}{one.name} = {one.example_text}"]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> object:
    """Return *value* as JSON can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return masked(str(value)) if isinstance(value, str | Path) else value
