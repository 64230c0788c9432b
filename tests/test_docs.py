"""What the pages say is what the code does."""

import re
from pathlib import Path

from bgsupervisor import Reason
from bgsupervisor.config import OPTIONS
from bgsupervisor.ledger.transitions import TRANSITIONS

ROOT = Path(__file__).parent.parent


def test_the_transition_table_of_the_architecture_page_is_the_ledgers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("| event | from | to | by |")[1].split("\n\n")[0]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[2:]]
    known = [(one.event, ", ".join(one.sources) or "-", str(one.target), one.by) for one in TRANSITIONS]

    assert known == told


def test_every_module_has_its_room_on_the_architecture_page():
    rooms = (ROOT / "docs" / "architecture.md").read_text().split("## The rooms")[1].split("## Files")[0]
    modules = {path.name for path in (ROOT / "bgsupervisor").glob("*.py")} - {"__main__.py"}

    assert modules - set(re.findall(r"\w+\.py", rooms)) == set()


def readme_rows(head):
    table = (ROOT / "README.md").read_text().split(head)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_readme_has_every_option_with_unit_default_and_meaning():
    known = [
        [f"`{one.name}`", f"`{one.default_text}`" if one.default_text else "", one.unit, one.help] for one in OPTIONS
    ]

    assert known == readme_rows("| key | default | unit | |")


def test_the_readme_names_every_reason_that_can_come_about():
    later = {Reason.EXPIRED}  # no task expires yet
    told = {row[0].strip("`") for row in readme_rows("| Reason | When | For example |")}

    assert told == {str(reason) for reason in Reason if reason not in later}


def test_the_page_on_postgresql_names_the_oldest_driver_that_the_package_takes():
    oldest = re.search(r"psycopg\[binary\]>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]

    assert f"with psycopg, {oldest} or later" in (ROOT / "docs" / "postgresql.md").read_text()
