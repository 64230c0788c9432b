"""The only writer of rows. Knows no signals, and nothing that a PID means."""

from bgsupervisor.ledger.requests import Ledger

__all__ = ["Ledger"]
