"""Orders: read them from a CSV file, check them, keep them in the shop's own database. Knows nothing of tasks."""

from __future__ import annotations

import contextlib
import csv
import sqlite3
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DATA = Path(__file__).absolute().parent / "data"
DATABASE = DATA / "shop.db"
UPLOADS = DATA / "uploads"

COLUMNS = ("order", "date", "customer", "amount")
LONGEST = 100
LARGEST = Decimal(1_000_000)


class FileRefusedError(Exception):
    """The file as a whole is no list of orders; the message is for its owner."""


class RowRefusedError(Exception):
    """One row is no order; the message is for its owner."""


@dataclass(frozen=True)
class Order:
    number: str
    day: date
    customer: str
    cents: int


# ---- reading and checking ----


def upload_path(upload: str) -> Path:
    return UPLOADS / f"{upload}.csv"


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a file, each with the number of its line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise FileRefusedError(
                    f"Its first line must name the columns {', '.join(COLUMNS)}; it lacks {', '.join(missing)}."
                )
            return [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError:
        raise FileRefusedError("It is not a text file in UTF-8; save it as “CSV UTF-8”.") from None
    except csv.Error as error:
        raise FileRefusedError(f"It cannot be read as CSV after line {reader.line_num}: {error}.") from None


def checked(row: dict[str, str]) -> Order:
    """Make an order of a row."""
    values = {column: (row[column] or "").strip() for column in COLUMNS}
    for column, value in values.items():
        if not value:
            raise RowRefusedError(f"no {column}")
        if len(value) > LONGEST:
            raise RowRefusedError(f"the {column} is longer than {LONGEST} characters")
    try:
        day = date.fromisoformat(values["date"])
    except ValueError:
        raise RowRefusedError(f"the date “{values['date']}” is not like 2027-01-31") from None
    return Order(values["order"], day, values["customer"], cents_of(values["amount"]))


def cents_of(text: str) -> int:
    with contextlib.suppress(InvalidOperation):
        amount = Decimal(text)
        if amount.is_finite() and 0 < amount <= LARGEST and amount * 100 == int(amount * 100):
            return int(amount * 100)
    raise RowRefusedError(f"the amount “{text}” is not like 12.50")


# ---- the shop's database ----


@contextlib.contextmanager
def shop_database() -> Iterator[sqlite3.Connection]:
    """Open the database for one transaction: committed at the end, undone by any exception."""
    DATA.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(DATABASE, timeout=10)) as database, database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS orders (owner TEXT, number TEXT, day TEXT, customer TEXT, cents INTEGER, "
            "import_id INTEGER, PRIMARY KEY (owner, number))"
        )
        yield database


def save(owner: str, orders: Iterable[Order], import_id: int | None) -> tuple[int, int]:
    """Save all orders or none; return how many this import has saved, and their sum in cents.

    An order whose number is known stays as it is, so saving the same orders again changes nothing.
    """
    rows = [(owner, one.number, one.day.isoformat(), one.customer, one.cents, import_id) for one in orders]
    with shop_database() as database:
        database.executemany("INSERT OR IGNORE INTO orders VALUES (?, ?, ?, ?, ?, ?)", rows)
        return totals(database, owner, import_id)


def totals(database: sqlite3.Connection, owner: str, import_id: int | None = None) -> tuple[int, int]:
    """Return count and sum of an owner's orders, or of those that one import has saved."""
    query = "SELECT COUNT(*), COALESCE(SUM(cents), 0) FROM orders WHERE owner = ? AND (? IS NULL OR import_id = ?)"
    return database.execute(query, (owner, import_id, import_id)).fetchone()
