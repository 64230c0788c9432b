"""What a nursery writes down, and what is read of it by those who come later."""

from __future__ import annotations

from bgsupervisor import exits
from bgsupervisor.statuses import Reason
from bgsupervisor.wire import Exited, Who

KILLED = Exited(who=Who(7, 70), exit_code=None, signal=9, ordered=Reason.CANCELLED)
LEFT = Exited(who=Who(8, 80), exit_code=3, signal=None)


def test_what_is_written_is_read_until_it_is_forgotten(tmp_path):
    record = tmp_path / "nursery-1-1"
    for exited in (KILLED, LEFT):
        exits.write(record, exited)
    assert exits.read(record) == {KILLED.who: KILLED, LEFT.who: LEFT}
    exits.keep(record, [LEFT])  # it is small
    assert exits.read(record) == {KILLED.who: KILLED, LEFT.who: LEFT}
    exits.keep(record, [])
    assert exits.read(record) == {}
    exits.write(record, LEFT)
    assert exits.read(record) == {LEFT.who: LEFT}


def test_a_record_that_is_gone_cut_off_or_rubbish_tells_what_can_be_read(tmp_path):
    record = tmp_path / "nursery-1-1"
    assert exits.read(record) == {}
    exits.keep(record, [])
    assert not record.exists()
    exits.write(record, KILLED)
    whole = record.read_bytes()
    record.write_bytes(b"\xff\xfe\n[]\n{}\n" + whole + whole[:20])
    assert exits.read(record) == {KILLED.who: KILLED}


def test_where_nothing_can_be_written_nobody_stops(tmp_path):
    exits.write(tmp_path / "no-folder" / "nursery-1-1", KILLED)


def test_a_record_that_is_never_empty_does_not_grow_without_end(tmp_path):
    record = tmp_path / "nursery-1-1"
    exits.write(record, LEFT)  # nobody acknowledges it
    for number in range(3000):
        passing = Exited(who=Who(number + 10, 1), exit_code=None, signal=9)
        exits.write(record, passing)
        exits.keep(record, [LEFT])
    assert record.stat().st_size < 2 * exits.LARGE_BYTES
    assert exits.read(record)[LEFT.who] == LEFT
    assert [path.name for path in tmp_path.iterdir()] == [record.name]
