"""What a START row and the child that it names prove, as a table."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest

from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.supervisor.children import ChildHandle, ChildState
from bgsupervisor.supervisor.recovery import ChildVerdict, RowVerdict, judge_child, judge_row
from bgsupervisor.system import processes

OWN = dataclasses.replace(processes.own_identity("here"), boot_id="boot", pid_ns=1)
ROW = {
    "pid": 5,
    "start_ticks": 6,
    "boot_id": "boot",
    "pid_ns": 1,
    "suspend_requested_at": None,
    "cancel_requested_at": None,
}
ELSEWHERE = {"pid_ns": 2}


@pytest.mark.parametrize(
    ("changed", "is_unordered", "silent_s", "verdict"),
    [
        ({}, False, math.inf, RowVerdict.LOCAL),
        ({}, True, 0.0, RowVerdict.NOT_STARTED),
        ({"pid": None}, False, 0.0, "VANISHED"),
        ({"pid": -1}, False, 0.0, "VANISHED"),
        ({"start_ticks": None}, False, 0.0, "VANISHED"),
        ({"boot_id": None}, True, 0.0, "VANISHED"),
        ({"boot_id": "another"}, False, 0.0, "HOST_REBOOTED"),
        ({"boot_id": "another", **ELSEWHERE}, True, 0.0, "HOST_REBOOTED"),
        (ELSEWHERE, False, 30.0, RowVerdict.FOREIGN),
        (ELSEWHERE, True, 30.1, "HOST_LOST"),
        (ELSEWHERE, False, math.inf, "HOST_LOST"),
        ({**ELSEWHERE, "suspend_requested_at": 1}, False, 31.0, RowVerdict.FOREIGN),
        ({**ELSEWHERE, "suspend_requested_at": 1, "cancel_requested_at": 1}, False, 31.0, "HOST_LOST"),
    ],
)
def test_judge_row_for_each_kind_of_row_returns_its_verdict(changed, is_unordered, silent_s, verdict):
    record = SimpleNamespace(**ROW | changed)
    found = judge_row(record, OWN, is_unordered=is_unordered, silent_s=silent_s, lease_s=30.0)
    assert getattr(found, "reason", found) == verdict


THIS, OTHER = Attempt(7, 2), Attempt(8, 1)
CONNECTED = SimpleNamespace(channel=SimpleNamespace(closed=False, broken=False))


@pytest.mark.parametrize(
    ("facts", "state", "verdict"),
    [
        ({}, ChildState.STARTING, ChildVerdict.RUNS),
        ({"ready": True, "peer": CONNECTED}, ChildState.IDLE, ChildVerdict.NOT_STARTED),
        ({"ready": True}, ChildState.IDLE, ChildVerdict.RUNS),
        ({"says": THIS}, ChildState.RUNNING, ChildVerdict.RUNS),
        ({"says": OTHER}, ChildState.RUNNING, ChildVerdict.BUSY),
        ({"attempt": THIS}, ChildState.RUNNING, ChildVerdict.BUSY),
        ({"attempt": OTHER}, ChildState.RUNNING, ChildVerdict.BUSY),
        ({"says": THIS, "end": object()}, ChildState.ENDED, ChildVerdict.RUNS),
        ({"ready": True, "peer": CONNECTED, "leave_by": 1.0}, ChildState.LEAVING, ChildVerdict.RUNS),
        ({"dead_since": 1.0}, ChildState.DEAD, ChildVerdict.RUNS),
    ],
)
def test_judge_child_for_each_state_returns_its_verdict(facts, state, verdict):
    child = ChildHandle(OWN, None, **facts)
    assert child.state is state
    assert judge_child(child, THIS, is_stranger=False) is verdict
    assert judge_child(child, THIS, is_stranger=True) is ChildVerdict.STRANGER
