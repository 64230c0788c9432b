"""Limits in seconds, on a machine that is slower, or busier, than the one they were written for."""

import subprocess
import sys
import time

# Starting this took 0.10 s where the limits were written, on two cores with nothing else to do.
IMPORTS = "import argparse, logging, multiprocessing.managers, sqlite3"
NOMINAL_S = 0.10

_starts_s = []


def allowed_s(seconds):
    """Return what *seconds* become where an interpreter takes longer to start than NOMINAL_S; never less.

    The slowest start of this test process counts: the machine may have been busy while the test waited.
    """
    began = time.monotonic()
    subprocess.run([sys.executable, "-I", "-c", IMPORTS], check=True)
    _starts_s.append(time.monotonic() - began)
    return seconds * max(1.0, max(_starts_s) / NOMINAL_S)
