"""One word for each thing: those that the glossary has replaced stay away from code, tests and pages."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PLACES = ("bgsupervisor", "tests", "docs", "examples", "bench", "README.md", "CONTRIBUTING.md")

REPLACED = {
    r"nurser(y|ies)": "fork server",
    r"wards?": "child handle",
    r"ears|reception": "event sources",
    r"boards?": "wait manager",
    r"bells?|rung": "wake-up",
    r"circles|needs_of": "cycle in the wait-for graph",
    r"borrowed|lending": "external connection",
    r"begotten": "child",
    r"tombstones?": "released lock",
    r"wish|wishes": "control request",
    r"unbegun": "not started",
    r"never_told": "undelivered",
}
"""The old words, as patterns of whole words, and what stands for them now. `Deadlock.circle` is public, and stays."""


def pages():
    for place in PLACES:
        path = REPOSITORY / place
        yield from (
            [path]
            if path.is_file()
            else (one for kind in ("*.py", "*.md") for one in path.rglob(kind) if one != Path(__file__))
        )


@pytest.mark.parametrize("pattern", REPLACED)
def test_a_replaced_word_stands_nowhere(pattern):
    word = re.compile(rf"(?<![a-z])({pattern})(?![a-z])", re.IGNORECASE)
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in pages()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if word.search(line)
    ]
    assert not found, f"say {REPLACED[pattern]}"


def test_the_pages_are_read():
    assert len(list(pages())) > 200
