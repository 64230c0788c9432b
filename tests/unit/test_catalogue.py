"""The catalogue of the supervisors, as requests by name read it."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from bgsupervisor import registry
from bgsupervisor.catalogue import Catalogue, Known
from bgsupervisor.ledger.records import SupervisorRecord

NOW = datetime(2027, 1, 31, 12, 0, tzinfo=UTC)


def row(*, failed):
    return SupervisorRecord(
        host="h",
        boot_id="b",
        pid_ns=1,
        pid=7,
        start_ticks=1,
        started_at=NOW,
        heartbeat_at=NOW,
        slots=1,
        version="",
        catalogue=json.dumps({"appx:greet": {}}),
        code_error=json.dumps([{"module": failed, "error": "a sentence"}]),
    )


@pytest.mark.parametrize(
    ("failed", "objection"),
    [
        ("", "no supervisor has a task named 'greeet'; did you mean appx:greet?"),  # a warning about data
        ("appy", "no supervisor has a task named 'greeet'; did you mean appx:greet?"),
    ],
)
def test_known_with_a_warning_in_the_row_still_objects_to_an_unknown_name(failed, objection, monkeypatch):
    monkeypatch.setattr(registry, "_definitions", {})  # those of other tests, which are known as well
    catalogue = Catalogue.of([row(failed=failed)], now=NOW)

    assert Known(catalogue, ["appx"]).objection("greeet") == objection


def test_known_does_not_object_to_a_name_of_a_module_that_failed_to_load():
    catalogue = Catalogue.of([row(failed="appy")], now=NOW)

    assert Known(catalogue, ["appx"]).objection("appy:greet") is None
