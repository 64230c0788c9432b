"""A configuration that was found rather than named: whose it may be, and who may write beside it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from as_user import NOBODY, as_nobody, needs_root, open_folder
from conftest import wait_until

from bgsupervisor import Service, config
from bgsupervisor.config import load, remarks
from bgsupervisor.doctor import Grade, Machine, Scene, files
from bgsupervisor.errors import ConfigError

pytestmark = needs_root  # only root can make what is another user's

OWN, STRANGER = 0, NOBODY
WAITS = """
import os, time

@task
def one() -> str:
    time.sleep(1)
    return os.getcwd()

@task
def waits(id: int) -> None:
    current().wait_for(id)
"""
RUNS_CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.fixture
def outer():
    """A folder of root's in which every user may look."""
    with open_folder() as folder:
        yield folder


def make(folder, *, uid=OWN, mode=0o755, name="bgsupervisor.toml", text="", file_uid=None, file_mode=0o644):
    """Make a folder with a configuration, of the given owners and modes; return it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(file_mode)
    os.chown(folder / name, uid if file_uid is None else file_uid, -1)
    folder.chmod(mode)
    os.chown(folder, uid, -1)
    return folder


def found(folder, **options):
    return load(cwd=folder, environ={}, **options).path


def refused(folder, **options):
    with pytest.raises(ConfigError, match=r"cannot use .* upwards from the working folder: .*--config or") as raised:
        found(folder, **options)
    return str(raised.value)


# ---- what is found ----

CASES = {
    "own in a closed folder": ({}, None),
    "own in a folder of a group": ({"mode": 0o2775, "file_mode": 0o664}, None),
    "a stranger's file": ({"file_uid": STRANGER}, "bgsupervisor.toml belongs to user nobody, and this is user root"),
    "a stranger's folder": ({"uid": STRANGER, "file_uid": OWN}, "belongs to user nobody"),
    "a file that every user may write": ({"file_mode": 0o666}, "every user may write"),
    "a folder that every user may write": ({"mode": 0o777}, "every user may write"),
    "a sticky folder that every user may write": ({"mode": 0o1777}, "every user may write"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("below", [".", "a/b"])
@pytest.mark.parametrize("name", ["bgsupervisor.toml", "pyproject.toml"])
def test_load_of_a_found_file_trusts_as_documented(outer, case, below, name):
    options, why = CASES[case]
    folder = make(outer / "app", name=name, text="[tool.bgsupervisor]\n" * (name == "pyproject.toml"), **options)
    (folder / below).mkdir(parents=True, exist_ok=True)

    if why is None:
        assert found(folder / below) == folder / name
    else:
        assert why.replace("bgsupervisor.toml", name) in refused(folder / below)


@pytest.mark.parametrize(
    ("above", "is_trusted"), [((OWN, 0o777), False), ((OWN, 0o1777), True), ((STRANGER, 0o755), False)]
)
def test_load_of_a_found_file_looks_at_the_folders_above(outer, above, is_trusted):
    uid, mode = above
    (outer / "above").mkdir()
    folder = make(outer / "above" / "app")
    (outer / "above").chmod(mode)
    os.chown(outer / "above", uid, -1)

    if is_trusted:
        assert found(folder) == folder / "bgsupervisor.toml"
    else:
        assert str(outer / "above") in refused(folder)


def test_load_of_a_found_file_of_ones_own_trusts_it_below_tmp(outer):
    folder = make(outer / "app", uid=NOBODY)

    assert as_nobody(lambda: found(folder)) == str(folder / "bgsupervisor.toml")
    make(outer / "roots")
    assert as_nobody(lambda: found(outer / "roots")) == str(outer / "roots" / "bgsupervisor.toml")


@pytest.mark.parametrize("what", ["link of a stranger", "target of a stranger", "target in an open folder"])
@pytest.mark.parametrize("links", ["file", "folder"])
def test_load_of_a_found_file_looks_at_links_and_where_they_lead(outer, what, links):
    target = make(outer / "target", uid=STRANGER if what == "target of a stranger" else OWN)
    if what == "target in an open folder":
        (outer / "target").chmod(0o777)
    folder = outer / "current"
    if links == "folder":
        folder.symlink_to(target)
        link = folder
    else:
        folder.mkdir()
        link = folder / "bgsupervisor.toml"
        link.symlink_to(target / "bgsupervisor.toml")
    assert what == "link of a stranger" or refused(folder)
    if what == "link of a stranger":
        assert found(folder) == folder / "bgsupervisor.toml"
        os.chown(link, STRANGER, -1, follow_symlinks=False)
        assert f"{link} belongs to user nobody" in refused(folder)


def test_load_does_not_read_a_strangers_pyproject(outer):
    folder = make(outer / "app", name="pyproject.toml", file_uid=STRANGER, text="this is no TOML")

    assert "belongs to user nobody" in refused(folder)


def test_remarks_do_not_read_a_strangers_files(outer):
    own = make(outer / "own")
    folder = make(outer / "app", name="pyproject.toml", text="[tool.bgsupervisor]\n")
    named = load(own / "bgsupervisor.toml", environ={})
    assert any("pyproject.toml is ignored" in one for one in remarks(named, environ={}, cwd=folder))

    os.chown(folder / "pyproject.toml", STRANGER, -1)

    assert not any("pyproject.toml" in one for one in remarks(named, environ={}, cwd=folder))


@pytest.mark.parametrize("key", ["env_file", "python_path"])
def test_load_refuses_what_a_found_file_names_of_a_stranger(outer, key):
    (outer / "lib").mkdir()
    (outer / "lib" / "env").touch()
    value = '"../lib/env"' if key == "env_file" else '["../lib"]'
    folder = make(outer / "app", text=f"{key} = {value}\n")
    assert found(folder) == folder / "bgsupervisor.toml"

    os.chown(outer / "lib", STRANGER, -1)

    assert f"{outer}/lib belongs to user nobody" in refused(folder)
    assert load(folder / "bgsupervisor.toml", environ={}).path


# ---- what is named ----


@pytest.mark.parametrize("how", ["argument", "variable", "relative"])
def test_load_of_a_named_file_asks_nobody(outer, how):
    folder = make(outer / "app", uid=STRANGER, mode=0o777, file_mode=0o666)
    file = folder / "bgsupervisor.toml"

    if how == "argument":
        assert load(file, environ={}).path == file
    elif how == "variable":
        assert load(cwd=outer, environ={"BGSUPERVISOR_CONFIG": str(file)}).path == file
    else:
        assert load("bgsupervisor.toml", cwd=folder, environ={}).path == file


# ---- programs ----


def service_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PWD", raising=False)
    with contextlib.closing(Service()) as service:
        return service.ledger.store.place


@pytest.mark.parametrize("file_mode", [0o644, 0o664])
def test_service_takes_the_file_of_another_user(outer, monkeypatch, file_mode):
    folder = make(outer / "app", uid=STRANGER, file_mode=file_mode)

    assert service_in(folder, monkeypatch) == str(folder / "bgsupervisor.db")


def test_service_takes_its_own_file_wherever_it_lies(outer, monkeypatch):
    folder = make(outer / "app", mode=0o777)

    assert service_in(folder, monkeypatch) == str(folder / "bgsupervisor.db")


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_service_refuses_a_file_that_anybody_may_have_planted(outer, monkeypatch, mode):
    folder = make(outer / "app", mode=mode, file_uid=STRANGER)

    with pytest.raises(ConfigError, match="every user may write"):
        service_in(folder, monkeypatch)


# ---- the command line ----


def cli(*arguments, cwd):
    names = ("PATH", "HOME", "LANG", "PYTHONPATH", "COVERAGE_PROCESS_START")
    script = Path(sys.executable).with_name("bgsupervisor")
    return subprocess.run(
        [script, *map(str, arguments)],
        cwd=cwd,
        env={name: os.environ[name] for name in names if name in os.environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


COMMANDS = [["check"], ["run"], ["doctor"], ["ps"], ["show", "1"], ["request", "mine:x"], ["retry", "1"], ["dev"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize(("uid", "mode"), [(OWN, 0o1777), (STRANGER, 0o755)])
def test_check_below_a_world_writable_folder_runs_nobodys_code(outer, command, uid, mode):
    open_to_all = outer / "open"
    open_to_all.mkdir()
    open_to_all.chmod(mode)
    os.chown(open_to_all, uid, -1)
    (open_to_all / "bgsupervisor.toml").write_text('tasks = ["mine"]\nsetup = "mine:x"\n')
    (open_to_all / "mine.py").write_text(RUNS_CODE)
    for path in open_to_all.iterdir():
        os.chown(path, STRANGER, -1)
    (open_to_all / "work").mkdir()

    told = cli(*command, cwd=open_to_all / "work")

    assert told.returncode == (1 if command == ["doctor"] else 3)
    assert "cannot use" in told.stdout + told.stderr
    assert "Traceback" not in told.stderr
    assert sorted(path.name for path in open_to_all.iterdir()) == ["bgsupervisor.toml", "mine.py", "work"]


@pytest.mark.parametrize("command", ["check", "doctor"])
@pytest.mark.parametrize("module", ["msgspec", "pickle", "bgsupervisor"])
def test_check_imports_nothing_from_the_working_folder(outer, command, module):
    folder = make(outer / "app", text='tasks = ["mine"]\n')
    (folder / "mine.py").write_text("from bgsupervisor import task\n\n@task\ndef one() -> None: ...\n")
    (outer / "cwd").mkdir()
    (outer / "cwd" / f"{module}.py").write_text(RUNS_CODE)

    told = cli(command, "--config", folder / "bgsupervisor.toml", cwd=outer / "cwd")

    assert "one" in told.stdout or "mine: 1 task(s)" in told.stdout, told
    assert [path.name for path in (outer / "cwd").iterdir()] == [f"{module}.py"]


@pytest.mark.parametrize("command", [["run", "--burst"], ["dev"]])
def test_run_imports_nothing_from_the_working_folder(outer, command):
    folder = make(outer / "app", text='tasks = ["mine"]\n')
    (folder / "mine.py").write_text("from bgsupervisor import current, task\n" + WAITS)
    working = outer / "cwd"
    working.mkdir()
    for module in ("multiprocessing", "msgspec", "bgsupervisor", "mine"):
        (working / f"{module}.py").write_text(RUNS_CODE)
    with contextlib.closing(Service(config=folder / "bgsupervisor.toml")) as service:
        first = service.request("mine:one")
        second = service.request("mine:waits", {"id": first.id})
        names = ("PATH", "HOME", "LANG", "PYTHONPATH", "COVERAGE_PROCESS_START")
        process = subprocess.Popen(
            [Path(sys.executable).with_name("bgsupervisor"), "--config", folder / "bgsupervisor.toml", *command],
            cwd=working,
            env={name: os.environ[name] for name in names if name in os.environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert service.wait(second, timeout_s=30).status == "DONE"
            assert service.result(first) == str(folder)
            wait_until((folder / ".bgsupervisor" / "board.sock").exists, "there is a wait manager")
            assert sorted(path.name for path in working.iterdir()) == [
                "bgsupervisor.py", "mine.py", "msgspec.py", "multiprocessing.py"
            ]  # fmt: skip
        finally:
            process.terminate()
            process.wait(30)


# ---- doctor ----


def scene_of(folder):
    return Scene(config=load(folder / "bgsupervisor.toml", environ={}), machine=Machine())


def test_doctor_says_wrong_where_every_user_may_write_the_code(outer):
    folder = make(outer / "app")
    assert [grade for grade, _ in files.code(scene_of(folder))] == [Grade.OK]

    folder.chmod(0o777)

    assert {grade for grade, told in files.code(scene_of(folder)) if f"every user may write {folder}" in told} == {
        Grade.WRONG
    }


def test_doctor_says_wrong_of_the_folders_that_the_code_comes_from(outer):
    (outer / "lib").mkdir()
    (outer / "env").touch()
    folder = make(outer / "app", text='python_path = ["../lib"]\nenv_file = "../env"\n')
    (outer / "lib").chmod(0o777)
    (outer / "env").chmod(0o666)

    told = "\n".join(told for grade, told in files.code(scene_of(folder)) if grade is Grade.WRONG)

    assert f"every user may write {outer}/lib;" in told
    assert f"every user may write {outer}/env;" in told


def test_doctor_notes_a_group_that_may_write_the_code(outer):
    folder = make(outer / "app")
    os.chown(folder, OWN, 33)
    folder.chmod(0o2775)

    assert [grade for grade, told in files.code(scene_of(folder)) if "group www-data may write" in told] == [Grade.NOTE]


def test_doctor_notes_code_of_another_user(outer):
    folder = make(outer / "app", uid=STRANGER)

    assert {grade for grade, _ in files.code(scene_of(folder))} == {Grade.NOTE}


def test_module_imports_nothing_of_other_users_on_windows(monkeypatch, outer):
    folder = make(outer / "app", uid=STRANGER, mode=0o777)
    monkeypatch.delattr(config.os, "geteuid")

    assert config.distrust(folder / "bgsupervisor.toml") is None
