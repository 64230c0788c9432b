"""Requests by a name: which are refused or warned of, and what a short one means."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import sys
import uuid

import peewee
import pytest
from support.app import wait_until

from bgsupervisor import (
    RequestRefused,
    Service,
    Status,
    UnknownTask,
    UnknownTaskName,
    catalogue,
    registry,
    task_context,
    tasks,
)
from bgsupervisor import service as rooms

TASKS = """
    import time
    from bgsupervisor import Task, task

    class MailOrder(Task):
        def run(self, order: int = 0) -> str | None:
            return self.key

    @task(name="nightly")
    def clean_up() -> None: ...

    @task
    def slow() -> None:
        time.sleep(60)

    @task
    def orders(name: str) -> str:
        from bgsupervisor import current
        return current().request(name).id
"""
MORE = """
    from bgsupervisor import Task

    class MailOrder(Task):
        def run(self) -> None: ...

    class MailBill(Task):
        def run(self) -> None: ...
"""


@pytest.fixture
def app(make_app):
    return make_app(TASKS)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Have this process know no task, whatever other tests have imported."""
    monkeypatch.setattr(registry, "_definitions", {})


@pytest.fixture
def supervised(app):
    app.start()
    has_loaded(app, "appx:MailOrder")
    return app


def has_loaded(app, name):
    wait_until(lambda: any(name in one.catalogue for one in app.service.ledger.supervisors()), f"{name} is loaded")


def rows(app):
    return [(one.name, str(one.status)) for one in app.service.list()[::-1]]


# ---- the command line ----


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("appx:MailOrde", "did you mean appx:MailOrder?"),
        ("appx.MailOrder", "did you mean appx:MailOrder?"),
        ("MailOrde", "did you mean appx:MailOrder?"),
        ("nightlly", "did you mean nightly?"),
        ("elsewhere.jobs:Send", "`bgsupervisor check` lists all tasks"),
    ],
)
def test_request_by_a_wrong_name_is_refused_with_the_nearest(app, name, nearest):
    done = app.cli("request", name)

    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot request this: the " in done.stderr
    assert nearest in done.stderr
    assert re.search(r"(\?|tasks\.) --force records it anyway$", done.stderr.strip())
    assert "Traceback" not in done.stderr
    assert rows(app) == []


def test_request_by_a_wrong_name_is_refused_by_the_catalogue(supervised):
    (supervised.folder / "appx.py").unlink()  # nothing to import here
    done = supervised.cli("request", "appx:MailOrde")

    assert done.returncode == 2
    assert "no supervisor has a task named 'appx:MailOrde'; did you mean appx:MailOrder?" in done.stderr
    assert rows(supervised) == []


def test_request_with_force_records_a_wrong_name(supervised):
    done = supervised.cli("request", "appx:MailOrde", "--force")

    assert (done.returncode, done.stdout) == (0, "requested task 1 (appx:MailOrde)\n")
    assert "no supervisor has code for appx:MailOrde, so it waits until one has; did you mean appx:MailOrder?" in (
        done.stderr
    )
    assert rows(supervised) == [("appx:MailOrde", "REQUEST")]


def test_request_of_code_newer_than_the_supervisor_is_recorded(supervised):
    supervised.write(TASKS + "\n    @task\n    def fresh() -> None: ...\n")
    done = supervised.cli("request", "appx:fresh")

    assert (done.returncode, done.stdout) == (0, "requested task 1 (appx:fresh)\n")
    assert "no supervisor has loaded appx:fresh yet; code on disk is newer" in done.stderr


def test_request_of_a_module_that_cannot_be_imported_is_recorded(app):
    app.write("import missing_dependency")
    done = app.cli("request", "appx:MailOrder", "--key", "a")

    assert (done.returncode, done.stdout) == (0, "requested task 1 (appx:MailOrder)\n")


@pytest.mark.parametrize("running", [False, True])
def test_request_by_a_short_name_runs_the_task_it_means(app, running):
    if running:
        app.start()
        has_loaded(app, "appx:MailOrder")
    done = app.cli("request", "MailOrder", '{"order": 3}')
    wrong = app.cli("request", "MailOrder", '{"oder": 3}')

    assert (done.returncode, done.stdout) == (0, "requested task 1 (appx:MailOrder)\n")
    assert wrong.returncode == 1
    assert "data for appx:MailOrder is invalid" in wrong.stderr


def test_request_by_an_ambiguous_short_name_lists_what_it_means(make_app):
    app = make_app(TASKS, tasks=["appx", "shop"])
    app.write(MORE, "shop")
    done = app.cli("request", "MailOrder")

    assert done.returncode == 2
    assert "'MailOrder' means 2 tasks: appx:MailOrder, shop:MailOrder; give one of these" in done.stderr
    assert app.cli("request", "MailBill").stdout == "requested task 1 (shop:MailBill)\n"


def test_prune_by_a_short_name_deletes_what_it_means(make_app):
    app = make_app(TASKS)
    for name in ("appx:MailOrder", "appx:slow", "shop:slow"):
        app.service.cancel(app.service.request(name))
    ambiguous = app.cli("prune", "--name", "slow", "--older-than-days", "0")
    wrong = app.cli("prune", "--name", "Mail", "--older-than-days", "0")
    done = app.cli("prune", "--name", "MailOrder", "--older-than-days", "0")

    assert ambiguous.returncode == 2
    assert "--name slow means 2 names: appx:slow, shop:slow; give one of them" in ambiguous.stderr
    assert (wrong.returncode, wrong.stderr) == (
        0,
        "no task has the name Mail; their names are appx:MailOrder, appx:slow, shop:slow\n",
    )
    assert (done.returncode, done.stdout) == (0, "DONE: 0 task(s) deleted\nINTERRUPTED: 1 task(s) deleted\n")
    assert [name for name, _ in rows(app)] == ["appx:slow", "shop:slow"]


# ---- the API ----


def test_service_request_by_a_wrong_name_warns_and_records(supervised, caplog):
    for _ in range(3):
        supervised.service.request("appx:MailOrde")
    supervised.service.request("appx:MailOrder")
    supervised.service.request("nightly")

    assert [record.message for record in caplog.records if record.name == "bgsupervisor"] == [
        (
            "a task is requested that may never run: no supervisor has a task named 'appx:MailOrde'; "
            "did you mean appx:MailOrder?"
        )
    ]
    assert [name for name, _ in rows(supervised)][:3] == ["appx:MailOrde"] * 3


def test_service_warns_of_a_wrong_name_again_after_a_minute(supervised, caplog, monkeypatch):
    supervised.service.request("appx:MailOrde")
    monkeypatch.setattr(rooms, "NAME_WARN_S", 0.0)
    supervised.service.request("appx:MailOrde")

    assert len(caplog.records) == 2


def test_service_that_refuses_raises_and_records_nothing(supervised):
    strict = Service(config=supervised.config, unknown_names="refuse")
    with pytest.raises(UnknownTaskName, match="did you mean appx:MailOrder") as raised:
        strict.request("appx.MailOrder", {"order": 1})
    with pytest.raises(UnknownTaskName):
        strict.request_many("appx:MailOrde", [{}, {}])

    assert (raised.value.name, raised.value.candidates) == ("appx.MailOrder", ("appx:MailOrder",))
    assert isinstance(raised.value, RequestRefused)
    assert rows(supervised) == []


def test_service_takes_the_configured_answer_to_unknown_names(make_app, caplog):
    strict, open_ = (make_app(TASKS, name=answer, unknown_names=answer) for answer in ("refuse", "accept"))
    for app in (strict, open_):
        app.start()
        has_loaded(app, "appx:slow")

    with pytest.raises(UnknownTaskName):
        strict.service.request("appx:slo")
    assert open_.service.request("appx:slo").id == 1
    assert caplog.records == []


def test_service_without_a_supervisor_judges_by_loaded_modules(make_app, monkeypatch, caplog):
    app = make_app(TASKS.replace("class ", "class Here").replace("nightly", "here"), tasks=["loaded_here", "absent"])
    (app.folder / "appx.py").rename(app.folder / "loaded_here.py")
    app.service.request("loaded_here:HereMailOrde")
    app.service.request("absent:Anything")
    assert caplog.records == []  # nobody can know yet

    monkeypatch.syspath_prepend(str(app.folder))
    monkeypatch.setitem(sys.modules, "loaded_here", None)
    monkeypatch.delitem(sys.modules, "loaded_here")
    __import__("loaded_here")
    app.service.request("absent:Anything")
    app.service.request("email:Anything")  # loaded, and no module of tasks
    assert caplog.records == []
    app.service.request("loaded_here:HereMailOrde")
    assert "the module loaded_here defines no task named 'loaded_here:HereMailOrde'; did you mean" in caplog.text


def test_service_does_not_trust_a_catalogue_that_is_still_loading(make_app, caplog):
    app = make_app("import time; time.sleep(3)\n" + "from bgsupervisor import task\n@task\ndef late() -> None: ...\n")
    app.start(wait=False)
    wait_until(lambda: app.service.ledger.supervisors() or app.state_dir.exists(), "a supervisor has started")
    app.service.request("appx:late")

    assert caplog.records == []


def test_service_hears_of_a_new_catalogue_before_it_warns(supervised, caplog, monkeypatch):
    monkeypatch.setattr(rooms, "CATALOGUE_AGE_MISSED_S", 0.0)
    supervised.service.request("appx:slow", delay_s=60)
    supervised.write(TASKS + "\n    @task\n    def fresh() -> None: ...\n")
    supervised.cli("reload")
    wait_until(lambda: "fresh" in supervised.service.ledger.supervisors()[0].catalogue, "it has loaded the new code")
    supervised.service.request("appx:fresh")

    assert caplog.records == []


def test_service_request_by_name_reads_the_catalogue_once_a_minute(supervised, monkeypatch):
    read = []
    original = type(supervised.service.ledger).supervisors
    supervised.service.request("appx:slow", delay_s=60)
    monkeypatch.setattr(type(supervised.service.ledger), "supervisors", lambda self: read.append(1) or original(self))
    for _ in range(20):
        supervised.service.request("appx:slow", delay_s=60)

    assert read == []


def test_service_takes_short_names_wherever_a_name_is_taken(supervised, caplog):
    service = supervised.service
    handle = service.request("MailOrder", key="a")
    supervised.wait(handle)

    assert service.get(handle).name == "appx:MailOrder"
    assert service.status("MailOrder") is Status.DONE
    assert service.status("MailOrder", key="b") is None
    assert service.get(handle, name="MailOrder").id == handle.id
    assert service.get(handle, name="slow") is None
    assert [one.id for one in service.list(name="MailOrder")] == [handle.id]
    assert service.counts("MailOrder")[Status.DONE] == 1
    assert caplog.records == []


def test_service_with_an_ambiguous_short_name_lists_what_it_means(make_app, caplog):
    app = make_app(TASKS, tasks=["appx", "shop"])
    app.write(MORE, "shop")
    app.start()
    has_loaded(app, "shop:MailOrder")
    for call in (app.service.status, app.service.counts, lambda name: app.service.list(name=name)):
        with pytest.raises(UnknownTaskName, match="means 2 tasks: appx:MailOrder, shop:MailOrder; give one") as raised:
            call("MailOrder")
        assert raised.value.candidates == ("appx:MailOrder", "shop:MailOrder")
    app.service.request("MailOrder")

    assert "means 2 tasks: appx:MailOrder, shop:MailOrder" in caplog.text
    assert rows(app)[0][0] == "MailOrder"


def test_a_body_that_requests_a_wrong_name_warns_in_its_log(supervised):
    handle = supervised.service.request("appx:orders", {"name": "appx:slo"})
    record = supervised.wait(handle)

    assert record.status is Status.DONE
    assert "no supervisor has a task named 'appx:slo'; did you mean appx:slow?" in supervised.log_of(record)


@pytest.mark.of_sqlite
def test_a_name_is_judged_on_the_connection_it_is_requested_on(supervised):
    strict = Service(config=supervised.config, unknown_names="refuse")
    external = sqlite3.connect(supervised.folder / "bgsupervisor.db")
    external.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnknownTaskName):
        strict.request("appx:MailOrde", connection=external)
    assert strict.request("MailOrder", connection=external).created
    external.rollback()
    external.close()

    assert rows(supervised) == []


@pytest.mark.of_sqlite
def test_a_name_in_a_shared_transaction_is_judged_after_its_write_lock(supervised, monkeypatch):
    shared = peewee.SqliteDatabase(supervised.folder / "bgsupervisor.db", timeout=5)
    service = Service(shared, config=supervised.config)
    service.counts()
    other = sqlite3.connect(supervised.folder / "bgsupervisor.db", timeout=0, isolation_level=None)
    read = catalogue.Catalogue.of

    def read_while_others_write(*arguments, **named):
        with contextlib.suppress(sqlite3.OperationalError):  # after this a transaction that has read cannot write
            other.execute("UPDATE bgsupervisor_supervisor SET slots = slots + 1")
        return read(*arguments, **named)

    monkeypatch.setattr(catalogue.Catalogue, "of", read_while_others_write)
    with shared.atomic():
        service.request("MailOrder")
    other.close()
    shared.close()

    assert [name for name, _ in rows(supervised)] == ["appx:MailOrder"]


# ---- keys, and what comes after ----

USER = uuid.UUID("5ad2cc3e-0d0e-4f6a-9d9b-0c1f6b8a4f11")


@pytest.mark.parametrize(("given", "kept"), [(5, "5"), (0, "0"), (USER, str(USER)), ("5", "5")])
def test_a_key_that_is_a_number_or_a_uuid_is_kept_as_text(app, given, kept):
    service = app.service
    handle = service.request("a:b", key=given)
    once = service.request("a:b", unique=given)

    assert service.get(handle).key == kept
    assert service.get(once).unique_key == kept
    assert service.request("a:b", unique=given) == task_context.Handle(once.id, created=False)
    assert service.get(handle, key=given).id == handle.id
    assert service.get(handle, key="other") is None
    assert service.status("a:b", key=given) is Status.REQUEST
    assert [one.id for one in service.list(key=given)] == [handle.id]
    assert service.get(service.request_many("a:b", [{}], key=given)[0]).key == kept
    assert service.get(service.request("a:b", key=given, unique=True)).unique_key == kept
    assert service.cancel(handle, by=given).detail is not None


@pytest.mark.parametrize("key", [True, 5.5, b"5", ["5"]])
def test_a_key_that_is_neither_text_nor_id_is_refused(app, key):
    for call in (
        lambda: app.service.request("a:b", key=key),
        lambda: app.service.status("a:b", key=key),
        lambda: app.service.list(key=key),
        lambda: app.service.get(app.service.request("a:b"), key=key),
    ):
        with pytest.raises(RequestRefused, match="it must be a text, a whole number or a UUID"):
            call()


def test_after_takes_one_task_as_well_as_several(app):
    first = app.service.request("a:b")
    for after in (first, first.id, [first], (first.id,), app.service.get(first), {first}, iter([first])):
        second = app.service.request("a:b", after=after)
        app.service.cancel(second)
    later = app.service.request("a:b", after=first)
    app.service.cancel(first)

    assert app.service.get(later).reason == "DEPENDENCY"
    assert app.service.request("a:b", after=None).created


@pytest.mark.parametrize("after", ["5", b"5", True, 5.5, ["5"], [None]])
def test_after_that_is_no_task_is_refused_with_a_sentence(app, after):
    with pytest.raises(RequestRefused, match=r"after is .*; it must be a handle or an id, or a list of them"):
        app.service.request("a:b", after=after)


@pytest.mark.parametrize("after", [99999, [99999], -1, 2**70])
def test_after_a_task_that_is_not_there_is_refused(app, after):
    with pytest.raises(UnknownTask, match="no task has the id"):
        app.service.request("a:b", after=after)


def test_a_task_box_finds_a_key_that_is_a_number(bgsupervisor):
    Service("sqlite:///nowhere.db").request("a:b", key=5)

    assert bgsupervisor.assert_requested("a:b", key=5) == bgsupervisor.assert_requested("a:b", key="5")
    with pytest.raises(AssertionError, match="expected a:b with key '6'"):
        bgsupervisor.assert_requested("a:b", key=6)


def test_a_task_box_takes_a_short_name_as_a_service_does(bgsupervisor):
    @tasks.task(name="appx:MailOrder")
    def mail_order() -> None: ...

    Service("sqlite:///nowhere.db").request("MailOrder")

    assert [one.name for one in bgsupervisor.assert_requested("MailOrder")] == ["appx:MailOrder"]
