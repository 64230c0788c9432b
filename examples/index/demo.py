"""The demo: a supervisor, two dozen tasks that index Python files, one that is killed, one that raises, one that waits.

    make demo                  index the standard library of the Python that runs this
    DEMO=folder make demo      index another folder

Leaves nothing running, whatever happens; exits with 0 only if everything ended as it should. The database stays in
.demo for a look afterwards, and is made anew by the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from leaving import end_all, identities, identity, known_processes
from plan import Group, NothingToIndex, groups_of, plan
from tasks import COLUMNS, CheckDigests, IndexPackage, Report

from bgsupervisor import BgSupervisorError, Reason, Service, Status
from bgsupervisor.system import process_tree, processes
from bgsupervisor.system.processes import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bgsupervisor import Handle, TaskRecord

HERE = Path(__file__).absolute().parent
CONFIG = HERE / "bgsupervisor.toml"
WORK = HERE.parent.parent / ".demo"
LOCK_NAME = "demo.lock"

BEGIN_S = 20.0
"""A requested task must run within this time, on the slowest machine."""
KILL_SEEN_S = 5.0
LEAVE_S = 10.0
PROBLEM_LINES = 20
TURNS_EVERY = 6
"""One package of so many takes turns with others for a permit."""
UNFINISHED = "unfinished.py"
VICTIM = CheckDigests.__name__

BROKEN = '''\
"""A file that is not written to its end yet."""

def total(prices:
    return sum(prices)
'''


class DemoFailed(Exception):
    """Something was not as it should be; the message says what."""


# ---- what people see ----


def _speaker() -> Callable[[str, str], None]:
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console  # noqa: PLC0415 - only a terminal needs it

            console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
            return lambda text, style: console.print(text, style=style or None)
    return lambda text, _: print(text, flush=True)


_speak = _speaker()


def say(text: str = "", style: str = "") -> None:
    """Print a line, coloured where that is possible."""
    _speak(text, style)


def chapter(text: str) -> None:
    """Print a line that begins something new."""
    say()
    say(text, "bold")


def command(*arguments: str) -> list[str]:
    """Return what runs one command of the command line."""
    return [sys.executable, "-m", "bgsupervisor", "--config", str(CONFIG), *arguments]


def show(*arguments: str) -> None:
    """Run one command of the command line as a person would, with what it prints."""
    say()
    say(f"$ bgsupervisor {' '.join(arguments)}", "bold cyan")
    sys.stdout.flush()
    done = subprocess.run(
        command(*arguments), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, timeout=30, check=False
    )
    if done.returncode:
        raise DemoFailed(f"`bgsupervisor {' '.join(arguments)}` left with {done.returncode}")


def short(path: Path) -> str:
    """Return a path as one would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# ---- the supervisor and what it starts ----


class Demo:
    """One run of the demo in a folder of its own."""

    def __init__(self, root: Path, groups: list[Group], work: Path) -> None:
        self.root = root
        self.groups = groups
        self.work = work
        self.service = Service(config=CONFIG)
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.index: dict[int, Group] = {}
        self.passes, self.expected_s = plan(root, groups)

    def run(self, what: str) -> None:
        """Run the demo once; raises DemoFailed if anything goes another way."""
        size_mib = sum(group.size_bytes for group in self.groups) / 2**20
        files = sum(group.files for group in self.groups)
        tasks = "1 background task indexes" if len(self.groups) == 1 else f"{len(self.groups)} background tasks index"
        say(f"{tasks} {what}: {files:,} files, {size_mib:.1f} MiB.", "bold")
        say("Besides, one task is killed from outside, and one raises an error. Watch what becomes of each.")
        say("Another one waits for them all, for what each has scanned and for its end, and reports.")
        say(
            f"(Each file is parsed {self.passes} times and the fastest counts, so that there is something to watch: "
            f"about {self.expected_s + 5:.0f} s. A name as a..b means the small packages from a to b.)"
        )
        self._start()
        broken, victim, report = self._request()
        began_s = time.perf_counter()
        self._await(lambda: self._known(victim).progress_done is not None, BEGIN_S, "the first tasks run")
        self._pause_until(began_s + 2)
        show("ps", "--tree")
        self._pause_until(began_s + 0.4 * self.expected_s)
        self._kill(victim)
        self._pause_until(began_s + 0.7 * self.expected_s)
        if self._indexing():
            show("ps", "--tree")
        limit_s = 60 + 3 * self.expected_s
        self._await(lambda: not self._indexing(), limit_s, "all packages are indexed", every_s=0.2)
        self._await(lambda: self._known(report).ended, BEGIN_S, "the report is there")
        chapter("Everything has ended. The index, as the task says that waited for all others:")
        self._show_index(report)
        chapter("And what became of every task:")
        show("ps", "--all")
        self._check(broken, victim, report)
        left = self.end()
        if left:
            raise DemoFailed(f"these were still there {LEAVE_S:g} s after the supervisor was asked to leave: {left}")
        say()
        say(f"Supervisor, fork server and all {len(self.index) + 3} children have left, as PIDs and start times show.")
        self._tell_what_to_try(broken)

    def _start(self) -> None:
        errors = (self.work / "run.err").open("wb")
        with errors:
            # A session of its own: Ctrl-C in this terminal is for the demo, which then ends the supervisor in order.
            self.supervisor = subprocess.Popen(
                command("run"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        chapter(f"The supervisor is started in the background: `bgsupervisor run`, PID {self.supervisor.pid}.")

    def _request(self) -> tuple[Handle, Handle, Handle]:
        """Request all tasks one by one, as the requests of a web application would.

        Returns the one that raises, the one that will be killed, and the one that waits for all others.
        """
        times_ms = []

        def request(*arguments: object, key: str | None, priority: int = 0) -> Handle:
            began_s = time.perf_counter()
            handle = self.service.request(*arguments, key=key, priority=priority)  # type: ignore[arg-type]
            times_ms.append((time.perf_counter() - began_s) * 1000)
            return handle

        self.service.counts()  # opens the database, which an application has done long ago
        (self.work / UNFINISHED).write_text(BROKEN)
        unfinished = {"root": str(self.work), "names": [UNFINISHED], "skip_broken": False}
        broken = request(IndexPackage, unfinished, key=UNFINISHED)
        victim = request(CheckDigests, {"root": str(self.root), "names": self.groups[0].names}, key=self.groups[0].name)
        for number, group in enumerate(self.groups):
            turns = number % TURNS_EVERY == 1
            data = {"root": str(self.root), "names": group.names, "passes": self.passes, "takes_turns": turns}
            self.index[request(IndexPackage, data, key=group.name).id] = group
        sad = [(UNFINISHED, broken.id), (VICTIM, victim.id)]
        packages = [*sad, *((group.name, id) for id, group in self.index.items())]
        report = request(Report, {"packages": packages}, key=None, priority=1)  # it gives its slot to the others
        say(
            f"{len(times_ms)} requests made; each returned within {statistics.median(times_ms):.1f} ms "
            f"(median; the slowest {max(times_ms):.1f} ms), and is safe on the disk since then."
        )
        return broken, victim, report

    def _kill(self, victim: Handle) -> None:
        record = self._known(victim)
        found, process = processes.open_process(identity(record))
        if record.status is not Status.START or found is not Verdict.ALIVE or process is None:
            raise DemoFailed(f"task {victim.id} should be running; it is {record.status}, its process {found}")
        chapter(
            f"Now task {record.id} ({CheckDigests.__name__}) is killed from outside: kill -9 {record.pid}. "
            "A crash or the kernel's OOM killer does the same."
        )
        with process:
            process.send_signal(signal.SIGKILL)  # what `kill -9` sends; to this process and never to a later one
        began_s = time.perf_counter()
        record = self.service.wait(victim, timeout_s=KILL_SEEN_S)
        seen_ms = (time.perf_counter() - began_s) * 1000
        say(f"Within {seen_ms:.0f} ms its row said {record.status} ({record.reason}): {record.detail}.")

    def _show_index(self, report: Handle) -> None:
        totals = self.service.result(report)
        rows = sorted(totals["packages"].items(), key=lambda row: -row[1]["lines"])
        columns = [column for column in COLUMNS if column not in ("broken", "parse_s")]
        wide = max(len(name) for name in [*totals["packages"], "PACKAGE"])

        def line(name: str, values: dict[str, float], digest: str) -> str:
            counts = "".join(f"{values[column]:>11,}" for column in columns)
            return f"{name:<{wide}}{counts}{values['parse_s'] * 1000:>8,.0f} ms  {digest}".rstrip()

        say(
            f"{'PACKAGE':<{wide}}{''.join(f'{column.upper():>11}' for column in columns)}{'PARSED IN':>11}  SHA-256",
            "bold",
        )
        for name, result in rows:
            say(line(name, result, result["digest"][:16]))
        say(line("TOTAL", totals["total"], ""), "bold")
        if broken := totals["total"]["broken"]:
            say(f"({broken} of the files cannot be parsed by this Python; only their lines and bytes are counted.)")
        for sentence in totals["missing"].values():
            say(f"Not in it: {sentence}.")

    def _check(self, broken: Handle, victim: Handle, report: Handle) -> None:
        """Compare all ends with what they should be, and what was indexed with what is there."""
        problems = [
            f"task {id} ({group.name}) ended {ending_of(record)}"
            for id, group in self.index.items()
            if (record := self._known(id)).status is not Status.DONE
        ]
        reported = self.service.result(report)
        for group in self.groups:
            found = reported["packages"].get(group.name, {})
            if (found.get("files"), found.get("bytes")) != (group.files, group.size_bytes):
                problems.append(f"the report lists other files of {group.name} than are there")
        if set(reported["missing"]) != {UNFINISHED, VICTIM}:
            problems.append(f"the report should lack two; it lacks {reported['missing']}")
        record = self._known(broken)
        if record.reason is not Reason.RAISED or "SyntaxError" not in (record.error or ""):
            problems.append(f"task {record.id} should have raised a SyntaxError; it ended {ending_of(record)}")
        record = self._known(victim)
        if record.reason is not Reason.SIGNALLED or record.signal != signal.SIGKILL:
            problems.append(f"task {record.id} should have ended by SIGKILL; it ended {ending_of(record)}")
        if problems:
            raise DemoFailed("\n".join(problems[:PROBLEM_LINES]))

    def _tell_what_to_try(self, broken: Handle) -> None:
        program = short(Path(sys.executable).with_name("bgsupervisor"))
        begin = f"{program} --config {short(CONFIG)}"
        if self.work != WORK:
            begin = f"BGSUPERVISOR_DATABASE={os.environ['BGSUPERVISOR_DATABASE']} {begin}"  # noqa: TID251 - see main
        chapter("What to try next:")
        say(f"  {begin} show {broken.id}     # all about the task that raised")
        say(f"  {begin} ps --json     # for programs")
        say("  DEMO=folder make demo     # index a folder of yours; the tasks are in examples/index/tasks.py")

    # Waiting

    def _known(self, task: Handle | int) -> TaskRecord:
        record = self.service.get(task)
        if record is None:
            raise DemoFailed(f"task {int(task)} is gone")
        return record

    def _indexing(self) -> int:
        counts = self.service.counts(IndexPackage)
        return counts[Status.REQUEST] + counts[Status.START]

    def _await(self, is_so: Callable[[], bool], limit_s: float, sentence: str, *, every_s: float = 0.05) -> None:
        deadline_s = time.perf_counter() + limit_s
        while not is_so():
            if self.supervisor is not None and self.supervisor.poll() is not None:
                raise DemoFailed(f"the supervisor left with {self.supervisor.returncode}: {self._last_words()}")
            if time.perf_counter() > deadline_s:
                raise DemoFailed(f"not so within {limit_s:.0f} s: {sentence}")
            time.sleep(every_s)

    def _last_words(self) -> str:
        for path in (self.work / "run.err", self.service.config.state_dir / "logs/supervisor.log"):
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            if lines:
                return f"{lines[-1]} (the last line of {short(path)})"
        return "and said nothing"

    def _pause_until(self, moment_s: float) -> None:
        """Let time pass, but not longer than there is work."""
        while time.perf_counter() < moment_s and self._indexing():
            time.sleep(0.1)

    # The end

    def end(self, *, abort: bool = False) -> list[int]:
        """Have everything leave that was started; return the PIDs that did not and had to be killed."""
        started = set(known_processes(self.service))
        if self.supervisor is not None and self.supervisor.poll() is None:
            if abort:
                self._cancel_all()
            started.update(identities(process_tree.descendants(self.supervisor.pid)))
            started.update(known_processes(self.service))
            self.supervisor.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.supervisor.wait(LEAVE_S)
            if self.supervisor.poll() is None:
                self.supervisor.kill()
                self.supervisor.wait(LEAVE_S)
        return end_all(started, wait_s=1.0 if abort else LEAVE_S)

    def _cancel_all(self) -> None:
        """Ask for the end of what runs, so that its rows record it; a few seconds, whatever happens."""
        with contextlib.suppress(BgSupervisorError, DemoFailed):
            for status in (Status.REQUEST, Status.START):
                for record in self.service.list(status=status, limit=None):
                    self.service.cancel(record.id, by="demo")
            self._await(
                lambda: not self.service.list(status=Status.START), 2 * self.service.config.grace_s + 2, "all end"
            )


def ending_of(record: TaskRecord) -> str:
    """Return how a task ended, in a few words."""
    return " ".join(str(word) for word in (record.status, record.reason, record.detail) if word)


# ---- the program ----


@contextlib.contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Have the working folder for this run alone, and empty; end what an earlier run that was killed has left."""
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()) and not (work / LOCK_NAME).exists():
        raise DemoFailed(f"{work} is not empty and no earlier demo made it; name another folder")
    with (work / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed(f"another demo runs in {work}; wait for it, or end it") from None
        if (work / "bgsupervisor.db").exists():
            with contextlib.suppress(BgSupervisorError):
                end_all(set(known_processes(Service(config=CONFIG))), wait_s=0)
        for path in work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()
        yield


def interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001 - a signal handler's arguments
    """Take SIGTERM and a closed terminal as Ctrl-C is taken."""
    raise KeyboardInterrupt


def run_demo(root: Path, what: str, leave_out: frozenset[str], work: Path) -> int:
    """Run the demo and return its exit code; nothing runs any more afterwards."""
    with claimed(work):
        demo = Demo(root, groups_of(root, leave_out=leave_out), work)
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            signal.signal(number, interrupt)
        try:
            demo.run(what)
        finally:
            for number in signals:
                signal.signal(number, signal.SIG_IGN)  # what follows takes some seconds at most
            demo.end(abort=True)
    return 0


def main() -> int:
    """Read the arguments, and turn whatever goes wrong into a sentence and an exit code."""
    parser = argparse.ArgumentParser(description="Index Python files in the background, with two accidents.")
    parser.add_argument("folder", nargs="?", help="what to index; the standard library if it is not given")
    parser.add_argument("--work", type=Path, default=WORK, help="where database and logs go; .demo if it is not given")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    for name in [name for name in os.environ if name.startswith("BGSUPERVISOR_")]:  # noqa: TID251 - the demo is its own
        del os.environ[name]  # noqa: TID251 - world, whatever this shell is set up for
    os.environ["BGSUPERVISOR_DATABASE"] = f"sqlite:///{work / 'bgsupervisor.db'}"  # noqa: TID251 - also for subprocesses
    if arguments.folder:
        root, what, leave_out = Path(arguments.folder).absolute(), arguments.folder, frozenset[str]()
    else:
        root, leave_out = Path(sysconfig.get_path("stdlib")), frozenset({"test"})
        what = f"the standard library of Python {platform.python_version()}, without its tests"
    try:
        return run_demo(root, what, leave_out, work)
    except (DemoFailed, NothingToIndex, BgSupervisorError, OSError, subprocess.TimeoutExpired) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was interrupted; nothing of it runs any more.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
