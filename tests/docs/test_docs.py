"""What the pages say is what the code does."""

import re
from pathlib import Path

import click
import pytest

from bgsupervisor import Reason
from bgsupervisor.cli.program import program
from bgsupervisor.config import OPTIONS
from bgsupervisor.ledger.transitions import TRANSITIONS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "examples" / "shop" / "README.md"]


def test_the_transition_table_of_the_architecture_page_is_the_ledgers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("| event | from | to | by |")[1].split("\n\n")[0]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[2:]]
    known = [(one.event, ", ".join(one.sources) or "-", str(one.target), one.by) for one in TRANSITIONS]

    assert known == told


def test_every_package_has_a_line_on_the_architecture_page():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("<!-- tree -->")[1]
    packages = {path.parent.name for path in (ROOT / "bgsupervisor").glob("*/__init__.py")}

    assert packages - set(re.findall(r"^ *(\w+)/", tree, re.MULTILINE)) == set()


def rows_of(page, head):
    table = (ROOT / "docs" / page).read_text().split(head)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_configuration_page_has_every_option_with_unit_default_and_meaning():
    known = [
        [f"`{one.name}`", f"`{one.default_text}`" if one.default_text else "", one.unit, one.help] for one in OPTIONS
    ]

    assert known == rows_of("configuration.md", "| key | default | unit | |")


def test_the_api_page_names_every_reason_that_can_come_about():
    later = {Reason.EXPIRED}  # no task expires yet
    told = {row[0].strip("`") for row in rows_of("api.md", "| Reason | When | For example |")}

    assert told == {str(reason) for reason in Reason if reason not in later}


def test_the_page_on_postgresql_names_the_oldest_driver_that_the_package_takes():
    oldest = re.search(r"psycopg\[binary\]>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]

    assert f"with psycopg, {oldest} or later" in (ROOT / "docs" / "postgresql.md").read_text()


def test_the_api_page_names_every_command_in_the_order_of_the_help():
    documented = [row[0].strip("`") for row in rows_of("api.md", "| command | what it does |")]

    assert documented == program.list_commands(click.Context(program))


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page.read_text())
    places = [(page.parent / path if path else page, anchor) for path, anchor in links]

    assert [str(place) for place, _ in places if not place.exists()] == []
    assert [(place.name, anchor) for place, anchor in places if anchor and anchor not in anchors(place)] == []


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text()

    assert len(text.splitlines()) <= 150
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in text] == []
