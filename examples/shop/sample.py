"""Makes a file of orders to try the shop with, a few rows of it wrong: python sample.py 20000 > orders.csv"""

from __future__ import annotations

import random
import sys
from datetime import date, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 20_000
CUSTOMERS = ("Ada Lovelace", "Grace Hopper", "Jana Nováková", "Jürgen Groß", "Mary Seacole", "José Niño", "孫 悟空")
MISTAKES = ("{0},{1},{2},", "{0},31.01.2027,{2},{3}", "{0},{1},{2},twelve", "{0},{1},,{3}")
MISTAKE_EVERY = 1500


def sample_lines(rows: int = ROWS, seed: int = 1) -> Iterator[str]:
    """Yield the lines of the file; the same *seed* gives the same file."""
    chance = random.Random(seed)  # noqa: S311 - invented orders, no secrets
    yield "order,date,customer,amount\n"
    for row in range(1, rows + 1):
        number = f"{seed}-{row:06d}"
        day = date(2026, 1, 1) + timedelta(days=chance.randrange(365))
        form = "{0},{1},{2},{3}" if row % MISTAKE_EVERY else chance.choice(MISTAKES)
        yield form.format(number, day, chance.choice(CUSTOMERS), f"{chance.randrange(100, 50_000) / 100:.2f}") + "\n"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.writelines(sample_lines(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS))
