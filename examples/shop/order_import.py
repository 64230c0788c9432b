"""The background task: check an uploaded file row by row, then save its good orders all at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from orders import FileRefusedError, RowRefusedError, checked, read_rows, save, upload_path

from bgsupervisor import Task

BATCH_ROWS = 50
BATCH_PAUSE_S = 0.02
"""In place of what makes a real import slow, such as asking a payment service about each batch."""
BAD_ROWS_SHOWN = 100


@dataclass
class Outcome:
    """The summary on the page when the import has ended; the task's result, as JSON."""

    rows: int = 0
    saved: int = 0
    saved_cents: int = 0
    known: int = 0
    bad: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    refused: str | None = None


class ImportOrders(Task):
    name = "import-orders"
    timeout_s = 600

    def run(self, owner: str, upload: str) -> Outcome:
        """Import the uploaded file *upload* for *owner*; a file full of mistakes is an outcome, not an error."""
        self.progress(message="Reading the file")
        try:
            rows = read_rows(upload_path(upload))
        except FileRefusedError as error:
            return Outcome(refused=str(error))
        outcome, orders = Outcome(rows=len(rows)), {}
        for start in range(0, len(rows), BATCH_ROWS):
            # Cancel arrives here, as an exception; nothing is saved yet, so there is nothing to undo.
            self.progress(start, len(rows), f"Checking row {start + 1:,} of {len(rows):,}")
            for line, row in rows[start : start + BATCH_ROWS]:
                try:
                    order = checked(row)
                    if order.number in orders:
                        raise RowRefusedError(f"order {order.number} stands in an earlier line already")  # noqa: TRY301
                    orders[order.number] = order
                except RowRefusedError as error:
                    outcome.bad += 1
                    if len(outcome.bad_rows) < BAD_ROWS_SHOWN:
                        outcome.bad_rows.append((line, str(error)))
            time.sleep(BATCH_PAUSE_S)
        self.progress(len(rows), len(rows), f"Saving {len(orders):,} orders")
        outcome.saved, outcome.saved_cents = save(owner, orders.values(), self.id)
        outcome.known = len(orders) - outcome.saved
        return outcome
