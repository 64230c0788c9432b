"""A proxy before the tests' PostgreSQL server that cuts connections at chosen places; loopback only."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading

CHUNK = 65536
TO_SERVER, TO_CLIENT = "to the server", "to the client"
COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
"""The message by which psycopg commits."""


@dataclasses.dataclass
class Cut:
    """Cut the connection that passes so many bytes in one direction from now on, after exactly these."""

    direction: str
    after_bytes: int
    reset: bool = False

    def passes(self, _line, direction, data):
        """Return how many of the bytes go on, and whether it is cut then."""
        if direction != self.direction:
            return len(data), False
        going = min(len(data), self.after_bytes)
        self.after_bytes -= going
        return going, self.after_bytes == 0


@dataclasses.dataclass
class AnswerCut:
    """Cut the next connection that sends one of *words*: "before" them, "within" the answer to them, or "after" it."""

    words: tuple[bytes, ...]
    where: str = "within"
    reset: bool = False
    line: object = None

    def passes(self, line, direction, data):
        found = [data.index(words) for words in self.words if words in data]
        if self.line is None and direction == TO_SERVER and found:
            if self.where == "before":
                return found[0], True
            self.line = line
        elif self.line is line and direction == TO_CLIENT:
            return (0 if self.where == "within" else len(data)), True
        return len(data), False


def commit_cut(where, reset=False):  # noqa: FBT002 - as Cut
    """Cut the next connection that commits."""
    return AnswerCut((COMMIT,), where, reset)


@dataclasses.dataclass
class LostCommit:
    """The next COMMIT never arrives, and only its client learns that the connection is dead."""

    done: bool = False
    reset: bool = False

    def passes(self, line, direction, data):
        if not self.done and direction == TO_SERVER and COMMIT in data:
            self.done = line.keeps_server = True
            return 0, True
        return len(data), False


class Line:
    """One connection through the proxy: two sockets and the threads that pass on what comes."""

    def __init__(self, proxy, client):
        self.proxy = proxy
        self.client = client
        self.keeps_server = False
        try:
            self.server = socket.create_connection(("127.0.0.1", proxy.port_of_server))
        except OSError:
            client.close()
            raise
        for one in (self.client, self.server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def _live(self):
        back = threading.Thread(target=self._pass_on, args=(self.server, self.client, TO_CLIENT), daemon=True)
        back.start()
        self._pass_on(self.client, self.server, TO_SERVER)
        if self.keeps_server:
            self.proxy.closing.wait()
            self.keeps_server = False
            self.end()
        back.join()
        self.client.close()
        self.server.close()
        self.proxy.lines.discard(self)

    def _pass_on(self, source, target, direction):
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                self.proxy.flowing.wait()
                data = self.proxy.change(self, direction, data)
                going, cut, reset = self.proxy.judge(self, direction, data)
                target.sendall(data[:going])
                if cut:
                    self.end(reset=reset)
        self.end()

    def end(self, *, reset=False):
        """Have both ends closed; with a reset if so wanted: then nothing may be said before."""
        for one in (self.client,) if self.keeps_server else (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)


class Proxy:
    """Forwards to a server on this machine; `arm` has it cut once."""

    def __init__(self, port_of_server):
        self.port_of_server = port_of_server
        self.flowing = threading.Event()
        self.flowing.set()
        self.lines = set()
        self.cuts_done = 0
        self.refuses = False  # connections after the cut
        self.change = lambda _line, _direction, data: data  # what is passed on in place of it
        self._armed = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]
        self.closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses and self._armed is None:
                client.close()
                continue
            with contextlib.suppress(OSError):
                self.lines.add(Line(self, client))

    def arm(self, cut):
        """Have *cut* done once; it takes the place of one that is still to come."""
        with self._lock:
            self._armed = cut

    @property
    def armed(self):
        return self._armed is not None

    def judge(self, line, direction, data):
        with self._lock:
            if self._armed is None:
                return len(data), False, False
            going, cut = self._armed.passes(line, direction, data)
            reset = self._armed.reset
            if cut:
                self._armed = None
                self.cuts_done += 1
            return going, cut, reset

    def cut_all(self):
        for line in list(self.lines):
            line.end()

    def close(self):
        """Cut all, and accept no more."""
        self.flowing.set()
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a thread that waits in accept() would not see it closed
        self._thread.join()
        self._listener.close()
        for line in list(self.lines):
            line.end()
            line.thread.join()


def error(words):
    """Return the message by which a server refuses a connection."""
    fields = b"SFATAL\0VFATAL\0C08P01\0M" + words.encode() + b"\0\0"
    return b"E" + struct.pack("!I", len(fields) + 4) + fields


def with_another_pid(_line, direction, data):
    """Tell the client another PID than its session's, as poolers do, whose sessions are not the server's."""
    head = b"K\0\0\0\x0c"
    if direction == TO_CLIENT and head in data:
        place = data.index(head) + len(head)
        return data[:place] + struct.pack("!I", 4711) + data[place + 4 :]
    return data


def without_options(_line, direction, data):
    """Refuse our options, as PgBouncer does unless it was told to ignore them."""
    if direction == TO_CLIENT and data.startswith(b"R"):  # it asks for the password
        return error("unsupported startup parameter in options: statement_timeout")
    return data
