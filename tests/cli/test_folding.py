"""Frames of libraries are folded wherever people see a traceback or a stack; what is stored stays whole."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from support.app import wait_until

import bgsupervisor
from bgsupervisor.cli.display.traces import folded
from bgsupervisor.config import Config

CONFIG = Config(base_dir=Path("/srv/app"), tasks=("shop.tasks",), python_path=("/opt/lib/python3/ours",))
STANDARD = sysconfig.get_path("stdlib")
OURS = Path(bgsupervisor.__file__).parent


def frame(path, name="f", *, margin="  ", source="x()"):
    return f'{margin}File "{path}", line 3, in {name}\n{margin}  {source}\n{margin}  ^^^\n'


APP = frame("/srv/app/myapp/tasks.py")
ALCHEMY = frame("/srv/app/venv/lib/python3.11/site-packages/sqlalchemy/engine/base.py")
DRIVER = frame("/usr/lib/python3/dist-packages/psycopg/cursor.py")
JSON = frame(f"{STANDARD}/json/decoder.py")
HEAD = "Traceback (most recent call last):\n"


def test_runs_of_library_frames_become_one_line_and_the_last_frame_stays():
    text = HEAD + frame(f"{OURS}/child.py") + APP + ALCHEMY * 6 + DRIVER + APP + JSON * 2 + "ValueError: no\n  way\n"

    assert folded(text, CONFIG) == (
        f"{HEAD}  ... 1 frame in bgsupervisor ...\n{APP}"
        f"  ... 7 frames in site-packages/sqlalchemy, site-packages/psycopg ...\n{APP}"
        f"  ... 1 frame in Python's library ...\n{JSON}ValueError: no\n  way"
    )


@pytest.mark.parametrize(
    ("path", "is_own"),
    [
        ("/srv/app/tasks.py", True),
        ("/opt/lib/python3/ours/tasks.py", True),
        ("/elsewhere/checkout/shared.py", True),
        ("/srv/venv/lib/python3.11/site-packages/shop/tasks.py", True),
        ("<string>", True),
        ("/srv/venv/lib/python3.11/site-packages/shopping/tasks.py", False),
        ("/srv/venv/lib/python3.11/site-packages/six.py", False),
        ("/usr/lib/python3.12/json/decoder.py", False),
        ("<frozen importlib._bootstrap>", False),
        (f"{OURS}/forkserver.py", False),
    ],
)
def test_frame_is_the_applications_by_where_its_file_lies(path, is_own):
    text = frame(path) + APP
    assert (folded(text, CONFIG) == text.rstrip("\n")) is is_own


@pytest.mark.parametrize("error", ["ModuleNotFoundError: No module named 'x'", "SyntaxError: '(' was never closed"])
def test_innermost_frame_of_the_import_machinery_is_folded_too(error):
    text = HEAD + APP + frame(f"{STANDARD}/importlib/__init__.py") + frame("<frozen importlib._bootstrap>") * 2 + error

    assert folded(text, CONFIG) == f"{HEAD}{APP}  ... 3 frames in Python's library ...\n{error}"


def test_stack_of_python_313_is_folded_over_the_entry_of_a_constructor():
    library, app = f'  File "{STANDARD}/a.py", line 1 in f', '  File "/srv/app/tasks.py", line 2 in run'
    text = f'{app}\n{library}\n  File "__init__", line ??? in __init__\n{library}'

    assert folded(text, CONFIG).splitlines() == [app, "  ... 3 frames in Python's library ..."]


def test_chained_exceptions_are_folded_one_by_one():
    between = "KeyError: 1\n\nDuring handling of the above exception, another exception occurred:\n\n"
    text = HEAD + ALCHEMY + DRIVER + between + HEAD + APP + ALCHEMY * 2 + "ValueError"
    assert folded(text, CONFIG) == (
        f"{HEAD}  ... 1 frame in site-packages/sqlalchemy ...\n{DRIVER}{between}"
        f"{HEAD}{APP}  ... 1 frame in site-packages/sqlalchemy ...\n{ALCHEMY}ValueError"
    )


def test_real_exception_group_keeps_all_its_exceptions(tmp_path):
    library = tmp_path / "lib" / "python3.11" / "site-packages" / "deep"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("def call(f, n=3):\n    return call(f, n - 1) if n else f()\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import deep
            def one(): raise KeyError("one")
            def two():
                try: deep.call(one)
                except KeyError as error: raise ValueError("two\\n  File of its own") from error
            def both():
                found = []
                for call in (one, two):
                    try: deep.call(call)
                    except Exception as error: found.append(error)
                raise ExceptionGroup("both", found)
            deep.call(both)
        """)
    )
    environment = {"PYTHONPATH": str(library.parent)}
    text = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False).stderr
    shown = folded(text, Config(base_dir=tmp_path))

    assert text.count("deep/__init__.py") + text.count("[Previous line repeated 1 more time]") == 16
    assert "deep/__init__.py" not in shown
    assert shown.count("... 4 frames in site-packages/deep ...") == 4
    of_libraries = ("site-packages/deep", "call(f, n - 1)", "[Previous", "^^^")
    kept = [line for line in text.splitlines() if not any(one in line for one in of_libraries)]
    assert [line for line in shown.splitlines() if "frames in" not in line and "^^^" not in line] == kept


def test_recursion_counts_as_the_frames_it_stands_for():
    repeated = "  [Previous line repeated 967 more times]\n"
    assert folded(HEAD + ALCHEMY + repeated + APP + "RecursionError", CONFIG) == (
        f"{HEAD}  ... 968 frames in site-packages/sqlalchemy ...\n{APP}RecursionError"
    )
    assert repeated in folded(HEAD + APP + repeated + "RecursionError", CONFIG)


def test_stack_of_faulthandler_keeps_its_first_frame():
    lines = [
        "Thread 0x1 (most recent call first):",
        f'  File "{STANDARD}/threading.py", line 1 in wait',
        f'  File "{STANDARD}/threading.py", line 2 in join',
        '  File "/srv/app/tasks.py", line 3 in run',
        f'  File "{OURS}/child.py", line 4 in main',
        f'  File "{OURS}/forkserver.py", line 5 in main',
        '  File "<string>", line 1 in <module>',
        "",
        "Thread 0x2 (most recent call first):",
        f'  File "{OURS}/link.py", line 6 in run',
    ]
    kept = [
        *lines[:2],
        "  ... 1 frame in Python's library ...",
        lines[3],
        "  ... 3 frames in bgsupervisor, Python's library ...",
    ]
    assert folded("\n".join(lines), CONFIG).splitlines() == [*kept, *lines[7:]]


def test_more_than_three_libraries_are_counted():
    some = "".join(frame(f"/v/lib/python3.11/site-packages/{name}/x.py") for name in "abcde")
    words = "site-packages/a, site-packages/b, site-packages/c and 2 more"
    assert folded(some + APP, CONFIG) == f"  ... 5 frames in {words} ...\n{APP}".rstrip()


@pytest.mark.parametrize(
    "text", ["", "no traceback\n  at all", '  File "x.py", line 1\n    a b\n      ^\nSyntaxError: no']
)
def test_text_without_frames_stays_as_it_is(text):
    assert folded(text, CONFIG) == text


# ---- where people see it ----

SOURCE = """
import json, time
from bgsupervisor import Task, task

@task
def fails(text: str):
    return json.loads(text)

class Late(Task):
    timeout_s = 0.5
    def run(self):
        time.sleep(60)
"""


def test_show_and_request_fold_and_full_and_json_do_not(make_app):
    app = make_app(SOURCE)
    app.start()
    done = app.cli("request", "appx:fails", '{"text": "{"}', "--wait")
    shown, full = app.cli("show", "1").stdout, app.cli("show", "1", "--full").stdout

    assert done.returncode == 1
    for text in (shown, done.stderr):
        assert "frame in bgsupervisor ..." in text
        assert "... 2 frames in Python's library ..." in text
        assert "return json.loads(text)" in text
        assert "body.py" not in text
    assert "error (frames of libraries are folded, --full shows them):\n" in shown
    assert done.stderr.splitlines()[-1].startswith("bgsupervisor: task 1 was interrupted: RAISED: json.decoder")
    assert "error:\n" in full
    for text in (full, app.service.get(1).error, json.loads(app.cli("show", "1", "--json").stdout)["error"]):
        assert "body.py" in text
        assert text.count("json/") == 3


def test_stack_folds_and_full_does_not(make_app):
    app = make_app(SOURCE.replace("0.5", "60"))
    app.start()
    app.started(app.service.request("appx:Late"))
    wait_until(lambda: "in run" in app.cli("stack", "1").stdout, "it sleeps in its body")

    assert "frames in bgsupervisor" in app.cli("stack", "1").stdout
    full = app.cli("stack", "1", "--full").stdout
    assert "frames in" not in full
    assert "body.py" in full


def test_check_folds_and_full_and_json_do_not(make_app):
    app = make_app("import helper")
    app.write("import json\njson.loads('{')", module="helper")
    shown = app.cli("check").stderr

    assert "helper.py" in shown
    assert "frames in Python's library ..." in shown
    assert "application.py" not in shown
    assert "application.py" in app.cli("check", "--full").stderr
    assert "application.py" in app.cli("check", "--json").stdout
