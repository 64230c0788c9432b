"""The context of a body: progress, parts, waits, locks and requests; knows no database and no process."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
import threading
from collections.abc import Sized
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from bgsupervisor.errors import NotInTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Self, TypeAlias

__all__ = ["Context", "Handle", "Lock", "checked_ids", "current", "entered", "is_given_up", "waits_alone"]

T = TypeVar("T")

PERMITS_MAX = 10_000
"""Limit of the permits of one lock."""


@dataclasses.dataclass(frozen=True, slots=True)
class Handle:
    """A requested task: its id, and whether this request created it (False: a live twin holds the unique key)."""

    id: int
    created: bool = True

    def __int__(self) -> int:
        return self.id


if TYPE_CHECKING:
    Awaited: TypeAlias = Handle | int


class Context:
    """The context of a running body; this one serves a body that no supervisor runs.

    Attributes:
        id: The task's number; None outside a supervisor.
        attempt: Which try this is, from 1; 0 outside a supervisor.
        key: The key it was requested with.
    """

    id: int | None = None
    attempt: int = 0
    key: str | None = None

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt should end; the next progress or track raises `Cancelled`."""
        return False

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Report the progress of the body, in any unit: *done* of *total*, and one line of text.

        Cheap (some microseconds) and never blocks. It reaches the row several times a second; calls in between do so
        with the next heartbeat, and the last one with the end. Every call counts as progress (`stall_s`), whatever the
        numbers.

        Raises:
            Cancelled: This attempt should end.
        """

    def track(self, iterable: Iterable[T], total: float | None = None) -> Iterator[T]:
        """Yield the items, reporting the progress after each; *total* is asked of `len` if it is not given.

        Raises:
            Cancelled: This attempt should end.
        """
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self.progress(0, total)
        for count, item in enumerate(iterable, start=1):
            yield item
            self.progress(count, total)

    def reach(self, part: str, value: object = None) -> None:
        """Record a named part of this task, durably, with a JSON value, and wake the tasks that wait for it.

        Again overwrites the value. Parts are cleared when the task is retried. Blocks for one commit.

        Raises:
            Cancelled: This attempt should end.
            DataInvalid, DataTooLarge: The value is not JSON, or too large.
        """

    def wait_for(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - whatever the other task has given
        """Wait until another task has reached a part, or has ended DONE; return the part's value, or the result.

        Returns at once if that has happened, also long ago. The other may run, wait, or not have started. Meanwhile
        this body's slot is given to others; it takes one again, ahead of any new task, before it continues.

        Args:
            task: A handle or an id, or several: then a list of values in their order.
            part: Which part; None waits for the end.
            timeout_s: How long at most; None is no limit but the other's end.
            return_interrupted: With several tasks, put the PartNotReached of one that was interrupted in its place
                instead of raising the first.

        Raises:
            PartNotReached: The other has ended without reaching it, or was interrupted where its end was awaited.
            Deadlock: This wait would have closed a cycle.
            WaitTimeout, UnknownTask, Cancelled.
            NotInTask: No supervisor runs this body.
        """
        raise NotInTask("wait_for makes sense only in a body that a supervisor runs")

    async def wait_for_async(
        self,
        task: Awaited | Sequence[Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - as wait_for
        """Wait like `wait_for`, while the body's event loop runs."""
        wait = functools.partial(self.wait_for, task, part, timeout_s, return_interrupted=return_interrupted)
        return await _in_thread(wait)

    def lock(self, name: str, permits: int = 1, timeout_s: float | None = None) -> Lock:
        """Return a context manager that holds one of *permits* places of a lock; first come, first served.

        Works with `with` and `async with`; what it gives has `abandoned_by`, the task that died with this permit
        before, if one did. A holder that dies frees its permit in the transaction that records its end.

        Raises (when entered):
            LockHeld: This attempt holds it already.
            Deadlock, WaitTimeout, Cancelled, NotInTask: As `wait_for`.
        """
        return Lock(self, name, permits, timeout_s)

    def barrier(self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until *parties* tasks have arrived here; then all continue, and the barrier can be used again.

        Args:
            name: Of the barrier, within its scope.
            parties: How many continue together; a retried task counts once.
            scope: Whose barrier it is; None is the task that requested this one and its siblings.
            timeout_s: How long at most.

        Raises:
            BarrierBroken: Another participant died while it waited here, or not enough can come any more; says why.
            ValueError: No scope, and no task requested this one; or the others have named another number of parties.
            WaitTimeout, Cancelled, NotInTask: As `wait_for`.
        """
        raise NotInTask("barrier makes sense only in a body that a supervisor runs")

    async def barrier_async(
        self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Wait like `barrier`, while the body's event loop runs."""
        await _in_thread(functools.partial(self.barrier, name, parties, scope=scope, timeout_s=timeout_s))

    def request(self, task: Any, data: Mapping[str, object] | None = None, **options: Any) -> Handle:  # noqa: ANN401 - those of Service.request
        """Request another task, with this one as its parent; arguments and errors as `Service.request`.

        Raises:
            NotInTask: No supervisor runs this body.
        """
        raise NotInTask("request makes sense only in a body that a supervisor runs; use a Service elsewhere")

    def _acquire(self, name: str, permits: int, timeout_s: float | None) -> int | None:
        raise NotInTask("lock makes sense only in a body that a supervisor runs")

    def _release(self, name: str) -> None:
        raise NotInTask("lock makes sense only in a body that a supervisor runs")

    def _rouse(self) -> None:
        """Wake the threads that wait for this body, so that they check whether they still should."""


class Lock:
    """A place in a lock, held while the `with` block runs.

    Attributes:
        abandoned_by: The task that died while it held this permit, if that is why it was free.
    """

    def __init__(self, context: Context, name: str, permits: int, timeout_s: float | None) -> None:
        if isinstance(permits, bool) or not isinstance(permits, int) or not 0 < permits <= PERMITS_MAX:
            raise ValueError(f"permits is {permits!r}; it must be a whole number from 1 to {PERMITS_MAX}")
        self._context = context
        self._name = name
        self._permits = permits
        self._timeout_s = timeout_s
        self.abandoned_by: int | None = None
        self._held_by: int | None = None

    def __enter__(self) -> Self:
        self.abandoned_by = self._context._acquire(self._name, self._permits, self._timeout_s)  # noqa: SLF001 - its half
        self._held_by = os.getpid()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._held_by != os.getpid():
            return  # a copy that the body has forked leaves the block too; the original still holds the permit
        self._held_by = None
        self._context._release(self._name)  # noqa: SLF001 - as above

    async def __aenter__(self) -> Self:
        try:
            return await _in_thread(self.__enter__)
        except BaseException:
            if self._held_by is not None:  # it came just when the loop gave it up
                self.__exit__()
            raise

    async def __aexit__(self, *raised: object) -> None:
        await _in_thread(self.__exit__)


def checked_ids(awaited: Iterable[object]) -> list[int]:
    """Return the ids of tasks that are named by handles, records or ids.

    Raises:
        ValueError: One of them is something else, as a text or a truth value.
    """
    ids = []
    for one in awaited:
        id = one if isinstance(one, int) else getattr(one, "id", None)
        if isinstance(id, bool) or not isinstance(id, int):
            raise ValueError(f"{one!r} is not a task; give a handle or an id")  # noqa: TRY004 - as all bad arguments
        ids.append(id)
    return ids


class _Beside(NamedTuple):
    """The coroutine of an async wait, as the thread of that wait knows it.

    Attributes:
        given_up: The loop has cancelled the coroutine, as asyncio.timeout does.
        alone: No other coroutine of the loop runs beside it.
    """

    given_up: threading.Event
    alone: bool


_beside: contextvars.ContextVar[_Beside] = contextvars.ContextVar("bgsupervisor_beside")


def is_given_up() -> bool:
    """Return whether the coroutine that this thread waits for was cancelled by its loop."""
    beside = _beside.get(None)
    return beside is not None and beside.given_up.is_set()


def waits_alone() -> bool:
    """Return whether nothing of the body runs beside the wait of this thread: no coroutine and no thread.

    Of a wait in the main thread that is taken for granted: threads that a library has left idle do not count.
    """
    beside = _beside.get(None)
    return threading.current_thread() is threading.main_thread() if beside is None else beside.alone


async def _in_thread(call: Callable[[], T]) -> T:
    """Call what blocks in a thread of its own; a coroutine that is cancelled waits for the thread's end.

    Not in one of the loop's own pool: that has few, and a lock holder needs one to release it.
    """
    import asyncio  # noqa: PLC0415 - 40 ms that only an async body pays
    from concurrent.futures import Future  # noqa: PLC0415 - as above

    beside = _Beside(threading.Event(), alone=len(asyncio.all_tasks()) == 1)
    answer: Future[T] = Future()

    def called() -> None:
        _beside.set(beside)
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the coroutine raises it
            answer.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(called,), name="bgsupervisor wait", daemon=True).start()
    waiting = asyncio.wrap_future(answer)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        beside.given_up.set()
        _context._rouse()  # noqa: SLF001 - its half
        await asyncio.wait([waiting])
        if not waiting.cancelled():
            waiting.exception()  # the cancellation reports it
        raise


_outside = Context()
_context: Context = _outside


def current() -> Context:
    """Return the context of the body that runs in this process, from any of its threads."""
    return _context


@contextlib.contextmanager
def entered(context: Context) -> Iterator[None]:
    """Make *context* the current one of this process while a body runs."""
    global _context  # noqa: PLW0603 - a child runs one body at a time, and its threads must see it too
    before, _context = _context, context
    try:
        yield
    finally:
        _context = before
