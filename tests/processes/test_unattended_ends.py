"""What the next supervisor's log says about tasks that ended while no supervisor was running."""

import sys

import pytest

from bgsupervisor.ipc.lock import Lock
from bgsupervisor.supervisor import loop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

SOURCE = """
    import pathlib, time
    from bgsupervisor import task

    @task
    def until(name: str) -> None:
        while not pathlib.Path(name).exists():
            time.sleep(0.01)

    @task
    def fails(name: str) -> None:
        until(name)
        raise LookupError("of its own")

    @task
    def quick() -> None:
        pass
"""
SENTENCE = "while no supervisor was running"


def told(supervising):
    return [line.partition(" INFO ")[2] for line in supervising.log.splitlines() if SENTENCE in line]


@pytest.mark.on_both
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_log_of_the_next_supervisor_names_what_ended_meanwhile(make_app, how):
    app = make_app(SOURCE)
    old = app.start()
    attended = app.service.request("appx:quick")
    app.wait(attended)
    done, failed = (
        app.service.request("appx:until", {"name": "end"}),
        app.service.request("appx:fails", {"name": "end"}),
    )
    for handle in (done, failed):
        app.started(handle)
    getattr(old, how)()
    waiting = app.service.request("appx:quick", delay_s=3600)
    app.service.cancel(waiting)  # it never ran, so no process of this host has ended
    (app.folder / "end").touch()
    app.wait(done)
    app.wait(failed)

    new = app.start()

    expected = {
        f"task {done.id} (appx:until) ended DONE {SENTENCE}",
        f"task {failed.id} (appx:fails) ended INTERRUPTED, RAISED: LookupError: of its own {SENTENCE}",
    }
    assert set(told(new)) == expected
    assert len(told(new)) == 2
    new.stop()
    app.start()
    assert len(told(new)) == 2, "the one after that has nothing new to say"


def test_log_of_many_unattended_ends_is_bounded(make_app):
    app = make_app(SOURCE, slots=4, spares=0)
    old = app.start()
    handles = [app.service.request("appx:until", {"name": "end"}) for _ in range(4)]
    for handle in handles:
        app.started(handle)
    old.kill()
    (app.folder / "end").touch()
    for handle in handles:
        app.wait(handle)
    folder = app.folder / "bounded"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from bgsupervisor.supervisor import loop as supervisor\nsupervisor.UNATTENDED_SHOWN = 3\n"
    )

    new = app.start(environment={"PYTHONPATH": str(folder)})

    assert loop.UNATTENDED_SHOWN == 20
    assert len(told(new)) == 3
    assert "so did 1 others; `bgsupervisor ps --all` lists them" in new.log


def test_lock_that_was_never_held_was_unattended_for_no_time(tmp_path):
    first = Lock(tmp_path / "lock")
    before = first.unattended_since
    assert first.acquire()
    assert first.unattended_since > before - 1
    first.close()
