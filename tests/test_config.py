from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from as_user import as_nobody, needs_root, open_folder

from bgsupervisor import config
from bgsupervisor.config import OPTIONS, Config, apply_env_file, env_file_values, load, sqlite_path, template
from bgsupervisor.errors import ConfigError

SOURCE = str(Path(config.__file__).parents[1])
MIB = 1024 * 1024


@pytest.fixture
def app(tmp_path):
    """Return a folder with an empty configuration file."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "bgsupervisor.toml").touch()
    return folder


def write(folder, text, name="bgsupervisor.toml"):
    (folder / name).write_text(text)
    return folder / name


def load_from(folder, text="", environ=None, **flags):
    """Write *text* as the configuration file of *folder* and load it from there."""
    write(folder, text)
    return load(cwd=folder, environ=environ or {}, flags=flags)


# ---- Finding the file ------------------------------------------------------------------------------------------


def test_the_nearest_file_upwards_is_found(app):
    deep = app / "a" / "b"
    deep.mkdir(parents=True)
    found = load(cwd=deep, environ={})
    assert (found.path, found.base_dir) == (app / "bgsupervisor.toml", app)
    write(app / "a", "[tool.bgsupervisor]\nslots = 3", "pyproject.toml")
    assert load(cwd=deep, environ={}).path == app / "a" / "pyproject.toml"


def test_in_one_folder_our_own_file_wins_over_pyproject(app):
    write(app, "[tool.bgsupervisor]\nslots = 3", "pyproject.toml")
    assert load(cwd=app, environ={}).slots == 16
    (app / "bgsupervisor.toml").unlink()
    assert load(cwd=app, environ={}).slots == 3


def test_a_pyproject_without_our_table_is_passed_by(app):
    inner = app / "inner"
    inner.mkdir()
    write(inner, "[tool.other]\nslots = 3", "pyproject.toml")
    assert load(cwd=inner, environ={}).path == app / "bgsupervisor.toml"


def test_a_named_file_wins_over_the_variable_and_the_variable_over_the_search(app, tmp_path):
    named, by_variable = write(tmp_path, "slots = 1", "one.toml"), write(tmp_path, "slots = 2", "two.toml")
    environ = {"BGSUPERVISOR_CONFIG": str(by_variable)}
    assert load(cwd=app, environ=environ).slots == 2
    assert load(named, cwd=app, environ=environ).slots == 1
    assert load("../one.toml", cwd=app, environ=environ).path == named
    assert load(cwd=app, environ={"BGSUPERVISOR_CONFIG": "../two.toml"}).path == by_variable


def test_the_variable_is_enough_in_the_root_folder(app, monkeypatch):
    monkeypatch.chdir("/")
    found = load(environ={"BGSUPERVISOR_CONFIG": str(app / "bgsupervisor.toml")})
    assert found.base_dir == app
    assert found.database == f"sqlite:///{app}/bgsupervisor.db"


def test_nothing_found_lists_the_folders_searched_and_what_to_do(monkeypatch):
    monkeypatch.chdir("/usr/bin")
    with pytest.raises(ConfigError, match="is in /usr/bin, /usr, /; write one with `bgsupervisor init`"):
        load(environ={"PWD": "/usr/bin"})
    with pytest.raises(ConfigError, match=r"is in /; .* BGSUPERVISOR_DATABASE$"):
        load(environ={}, cwd=Path("/"))


@pytest.mark.parametrize(
    "asked",
    [
        {"database": "sqlite:///x.db"},
        {"flags": {"database": "sqlite:///x.db"}},
        {"environ": {"BGSUPERVISOR_DATABASE": "sqlite:///x.db"}},
        {"environ": {"BGSUPERVISOR_ENV_FILE": "settings"}},
    ],
    ids=["argument", "flag", "environment", "env_file"],
)
def test_a_database_named_needs_no_file(tmp_path, asked):
    write(tmp_path, "BGSUPERVISOR_DATABASE=sqlite:///x.db", "settings")
    found = load(cwd=tmp_path, **{"environ": {}, **asked})
    assert (found.path, found.base_dir) == (None, tmp_path)
    assert found.database == f"sqlite:///{tmp_path}/x.db"
    assert found.state_dir == tmp_path / ".bgsupervisor"


def test_a_named_file_that_is_missing_is_told_in_a_sentence(tmp_path):
    for name in (tmp_path / "absent.toml", tmp_path / "absent" / "absent.toml"):
        with pytest.raises(ConfigError, match=re.escape(f"{name} does not exist")):
            load(name, environ={})
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be read: Is a directory"):
        load(tmp_path, environ={})


def test_a_found_link_that_leads_nowhere_is_an_error_and_not_passed_by(app):
    (app / "inner").mkdir()
    (app / "inner" / "bgsupervisor.toml").symlink_to("absent")
    with pytest.raises(ConfigError, match=r"inner/bgsupervisor.toml does not exist"):
        load(cwd=app / "inner", environ={})


def test_a_named_pyproject_without_our_table_is_an_error(tmp_path):
    file = write(tmp_path, "[tool.other]\n", "pyproject.toml")
    with pytest.raises(ConfigError, match=r"has no table \[tool.bgsupervisor\]"):
        load(file, environ={})
    write(tmp_path, "[tool]\nbgsupervisor = 5\n", "pyproject.toml")
    with pytest.raises(ConfigError, match=r"tool.bgsupervisor must be a table"):
        load(file, environ={})


def test_our_own_file_with_a_table_header_is_explained(app):
    with pytest.raises(ConfigError, match="keys stand at the top here, without the line"):
        load_from(app, "[tool.bgsupervisor]\nslots = 3")


@needs_root
def test_a_file_that_may_not_be_read_names_user_and_path():
    with open_folder() as folder:
        file = write(folder, "slots = 3")
        file.chmod(0o600)
        said = as_nobody(lambda: load(cwd=folder, environ={}))
    assert said.startswith(f"AccessError: user nobody cannot read {file}: Permission denied; ")


@needs_root
def test_a_folder_that_may_not_be_searched_is_an_error_and_not_passed_by(monkeypatch):
    with open_folder() as folder:
        write(folder, "slots = 3")
        (folder / "closed").mkdir(0o700)
        monkeypatch.chdir(folder / "closed")
        said = as_nobody(lambda: load(environ={}))
    assert said.startswith(f"AccessError: user nobody cannot read {folder / 'closed'}: Permission denied; ")


def test_a_working_folder_that_is_gone_is_told_in_a_sentence(tmp_path, app, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the working folder is gone or cannot be read"):
        load(environ={"PWD": str(gone)})
    assert load(app / "bgsupervisor.toml", environ={}).base_dir == app


# ---- Paths -----------------------------------------------------------------------------------------------------


@pytest.fixture
def current(tmp_path):
    """Return a `current` link to a release that has a configuration file."""
    release = tmp_path / "releases" / "42"
    release.mkdir(parents=True)
    write(release, 'database = "sqlite:///../shared/tasks.db"\npython_path = ["lib"]\nenv_file = ".env"')
    (release / ".env").touch()
    (tmp_path / "current").symlink_to("releases/42")
    return tmp_path / "current"


def test_a_release_behind_a_link_stays_behind_it(current, tmp_path, monkeypatch):
    monkeypatch.chdir(current)
    by_shell = load(environ={"PWD": str(current)})
    assert load(current / "bgsupervisor.toml", environ={}) == by_shell
    assert load(environ={"BGSUPERVISOR_CONFIG": f"{current}/bgsupervisor.toml"}) == by_shell
    assert by_shell.base_dir == current
    assert by_shell.database == f"sqlite:///{tmp_path}/shared/tasks.db"
    assert by_shell.state_dir == tmp_path / "shared" / ".bgsupervisor"
    assert by_shell.python_path == (f"{current}/lib",)
    assert by_shell.env_file == current / ".env"


@pytest.mark.parametrize("pwd", ["/", "/absent", ".", ""])
def test_a_pwd_that_names_another_folder_is_not_believed(current, monkeypatch, pwd):
    monkeypatch.chdir(current)
    assert load(environ={"PWD": pwd}).base_dir == current.resolve()


def test_relative_paths_start_from_the_file_wherever_one_is(app, tmp_path):
    found = load(
        app / "bgsupervisor.toml",
        cwd=tmp_path,
        database="sqlite:///data/x.db",
        environ={"BGSUPERVISOR_PYTHON_PATH": "lib, ../more"},
    )
    assert found.database == f"sqlite:///{app}/data/x.db"
    assert found.state_dir == app / "data" / ".bgsupervisor"
    assert found.python_path == (f"{app}/lib", f"{tmp_path}/more")
    assert load_from(app, 'database = "sqlite:////data/x.db"\nstate_dir = "run"').state_dir == app / "run"


def test_an_absolute_database_stays_as_it_is(app):
    assert load_from(app, 'database = "sqlite:////data/a%20b.db"').database == "sqlite:////data/a%20b.db"


def test_sqlite_path_takes_addresses_by_the_letter():
    assert sqlite_path("sqlite:////srv/a%20b.db") == Path("/srv/a%20b.db")
    assert sqlite_path("sqlite:///a/b.db") == Path("a/b.db")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("sqlite:///:memory:", "cannot be in memory, because tasks run in other processes"),
        ("sqlite:///file::memory:?cache=shared", "cannot be in memory"),
        ("sqlite:///", "names no file"),
        ("sqlite://x.db", "names no file"),
        ("sqlite:x.db", "names no file"),
        ("sqlite:///x.db?timeout=5", "no options after a question mark"),
        ("mysql://jana:geheim@db/app", "'mysql' is not supported, only sqlite and postgresql are"),
        ("tasks.db", "names no kind of database, only sqlite and postgresql are"),
        ("postgresql://jana:geheim@db", "names no database of the PostgreSQL server"),
        ("postgresql://jana:geheim@db/", "names no database of the PostgreSQL server"),
        ("postgresql://jana:gehe/im@db/app", "cannot be read; write postgresql://user:password@host/database"),
        ("postgresql://jana:1/geheim@db/app", "what is special in a password as %40"),
        ("postgresql://jana:geheim#x@db/app", "cannot be read"),
        ("postgresql://jana:geheim@[db/app", "cannot be read"),
    ],
)
def test_an_address_that_cannot_work_is_refused_without_its_password(app, url, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_from(app, database=url)
    assert str(caught.value).endswith("(--database)")
    assert "geheim" not in str(caught.value)


# ---- Values and where they come from ---------------------------------------------------------------------------


def test_an_empty_file_gives_the_defaults(app):
    found = load(cwd=app, environ={})
    expected = Config(
        base_dir=app,
        path=app / "bgsupervisor.toml",
        database=f"sqlite:///{app}/bgsupervisor.db",
        state_dir=app / ".bgsupervisor",
    )
    assert found == expected
    assert set(found.origins.values()) == {"default"}
    assert (found.slots, found.spares, found.reuse, found.lease_s) == (16, 2, 1, 30)
    assert (found.data_max_bytes, found.log_max_bytes) == (MIB, 10 * MIB)
    assert (found.heartbeat_s, found.grace_s, found.busy_timeout_s, found.start_method) == (5, 10, 5, "fork")


def test_flags_win_over_the_environment_and_that_over_its_file_and_the_file(app):
    write(app, "BGSUPERVISOR_SPARES=3\nBGSUPERVISOR_REUSE=3\nBGSUPERVISOR_SLOTS=3\nOTHER=1", ".env")
    text = 'slots = 4\nspares = 4\nreuse = 4\ngrace_s = 4\nenv_file = ".env"'
    environ = {"BGSUPERVISOR_SPARES": "2", "BGSUPERVISOR_SLOTS": "2"}
    found = load_from(app, text, environ, slots=1, tasks=None)
    assert (found.slots, found.spares, found.reuse, found.grace_s, found.tasks) == (1, 2, 3, 4, ())
    file = app / "bgsupervisor.toml"
    assert {key: found.origins[key] for key in ("slots", "spares", "reuse", "grace_s", "tasks")} == {
        "slots": "--slots",
        "spares": "environment BGSUPERVISOR_SPARES",
        "reuse": f"environment BGSUPERVISOR_REUSE in {app / '.env'}",
        "grace_s": f"file {file}",
        "tasks": "default",
    }


def test_the_argument_wins_over_the_flag(app):
    found = load(cwd=app, environ={}, database="sqlite:////a.db", flags={"database": "sqlite:////b.db"})
    assert found.database == "sqlite:////a.db"
    assert found.origins["database"] == "argument database"


def test_this_process_has_the_environment_when_none_is_given(app, monkeypatch):
    monkeypatch.setenv("BGSUPERVISOR_SLOTS", "5")
    assert load(cwd=app).slots == 5


def test_every_kind_of_text_is_converted(app):
    environ = {
        "BGSUPERVISOR_TASKS": "myapp.tasks, other",
        "BGSUPERVISOR_SETUP": "django:setup",
        "BGSUPERVISOR_SLOTS": " 8 ",
        "BGSUPERVISOR_GRACE_S": "2.5",
        "BGSUPERVISOR_DATA_MAX_BYTES": "2048",
        "BGSUPERVISOR_LOG_MAX_BYTES": "512 KiB",
        "BGSUPERVISOR_STATE_DIR": "/run/x",
        "BGSUPERVISOR_START_METHOD": "spawn",
        "BGSUPERVISOR_HOST": "",
        "BGSUPERVISOR_PORT": "tcp://1.2.3.4:80",
    }
    found = load(cwd=app, environ=environ)
    assert (found.tasks, found.setup, found.slots, found.grace_s) == (("myapp.tasks", "other"), "django:setup", 8, 2.5)
    assert (found.data_max_bytes, found.log_max_bytes) == (2048, 512 * 1024)
    assert (found.state_dir, found.start_method, found.host) == (Path("/run/x"), "spawn", None)
    flags = {"state_dir": Path("/run/y"), "tasks": ("a", "b"), "log_max_bytes": "1GiB", "spares": "0"}
    found = load(cwd=app, environ=environ, flags=flags)
    assert (found.state_dir, found.tasks, found.log_max_bytes, found.spares) == (
        Path("/run/y"),
        ("a", "b"),
        1024 * MIB,
        0,
    )


def test_a_file_writes_sizes_as_number_or_words(app):
    found = load_from(app, 'data_max_bytes = "2 MiB"\nlog_max_bytes = 65536')
    assert (found.data_max_bytes, found.log_max_bytes) == (2 * MIB, 65536)


def test_threads_is_another_word_for_slots(app):
    assert load_from(app, "threads = 4").slots == 4
    found = load_from(app, "slots = 4", {"BGSUPERVISOR_THREADS": "5"})
    assert (found.slots, found.origins["slots"]) == (5, "environment BGSUPERVISOR_THREADS")


def test_both_words_in_one_place_are_an_error(app):
    with pytest.raises(ConfigError, match=r"slots and threads mean the same, keep one \(file .*bgsupervisor.toml\)"):
        load_from(app, "threads = 4\nslots = 4")
    with pytest.raises(ConfigError, match="slots and threads mean the same"):
        load_from(app, "", {"BGSUPERVISOR_THREADS": "5", "BGSUPERVISOR_SLOTS": "5"})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("slot", "slots"), ("state-dir", "state_dir"), ("Heartbeat", "heartbeat_s"), ("SLOTS", "slots")],
)
def test_unknown_key_names_the_nearest_right_one(app, key, nearest):
    with pytest.raises(ConfigError, match=rf"{app}/bgsupervisor.toml: unknown key {key}; did you mean {nearest}\?"):
        load_from(app, f"{key} = 5")


def test_unknown_key_far_from_all_lists_them(app):
    with pytest.raises(ConfigError, match="unknown key zzzz; the keys are database, table_prefix, tasks, "):
        load_from(app, "zzzz = 5")
    with pytest.raises(ConfigError, match="the command line: unknown key slot;"):
        load_from(app, slot=5)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('slots = "4"', "slots must be a whole number from 1 to 1000, not '4'"),
        ("slots = true", "slots must be a whole number from 1 to 1000, not True"),
        ("slots = 4.0", "slots must be a whole number from 1 to 1000, not 4.0"),
        ("slots = 0", "slots must be a whole number from 1 to 1000, not 0"),
        ("threads = 1001", "threads must be a whole number from 1 to 1000, not 1001"),
        (
            "log_max_bytes = 16383",
            'log_max_bytes must be a size such as 1048576 or "1 MiB" from 16 KiB to 1 GiB, not 16383',
        ),
        ("reuse = 0", "reuse must be a whole number from 1 to 1000000, not 0"),
        ("grace_s = -1", "grace_s must be a number of seconds from 0 to 86400, not -1"),
        ("grace_s = nan", "grace_s must be a number of seconds from 0 to 86400, not nan"),
        ("grace_s = false", "grace_s must be a number of seconds from 0 to 86400, not False"),
        ("heartbeat_s = 0", "heartbeat_s must be a number of seconds from 0.05 to 3600, not 0"),
        (f"grace_s = 1{'0' * 400}", "grace_s must be a number of seconds from 0 to 86400, not 1000"),
        ('data_max_bytes = "1 MB"', "data_max_bytes must be a size such as 1048576 or .* from 1 KiB to 64 MiB, not"),
        ("data_max_bytes = 1.5", "data_max_bytes must be a size"),
        ("data_max_bytes = 0", "data_max_bytes must be a size"),
        ('tasks = "myapp.tasks"', "tasks must be a list of modules such as .*, not 'myapp.tasks'"),
        ('tasks = ["myapp/tasks.py"]', "tasks must be a list of modules"),
        ("tasks = [5]", "tasks must be a list of modules"),
        ('setup = "django.setup"', "setup must be a function as .*, not 'django.setup'"),
        ('start_method = "forkserver"', 'start_method must be "fork" or "spawn", not \'forkserver\''),
        ('table_prefix = "a-b"', "table_prefix must be at most 32 letters"),
        ('table_prefix = ""', "table_prefix must be at most 32 letters"),
        ('host = ""', "host must be text that is not empty, not ''"),
        ("state_dir = 5", "state_dir must be a path, not 5"),
        ('state_dir = "a\\u0000"', "state_dir must be a path"),
        ("database = 5", "database must be an address"),
        ("python_path = [1]", "python_path must be a list of paths"),
    ],
)
def test_a_wrong_value_says_what_was_expected_what_came_and_from_where(app, line, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_from(app, line)
    assert str(caught.value).endswith(f"(file {app}/bgsupervisor.toml)")


def test_a_wrong_value_of_the_environment_names_the_variable(app):
    with pytest.raises(ConfigError, match=r"not 'many' \(environment BGSUPERVISOR_THREADS\)$"):
        load_from(app, "", {"BGSUPERVISOR_THREADS": "many"})
    with pytest.raises(ConfigError, match=r"not 'many' \(--busy-timeout-s\)$"):
        load_from(app, busy_timeout_s="many")


def test_a_long_wrong_value_is_cut_short_after_its_password_is_masked(app):
    with pytest.raises(ConfigError) as caught:
        load_from(app, f'slots = "x://jana:{"geheim" * 50}@db/{"y" * 500}"')
    assert "jana:***@db" in str(caught.value)
    assert len(str(caught.value)) < 200 + len(str(app))


def test_a_lease_must_outlast_two_heartbeats(app):
    with pytest.raises(
        ConfigError, match=r"lease_s is 9 \(file .*\) and must be at least twice heartbeat_s, which is 5"
    ):
        load_from(app, "lease_s = 9")
    assert load_from(app, "lease_s = 9\nheartbeat_s = 4.5").lease_s == 9


@pytest.mark.parametrize(
    ("text", "where"), [("slots = 1\nslots 2\n", ", line 2"), ("slots = [", ""), ("slots = 1\nslots = 2\n", ", line 2")]
)
def test_bad_toml_names_file_and_line(app, text, where):
    with pytest.raises(ConfigError, match=f"{app}/bgsupervisor.toml{where}: not valid TOML: [A-Z]"):
        load_from(app, text)


def test_a_file_that_is_not_text_is_told_in_a_sentence(app):
    (app / "bgsupervisor.toml").write_bytes(b"slots = 1 # \xff")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 12\)"):
        load(cwd=app, environ={})


def test_a_byte_order_mark_is_no_error(app):
    (app / "bgsupervisor.toml").write_bytes(b"\xef\xbb\xbfslots = 3\r\n")
    assert load(cwd=app, environ={}).slots == 3


# ---- The environment's file ------------------------------------------------------------------------------------


def values_of(app, text):
    write(app, text, ".env")
    return env_file_values(load_from(app, 'env_file = ".env"'))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("KEY=value", "value"),
        ("export KEY=value", "value"),
        ("  KEY = two words  ", "two words"),
        ("KEY=", ""),
        ("KEY=value # comment", "value"),
        ("KEY= # comment", ""),
        ("KEY=a#b", "a#b"),
        ("KEY=#abc", "#abc"),
        ("KEY='a # \"b\" \\n $X'", 'a # "b" \\n $X'),
        ("KEY='a' # comment", "a"),
        ('KEY="a # b" # comment', "a # b"),
        ('KEY="a\\n\\"b\\"\\t\\\\n"', 'a\n"b"\t\\n'),
        ("KEY=$HOME/${X}", "$HOME/${X}"),
        ("KEY=a=b", "a=b"),
        ("# KEY=no\n\n\r\nKEY=crlf\r\n", "crlf"),
        ("KEY=first\nKEY=second", "second"),
        ("KEY=a\u2028b", "a\u2028b"),
    ],
)
def test_lines_of_the_environments_file(app, line, value):
    assert values_of(app, line) == {"KEY": value}


@pytest.mark.parametrize(
    "line", ["geheim", "KEY='geheim", 'KEY="geheim\\"', "1KEY=geheim", "K-Y=geheim", "KEY=geheim\0"]
)
def test_a_line_that_is_none_is_named_by_number_and_never_shown(app, line):
    with pytest.raises(ConfigError, match=r"/.env, line 2: expected KEY=VALUE") as caught:
        values_of(app, f"A=1\n{line}\n")
    assert "geheim" not in str(caught.value)


def test_a_wrong_value_of_the_environments_file_is_never_shown(app):
    with pytest.raises(ConfigError, match=rf"\(environment BGSUPERVISOR_SLOTS in {app}/.env\)") as caught:
        values_of(app, "BGSUPERVISOR_SLOTS=geheim")
    assert "geheim" not in str(caught.value)


def test_the_environments_file_cannot_name_another(app):
    write(app, "BGSUPERVISOR_ENV_FILE=other", ".env")
    assert load_from(app, 'env_file = ".env"').env_file == app / ".env"


def test_a_missing_environments_file_is_an_error(app):
    with pytest.raises(ConfigError, match=r"/.env does not exist"):
        load_from(app, 'env_file = ".env"')


@needs_root
def test_an_environments_file_that_may_not_be_read_names_user_and_path():
    with open_folder() as folder:
        write(folder, "A=1", ".env").chmod(0o600)
        write(folder, 'env_file = ".env"')
        said = as_nobody(lambda: load(cwd=folder, environ={}))
    assert said.startswith(f"AccessError: user nobody cannot read {folder}/.env: Permission denied; ")


def test_the_environments_file_is_applied_without_overriding(app, monkeypatch):
    monkeypatch.setenv("TEST_KEPT", "kept")
    monkeypatch.setenv("TEST_NEW", "")
    monkeypatch.delenv("TEST_NEW")
    write(app, "TEST_KEPT=lost\nTEST_NEW=new", ".env")
    apply_env_file(load_from(app, 'env_file = ".env"'))
    assert (os.environ["TEST_KEPT"], os.environ.pop("TEST_NEW")) == ("kept", "new")


def test_loading_changes_no_environment_and_no_file_gives_no_values(app):
    before = dict(os.environ)
    assert values_of(app, "TEST_NEW=new") == {"TEST_NEW": "new"}
    assert dict(os.environ) == before
    assert env_file_values(load_from(app)) == {}


# ---- Showing, handing over -------------------------------------------------------------------------------------


def test_the_template_is_valid_and_says_nothing_but_the_defaults(app):
    found = load_from(app, template())
    assert found == load_from(app, 'tasks = ["myapp.tasks"]')
    assert [key for key, origin in found.origins.items() if origin != "default"] == ["tasks"]


def test_the_template_uncommented_has_every_key_with_a_value_that_loads(app):
    text = re.sub(r"^# (\w+ = )", r"\1", template(), flags=re.MULTILINE)
    assert list(tomllib.loads(text)) == [option.name for option in OPTIONS]
    (app / ".env").touch()
    found, default = load_from(app, text), load_from(app)
    examples = {option.name for option in OPTIONS if option.example is not None}
    assert {o.name for o in OPTIONS if getattr(found, o.name) != getattr(default, o.name)} == examples
    assert 'data_max_bytes = "1 MiB"\n' in text
    assert "grace_s = 10\n" in text


def test_options_are_the_fields_that_users_write():
    own = {"base_dir", "path", "origins"}
    assert [option.name for option in OPTIONS] == [f.name for f in fields(Config) if f.name not in own]
    by_name = {option.name: option for option in OPTIONS}
    assert (by_name["grace_s"].unit, by_name["log_max_bytes"].unit, by_name["slots"].unit) == ("seconds", "bytes", "")
    assert (by_name["log_max_bytes"].default_text, by_name["host"].default_text) == ('"10 MiB"', "")
    assert by_name["slots"].variable == "BGSUPERVISOR_SLOTS"


def test_a_unit_stands_in_the_name():
    for option in OPTIONS:
        assert option.name.endswith(("_s",)) == (option.unit == "seconds"), option.name
        assert option.name.endswith("_bytes") == (option.unit == "bytes"), option.name


def test_a_configuration_survives_pickling_and_cannot_be_changed(app):
    found = load_from(app, 'tasks = ["a"]')
    copy = pickle.loads(pickle.dumps(found))
    assert copy == found
    assert copy.origins == found.origins
    assert hash(copy) == hash(found)
    with pytest.raises(AttributeError):
        found.slots = 3


def test_describe_has_every_key_in_order_with_its_origin(app):
    described = load_from(app, 'tasks = ["a"]', slots=3).describe()
    assert [key for key, _, _ in described] == [option.name for option in OPTIONS]
    assert ("slots", 3, "--slots") in described
    assert ("tasks", ["a"], f"file {app}/bgsupervisor.toml") in described
    assert ("state_dir", f"{app}/.bgsupervisor", "default") in described
    assert ("host", None, "default") in described


def test_describe_masks_the_password_of_an_address():
    described = Config(base_dir=Path("/"), database="postgresql://jana:ge@h/eim@db:5432/app").describe()
    assert described[0] == ("database", "postgresql://jana:***@db:5432/app", "default")
    in_query = Config(base_dir=Path("/"), database="postgresql:///app?password=geheim&user=jana").describe()
    assert in_query[0] == ("database", "postgresql:///app?password=***&user=jana", "default")


def test_a_postgresql_address_stays_as_it_is_and_the_state_directory_is_beside_the_file(app):
    url = "postgresql://jana:ge%40heim@db:5432/app?sslmode=require"
    config = load_from(app, database=url)
    assert config.database == url
    assert config.state_dir == app / ".bgsupervisor"


def test_importing_is_cheap():
    code = "import sys, bgsupervisor.config; print(*{'peewee', 'psutil', 'msgspec', 'click'} & set(sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": SOURCE}, check=True, timeout=20, capture_output=True, text=True
    )
    assert said.stdout == "\n"
