"""Limits follow what the machine allows: up only, in proportion, and not without end."""

import pace
import pytest


class Machine:
    """Starts an interpreter in the time that it is given, and stands in for `time` and `subprocess`."""

    def __init__(self):
        self.now, self.start_s = 1000.0, pace.NOMINAL_S

    def monotonic(self):
        return self.now

    def run(self, command, *, check):
        assert pace.IMPORTS in command
        assert check
        self.now += self.start_s


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(pace, "time", made)
    monkeypatch.setattr(pace, "subprocess", made)
    monkeypatch.setattr(pace, "_starts", [])
    return made


@pytest.mark.parametrize(("start_s", "factor"), [(0.05, 1), (0.10, 1), (0.25, 2.5), (1.0, 10), (60.0, 10)])
def test_a_limit_follows_the_start_of_an_interpreter_between_once_and_ten_times(machine, start_s, factor):
    machine.start_s = start_s
    assert pace.allowed_s(2.0) == pytest.approx(2.0 * factor)


def test_the_slowest_start_of_the_last_minute_counts(machine):
    machine.start_s = 0.5
    assert pace.allowed_s(1.0) == pytest.approx(5.0)
    machine.start_s = 0.1
    machine.now += pace.RECENT_S - 1
    assert pace.allowed_s(1.0) == pytest.approx(5.0)
    machine.now += 2
    assert pace.allowed_s(1.0) == pytest.approx(1.0)


def test_an_interpreter_is_really_started():
    assert pace.allowed_s(3.0) >= 3.0
    assert 0 < pace._starts[-1][1] < 60
