"""Signatures that do not resolve spend no task; the hints of **kwargs hold for each of its keys."""

from __future__ import annotations

import datetime as dt
import typing

import pytest

from bgsupervisor.errors import DataInvalid, TaskDefinitionError
from bgsupervisor.payload import decode_data, encode_data
from bgsupervisor.signatures import Signature

GOOD = """
from bgsupervisor import task

@task
def sends(to: str) -> str:
    return to

@task
def other() -> int:
    return 1
"""
UNRESOLVED = """
from __future__ import annotations
from typing import TYPE_CHECKING
from bgsupervisor import task

if TYPE_CHECKING:
    from addresses import Address

@task
def sends(to: Address) -> str:
    return to

@task
def other() -> int:
    return 1
"""
UNBUILT = """
import dataclasses
from bgsupervisor import task

@dataclasses.dataclass
class Address:
    street: "Street"

@task
def sends(to: Address) -> str:
    return to.street

@task
def other() -> int:
    return 1
"""
HALF_LOADED = GOOD + "raise ImportError('after its tasks')\n"


def hold(app, handle, name="appx:other"):
    """See that the supervisor passes over a task while it runs another."""
    later = app.service.request(name)
    assert app.wait(later).status == "DONE"
    record = app.service.get(handle)
    assert (record.status, record.attempt, record.reason) == ("REQUEST", 0, None), record


@pytest.mark.parametrize("source", [UNRESOLVED, UNBUILT])
def test_a_task_whose_signature_fails_waits_until_it_loads(make_app, source):
    app = make_app(source)
    handle = app.service.request("appx:sends", {"to": "jana"})
    app.start()
    hold(app, handle)
    why = app.cli("why", str(handle.id)).stdout
    assert "no supervisor has code for appx:sends: task appx:sends failed to load: " in why
    assert "'to'" in why
    shown = app.cli("ps")
    assert "code missing" in shown.stdout
    assert "appx:sends failed to load: " in shown.stderr
    checked = app.cli("check")
    assert checked.returncode == 1
    assert "appx:sends failed to load:" in checked.stderr
    assert "appx:other" in checked.stdout
    assert "  appx:sends" not in checked.stdout
    app.write(GOOD)
    app.cli("reload")
    assert app.wait(handle).status == "DONE"
    assert app.service.result(handle) == "jana"


def test_a_task_of_a_module_that_raises_after_it_waits_until_it_loads(make_app):
    app = make_app(HALF_LOADED)
    app.configure(tasks=["appx", "appy"])
    app.write(GOOD, "appy")
    handle = app.service.request("appx:sends", {"to": "jana"})
    app.start()
    hold(app, handle, "appy:other")
    assert "ImportError: after its tasks" in app.cli("why", str(handle.id)).stdout
    app.write(GOOD)
    app.cli("reload")
    assert app.wait(handle).status == "DONE"


def test_a_reload_that_breaks_a_signature_leaves_the_old_code(make_app):
    app = make_app(GOOD)
    app.start()
    app.write(UNRESOLVED)
    done = app.cli("reload")
    assert done.returncode == 1
    assert "appx:sends failed to load" in done.stdout + done.stderr
    assert "the code that works stays in force" in done.stdout + done.stderr
    handle = app.service.request("appx:sends", {"to": "jana"})
    assert app.wait(handle).status == "DONE"


# ---- **kwargs ----


def dated(name: str, **dates: dt.date) -> None:
    """Take dates by any name."""


class Options(typing.TypedDict):
    since: typing.Required[dt.date]
    limit: typing.NotRequired[int]


def unpacked(name: str, **options: typing.Unpack[Options]) -> None:
    """Take the keys of a mapping."""


def anything(name: str, **more) -> None:
    """Take all."""


def decoded(function, text):
    return decode_data(text, Signature.of(function, skip_self=False, owner="mail"), name="mail")


def encoded(function, data):
    return encode_data(
        data, signature=Signature.of(function, skip_self=False, owner="mail"), limit_bytes=1000, name="mail"
    )


def test_each_extra_key_is_converted_by_its_hint():
    assert decoded(dated, '{"name": "x", "since": "2026-01-02", "p0": "2026-01-03"}') == {
        "name": "x",
        "since": dt.date(2026, 1, 2),
        "p0": dt.date(2026, 1, 3),
    }


def test_an_extra_key_that_does_not_fit_is_refused_by_name():
    with pytest.raises(DataInvalid, match=r"\$\.since must be date, but int 5 came") as caught:
        encoded(dated, {"name": "x", "until": dt.date(2026, 1, 2), "since": 5})
    assert caught.value.field == "$.since"


def test_data_with_extra_keys_comes_back_as_it_was_given():
    data = {"name": "x", "until": dt.date(2026, 1, 2)}
    assert decoded(dated, encoded(dated, data)) == data


def test_extra_keys_without_a_hint_are_left_as_they_are():
    assert decoded(anything, '{"name": "x", "since": "2026-01-02"}') == {"name": "x", "since": "2026-01-02"}


def test_an_unpacked_mapping_gives_each_key_its_own_hint():
    assert decoded(unpacked, '{"name": "x", "since": "2026-01-02"}') == {
        "name": "x",
        "since": dt.date(2026, 1, 2),
    }
    for bad, told in (
        ('{"name": "x"}', r"\$\.since is missing"),
        ('{"name": "x", "since": "2026-01-02", "limit": "many"}', r"\$\.limit must be int"),
        ('{"name": "x", "since": "2026-01-02", "limits": 1}', "did you mean 'limit'"),
    ):
        with pytest.raises(DataInvalid, match=told):
            decoded(unpacked, bad)


def by_position(to, /): ...
def any_number(*to: int): ...
def no_json(to: complex): ...
def no_json_keys(**to: complex): ...
def two_texts(to: dt.date | str): ...
def fails_to_resolve(to: 1 / 0): ...


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (by_position, "takes 'to' by position"),
        (any_number, r"takes '\*to' by position"),
        (no_json, "'to' has the hint complex, which cannot be read from JSON: complex is no JSON type"),
        (no_json_keys, "'to' has the hint complex"),
        (two_texts, "'to' has the hint .* cannot be read from JSON"),
        (fails_to_resolve, "cannot be resolved: division by zero"),
    ],
)
def test_a_signature_that_no_data_can_fill_is_refused(function, told):
    with pytest.raises(TaskDefinitionError, match=told):
        Signature.of(function, skip_self=False, owner="mail")


def test_extra_keys_reach_the_body_by_their_hint(make_app):
    app = make_app(
        """
        import datetime
        from bgsupervisor import task

        @task
        def ages(**born: datetime.date) -> list[str]:
            return [type(one).__name__ for one in born.values()]
        """
    )
    app.start()
    handle = app.service.request("appx:ages", {"jana": "2001-02-03"})
    assert app.wait(handle).status == "DONE"
    assert app.service.result(handle) == ["date"]
