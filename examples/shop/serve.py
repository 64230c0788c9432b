"""Starts the shop for a try: the web server on this machine alone, and the supervisor; Ctrl-C ends both.

    make shop                     from the project's folder
    python serve.py --port 8001   from this one

On a real machine a WSGI server and cron or systemd do this.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from webshop import app, service
from werkzeug.serving import make_server

from bgsupervisor import Status

CONFIG = Path(__file__).absolute().parent / "bgsupervisor.toml"
LEAVE_S = 10.0


def interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001 - a signal handler's arguments
    """Take SIGTERM and a closed terminal as Ctrl-C is taken."""
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="The shop: a web server and a supervisor.")
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1; 0 takes a free one")
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each look at a progress bar tires
    server = make_server("127.0.0.1", arguments.port, app, threaded=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    # In a session of its own, so that Ctrl-C reaches this program alone, which then ends the supervisor in order.
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "--config", str(CONFIG), "run"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        print(f"The shop is open at http://127.0.0.1:{server.server_port}/ (Ctrl-C closes it).", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # what follows takes some seconds at most
        server.server_close()
        supervisor.terminate()
        try:
            supervisor.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
    running = service.counts()[Status.START]
    left = f"; {running} running import(s) go on, and the next start finds what became of them" if running else ""
    print(f"The shop is closed{left}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
