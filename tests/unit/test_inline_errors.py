"""Errors of bodies that run inline after a commit of the application: all of them reach the test."""

from __future__ import annotations

import sqlite3

import pytest

from bgsupervisor import Service, task


@task
def fail(text: str) -> None:
    raise LookupError(text)


def test_inline_of_several_bodies_that_raise_after_a_commit_raises_all(bgsupervisor, tmp_path):
    service = Service("sqlite:////nowhere/supervised.db")
    connection = sqlite3.connect(tmp_path / "app.db")
    connection.execute("CREATE TABLE orders (id INTEGER)")

    def request_both():
        with bgsupervisor.inline(raise_errors=True):
            for text in ("first", "second"):
                connection.execute("INSERT INTO orders VALUES (1)")
                service.request(fail, {"text": text}, connection=connection)
            connection.commit()

    with pytest.raises(ExceptionGroup) as raised:
        request_both()
    connection.close()

    assert [str(one) for one in raised.value.exceptions] == ["first", "second"]
