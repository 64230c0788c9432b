"""What authors of tasks write: classes, functions, their options, and bodies that are called directly."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bgsupervisor
from bgsupervisor import Task, TaskDefinitionError, current, task, tasks
from bgsupervisor.tasks import Context, FunctionTask, definition_of, definitions, entered
from bgsupervisor.wire import TaskOptions

SOURCE = str(Path(bgsupervisor.__file__).parents[1])


@pytest.fixture(autouse=True)
def _only_its_own_tasks(monkeypatch):
    """Have what a test defines forgotten after it."""
    monkeypatch.setattr(tasks, "_definitions", dict(definitions()))


class Telling(Context):
    """A context as a supervisor's child has it, which keeps what it is told."""

    id, attempt, key = 7, 2, "k"

    def __init__(self):
        self.told = []

    @property
    def cancel_requested(self):
        return True

    def progress(self, done=None, total=None, message=None):
        self.told.append((done, total, message))


# ---- definitions ----


def test_a_class_is_known_by_module_and_qualified_name():
    class Import(Task):
        timeout_s = 600
        stall_s = 60
        memory_limit_bytes = 2**30
        secret = ("password",)

        def run(self, ids: list[int]) -> int:
            return len(ids)

    definition = Import.definition()
    here = "test_a_class_is_known_by_module_and_qualified_name.<locals>.Import"
    assert (definition.name, definition.module) == (f"test_tasks:{here}", "test_tasks")
    assert definition.options == TaskOptions(
        timeout_s=600.0, stall_s=60.0, memory_limit_bytes=2**30, secret=("password",)
    )
    assert definition.body()(ids=[1, 2]) == 2
    assert definition_of(Import) is definition_of(definition.name) is definitions()[definition.name] is definition


def test_each_attempt_gets_an_instance_of_its_own():
    class Count(Task):
        def run(self):
            self.seen = getattr(self, "seen", 0) + 1
            return self.seen

    assert [Count.definition().body()() for _ in range(2)] == [1, 1]


def test_a_function_is_a_task_and_stays_a_function():
    @task(name="send", timeout_s=5, stall_s=1, secret=("token",))
    def send_mail(to: str, subject: str = "", token: str = "") -> str:
        """Send one mail."""
        return f"{to}: {subject}"

    assert isinstance(send_mail, FunctionTask)
    assert send_mail("jana", subject="Hello") == "jana: Hello"
    assert (send_mail.__name__, send_mail.__doc__, send_mail.__module__) == (
        "send_mail",
        "Send one mail.",
        "test_tasks",
    )
    assert list(inspect.signature(send_mail).parameters) == ["to", "subject", "token"]
    assert repr(send_mail) == "<task send>"
    definition = send_mail.definition()
    assert (definition.name, definition.options) == ("send", TaskOptions(timeout_s=5.0, stall_s=1.0, secret=("token",)))
    assert definition_of(send_mail) is definition
    assert definition.body()(to="petr") == "petr: "


def test_a_function_needs_no_options():
    @task
    def plain(): ...

    assert plain.definition().options == TaskOptions()
    assert plain.definition().name.endswith("<locals>.plain")
    assert plain.definition().name.startswith("test_tasks:")


def test_a_name_of_its_own_is_not_inherited():
    class Base(Task):
        name = "base"
        timeout_s = 5

        def run(self): ...

    class Derived(Base):
        pass

    assert Base.definition().name == "base"
    assert Derived.definition().name.endswith(":test_a_name_of_its_own_is_not_inherited.<locals>.Derived")
    assert Derived.definition().options.timeout_s == 5.0
    assert Derived.definition().body().__self__.__class__ is Derived


def test_a_base_without_a_body_is_no_task_and_its_children_are():
    class Base(Task):
        timeout_s = 9

    class Derived(Base):
        def run(self): ...

    with pytest.raises(TaskDefinitionError, match=r"Base has no `run`, so it cannot be requested"):
        Base.definition()
    assert Derived.definition().options.timeout_s == 9.0


def test_two_tasks_cannot_have_one_name():
    class First(Task):
        name = "import"

        def run(self): ...

    with pytest.raises(TaskDefinitionError, match=r"two tasks have the name 'import'.*First.*Second.*set `name`"):

        class Second(Task):
            name = "import"

            def run(self): ...

    with pytest.raises(TaskDefinitionError, match="two tasks have the name 'import'"):
        task(name="import")(lambda: None)
    assert definitions()["import"] is First.definition()


def test_a_module_that_is_loaded_again_defines_its_tasks_again():
    for _ in range(2):

        class Again(Task):
            name = "again"

            def run(self): ...

    assert definitions()["again"] is Again.definition()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("timeout_s", 0, "timeout_s is 0; it must be a number of seconds above 0"),
        ("timeout_s", -1, "timeout_s is -1"),
        ("timeout_s", "60", "timeout_s is '60'"),
        ("timeout_s", True, "timeout_s is True"),
        ("timeout_s", float("nan"), "timeout_s is nan"),
        ("timeout_s", float("inf"), "timeout_s is inf"),
        ("stall_s", 0, "stall_s is 0; it must be a number of seconds above 0"),
        ("stall_s", "60", "stall_s is '60'"),
        ("memory_limit_bytes", 0, "memory_limit_bytes is 0; it must be a whole number of bytes above 0"),
        ("memory_limit_bytes", 1.5, "memory_limit_bytes is 1.5"),
        ("memory_limit_bytes", True, "memory_limit_bytes is True"),
        ("secret", "password", r"secret is 'password'; it must be a tuple of names, as \(\"password\",\)"),
        ("secret", 5, "secret is 5"),
        ("name", "", "name is ''; it must be a text"),
        ("name", "  ", "name is '  '"),
        ("name", 5, "name is 5"),
    ],
)
def test_an_option_of_a_wrong_kind_is_told_where_it_is_defined(option, value, says):
    known = definitions()
    with pytest.raises(TaskDefinitionError, match=says):
        type("Wrong", (Task,), {option: value, "run": lambda _: None})
    with pytest.raises(TaskDefinitionError, match=says):
        task(**{option: value})(lambda: None)
    assert definitions() == known


@pytest.mark.parametrize("run", [5, "run", staticmethod(lambda ids: ids), classmethod(lambda _: 1), property(len)])
def test_a_body_must_be_a_plain_method(run):
    with pytest.raises(TaskDefinitionError, match="Wrong: run must be a plain method"):
        type("Wrong", (Task,), {"run": run})


@pytest.mark.parametrize("what", [len, "text", Task, type])
def test_only_functions_are_decorated(what):
    with pytest.raises(TaskDefinitionError, match=r"@task is for functions.*subclass Task instead"):
        task(what)


@pytest.mark.parametrize("what", [None, 5, len, type, object()])
def test_what_is_no_task_has_no_definition(what):
    with pytest.raises(TaskDefinitionError, match="is not a task: give a Task class"):
        definition_of(what)


def test_a_name_that_is_not_loaded_has_no_definition():
    assert definition_of("elsewhere:Task") is None


def test_a_parameter_that_no_data_can_fill_is_told_when_the_signature_is_first_used():
    @task
    def wrong(*ids: int): ...

    with pytest.raises(TaskDefinitionError, match=r"takes '\*ids' by position"):
        wrong.definition().signature  # noqa: B018 - the property raises


# ---- called directly ----


def test_a_body_that_is_called_directly_runs_here_and_tells_nobody():
    class Import(Task):
        def run(self, ids: list[int]) -> list[object]:
            self.progress(0, len(ids), "begun")
            seen = [id * 2 for id in self.track(ids)]
            return [seen, self.id, self.attempt, self.key, self.cancel_requested]

    assert Import().run([1, 2]) == [[2, 4], None, 0, None, False]


def test_outside_a_body_the_context_is_that_of_nobody():
    context = current()
    assert (context.id, context.attempt, context.key, context.cancel_requested) == (None, 0, None, False)
    assert context.progress(1, 2, "x") is None
    assert list(context.track(iter("ab"))) == ["a", "b"]


def test_inside_a_body_task_and_current_speak_of_its_attempt():
    class Import(Task):
        def run(self):
            self.progress(1, message="half")
            return self.id, self.attempt, self.key, self.cancel_requested

    context = Telling()
    with entered(context):
        assert Import().run() == (7, 2, "k", True)
        assert current() is context
    assert context.told == [(1, None, "half")]
    assert current() is not context


def test_the_context_ends_with_the_body_however_it_ended():
    with pytest.raises(ZeroDivisionError), entered(Telling()):
        raise ZeroDivisionError
    assert current().id is None


def test_track_tells_after_each_item_and_knows_the_total_of_what_has_a_length():
    context = Telling()
    with entered(context):
        walk = current().track("ab")
        assert context.told == []
        assert next(walk) == "a"
        assert context.told == [(0, 2, None)]
        assert list(walk) == ["b"]
        assert context.told == [(0, 2, None), (1, 2, None), (2, 2, None)]
        context.told.clear()
        assert list(current().track(iter("a"))) == ["a"]
        assert context.told == [(0, None, None), (1, None, None)]
        context.told.clear()
        list(current().track(iter("a"), total=9))
        assert context.told == [(0, 9, None), (1, 9, None)]


def test_an_async_body_can_be_awaited_directly():
    class Fetch(Task):
        async def run(self, n: int) -> int:
            await asyncio.sleep(0)
            return n + 1

    @task
    async def fetch(n: int) -> int:
        return n + 2

    async def both():
        return await Fetch().run(1), await fetch(1)

    assert asyncio.run(both()) == (2, 3)


# ---- what a type checker says ----

USER_CODE = """
from datetime import datetime, timezone

from bgsupervisor import Interrupted, NotEnded, Service, Status, Task, TaskRecord, current, task


class ImportInvoices(Task):
    timeout_s = 600
    secret = ("password",)

    def run(self, ids: list[int], password: str = "") -> int:
        for invoice_id in self.track(ids):
            self.progress(1, message=str(invoice_id + 1))
        return len(ids)


class Fetch(Task):
    async def run(self) -> None: ...


@task(name="mail", timeout_s=5.0)
def send_mail(to: str, subject: str) -> bool:
    current().progress(1, 2, "connecting")
    return True


@task
def plain(n: int) -> str:
    return str(n)


def view(service: Service) -> str | None:
    handle = service.request(ImportInvoices, {"ids": [1, 2]}, key="k", unique=True, priority=3)
    service.request("shop:Task", delay_s=5)
    service.request(send_mail, {"to": "jana"}, run_at=datetime.now(timezone.utc))
    service.request_many(plain, [{"n": 1}, {"n": 2}])
    number: int = handle.id
    sent: bool = send_mail("jana", subject="x")
    text: str = plain(number)
    length: int = ImportInvoices().run([1])
    status: Status | None = service.status(ImportInvoices, key="k")
    record: TaskRecord = service.wait(handle, timeout_s=5)
    found = service.get(handle)
    try:
        service.result(handle)
    except (Interrupted, NotEnded) as error:
        return str(error) + text * length
    return found.message if found and sent and status and record.ended else None
"""

WRONG_CALLS = {
    "send_mail(5, 'x')": "arg-type",
    "send_mail('jana')": "call-arg",
    "plain(1) + 1": "operator",
    "service.request(ImportInvoices, priority='high')": "arg-type",
    "service.request(ImportInvoices, nonsense=1)": "call-arg",
    "service.request(print)": "arg-type",
    "service.get('7')": "arg-type",
    "service.get(7).message": "union-attr",
    "service.wait(7)": "call-arg",
    "task(timeout_s='5')": "call-overload",
    "[n.upper() for n in Task().track([1])]": "attr-defined",
}


def test_user_code_is_checked_by_its_types(tmp_path):
    snippet = tmp_path / "views.py"
    wrong = "".join(f"    {call}\n" for call in WRONG_CALLS)
    snippet.write_text(USER_CODE + "\n\ndef wrong(service: Service) -> None:\n" + wrong)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", str(snippet)],
        cwd=tmp_path,
        env={"MYPYPATH": SOURCE, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    first = USER_CODE.count("\n") + 4
    said = {}
    for line in found.stdout.splitlines():
        if line.startswith("views.py:") and ": error:" in line:
            said.setdefault(int(line.split(":")[1]), line.rpartition("[")[2].rstrip("]"))
    assert said == {first + place: code for place, code in enumerate(WRONG_CALLS.values())}, found.stdout
