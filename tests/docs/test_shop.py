"""The example shop, as its users have it: a real web server, a real supervisor, and once a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.app import LIMIT_S, App, wait_until

from bgsupervisor.system import process_tree, processes
from bgsupervisor.system.processes import ProcessIdentity

pytest.importorskip("flask", reason="Flask is not installed; the extra `shop` has it")
httpx = pytest.importorskip("httpx", reason="httpx is not installed; the extra `dev` has it")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

SHOP = Path(__file__).parents[2] / "examples" / "shop"
HEADINGS = "order,date,customer,amount\n"
LONG = HEADINGS + "".join(f"{row},2026-05-17,Ada,1.00\n" for row in range(20_000))
"""A file that takes some eight seconds."""


class Shop(App):
    """A copy of the example in a folder of its own."""

    def __init__(self, folder):
        shutil.copytree(SHOP, folder, ignore=shutil.ignore_patterns("*.db*", "uploads", "secret", ".bgsupervisor"))
        self.folder = folder
        self.config = folder / "bgsupervisor.toml"
        self.state_dir = folder / "data" / ".bgsupervisor"
        self.supervisors = []
        self._service = None
        self._servers = []
        self.url = None

    def open(self):
        """Start web server and supervisor as `make shop` does."""
        return self._serve(["serve.py", "--port", "0"], r"open at (\S+)/ ")

    def open_web_server_only(self):
        return self._serve(["-m", "flask", "--app", "webshop", "run", "--port", "0"], r"Running on (\S+)")

    def _serve(self, arguments, said):
        output = self.folder / f"serve-{len(self._servers)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment(PYTHONUNBUFFERED="1"),
            )
        self._servers.append(process)
        found = wait_until(
            lambda: process.poll() is not None or re.search(said, output.read_text()),
            "the web server tells its address",
        )
        assert process.poll() is None, output.read_text()
        self.url = found[1]
        process.output = output
        return process

    def visitor(self, name):
        """Return a browser without a screen, in which *name* has signed in."""
        client = httpx.Client(base_url=self.url, follow_redirects=True, timeout=LIMIT_S)
        assert client.post("/sign-in", data={"name": name}).status_code == 200
        return client

    def end(self):
        started = [
            found
            for server in self._servers
            if server.poll() is None
            for pid in process_tree.descendants(server.pid)
            if (found := processes.identity_of(pid, "test"))
        ]
        for server in self._servers:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(LIMIT_S)
            server.kill()
            server.wait(LIMIT_S)
        self._started = started
        super().end()

    def _children(self):
        if (self.folder / "data" / "bgsupervisor.db").exists():
            for row in (*self.service.ledger.supervisors(), *self.service.ledger.starts()):
                yield self._identity(row.pid, row.start_ticks)
        yield from (self._identity(one.pid, one.start_ticks) for one in self._started)


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path / "shop")
    yield shop
    shop.end()


def send(visitor, text, name="orders.csv"):
    """Upload a file as the page does; return the path of its import's page."""
    content = text if isinstance(text, bytes) else text.encode()
    page = visitor.post("/imports", files={"orders": (name, content)})
    assert page.status_code == 200, page.text
    return page.url.path


def state(visitor, path):
    answer = visitor.get(f"{path}/state")
    assert answer.status_code == 200, answer.text
    return answer.json()


def ended(visitor, path):
    return wait_until(lambda: (now := state(visitor, path))["ended"] and now, f"the import of {path} has ended")


def words_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.text))


# ---- what a shop owner sees ----


def test_an_upload_makes_progress_and_the_page_then_tells_counts_sum_and_bad_rows(shop):
    shop.open()
    jana = shop.visitor("jana")
    good = "".join(f"A{row},2026-05-17,Ada,10.50\n" for row in range(1_000))
    bad = "B1,17.05.2026,Ada,1.00\nB2,2026-05-17,,1.00\nB3,2026-05-17,Ada,much\nA1,2026-05-17,Ada,1.00\n"

    path = send(jana, HEADINGS + good + bad)
    seen = []
    wait_until(lambda: seen.append(state(jana, path)) or seen[-1]["ended"], "the import has ended")

    assert seen[-1]["status"] == "DONE"
    between = [one["fraction"] for one in seen if one["status"] == "START" and one["fraction"]]
    assert between == sorted(between)
    assert between, "no progress was seen"
    assert any("Checking row" in one["words"] and "of 1,004" in one["words"] for one in seen)
    page = words_of(jana.get(path))
    assert "Orders saved 1,000 Their sum 10,500.00 Left out 4" in page
    assert "1002 the date “17.05.2026” is not like 2027-01-31" in page
    assert "1003 no customer" in page
    assert "1004 the amount “much” is not like 12.50" in page
    assert "1005 order A1 stands in an earlier line already" in page
    assert "Orders 1,000 Sum 10,500.00" in words_of(jana.get("/"))


def test_an_import_that_is_cancelled_while_it_runs_is_told_so_and_saves_nothing(shop):
    shop.open()
    jana = shop.visitor("jana")
    path = send(jana, LONG)
    wait_until(lambda: state(jana, path)["fraction"], "the import makes progress")

    page = jana.post(f"{path}/cancel")

    assert page.url.path == path
    end = ended(jana, path)
    assert (end["status"], end["reason"], end["title"]) == ("INTERRUPTED", "CANCELLED", "Cancelled")
    assert "You cancelled this import. None of its orders were saved." in words_of(jana.get(path))
    assert "Orders 0" in words_of(jana.get("/"))
    assert shop.service.list()[0].cancel_requested_by == "jana"


def test_an_import_whose_process_is_killed_is_told_so_and_can_be_tried_again(shop):
    shop.open()
    jana = shop.visitor("jana")
    path = send(jana, LONG)
    wait_until(lambda: state(jana, path)["fraction"], "the import makes progress")

    row = shop.service.list()[0]
    _, child = processes.open_process(ProcessIdentity(row.host, row.boot_id, row.pid_ns, row.pid, row.start_ticks))
    with child:
        child.send_signal(signal.SIGKILL)

    assert ended(jana, path)["reason"] == "SIGNALLED"
    assert "cut off by something on our side. None of its orders were saved." in words_of(jana.get(path))
    assert jana.post(f"{path}/retry").url.path == path
    wait_until(lambda: state(jana, path)["status"] == "START", "the import runs again")


def test_an_import_of_another_user_does_not_exist(shop):
    shop.open_web_server_only()
    path = send(shop.visitor("jana"), HEADINGS)
    other = shop.visitor("otto")

    assert other.get(path).status_code == 404
    assert other.get(f"{path}/state").status_code == 404
    assert other.post(f"{path}/cancel").status_code == 404
    assert other.post(f"{path}/retry").status_code == 404
    assert path not in other.get("/").text
    assert shop.service.list()[0].status == "REQUEST"


def test_without_a_supervisor_the_page_says_that_it_waits_and_since_when_nobody_works(shop):
    shop.start().stop()
    last_seen = datetime.now(UTC) - timedelta(minutes=90)
    shop.service.ledger.store.database.execute_sql(
        "UPDATE bgsupervisor_supervisor SET left_at = ?", (last_seen.isoformat(sep=" ", timespec="microseconds"),)
    )
    shop.open_web_server_only()
    jana = shop.visitor("jana")

    path = send(jana, HEADINGS + "1,2026-05-17,Ada,1.00\n")

    now = state(jana, path)
    assert (now["status"], now["title"]) == ("REQUEST", "Waiting")
    assert now["no_supervisor_since"] == last_seen.isoformat()
    assert f"No imports have been worked on since {last_seen.astimezone():%Y-%m-%d %H:%M}" in words_of(jana.get(path))
    shop.start()
    assert ended(jana, path)["status"] == "DONE"


def test_imports_that_wait_tell_how_many_come_first(shop):
    shop.open_web_server_only()
    jana = shop.visitor("jana")

    paths = [send(jana, f"{HEADINGS}{row},2026-05-17,Ada,1.00\n") for row in range(3)]

    assert [state(jana, path)["words"] for path in paths] == [
        "Yours is next.",
        "1 import comes before yours.",
        "2 imports come before yours.",
    ]


def test_the_same_file_sent_twice_is_one_import_while_it_lives_and_saves_nothing_twice_afterwards(shop):
    shop.open_web_server_only()
    jana = shop.visitor("jana")
    text = HEADINGS + "1,2026-05-17,Ada,1.00\n"

    first, second = send(jana, text), send(jana, text)

    assert first == second
    assert send(shop.visitor("otto"), text) != first
    assert send(jana, text + "2,2026-05-17,Ada,1.00\n") != first
    shop.start()
    assert ended(jana, first)["status"] == "DONE"
    later = send(jana, text)
    assert later != first
    assert ended(jana, later)["status"] == "DONE"
    assert "Orders saved 0 Their sum 0.00 Known before 1" in words_of(jana.get(later))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"number,total\n1,2\n", "it lacks order, date, customer, amount."),
        (b"", "it lacks order, date, customer, amount."),
        (HEADINGS.encode() + b"1,2026-05-17,J\xfcrgen,1.00\n", "It is not a text file in UTF-8"),
        (HEADINGS.encode() + b'1,2026-05-17,"Ada,1.00\n', "It cannot be read as CSV after line"),
    ],
)
def test_a_file_that_is_no_list_of_orders_is_refused_with_a_sentence_for_its_owner(shop, content, sentence):
    shop.open()
    jana = shop.visitor("jana")

    path = send(jana, content)

    assert ended(jana, path)["status"] == "DONE"
    page = words_of(jana.get(path))
    assert "The file was not imported" in page
    assert sentence in page


def test_a_fault_of_the_program_is_told_as_one_and_its_details_stay_with_the_operators(shop):
    shop.open_web_server_only()
    jana = shop.visitor("jana")
    path = send(jana, HEADINGS + "1,2026-05-17,Ada,1.00\n")
    for upload in (shop.folder / "data" / "uploads").iterdir():
        upload.unlink()

    shop.start()

    assert ended(jana, path)["reason"] == "RAISED"
    page = jana.get(path)
    assert "It is not your file's fault" in words_of(page).replace("&#39;", "'")
    assert "FileNotFoundError" not in page.text
    assert "FileNotFoundError" in shop.service.list()[0].error


def test_who_has_not_signed_in_sees_nothing_and_a_form_without_a_file_is_refused(shop):
    shop.open_web_server_only()
    with httpx.Client(base_url=shop.url, timeout=LIMIT_S) as stranger:
        assert stranger.get("/").headers["location"] == "/sign-in"
        assert stranger.get("/imports/1/state").status_code == 404
        assert stranger.post("/imports", files={"orders": ("a.csv", b"")}).headers["location"] == "/sign-in"
    page = shop.visitor("jana").post("/imports", data={})
    assert "Please choose a file first." in page.text
    assert shop.service.list() == []


def test_ctrl_c_closes_the_shop_while_an_import_goes_on_and_the_next_start_has_its_result(shop):
    first = shop.open()
    jana = shop.visitor("jana")
    path = send(jana, HEADINGS + "".join(f"{row},2026-05-17,Ada,1.00\n" for row in range(5_000)))
    wait_until(lambda: state(jana, path)["fraction"], "the import makes progress")
    supervisor = shop.service.ledger.supervisors()[0].pid

    first.send_signal(signal.SIGINT)

    assert first.wait(LIMIT_S) == 0
    assert "1 running import(s) go on" in first.output.read_text()
    assert not _is_there(supervisor)
    shop.open()
    again = shop.visitor("jana")
    end = ended(again, path)
    assert end["status"] == "DONE"
    assert shop.service.list()[0].attempt == 1
    assert "Orders saved 5,000" in words_of(again.get(path))


def _is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = (
    "--no-sandbox",  # tests may run as root, and open no page but ours
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture
def page():
    """Return a page of a real browser that speaks with this machine only."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; Debian has it in the package chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; `make test-browser` installs it"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        page = browser.new_page(viewport={"width": 900, "height": 760})
        page.set_default_timeout(LIMIT_S * 1000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda line: page.faults.append(line.text) if line.type == "error" else None)
        yield page
        browser.close()


@pytest.mark.browser
def test_in_a_browser_the_bar_moves_to_the_result_and_cancel_ends_a_second_import(shop, page, tmp_path):
    shop.open()
    pictures = Path(os.environ.get("SHOP_PICTURES", tmp_path))
    file = tmp_path / "orders.csv"
    file.write_text(HEADINGS + "".join(f"{row},2026-05-17,Ada,2.00\n" for row in range(6_000)) + "x,y,z,1\n")

    def snap(name):
        page.screenshot(path=pictures / f"{name}.png")

    page.goto(shop.url)
    snap("1-sign-in")
    page.fill("#name", "jana")
    page.click("text=Sign in >> nth=-1")
    page.set_input_files("input[type=file]", file)
    snap("2-home")
    page.click("main button")
    width = "parseFloat(document.querySelector('#bar > div')?.style.width)"
    page.wait_for_function(f"{width} > 5 && {width} < 60")
    before = page.evaluate(width)
    page.wait_for_function(f"{width} > {before}")
    snap("3-running")
    page.wait_for_selector("#saved")
    assert (page.inner_text("#title"), page.inner_text("#saved")) == ("Finished", "6,000")
    assert (page.inner_text("#sum"), page.inner_text("#bad")) == ("12,000.00", "1")
    assert "the date “y” is not like" in page.inner_text("#bad-rows")
    snap("4-done")

    file.write_text(LONG)
    page.click("text=Send another file")
    page.set_input_files("input[type=file]", file)
    page.click("main button")
    page.wait_for_function(f"{width} > 2")
    page.click("#cancel")
    page.wait_for_selector("text=You cancelled this import")
    assert page.inner_text("#title") == "Cancelled"
    snap("5-cancelled")
    page.goto(shop.url)
    assert page.inner_text("tbody tr:nth-child(1) .chip") == "Cancelled"
    assert page.inner_text("tbody tr:nth-child(2) .chip") == "Finished"
    snap("6-list")
    assert page.faults == []
