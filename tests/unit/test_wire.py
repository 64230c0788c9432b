"""Frames between processes, and the event sources, which take the messages of every process that connects."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import pytest
from support.app import wait_until
from support.as_user import as_nobody, needs_root, open_folder

from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import WireError
from bgsupervisor.ipc import channel as framing
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.channel import MAX_FRAME_BYTES, Channel
from bgsupervisor.ipc.messages import (
    PROTOCOL_VERSION,
    Ack,
    AttemptResult,
    Beat,
    ChildHello,
    Exited,
    LoadFailure,
    ProcessRef,
    Progress,
    ResultReport,
    Run,
    TaskOptions,
)
from bgsupervisor.ipc.sockets import connect
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.events import EventSources
from bgsupervisor.system import processes

ME = ProcessRef(os.getpid(), 5)
MESSAGES = [
    ChildHello(version=1, ref=ME, fork_server=ProcessRef(1, 2)),
    ChildHello(
        version=1,
        ref=ME,
        fork_server=ProcessRef(1, 2),
        id=7,
        attempt=2,
        end=AttemptResult(reason=Reason.RAISED, detail="ž"),
    ),
    messages.ForkServerHello(
        version=1,
        ref=ME,
        catalogue={"a:b": TaskOptions(timeout_s=5.0), "c": TaskOptions()},
        failures=[LoadFailure("a", "ImportError")],
        warnings=["a thread"],
        children=[ProcessRef(3, 4)],
        exits=[Exited(ref=ProcessRef(5, 6), exit_code=None, signal=9, ordered=Reason.TIMED_OUT)],
    ),
    Exited(ref=ME, exit_code=3, signal=None),
    messages.ExitsSeen([ME]),
    messages.Spawn(3),
    messages.Spawned(ME),
    messages.SpawnFailed(2, "Resource temporarily unavailable"),
    messages.Retire(),
    messages.Kill(ME, 9, Reason.STOPPED),
    Run(id=2**63 - 1, attempt=1, name="a:b", data='{"n": "\\u017e"}', key=None),
    Progress(id=1, attempt=1, done=0.5, total=None, message="half"),
    Beat(1, 2),
    ResultReport(1, 2, AttemptResult(result="x" * 100_000, peak_rss_bytes=2**40, cpu_s=0.25)),
    Ack(1, 2),
    messages.Cancel(id=1, attempt=2, reason=Reason.CANCELLED, why="cancelled by jana", by="jana"),
    messages.CallerHello(version=1, ref=ME),
    messages.WaitManagerHello(version=1, ref=ME),
    messages.WaitManagerBeat(),
    messages.Notify(["task:5", "lock:smtp"]),
    messages.Waiting(1, 2),
    messages.Resumed(1, 2, 15),
    messages.WantSlot(1, 2, 3),
    messages.SlotGranted(1, 2),
    messages.Reload(force=True),
    messages.Reloaded(done=False, detail="it does not load"),
    messages.Leave(),
]


def frame(message):
    body = msgspec.msgpack.encode(message)
    return struct.pack(">I", len(body)) + body


@pytest.fixture
def pair():
    """A channel and the plain socket at its other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


# ---- frames ----


def test_every_kind_of_message_is_among_those_that_are_tried():
    assert {type(message) for message in MESSAGES} == set(typing.get_args(messages.Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(pair, message):
    channel, theirs = pair
    other = Channel(theirs)
    other.send(message)
    received = []
    while not received:
        received = channel.receive()
        other.flush()
    assert received == [message]
    assert other.unsent_bytes == 0
    other.close()


def test_a_frame_may_be_split_at_every_byte(pair):
    channel, theirs = pair
    message = MESSAGES[1]
    sent = frame(message)
    for place in range(1, len(sent)):
        theirs.send(sent[:place])
        assert channel.receive() == []
        theirs.send(sent[place:])
        assert channel.receive() == [message]
    for place in range(len(sent)):
        received = (theirs.send(sent[place : place + 1]), channel.receive())[1]
    assert received == [message]


def test_several_frames_in_one_piece_are_several_messages_and_the_rest_waits(pair):
    channel, theirs = pair
    theirs.send(frame(Beat(1, 1)) + frame(Beat(2, 1)) + frame(Beat(3, 1))[:-1])
    assert channel.receive() == [Beat(1, 1), Beat(2, 1)]
    theirs.send(frame(Beat(3, 1))[-1:])
    assert channel.receive() == [Beat(3, 1)]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (struct.pack(">I", MAX_FRAME_BYTES + 1), "a frame of 80 MiB was announced"),
        (b"GET / HTTP/1.1\r\n\r\n", "GiB was announced"),
        (struct.pack(">I", 0), "a message of 0 bytes cannot be read"),
        (struct.pack(">I", 3) + b"\xc1\xc1\xc1", "a message of 3 bytes cannot be read"),
        (frame({"type": "Beat", "id": "one", "attempt": 1}), "cannot be read: Expected `int`"),
        (frame({"type": "Bribe"}), "cannot be read: Invalid value 'Bribe'"),
        (frame([1, 2]), "cannot be read"),
        (frame(Beat(1, 1))[:4] + frame(Beat(1, 1))[4:-1] + b"\xc1", "cannot be read"),
    ],
)
def test_what_is_not_our_protocol_is_an_error(pair, sent, says):
    channel, theirs = pair
    theirs.send(sent)
    with pytest.raises(WireError, match=says):
        channel.receive()


def test_what_a_peer_said_before_it_left_is_delivered(pair):
    channel, theirs = pair
    theirs.send(frame(Beat(1, 1)) + frame(Beat(2, 1))[:3])
    theirs.close()
    assert channel.receive() == [Beat(1, 1)]
    assert channel.closed
    assert channel.receive() == []
    assert channel.send(Beat(1, 1)) == 0
    assert channel.written_bytes == 0


def test_a_peer_that_is_gone_closes_the_channel_of_who_writes(pair):
    channel, theirs = pair
    theirs.close()
    channel.send(Beat(1, 1))
    assert channel.broken
    assert channel.written_bytes == 0  # so the message has not left at all


def test_the_last_word_of_a_peer_is_read_after_a_word_to_it_was_refused(pair):
    channel, theirs = pair
    other = Channel(theirs)
    other.send(ResultReport(1, 1, AttemptResult(result="7")))
    theirs.close()
    channel.send(Ack(1, 1))

    assert channel.receive_all() == [ResultReport(1, 1, AttemptResult(result="7"))]
    assert channel.closed


def test_one_look_takes_a_bounded_amount_and_all_of_a_dead_peer_is_read_in_several(pair):
    channel, theirs = pair
    end = ResultReport(1, 1, AttemptResult(result="x" * 3_000_000))
    other = Channel(theirs)
    looks = 0
    other.send(end)
    received = []
    while other.unsent_bytes:
        received += channel.receive()
        looks += 1
        other.flush()
    other.close()
    assert looks > 5
    assert received + channel.receive_all() == [end]
    assert channel.closed


def test_a_peer_that_says_much_does_not_keep_the_others_waiting(pair, monkeypatch):
    monkeypatch.setattr(framing, "RECEIVE_BYTES", 65536)
    channel, theirs = pair
    sent = frame(Progress(id=1, attempt=1, done=None, total=None, message="x" * 9_000))
    for _ in range(15):
        theirs.sendall(sent)
    first = channel.receive()
    assert 0 < len(first) < 15
    assert len(first) + len(channel.receive()) + len(channel.receive()) == 15


def test_reading_all_of_a_silent_peer_ends(pair):
    channel, theirs = pair
    theirs.send(frame(Beat(1, 1)))
    assert channel.receive_all() == [Beat(1, 1)]
    assert not channel.closed


def test_a_full_buffer_keeps_what_is_to_be_written_and_flushes_it_in_order(pair):
    channel, theirs = pair
    size = len(frame(Run(id=1, attempt=1, name="a", data="x" * 100_000)))
    places = [channel.send(Run(id=id, attempt=1, name="a", data="x" * 100_000)) for id in range(1, 31)]
    assert places == [size * place for place in range(30)]
    assert not channel.closed
    assert not channel.flush()
    assert 0 < channel.written_bytes < channel.queued_bytes == 30 * size
    assert channel.unsent_bytes == channel.queued_bytes - channel.written_bytes
    assert places[-1] >= channel.written_bytes  # the last one has not left
    other = Channel(theirs)
    received = []
    while len(received) < 30:
        received += other.receive()
        channel.flush()
    assert [message.id for message in received] == list(range(1, 31))
    assert channel.flush()
    assert channel.unsent_bytes == 0
    other.close()


def test_a_file_that_took_over_the_number_of_a_connection_is_never_written_to(pair, tmp_path):
    channel, _ = pair
    stolen = tmp_path / "report.csv"
    number = channel.fileno()
    with stolen.open("w+b") as file:
        file.write(b"the body's own words")
        file.flush()
        file.seek(0)
        os.dup2(file.fileno(), number)
    channel.send(Beat(1, 1))
    assert channel.closed
    assert channel.receive() == []
    channel.close()
    assert stolen.read_bytes() == b"the body's own words"
    os.close(number)  # closing the channel has left the file alone


def test_a_socket_that_took_over_the_number_of_a_connection_is_never_spoken_to(pair):
    channel, _ = pair
    number = channel.fileno()
    body, peer = socket.socketpair()
    os.dup2(body.fileno(), number)
    peer.send(b"not for us")
    assert channel.receive() == []
    assert channel.closed
    channel.closed = False
    channel.send(Beat(1, 1))
    assert channel.closed
    channel.close()
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.recv(1)
    assert body.recv(100) == b"not for us"
    for one in (body, peer):
        one.close()
    os.close(number)


def test_a_descriptor_that_was_closed_under_the_channel_is_no_disaster(pair):
    channel, _ = pair
    os.close(channel.fileno())
    assert channel.receive() == []
    assert channel.closed
    channel.close()
    channel.close()


def test_a_channel_knows_its_peer_as_the_kernel_does(pair):
    assert pair[0].peer() == (os.getpid(), os.geteuid())


def test_a_forgotten_copy_does_not_end_the_connection(pair):
    channel, theirs = pair
    copy = Channel(socket.socket(fileno=os.dup(channel.fileno())))
    copy.forget()
    assert copy.closed
    theirs.send(frame(Beat(1, 1)))
    assert channel.receive() == [Beat(1, 1)]


# ---- sources ----


@pytest.fixture
def state_dir(tmp_path):
    folder = StateDir(tmp_path / "state")
    folder.create()
    return folder


@pytest.fixture
def sources(state_dir):
    sources = EventSources(state_dir, SystemClock())
    yield sources
    sources.close()


@pytest.fixture
def dial(state_dir):
    dialled = []

    def dial():
        channel = Channel(connect(state_dir.path, "control.sock", socket.SOCK_STREAM))
        dialled.append(channel)
        return channel

    yield dial
    for channel in dialled:
        channel.close()


def hear(sources, timeout_s=0.0):
    return sources.hear(sources.rest(timeout_s))


def hear_until(sources, condition, sentence):
    """Let the sources turn until *condition* of all that was heard."""
    heard = []

    def turn():
        heard.append(hear(sources, 0.01))
        return condition(heard)

    wait_until(turn, sentence)
    return heard


def messages_of(heard):
    return [message for one in heard for _, message in one.messages]


def hello(**more):
    return ChildHello(**{"version": PROTOCOL_VERSION, "ref": ME, "fork_server": ProcessRef(1, 2)} | more)


def says_hello(sources, channel):
    """Have *channel* say hello; return the peer that the sources knows it as."""
    channel.send(hello())
    heard = hear_until(sources, messages_of, "the hello is heard")
    return next(peer for one in heard for peer, _ in one.messages)


def is_closed(sources, channel):
    """Whether the other end has closed *channel*, after the sources has turned."""

    def turn():
        hear(sources, 0.01)
        with contextlib.suppress(WireError):
            channel.receive()
        return channel.closed

    wait_until(turn, "the connection is closed")
    return True


def test_a_hello_makes_a_peer_that_is_heard_and_can_be_spoken_to(sources, dial):
    channel = dial()
    peer = says_hello(sources, channel)
    assert (peer.ref, peer.pid) == (ME, os.getpid())
    channel.send(Beat(1, 1))
    assert messages_of([hear(sources, 5)]) == [Beat(1, 1)]
    sources.send(peer, Ack(1, 1))
    assert channel.receive() == [Ack(1, 1)]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "GiB was announced"),
        (frame({"type": "Bribe"}), "cannot be read"),
        (frame(Beat(1, 1)), "did not say hello first"),
        (frame(hello(version=99)), "it speaks protocol 99, this supervisor speaks 1"),
        (frame(hello(ref=ProcessRef(1, 1))), "it says that it is PID 1"),
        (frame(messages.CallerHello(version=99, ref=ME)), "it speaks protocol 99"),
        (frame(hello()) + frame(hello(ref=ProcessRef(1, 1))), "it says that it is PID 1"),
    ],
    ids=["rubbish", "unknown", "no hello", "version", "pid", "caller's version", "a second hello"],
)
def test_a_peer_that_does_not_speak_our_protocol_is_closed_and_the_others_are_served(sources, dial, caplog, said, says):
    good, bad = dial(), dial()
    says_hello(sources, good)
    with caplog.at_level(logging.WARNING, "bgsupervisor"):
        bad._socket.send(said)
        assert is_closed(sources, bad)
    (record,) = caplog.records
    assert says in record.getMessage()
    assert f"PID {os.getpid()}" in record.getMessage()
    good.send(Beat(1, 1))
    assert messages_of(hear_until(sources, messages_of, "the good one is heard")) == [Beat(1, 1)]


def test_a_peer_that_leaves_is_let_go_and_what_it_said_is_heard(sources, dial):
    channel = dial()
    peer = says_hello(sources, channel)
    channel.send(ResultReport(1, 1, AttemptResult(result="1")))
    channel.close()
    heard = hear_until(sources, lambda _: peer.channel.closed, "its leaving is noticed")
    assert messages_of(heard) == [ResultReport(1, 1, AttemptResult(result="1"))]
    assert sources._peers == {}


def test_the_last_words_of_a_dead_peer_are_read_even_if_they_are_long(sources, dial):
    channel = dial()
    peer = says_hello(sources, channel)
    channel.send(Beat(1, 1))
    channel.send(Beat(1, 1))
    channel.close()
    assert sources.last_messages(peer) == [Beat(1, 1), Beat(1, 1)]
    assert sources._peers == {}


def test_the_last_words_of_a_peer_gone_mad_are_nothing(sources, dial):
    channel = dial()
    peer = says_hello(sources, channel)
    channel._socket.send(b"\xff" * 100)
    channel.close()
    assert sources.last_messages(peer) == []


def test_a_peer_that_does_not_read_delays_nobody_and_gets_all_when_it_reads(sources, dial):
    lazy, good = dial(), dial()
    peer = says_hello(sources, lazy)
    other = says_hello(sources, good)
    for id in range(1, 21):
        sources.send(peer, Run(id=id, attempt=1, name="a", data="x" * 100_000))
    assert peer.channel.unsent_bytes > 0
    sources.send(other, Ack(1, 1))
    assert good.receive() == [Ack(1, 1)]
    received = []

    def read(_):
        received.extend(lazy.receive())
        return len(received) == 20

    hear_until(sources, read, "all orders have arrived")
    assert [message.id for message in received] == list(range(1, 21))
    wait_until(lambda: hear(sources) and not peer.channel.unsent_bytes, "all is written")
    assert sources.rest(0) == []  # it waits for no writing any more


def test_hundreds_dial_at_once_and_all_are_heard(sources, dial):
    channels = [dial() for _ in range(300)]
    for channel in channels:
        channel.send(hello())
    heard = hear_until(sources, lambda heard: len(messages_of(heard)) == 300, "all are heard")
    assert all(isinstance(message, ChildHello) for message in messages_of(heard))


def test_a_wake_up_is_heard_once_however_often_it_rang(sources, state_dir):
    wake_ups = connect(state_dir.path, "wake.sock", socket.SOCK_DGRAM)
    assert not hear(sources).woken
    for _ in range(5):
        wake_ups.send(b"")
    assert hear(sources, 5).woken
    assert not hear(sources).woken
    wake_ups.close()


def test_a_write_to_the_watched_file_is_heard(sources, tmp_path):
    path = tmp_path / "db-wal"
    sources.watch_file(path)  # not there yet: nothing happens
    path.write_bytes(b"")
    sources.watch_file(path)
    assert not hear(sources).database_touched
    path.write_bytes(b"x")
    assert hear(sources, 5).database_touched
    assert not hear(sources).database_touched


def test_a_death_is_heard_once(sources):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = processes.identity_of(process.pid, "here")
    _, handle = processes.open_process(identity)
    ref = ProcessRef(identity.pid, identity.start_ticks)
    sources.watch_process(ref, handle)
    sources.watch_process(ref, handle)
    assert hear(sources).deaths == []
    process.communicate(b"\n")
    assert hear(sources, 10).deaths == [ref]
    assert hear(sources).deaths == []
    sources.unwatch_process(ref)
    handle.close()


def test_signals_end_the_rest_until_the_sources_are_closed(state_dir):
    sources = EventSources(state_dir, SystemClock())
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        sources.listen_to_signals(tuple(before))
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert sorted(hear(sources, 5).signals) == [signal.SIGUSR1, signal.SIGUSR2]
    finally:
        sources.close()
        assert signal.set_wakeup_fd(-1) == -1  # a late signal writes into nobody's file
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_socket_whose_name_is_gone_is_noticed_and_bound_again(sources, state_dir, dial):
    assert sources.sockets_stand()
    old = dial()
    peer = says_hello(sources, old)
    state_dir.control.unlink()
    assert not sources.sockets_stand()
    sources.bind()
    assert sources.sockets_stand()
    says_hello(sources, dial())
    old.send(Beat(1, 1))  # who was connected stays so
    assert messages_of(hear_until(sources, messages_of, "the old one is heard")) == [Beat(1, 1)]
    assert peer.ref == ME
    assert state_dir.control.stat().st_mode & 0o777 == 0o600
    assert state_dir.wake.stat().st_mode & 0o777 == 0o660


def test_who_takes_the_names_over_is_noticed(sources, state_dir):
    successor = EventSources(state_dir, SystemClock())
    assert not sources.sockets_stand()
    assert successor.sockets_stand()
    successor.close()


def test_closed_sources_hold_no_descriptor(state_dir, tmp_path):
    def held():
        return sorted(path.name for path in Path("/proc/self/fd").iterdir())

    before = held()
    sources = EventSources(state_dir, SystemClock())
    path = tmp_path / "db-wal"
    path.touch()
    sources.watch_file(path)
    sources.close()
    assert held() == before
    assert state_dir.control.exists()  # for the next supervisor to replace


def dialled(path):
    """Dial as a stranger would, who does not ask whose socket it is."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


@needs_root
def test_another_user_who_may_dial_is_not_heard(caplog):
    with open_folder() as folder:
        state_dir = StateDir(folder / "state")
        state_dir.create()
        sources = EventSources(state_dir, SystemClock())
        for path, mode in [(state_dir.path, 0o755), (state_dir.control, 0o666)]:
            path.chmod(mode)
        with caplog.at_level(logging.WARNING, "bgsupervisor"):
            assert as_nobody(lambda: dialled(state_dir.control).send(b"x")) == "1"
            hear_until(sources, lambda _: caplog.records, "the stranger is refused")
        assert "a process of user id" in caplog.text
        assert sources._peers == {}
        sources.close()


def test_a_watch_that_cannot_be_had_leaves_the_net(sources, monkeypatch, tmp_path):
    def refuse(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bgsupervisor.supervisor.events.FileWatch", refuse)
    path = tmp_path / "db-wal"
    path.touch()
    sources.watch_file(path)
    path.write_bytes(b"x")
    assert not hear(sources).database_touched
    monkeypatch.undo()
    sources.watch_file(path)  # it is tried again
    path.write_bytes(b"y")
    assert hear(sources, 5).database_touched
