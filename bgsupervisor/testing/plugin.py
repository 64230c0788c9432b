"""The pytest plugin: each test has its own box, and what happens outside tests reaches no supervisor either."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bgsupervisor.testing.box import TaskBox
from bgsupervisor.testing.isolation import in_use, isolate, isolation_off, switch_off

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

__all__: list[str] = []

ISOLATION = "bgsupervisor_isolation"
"""The name of the ini option and of the marker."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini option."""
    sentence = (
        "on: every test has its own bgsupervisor database, and no supervisor hears of it (default); off: none has"
    )
    parser.addini(ISOLATION, sentence, type="bool", default=True)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Isolate what happens outside tests too: imports, also those of conftest.py, and fixtures of wider scopes."""
    if early_config.getini(ISOLATION):
        isolate(test_cases=False)
    else:
        switch_off()
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers", f'{ISOLATION}(state): "on" or "off", for this test, whatever the ini option says'
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked "off" reach the real database, with all of its fixtures."""
    marker = item.get_closest_marker(ISOLATION)
    if marker is None or marker.args != ("off",):
        return (yield)
    with isolation_off():
        return (yield)


@pytest.fixture(autouse=True)
def _bgsupervisor_isolation(request: pytest.FixtureRequest) -> None:
    """Isolate every test, unless the ini option or a marker says otherwise."""
    marker = request.node.get_closest_marker(ISOLATION)
    if marker is not None and marker.args not in (("on",), ("off",)):
        pytest.fail(f'the marker {ISOLATION} takes "on" or "off"; it was given {marker.args!r}')
    if marker.args == ("on",) if marker else request.config.getini(ISOLATION):
        request.getfixturevalue("bgsupervisor")


@pytest.fixture
def bgsupervisor() -> Iterator[TaskBox]:
    """The tasks of this test; a test that asks for it is isolated in any case."""
    with in_use(TaskBox()) as box:
        yield box
        box._raise_errors()  # noqa: SLF001 - the box is ours
