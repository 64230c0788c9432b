"""Has processes of bgsupervisor wait at the points of `bgsupervisor.failpoints` that a test has armed.

Python imports this file at its start when its folder is on PYTHONPATH. A test arms a point with a file POINT.armed that
names the kind of process which is to wait there; the first such process that comes by takes the file, writes its PID
into POINT.reached, and waits until there is a file POINT.go.

CONNECTION_LONELY_S, FORKSERVER_LONELY_S and WAIT_MANAGER_LONELY_S in the environment are how long idle children,
fork server and wait manager wait for a supervisor.
"""

import importlib
import multiprocessing
import os
import time
from pathlib import Path

LIMIT_S = 40.0


def kind():
    name = multiprocessing.current_process().name
    return name.removeprefix("bgsupervisor ").replace(" ", "_") if name.startswith("bgsupervisor ") else "supervisor"


def at(point):
    try:
        wanted = (FOLDER / f"{point}.armed").read_text()
    except FileNotFoundError:
        return
    if wanted != kind():
        return
    try:
        (FOLDER / f"{point}.armed").rename(FOLDER / f"{point}.taken")
    except FileNotFoundError:  # another was faster
        return
    (FOLDER / f"{point}.taken").write_text(str(os.getpid()))
    (FOLDER / f"{point}.taken").rename(FOLDER / f"{point}.reached")
    deadline = time.monotonic() + LIMIT_S
    while not (FOLDER / f"{point}.go").exists() and time.monotonic() < deadline:
        time.sleep(0.005)


if "PAUSES" in os.environ:
    FOLDER = Path(os.environ["PAUSES"])
    from bgsupervisor import failpoints

    failpoints.at = at
for module in ("connection", "forkserver", "wait_manager"):
    if f"{module.upper()}_LONELY_S" in os.environ:
        importlib.import_module(f"bgsupervisor.worker.{module}").LONELY_S = float(
            os.environ[f"{module.upper()}_LONELY_S"]
        )
