"""Limits in seconds on a machine that is slower, or busier, than the one they were written for."""

import subprocess
import sys
import time

IMPORTS = "import argparse, logging, multiprocessing.managers, sqlite3"
NOMINAL_S = 0.10
"""Time that an interpreter with IMPORTS took to start where the limits were written: two idle cores."""
SLOWEST = 10.0
"""Greatest factor: on a machine that is slower still, a limit would show nothing."""
RECENT_S = 60.0
"""Age in seconds up to which a measured start counts: the machine may have been busy while a test waited."""

_starts = []


def allowed_s(seconds):
    """Return *seconds* times how much longer an interpreter takes to start now than NOMINAL_S; never less.

    Starts an interpreter and waits for it. Of the starts of this test process in the last RECENT_S the slowest counts.
    """
    began = time.monotonic()
    subprocess.run([sys.executable, "-I", "-c", IMPORTS], check=True)
    now = time.monotonic()
    _starts[:] = [(at, took_s) for at, took_s in _starts if now - at < RECENT_S] + [(now, now - began)]
    slowest_s = max(took_s for _, took_s in _starts)
    return seconds * min(SLOWEST, max(1.0, slowest_s / NOMINAL_S))
