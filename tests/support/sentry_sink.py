"""A stand-in for Sentry's server, on this machine: takes in what the real SDK sends."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
import time

HELD_S = 30.0


class Sink(http.server.ThreadingHTTPServer):
    """Keeps the events that it is sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events = []
        self.answers_after_s = 0.0
        self.free = threading.Event()
        self.free.set()

    @property
    def dsn(self):
        return f"http://key@127.0.0.1:{self.server_address[1]}/1"

    def hold(self):
        """Answer nothing any more."""
        self.free.clear()

    def titles(self):
        """Return the type of each exception, and the text of each message, that has come; sorted."""
        found = []
        for event in self.events:
            errors = event.get("exception", {}).get("values", [])
            found.append(errors[-1]["type"] if errors else event.get("message") or event["logentry"]["message"])
        return sorted(found)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.free.wait(HELD_S)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        lines = [json.loads(line) for line in body.split(b"\n") if line.startswith(b"{")]
        self.server.events += [line for line in lines if "event_id" in line and "timestamp" in line]
        time.sleep(self.server.answers_after_s)
        with contextlib.suppress(OSError):  # the child has left
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    def log_message(self, *about):
        pass


@contextlib.contextmanager
def sentry_sink():
    """Run such a server."""
    with Sink() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.free.set()
            server.shutdown()
            thread.join()
