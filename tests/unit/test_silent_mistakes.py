"""Mistakes that Python and TOML let pass, and the sentences that they get when the tasks are loaded or checked."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from bgsupervisor import Task, TaskDefinitionError, config, errors, lookalikes, registry, sizes, task, tasks
from bgsupervisor.registry import definitions
from bgsupervisor.tasks import remarks


@pytest.fixture(autouse=True)
def _only_its_own_tasks(monkeypatch):
    """Forget after each test what it has defined, and do not look at the classes of other tests."""
    monkeypatch.setattr(registry, "_definitions", dict(definitions()))
    before = {*tasks.subclasses(Task)}
    look = tasks.subclasses
    monkeypatch.setattr(tasks, "subclasses", lambda base: [one for one in look(base) if one not in before])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Import a module of this source; called again it loads the same module again, with the new source."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(source, *, again="reload"):
        (tmp_path / "silent.py").write_text("from bgsupervisor import Task, task\n" + source)
        importlib.invalidate_caches()
        loaded = sys.modules.get("silent")
        if loaded is not None and again == "reload":
            return importlib.reload(loaded)
        sys.modules.pop("silent", None)
        return importlib.import_module("silent")

    yield load
    sys.modules.pop("silent", None)


# ---- a class without a body ----


def test_class_without_run_and_subclass_is_remarked():
    class Import(Task):
        pass

    assert remarks() == [_named(Import) + " has no `run` and no subclass, so it is no task; define `run`, or remove it"]


def test_base_class_with_a_subclass_is_not_remarked():
    class Base(Task):
        pass

    class Import(Base):
        def run(self): ...

    assert remarks() == []
    assert Import.definition()


def test_abstract_class_is_a_base_and_no_task():
    class Base(Task, abc.ABC):
        def run(self):
            return self.step()

        @abc.abstractmethod
        def step(self): ...

    class Import(Base):
        def step(self):
            return 7

    assert remarks() == []
    assert list(_own_definitions()) == [_named(Import)]
    assert Import.definition().body()() == 7
    with pytest.raises(TaskDefinitionError, match="Base has abstract methods, so it cannot be requested"):
        Base.definition()


def test_request_of_a_base_is_refused_by_class_and_by_name(make_app):
    class Import(Task):
        pass

    service = make_app("", tasks=[__name__]).service
    for what in (Import, _named(Import)):
        with pytest.raises(TaskDefinitionError, match="Import has no `run`, so it cannot be requested"):
            service.request(what)


# ---- two of one name ----

CLASS = "class Fail(Task):\n    def run(self): ...\n"
FUNCTION = "@task\ndef Fail(): ...\n"
INHERITED = "class Base(Task):\n    def run(self): ...\nclass Fail(Base): ...\n"


@pytest.mark.parametrize("second", [CLASS, FUNCTION, "class Fail(Base): ...\n"])
@pytest.mark.parametrize("first", [CLASS, FUNCTION, INHERITED])
def test_second_task_of_one_name_in_a_module_is_refused(module, first, second):
    source = ("" if "Base" in first else "class Base(Task):\n    def run(self): ...\n") + first + second
    with pytest.raises(TaskDefinitionError, match=r"two tasks have the name 'silent:Fail'.*at line \d+.*rename one"):
        module(source)


def test_two_tasks_with_the_body_of_one_base_cannot_share_a_name(module):
    base = "class Base(Task):\n    def run(self): ...\n"
    with pytest.raises(TaskDefinitionError, match=r"the name 'x': silent.A and silent.B; set `name` of one"):
        module(base + "class A(Base):\n    name = 'x'\nclass B(Base):\n    name = 'x'\n")


@pytest.mark.parametrize("again", ["reload", "import"])
def test_module_that_is_loaded_again_defines_its_tasks_again(module, again):
    module(INHERITED + FUNCTION.replace("Fail", "send"))
    moved = module("\n\n" + INHERITED + "\n" + FUNCTION.replace("Fail", "send"), again=again)

    assert definitions()["silent:Fail"] is moved.Fail.definition()
    assert definitions()["silent:send"] is moved.send.definition()


def test_shell_defines_the_same_task_again():
    shell = {"__name__": "__console__", "Task": Task}
    for blank_lines in (0, 5):
        exec("\n" * blank_lines + CLASS, shell)

    assert definitions()["__console__:Fail"] is shell["Fail"].definition()


def test_dataclass_with_slots_is_one_task(module):
    loaded = module(
        "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass Fail(Task):\n    def run(self): ...\n"
    )
    assert definitions()["silent:Fail"] is loaded.Fail.definition()


# ---- what looks like an option ----


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timeout", "did you mean timeout_s?"),
        ("time_limit", "did you mean timeout_s?"),
        ("timout_s", "did you mean timeout_s?"),
        ("Timeout_S", "did you mean timeout_s?"),
        ("stall", "did you mean stall_s?"),
        ("memory_limit", "did you mean memory_limit_bytes?"),
        ("secrets", "did you mean secret?"),
        ("task_name", "did you mean name?"),
        ("max_retries", "a task is tried again only by `bgsupervisor retry`"),
        ("retries", "a task is tried again only by"),
        ("queue", "there is one queue"),
        ("priority", "it is given with each request, as in `service.request(..., priority=...)`"),
        ("rate_limit", "let the body hold a lock with permits"),
    ],
)
def test_attribute_that_looks_like_an_option_is_remarked(name, says):
    cls = type("Import", (Task,), {name: 5, "run": lambda _: None})

    (said,) = remarks()
    assert said.startswith(f"{_named(cls)}: `{name}` is not an option and has no effect; {says}")
    with pytest.raises(TaskDefinitionError) as caught:
        task(**{name: 5})
    assert str(caught.value).startswith(f"{name} is not an option of @task; {says}")


def test_attributes_of_its_own_are_not_remarked():
    class Import(Task):
        name = "import"
        timeout_s = 5
        secret = ("password",)
        size = 5
        names = ("a", "b")
        total_s = time = url = "x"
        _timeout = 5

        @property
        def timeout(self):
            return 5

        def retry(self): ...

        def run(self, password: str): ...

    assert remarks() == []


def test_options_of_a_mixin_are_remarked_and_those_of_a_base_once():
    class Mixin:
        timeout = 5

    class Base(Mixin, Task):
        pass

    class Import(Base):
        def run(self): ...

    assert [said.partition(";")[0] for said in remarks()] == [
        f"{_named(Base)}: `timeout` is not an option and has no effect"
    ]
    assert Import.definition()


@pytest.mark.parametrize("name", ["key", "id", "lock", "progress"])
def test_attribute_that_hides_what_a_body_calls_is_remarked(name):
    cls = type("Import", (Task,), {name: "x", "run": lambda _: None})
    assert remarks() == [f"{_named(cls)}: the attribute `{name}` hides Task.{name}; rename it"]


def test_unknown_keyword_of_a_decorator_lists_the_options():
    with pytest.raises(TaskDefinitionError, match="colour is not an option of @task; the options are name, timeout_s"):
        task(colour="red")


def test_keyword_of_a_class_is_refused_with_what_to_write():
    with pytest.raises(TaskDefinitionError, match=r"options are attributes.*write timeout_s = 5 in its body"):

        class Import(Task, timeout_s=5):
            def run(self): ...

    with pytest.raises(TaskDefinitionError, match=r"timeout is not an option of a task; did you mean timeout_s\?"):

        class Export(Task, timeout=5):
            def run(self): ...


def test_keywords_of_an_application_base_reach_it():
    class Base(Task):
        def __init_subclass__(cls, *, colour, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.colour = colour

    class Import(Base, colour="red"):
        def run(self): ...

    assert Import.colour == "red"


def test_every_look_alike_leads_to_an_option_that_there_is():
    assert set(lookalikes._OTHERS) == set(lookalikes.OPTIONS)
    assert all(hasattr(Task, option) for option in lookalikes.OPTIONS)
    assert all(lookalikes.advice(option) is None for option in lookalikes.OPTIONS)


# ---- bodies that could never run ----


def test_body_that_yields_is_refused():
    with pytest.raises(TaskDefinitionError, match=r"Import.run: the body has `yield`"):

        class Import(Task):
            def run(self):
                yield 1

    with pytest.raises(TaskDefinitionError, match=r"the body has `yield`.*return a value instead"):

        @task
        async def send():
            yield 1


@pytest.mark.parametrize(("run", "kind"), [(staticmethod(len), "staticmethod"), (property(len), "property")])
def test_body_that_is_no_plain_method_is_refused_by_its_kind(run, kind):
    with pytest.raises(TaskDefinitionError, match=rf"not a {kind}; write def run\(self, ...\)"):
        type("Import", (Task,), {"run": run})


def test_decorated_method_is_refused_and_a_static_one_is_not():
    with pytest.raises(TaskDefinitionError, match=r"not for the method .*Mailer.send, whose self no data can fill"):

        class Mailer:
            @task
            def send(self, to: str): ...

    class Other:
        @staticmethod
        @task
        def send(to: str): ...

    assert Other.send.definition().signature.hints == {"to": str}


def test_class_whose_init_needs_arguments_is_a_load_failure():
    class Import(Task):
        def __init__(self, url, *, depth, limit=5): ...

        def run(self): ...

    with pytest.raises(TaskDefinitionError, match="__init__ needs url, depth, and each attempt makes its instance"):
        Import.definition().signature  # noqa: B018 - the property raises


def test_class_whose_init_needs_nothing_is_fine():
    @dataclasses.dataclass
    class Import(Task):
        depth: int = 5

        def run(self): ...

    assert Import.definition().signature.hints == {}


# ---- secrets ----


def test_secret_that_nearly_names_a_parameter_is_remarked():
    class Login(Task):
        secret = ("pasword", "token")

        def run(self, password: str, payload: dict): ...

    said = "secret names 'pasword', which is no parameter; did you mean 'password'?"
    assert remarks() == [f"{_named(Login)}: {said}"]


def test_secret_that_is_no_text_is_refused():
    with pytest.raises(TaskDefinitionError, match="secret has 5; it must be a tuple of names"):

        class Login(Task):
            secret = (5,)

            def run(self): ...


# ---- the configuration ----


def test_unknown_variable_of_our_prefix_is_remarked_with_the_nearest(tmp_path):
    (tmp_path / "bgsupervisor.toml").write_text('tasks = ["x"]\nenv_file = "env"\n')
    (tmp_path / "env").write_text("BGSUPERVISOR_SPARE=1\nOTHER=2\n")
    environ = {
        "BGSUPERVISOR_SLOT": "4",
        "BGSUPERVISOR_ZZZ": "1",
        "BGSUPERVISOR_SLOTS": "4",
        "BGSUPERVISOR_CONFIG": str(tmp_path / "bgsupervisor.toml"),
        "BGSUPERVISOR_PORT": "tcp://10.0.0.1:80",
        "BGSUPERVISOR_PORT_80_TCP_ADDR": "10.0.0.1",
        "BGSUPERVISOR_SERVICE_HOST": "10.0.0.1",
        "BGSUPERVISOR_SERVICE_PORT_HTTP": "80",
        "SLOT": "4",
    }
    found = config.remarks(config.load(cwd=tmp_path, environ=environ), environ=environ, cwd=tmp_path)

    no = "which is no setting and has no effect;"
    assert found == [
        f"the environment has BGSUPERVISOR_SLOT, {no} did you mean BGSUPERVISOR_SLOTS?",
        f"the environment has BGSUPERVISOR_ZZZ, {no} `bgsupervisor check` lists the settings",
        f"{tmp_path}/env has BGSUPERVISOR_SPARE, {no} did you mean BGSUPERVISOR_SPARES?",
    ]


def test_other_configurations_on_the_way_up_are_remarked(tmp_path):
    inner = tmp_path / "shop"
    inner.mkdir()
    (inner / "bgsupervisor.toml").write_text('tasks = ["x"]\n')
    for folder in (inner, tmp_path):
        (folder / "pyproject.toml").write_text("[tool.bgsupervisor]\n")
    assert _ignored(inner) == [inner / "pyproject.toml", tmp_path / "pyproject.toml"]

    (inner / "pyproject.toml").write_text("[tool.other]\n")
    (tmp_path / "pyproject.toml").write_text("not [ toml")
    assert _ignored(inner) == []


def test_three_slashes_before_an_absolute_path_are_remarked(tmp_path):
    (tmp_path / "bgsupervisor.toml").write_text(f'tasks = ["x"]\ndatabase = "sqlite:///{str(tmp_path)[1:]}/x.db"\n')
    (said,) = _remarks(tmp_path)

    assert f"did you mean sqlite:///{tmp_path}/x.db, with four slashes? (file {tmp_path}/bgsupervisor.toml)" in said


@pytest.mark.parametrize("database", ["sqlite:///x.db", "sqlite:///{}/x.db", "sqlite:///new/folder/x.db"])
def test_other_places_of_the_database_are_not_remarked(tmp_path, database):
    (tmp_path / "bgsupervisor.toml").write_text(f'tasks = ["x"]\ndatabase = "{database.format(tmp_path)}"\n')
    assert _remarks(tmp_path) == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [('"myapp.tasks"', '["myapp.tasks"]'), ('["myapp/tasks.py", "other"]', '["myapp.tasks", "other"]')],
)
def test_modules_written_otherwise_get_the_right_spelling(tmp_path, written, meant):
    (tmp_path / "bgsupervisor.toml").write_text(f"tasks = {written}\n")
    with pytest.raises(errors.ConfigError) as caught:
        config.load(cwd=tmp_path, environ={})
    assert f"did you mean tasks = {meant}? (file" in str(caught.value)


# ---- where people see it ----

APP = """
from bgsupervisor import Task

class Import(Task):
    timeout = 5
    timeout_s = 600
    memory_limit_bytes = 80_000_000
    secret = ("password", "token")

    def run(self, password: str, token: str): ...
"""


def test_check_warns_and_still_leaves_with_success(make_app):
    app = make_app(APP, tasks=["appx", "empty", "appx"])
    app.write("", module="empty")
    done = app.cli("check", environment={"BGSUPERVISOR_SLOT": "4"})

    assert done.returncode == 0
    assert "  appx:Import  (timeout_s 600, memory_limit_bytes 76.3 MiB, secret password and token)\n" in done.stdout, (
        "and options of every kind can be shown"
    )
    for sentence in (
        "warning: the environment has BGSUPERVISOR_SLOT, which is no setting",
        "warning: tasks names appx twice",
        "warning: the module empty defines no task; correct `tasks`, or import its tasks in it",
        "warning: appx:Import: `timeout` is not an option and has no effect; did you mean timeout_s?",
    ):
        assert sentence in done.stderr
    found = json.loads(app.cli("check", "--json", environment={"BGSUPERVISOR_SLOT": "4"}).stdout)
    assert len(found["warnings"]) == 4


def test_module_that_only_imports_tasks_is_not_remarked(make_app):
    app = make_app("import elsewhere")
    app.write(APP.replace("timeout = 5", ""), module="elsewhere")
    assert "warning" not in app.cli("check").stderr


def test_supervisor_writes_them_into_its_log(make_app):
    app = make_app(APP)
    (app.folder / "pyproject.toml").write_text("[tool.bgsupervisor]\n")
    done = app.cli("run", "--burst", environment={"BGSUPERVISOR_SLOT": "4"})
    log = (app.state_dir / "logs" / "supervisor.log").read_text()

    assert (done.returncode, done.stderr) == (0, "")
    assert "WARNING the environment has BGSUPERVISOR_SLOT" in log
    assert f"WARNING {app.folder}/pyproject.toml is ignored, because {app.config} is in force" in log
    assert "appx:Import: `timeout` is not an option" in log


# ---- sizes and numbers ----


def test_sizes_are_written_in_their_largest_unit():
    values = [0, 1, 812, 1024, 1536, 80_000_000, 227_258_368, 1024**2 - 1, 2 * 1024**3, 5 * 1024**5]
    assert [sizes.size(value) for value in values] == [
        *("0 bytes", "1 byte", "812 bytes", "1 KiB", "1.5 KiB", "76.3 MiB", "216.7 MiB", "1 MiB", "2 GiB", "5120 TiB")
    ]
    assert sizes.compared(227_258_368, 80_000_000) == ("216.7 MiB", "76.3 MiB")
    assert sizes.compared(1024**2 + 1, 1024**2) == ("1,048,577 bytes", "1,048,576 bytes")


def test_numbers_have_no_exponent():
    values = [80_000_000.0, 8e7 + 0.4, 1_000_000, 0.5, 100 / 3, 0, -5.0, 1e300, float("inf")]
    assert [sizes.number(value) for value in values] == [
        *("80000000", "80000000", "1000000", "0.5", "33.3333", "0", "-5", "1e+300", "inf")
    ]


def _named(cls):
    return f"{cls.__module__}:{cls.__qualname__}"


def _own_definitions():
    return {name: one for name, one in definitions().items() if one.module == __name__}


def _remarks(folder):
    return config.remarks(config.load(cwd=folder, environ={}), environ={}, cwd=folder)


def _ignored(folder):
    return [Path(said.partition(" is ignored")[0]) for said in _remarks(folder)]
