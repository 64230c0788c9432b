"""docs/waiting.md is run: its files as they stand, by a real supervisor; and its sentences, where they promise most."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import psutil
import pytest
from support.app import LIMIT_S, wait_until

from bgsupervisor import Deadlock, Interrupted, NotInTask
from bgsupervisor.config import OPTIONS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

PAGE = Path(__file__).parents[2] / "docs" / "waiting.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.\w+)\n")
MORE = """
from bgsupervisor import current, task

@task
def wait_for(id: int):
    current().wait_for(id)

@task
def meet(parties: int):
    current().barrier("met", parties, scope="everybody")

@task
async def wait_in_loop(id: int):
    async with current().lock("loop"):
        return await current().wait_for_async(id)
"""


def files():
    return {FILE_NAME.match(text)[1]: text for _, text in BLOCK.findall(PAGE.read_text()) if FILE_NAME.match(text)}


@pytest.fixture
def make(make_app):
    """Make and start the project of the page, with one module more; its configuration gets short limits."""

    def make(**options):
        modules = tomllib.loads(files()["bgsupervisor.toml"])["tasks"]
        app = make_app(MORE, tasks=[*modules, "appx"], **options)
        for name, text in files().items():
            if name != app.config.name:
                (app.folder / name).write_text(text)
        app.start()
        return app

    return make


def test_every_code_block_of_the_page_is_a_file_or_a_command_that_is_run():
    told = BLOCK.findall(PAGE.read_text())

    assert len(told) == PAGE.read_text().count("```") // 2
    assert [text for language, text in told if language != "console" and not FILE_NAME.match(text)] == []
    assert [text.splitlines()[0] for language, text in told if language == "console"] == ["$ python ask_for_export.py"]


def test_the_export_ends_while_the_import_goes_on(make):
    app = make()
    ((_, told),) = [block for block in BLOCK.findall(PAGE.read_text()) if block[0] == "console"]

    done = psutil.Popen(
        [sys.executable, "-W", "error", "ask_for_export.py"],
        cwd=app.folder,
        env=app.environment(),
        stdout=-1,
        stderr=-1,
        text=True,
    )
    output, errors = done.communicate(timeout=LIMIT_S)

    assert output == told.partition("\n")[2], errors


def test_a_part_that_was_reached_counts_also_when_its_task_was_cancelled_later(make):
    app = make()
    imported = app.service.request("exporting:ImportInvoices", {"ids": [1, 2, 3, 4, 5]})
    first = app.service.request("exporting:ExportCustomers", {"import_id": imported.id})
    app.wait(first)
    app.service.cancel(imported)
    assert app.wait(imported).reason == "CANCELLED"

    late = app.service.request("exporting:ExportCustomers", {"import_id": imported.id})

    assert app.wait(late).status == "DONE"
    assert app.service.result(late) == 5


def test_a_retry_clears_the_parts_and_who_waits_then_waits_for_the_new_attempt(make):
    app = make()
    imported = app.service.request("exporting:ImportInvoices", {"ids": [1, 2]}, delay_s=3600)
    app.service.cancel(imported)
    early = app.service.request("exporting:ExportCustomers", {"import_id": imported.id})
    assert "PartNotReached" in app.wait(early).detail

    app.service.retry(imported)
    late = app.service.request("exporting:ExportCustomers", {"import_id": imported.id})

    assert app.wait(late).status == "DONE"


def test_two_send_at_a_time_and_a_permit_of_the_dead_is_free_at_once(make):
    app = make()
    handles = app.service.request_many("mailing:send_mail", [{"to": f"customer {number}"} for number in range(6)])
    hold = app.service.ledger.store.tables.Hold
    seen = set()

    def holders():
        with app.service.ledger.store.connected():
            found = [id for (id,) in hold.select(hold.task_id).where(hold.task_id.is_null(False)).tuples()]
        seen.add(len(found))
        return found

    victim = wait_until(lambda: holders() if len(holders()) == 2 else None, "two hold permits")[0]
    psutil.Process(app.service.get(victim).pid).kill()
    wait_until(lambda: holders() == [] and all(app.service.get(one).ended for one in handles), "all have ended")

    assert max(seen) == 2
    ends = [app.service.get(one) for one in handles]
    assert [one.id for one in ends if one.reason == "SIGNALLED"] == [victim]
    assert sum(one.status == "DONE" for one in ends) == 5
    logs = [path.read_text() for path in (app.state_dir / "logs").glob("task-*.log")]
    assert [text for text in logs if text] == [f"task {victim} died while it sent\n"]


def test_the_fan_out_ends_also_with_a_single_slot(make):
    app = make(slots=1)
    handle = app.service.request("rebuilding:RebuildIndex", {"shards": 5})

    assert app.wait(handle).status == "DONE"
    assert app.service.result(handle) == [0, 1, 2, 3, 4]
    assert {record.parent_id for record in app.service.list(name="rebuilding:BuildShard")} == {handle.id}


def test_who_has_no_parent_needs_a_scope(make):
    app = make()
    alone = app.service.request("rebuilding:BuildShard", {"number": 0, "shards": 2})

    assert 'give scope="..."' in app.wait(alone).detail


def at_barrier(app, handle):
    return [row["kind"] for row in app.service.ledger.waits.rows([handle.id])] == ["barrier"]


def test_who_dies_at_the_barrier_breaks_it_for_the_others(make):
    app = make()
    first, second = (app.service.request("appx:meet", {"parties": 3}) for _ in range(2))
    wait_until(lambda: at_barrier(app, first) and at_barrier(app, second), "two are at the barrier")

    psutil.Process(app.service.get(first).pid).kill()

    detail = app.wait(second).detail
    assert "BarrierBroken" in detail
    assert f"task {first.id} was interrupted (SIGNALLED)" in detail


def test_a_cycle_is_named_and_its_closing_task_ends_deadlocked(make):
    app = make()
    handles = app.service.request_many("appx:wait_for", [{"id": 2}, {"id": 1}])
    assert [one.id for one in handles] == [1, 2]

    ends = [app.wait(one) for one in handles]

    assert sorted(one.reason for one in ends) == ["DEADLOCKED", "RAISED"]
    (told,) = [one.detail for one in ends if one.reason == "DEADLOCKED"]
    assert "task 1 waits for the end of task 2" in told
    assert "task 2 waits for the end of task 1" in told


def test_after_waits_for_done_and_names_whom_it_missed(make):
    app = make()
    first = app.service.request("exporting:ImportInvoices", {"ids": [1]})
    second = app.service.request("mailing:send_mail", {"to": "jana"}, after=[first])
    assert app.service.status(second) == "REQUEST"
    assert app.wait(second).status == "DONE"
    assert app.service.get(second).started_at >= app.service.get(first).ended_at

    planned = app.service.request("mailing:send_mail", {"to": "jana"}, delay_s=3600)
    lost = app.service.request("mailing:send_mail", {"to": "jana"}, after=[planned])
    lost_too = app.service.request("mailing:send_mail", {"to": "jana"}, after=[lost])
    tolerant = app.service.request("mailing:send_mail", {"to": "jana"}, after=[planned], after_any_end=True)
    app.service.cancel(planned)

    with pytest.raises(Interrupted, match=f"DEPENDENCY: had to come after task {planned.id}"):
        app.service.result(lost)
    with pytest.raises(Interrupted, match=f"DEPENDENCY: had to come after task {lost.id}"):
        app.service.result(lost_too)
    assert app.wait(tolerant).status == "DONE"
    app.service.retry(lost)
    assert app.wait(lost).status == "DONE"


def test_an_async_body_waits_too(make):
    app = make()
    mail = app.service.request("mailing:send_mail", {"to": "jana"})
    handle = app.service.request("appx:wait_in_loop", {"id": mail.id})

    app.wait(handle)
    assert app.service.result(handle) == "jana"


@pytest.mark.parametrize("whom", ["supervisor", "wait_manager"])
def test_without_supervisor_or_wait_manager_a_waiter_goes_on_within_a_second(make, whom):
    app = make()
    mail = app.service.request("mailing:send_mail", {"to": "jana"})
    waiter = app.service.request("appx:wait_for", {"id": mail.id})
    supervisor = psutil.Process(app.supervisors[0].process.pid)
    wait_until(lambda: app.service.ledger.waits.rows([waiter.id]), "the waiter waits")
    wait_manager = wait_until(lambda: _wait_manager(app, supervisor), "the wait manager is there")
    (wait_manager if whom == "wait_manager" else supervisor).kill()

    sent = wait_until(lambda: (one := app.service.get(mail)).ended and one, "the mail is sent", LIMIT_S)
    record = app.wait(waiter)

    assert record.status == "DONE"
    # A child without supervisor records its own end, after at most 5 s.
    limit_s = 2 if whom == "wait_manager" else 8
    assert (record.ended_at - sent.ended_at).total_seconds() < limit_s


def _wait_manager(app, supervisor):
    return next((child for child in supervisor.children() if "wait manager" in " ".join(child.cmdline())), None)


def test_what_a_waiter_waits_for_is_seen_in_all_three_listings(make):
    app = make()
    planned = app.service.request("mailing:send_mail", {"to": "jana"}, delay_s=3600)
    waiter = app.service.request("appx:wait_for", {"id": planned.id})
    wait_until(lambda: app.service.ledger.waits.rows([waiter.id]), "it waits")

    for arguments in (["ps"], ["ps", "--tree"], ["why", str(waiter.id)]):
        done = app.cli(*arguments)
        assert done.returncode == 0, done.stderr
        assert f"end of task {planned.id}" in done.stdout.replace("\N{NO-BREAK SPACE}", " ")


def test_called_directly_reach_does_nothing_and_the_others_say_so(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exporting_alone.py").write_text(files()["exporting.py"].replace("time.sleep(1)", "pass"))
    from exporting_alone import ExportCustomers, ImportInvoices

    assert ImportInvoices().run([1]) == 1
    with pytest.raises(NotInTask):
        ExportCustomers().run(1)


def test_the_figures_of_the_page_are_the_codes():
    from bgsupervisor.worker import coordination, waiting

    text = PAGE.read_text()
    assert f"1 to {coordination.NAME_CHARS} characters" in text
    assert f"`max_waiting` ({next(one.default for one in OPTIONS if one.name == 'max_waiting')})" in text
    assert waiting.POLL_S == 1.0
    assert hasattr(Deadlock([(1, "x")]), "circle")
