"""What a fork server writes down, and what is read of it by those who come later."""

from __future__ import annotations

from bgsupervisor.ipc import exit_journal
from bgsupervisor.ipc.messages import Exited, ProcessRef
from bgsupervisor.statuses import Reason

KILLED = Exited(ref=ProcessRef(7, 70), exit_code=None, signal=9, ordered=Reason.CANCELLED)
LEFT = Exited(ref=ProcessRef(8, 80), exit_code=3, signal=None)


def test_what_is_written_is_read_until_it_is_forgotten(tmp_path):
    record = tmp_path / "forkserver-1-1"
    for exited in (KILLED, LEFT):
        exit_journal.write(record, exited)
    assert exit_journal.read(record) == {KILLED.ref: KILLED, LEFT.ref: LEFT}
    exit_journal.keep(record, [LEFT])  # it is small
    assert exit_journal.read(record) == {KILLED.ref: KILLED, LEFT.ref: LEFT}
    exit_journal.keep(record, [])
    assert exit_journal.read(record) == {}
    exit_journal.write(record, LEFT)
    assert exit_journal.read(record) == {LEFT.ref: LEFT}


def test_a_record_that_is_gone_cut_off_or_rubbish_tells_what_can_be_read(tmp_path):
    record = tmp_path / "forkserver-1-1"
    assert exit_journal.read(record) == {}
    exit_journal.keep(record, [])
    assert not record.exists()
    exit_journal.write(record, KILLED)
    whole = record.read_bytes()
    record.write_bytes(b"\xff\xfe\n[]\n{}\n" + whole + whole[:20])
    assert exit_journal.read(record) == {KILLED.ref: KILLED}


def test_where_nothing_can_be_written_nobody_stops(tmp_path):
    exit_journal.write(tmp_path / "no-folder" / "forkserver-1-1", KILLED)


def test_a_record_that_is_never_empty_does_not_grow_without_end(tmp_path):
    record = tmp_path / "forkserver-1-1"
    exit_journal.write(record, LEFT)  # nobody acknowledges it
    for number in range(3000):
        passing = Exited(ref=ProcessRef(number + 10, 1), exit_code=None, signal=9)
        exit_journal.write(record, passing)
        exit_journal.keep(record, [LEFT])
    assert record.stat().st_size < 2 * exit_journal.LARGE_BYTES
    assert exit_journal.read(record)[LEFT.ref] == LEFT
    assert [path.name for path in tmp_path.iterdir()] == [record.name]
