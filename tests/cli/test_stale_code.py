"""Code that was changed since the supervisor loaded it: what the commands say, and when they say nothing."""

import dataclasses
import json
import os
import sys

import pytest
from support.app import wait_until
from support.as_user import as_nobody, needs_root, open_folder

from bgsupervisor.config import load
from bgsupervisor.system import fingerprint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

SOURCE = """
    from bgsupervisor import task
    import helper

    @task
    def word() -> str:
        return helper.WORD
"""
WITH_ANOTHER = (
    SOURCE
    + """
    @task
    def words() -> str:
        return "two"
"""
)
SENTENCE = "code on disk is newer than what is loaded ({}): `bgsupervisor reload`"
OF_TASKS = SENTENCE.format("appx.py")


@pytest.fixture
def app(make_app):
    app = make_app(SOURCE)
    app.write('WORD = "old"', "helper")
    return app


@pytest.fixture
def running(app):
    app.start()
    assert "newer" not in app.cli("ps").stderr
    return app


def test_ps_request_and_doctor_after_an_edit_say_reload(running):
    running.write(WITH_ANOTHER)

    assert OF_TASKS in running.cli("ps").stderr
    listed = running.cli("ps", "--json")
    assert OF_TASKS in listed.stderr
    assert json.loads(listed.stdout) == []
    assert OF_TASKS in running.cli("request", "appx:word").stderr
    assert OF_TASKS in running.cli("request", "appx:word", "--wait").stderr
    told = {one["check"]: one for one in json.loads(running.cli("doctor", "--json").stdout)}["loaded code"]
    assert (told["grade"], "(appx.py)" in told["told"]) == ("note", True)


def test_ps_after_a_reload_says_nothing(running):
    running.write(WITH_ANOTHER)
    assert running.cli("reload").returncode == 0

    assert "newer" not in running.cli("ps").stderr
    assert "newer" not in running.cli("request", "appx:word").stderr
    assert "newer" not in running.cli("doctor").stdout


def test_ps_after_a_new_supervisor_says_nothing(running):
    running.write(WITH_ANOTHER)
    running.supervisors[0].stop()
    assert "newer" not in running.cli("ps").stderr  # the next one loads what is there
    running.start()

    assert "newer" not in running.cli("ps").stderr


def test_request_of_a_new_class_says_reload_and_guesses_no_other(running):
    running.write(WITH_ANOTHER)

    told = running.cli("request", "appx:words").stderr

    assert f"no supervisor has loaded appx:words yet; {OF_TASKS}" in told
    assert "did you mean" not in told
    assert "did you mean" not in running.cli("ps").stderr


def test_request_of_a_misspelt_name_still_guesses(running):
    assert "did you mean appx:word?" in running.cli("request", "appx:wrd").stderr


def test_ps_after_an_edit_of_an_imported_helper_says_reload(running):
    running.write('WORD = "newer"', "helper")

    assert SENTENCE.format("helper.py") in running.cli("ps").stderr


def test_run_after_an_edit_of_an_imported_helper_has_it_loaded(running):
    running.write('WORD = "newer"', "helper")

    assert running.cli("run").returncode == 0

    wait_until(lambda: running.supervisors[0].log.count("loaded 1 task") == 2, "the code was loaded again")
    handle = running.service.request("appx:word")
    running.wait(handle)
    assert running.service.result(handle) == "newer"


@pytest.mark.parametrize("name", ["bgsupervisor.toml", "secrets.env"])
def test_ps_after_an_edit_of_a_setting_says_reload(make_app, name):
    app = make_app(SOURCE, env_file="secrets.env")
    app.write("", "helper")
    (app.folder / "secrets.env").write_text("A=1\n")
    app.start()
    with (app.folder / name).open("a") as file:
        file.write("# more\n")

    assert SENTENCE.format(name) in app.cli("ps").stderr


def test_ps_after_a_refused_reload_names_the_failure_alone(running):
    running.write("raise RuntimeError")
    assert running.cli("reload").returncode == 1

    told = running.cli("ps").stderr

    assert "module appx failed to load" in told
    assert "newer" not in told
    running.write(SOURCE)
    assert OF_TASKS in running.cli("ps").stderr


@needs_root
@pytest.mark.parametrize("closed", ["code", "code/lib", "code/lib/deeper"])
def test_newer_code_of_files_that_a_user_may_not_read_is_unknown(closed):
    with open_folder() as folder:
        deeper = folder / "code" / "lib" / "deeper"
        deeper.mkdir(parents=True)
        (deeper / "tasks.py").touch()
        (folder / "bgsupervisor.toml").write_text('tasks = ["lib"]\npython_path = ["code"]\n')
        file = folder / "code.fingerprint"
        fingerprint.write_fingerprint(file, fingerprint.code_fingerprint(load(folder / "bgsupervisor.toml")))
        file.chmod(0o644)  # a state directory is closed to others, and so is the file
        (folder / closed).chmod(0o700)
        assert as_nobody(lambda: fingerprint.newer_code(file)) == "[]"
        (deeper / "tasks.py").write_text("1")

        assert fingerprint.newer_code(file) == ["lib"]
        assert as_nobody(lambda: fingerprint.newer_code(file)) == "[]"
        (folder / closed).chmod(0o755)
        assert as_nobody(lambda: fingerprint.newer_code(file)) == "['lib']"


def config_of(app):
    return load(app.config)


def test_newer_code_in_another_container_is_unknown(app, tmp_path):
    file = tmp_path / "code.fingerprint"
    known = fingerprint.code_fingerprint(config_of(app))
    fingerprint.write_fingerprint(file, known)
    app.write(WITH_ANOTHER)
    assert fingerprint.newer_code(file) == ["appx.py"]

    fingerprint.write_fingerprint(file, dataclasses.replace(known, root="1:2"))

    assert fingerprint.newer_code(file) == []


def test_newer_code_beyond_its_limit_is_unknown(make_app, tmp_path, monkeypatch):
    app = make_app(tasks=["large"])
    (app.folder / "large").mkdir()
    for number in range(20):
        (app.folder / "large" / f"{number}.py").touch()
    file = tmp_path / "code.fingerprint"
    fingerprint.write_fingerprint(file, fingerprint.code_fingerprint(config_of(app)))
    (app.folder / "large" / "7.py").write_text("1")
    assert fingerprint.newer_code(file) == ["large"]

    monkeypatch.setattr(fingerprint, "LISTING_ENTRIES", 10)

    assert fingerprint.newer_code(file) == []


@pytest.mark.parametrize("text", ["", "5", "[]", '{"digests": 1}', "0" * 64, "\0", '{"digests": {}, "package": "x"}'])
def test_read_stamp_of_another_version_or_half_a_file_is_none(tmp_path, text):
    file = tmp_path / "code.fingerprint"
    file.write_text(text)

    assert fingerprint.read_fingerprint(file) is None
    assert fingerprint.newer_code(file) == []


def test_extended_stamp_of_code_changed_while_it_loaded_is_newer(app, tmp_path):
    helper = app.folder / "helper.py"
    file = tmp_path / "code.fingerprint"
    known = fingerprint.code_fingerprint(config_of(app))
    changed_at_ns = helper.stat().st_ctime_ns

    fingerprint.write_fingerprint(file, known.extended([str(helper)], since_ns=changed_at_ns))
    assert fingerprint.newer_code(file) == []
    fingerprint.write_fingerprint(file, known.extended([str(helper)], since_ns=changed_at_ns - 1))

    assert fingerprint.newer_code(file) == ["helper.py"]


def test_loaded_places_leave_out_what_was_installed(monkeypatch, tmp_path):
    (tmp_path / "of_my_own.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import of_my_own  # noqa: F401

    places = fingerprint.loaded_places()

    assert str(tmp_path / "of_my_own.py") in places
    assert os.__file__ not in places
    assert not [one for one in places if "site-packages" in one]
