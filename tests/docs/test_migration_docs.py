"""docs/migrations.md is run: real Alembic and Django beside our tables, on both databases."""

from __future__ import annotations

import contextlib
import re
import shlex
import sqlite3
import sys
from pathlib import Path

import psycopg
import pytest
from support.pages import BLOCK, FILE_NAME, Following

from bgsupervisor import Service

PAGE = Path(__file__).parents[2] / "docs" / "migrations.md"
ALEMBIC, SCHEMA, UPGRADE = "Beside Alembic", "A schema of its own", "After an upgrade"


def blocks_of(title):
    return BLOCK.findall(PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0])


def commands_of(title):
    told = "\n".join(text for language, text in blocks_of(title) if language == "console")
    return [tuple(part.strip("\n").partition("\n")[::2]) for part in re.split(r"^\$ ", told, flags=re.MULTILINE)[1:]]


@pytest.fixture
def app(tmp_path):
    app = Following(tmp_path / "app")
    yield app
    app.end()


def with_our_tables(app, url):
    app.config.write_text(f'database = "{url}"\n')
    app.service.request("appx:any")


def ask(url, query):
    """Return the rows of a query by another connection, without the product."""
    driver, address = (sqlite3, url.removeprefix("sqlite:///")) if url.startswith("sqlite") else (psycopg, url)
    with contextlib.closing(driver.connect(address)) as connection:
        cursor = connection.execute(query)
        rows = [] if cursor.description is None else cursor.fetchall()
        connection.commit()
        return rows


def run(app, command):
    done = app.shell(command)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def follow(app, title):
    for command, told in commands_of(title):
        said = run(app, command)
        assert told in said, command


def test_every_block_of_the_page_is_run():
    assert set(re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)) == {UPGRADE, ALEMBIC, SCHEMA, "Beside Django"}
    for title in (UPGRADE, ALEMBIC, SCHEMA):
        for language, text in blocks_of(title):
            assert language == "console" or FILE_NAME.match(text), text
    assert blocks_of("Beside Django") == []


def test_the_tables_are_brought_to_this_version_as_the_page_says(app, url):
    app.config.write_text(f'database = "{url}"\n')
    follow(app, UPGRADE)


# ---- Alembic ----


def begin_alembic(app, url):
    """Have a project as `alembic init` makes it, with the page's files."""
    pytest.importorskip("alembic", reason="Alembic is not installed; the extra `dev` has it")
    run(app, "alembic init alembic")
    ini = app.folder / "alembic.ini"
    address = url.replace("postgresql://", "postgresql+psycopg://").replace("%", "%%")
    text, found = re.subn(
        "^sqlalchemy.url = .*$", lambda _: f"sqlalchemy.url = {address}", ini.read_text(), flags=re.MULTILINE
    )
    assert found == 1
    ini.write_text(text)
    for _, block in blocks_of(ALEMBIC):
        if name := FILE_NAME.match(block):
            (app.folder / name[1]).write_text(block)


def proposed(app):
    """Return what Alembic would do of itself, as the text of its newest revision."""
    newest = max((app.folder / "alembic" / "versions").glob("*.py"), key=lambda path: path.stat().st_mtime_ns)
    return newest.read_text()


def test_alembic_keeps_its_hands_off_our_tables(app, url):
    with_our_tables(app, url)
    begin_alembic(app, url)
    follow(app, ALEMBIC)
    assert "op.create_table('invoice'" in proposed(app)
    assert "bgsupervisor" not in proposed(app)
    assert run(app, "bgsupervisor migrate --check").startswith("up to date")
    assert len(app.service.list()) == 1


def test_without_the_hook_alembic_would_drop_our_tables(app, url):
    with_our_tables(app, url)
    begin_alembic(app, url)
    env = app.folder / "alembic" / "env.py"
    env.write_text(env.read_text().replace(", include_name=include_name", ""))
    run(app, commands_of(ALEMBIC)[0][0])
    assert "op.drop_table('bgsupervisor_task')" in proposed(app)


def test_an_include_object_as_the_page_has_it_does_the_same(app, url):
    (condition,) = re.findall(r"`(type_ == .*? and reflected and .*?)`", PAGE.read_text())
    with_our_tables(app, url)
    begin_alembic(app, url)
    env = app.folder / "alembic" / "env.py"
    hook = f"include_object=lambda object_, name, type_, reflected, compare_to: not ({condition})"
    env.write_text(env.read_text().replace("include_name=include_name", hook))
    follow(app, ALEMBIC)
    assert "bgsupervisor" not in proposed(app)


def test_alembic_does_not_look_into_a_schema_of_our_own(app, postgres, postgres_url):
    ((_, block),) = blocks_of(SCHEMA)
    query = re.search(r"\?options=\S+(?=\")", block)[0]
    name = postgres_url.rpartition("/")[2]
    (make_it,) = re.findall("`(CREATE SCHEMA .*?)`", PAGE.read_text())
    postgres.execute(make_it, database=name)
    with_our_tables(app, postgres_url + query)
    begin_alembic(app, postgres_url)
    env = app.folder / "alembic" / "env.py"
    env.write_text(env.read_text().replace(", include_name=include_name", ""))
    follow(app, ALEMBIC)
    assert "bgsupervisor" not in proposed(app)
    assert run(app, "bgsupervisor migrate --check").startswith("up to date")
    found = ask(postgres_url, "SELECT schemaname FROM pg_tables WHERE tablename LIKE 'bgsupervisor%'")
    assert set(found) == {("jobs",)}
    public = Service(postgres_url)  # another installation, which sees nothing of that one
    assert public.list() == []
    public.close()


# ---- Django ----

MODELS = """
from django.db import models

class Order(models.Model):
    customer = models.CharField(max_length=100)
"""
TESTS = """
from django.db import connection
from django.test import TestCase

class Tables(TestCase):
    def test_of_ours_there_are_none(self):
        names = connection.introspection.table_names()
        self.assertIn("orders_order", names)
        self.assertEqual([name for name in names if name.startswith("bgsupervisor")], [])
"""


def begin_django(app, url):
    """Have a project as Django's own commands make it, on the database *url*."""
    pytest.importorskip("django", reason="Django is not installed; the extra `dev` has it")
    if url.startswith("sqlite"):
        database = {"ENGINE": "django.db.backends.sqlite3", "NAME": url.removeprefix("sqlite:///")}
    else:
        known = psycopg.conninfo.conninfo_to_dict(url)
        database = {"ENGINE": "django.db.backends.postgresql"}
        for ours, theirs in (("dbname", "NAME"), ("user", "USER"), ("password", "PASSWORD"), ("host", "HOST")):
            database[theirs] = known[ours]
        database["PORT"] = known["port"]
    run(app, "django-admin startproject mysite . && django-admin startapp orders")
    settings = app.folder / "mysite" / "settings.py"
    text = settings.read_text().replace("INSTALLED_APPS = [", 'INSTALLED_APPS = [\n    "orders",')
    settings.write_text(f"{text}\nDATABASES = {{'default': {database!r}}}\n")
    (app.folder / "orders" / "models.py").write_text(MODELS)
    (app.folder / "orders" / "tests.py").write_text(TESTS)


def manage(app, command):
    return run(app, f"{shlex.quote(sys.executable)} manage.py {command}")


def test_django_does_not_see_our_tables_and_inspectdb_does_unless_tables_are_named(app, url):
    with_our_tables(app, url)
    begin_django(app, url)
    assert "Create model Order" in manage(app, "makemigrations orders")
    manage(app, "migrate")
    assert "No changes detected" in manage(app, "makemigrations --check --dry-run")
    assert "\nOK\n" in manage(app, "test --no-input")  # in a database without our tables

    ask(url, "INSERT INTO orders_order (customer) VALUES ('Ada')")
    manage(app, "flush --no-input")
    assert ask(url, "SELECT COUNT(*) FROM orders_order") == [(0,)]
    assert len(app.service.list()) == 1
    assert run(app, "bgsupervisor migrate --check").startswith("up to date")

    (command,) = re.findall(r"`manage\.py (inspectdb .*?)`", PAGE.read_text())
    named = manage(app, command)
    assert "class OrdersOrder(" in named
    assert "bgsupervisor" not in named.lower()
    assert "class BgsupervisorHold(" in manage(app, "inspectdb")
