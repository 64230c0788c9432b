"""Runs the body of a task, and turns what it returns or raises into the result of the attempt; knows no process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any

from bgsupervisor import payload, registry, task_context, tasks
from bgsupervisor.errors import BgSupervisorError
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.worker import leftovers, reporting
from bgsupervisor.worker.application import call_by_path
from bgsupervisor.worker.outcome import result_of_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import Run
    from bgsupervisor.worker.context import AttemptContext

__all__ = ["Body"]

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Format for an application that configures no logging."""


class Body:
    """The body of one attempt.

    Attributes:
        was_terminated: SIGTERM came while the body ran, and was a cancel.
    """

    def __init__(self, assignment: Run, config: Config) -> None:
        self._assignment = assignment
        self._config = config
        self._ended_by: tuple[BaseException, contextvars.Context] | None = None
        self.was_terminated = False

    def run(
        self,
        context: AttemptContext,
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> AttemptResult:
        """Run `child_setup` and the body; return the result, whatever they raise.

        Args:
            context: What the body can call.
            before: Called when `child_setup` has returned.
            after: Called when the body has ended and, if it returned, its open files are written.
        """
        assignment = self._assignment
        try:
            definition = _loaded_definition(assignment.name)
            data = payload.decode_data(
                assignment.data, definition.signature, name=assignment.name, secret=definition.options.secret
            )
            with _stopping_timers():
                with leftovers.ending_copies():
                    if self._config.child_setup:
                        call_by_path(self._config.child_setup)
                _configure_default_logging()
                before()
                body = definition.body()
                with task_context.entered(context), leftovers.ending_copies():
                    value = body(**data)
                    if inspect.iscoroutine(value):
                        value = asyncio.run(_awaited(value))
            leftovers.write()  # as part of the body: its limits hold while a pipe is full
            after()
            return AttemptResult(result=payload.encode_result(value, limit_bytes=self._config.data_max_bytes))
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is its end
            after()
            leftovers.write(quietly=True, regular_only=True)  # a full pipe may be why it was cancelled
            return self.result_of(error)

    def result_of(self, error: BaseException) -> AttemptResult:
        """Return the result of an attempt that *error* ended, and keep the error for `report_error`."""
        how = "the body ended after SIGTERM" if self.was_terminated else "the body ended when it was asked"
        self._ended_by = error, contextvars.copy_context()
        return result_of_exception(error, how=how)

    def report_error(self, end: AttemptResult) -> None:
        """Report the error that ended the body to the application, then drop it: its frames keep files open."""
        ended_by, self._ended_by = self._ended_by, None
        if ended_by is not None:
            error, context = ended_by  # of the body: a tracker keeps in it what the body has set for its events
            with contextlib.suppress(Exception):
                _configure_default_logging()
                context.run(reporting.report, error, end, self._assignment)


async def _awaited(body: Coroutine[Any, Any, object]) -> object:
    """Await an async body; a copy ends before it closes the event loop, whose epoll instance it shares."""
    with leftovers.ending_copies():
        return await body


def _configure_default_logging() -> None:
    """Print log records to stderr where the application configures no logging."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)


def _loaded_definition(name: str) -> registry.Definition:
    """Return the definition of a task. Raises BgSupervisorError where this process has not loaded it."""
    definition = tasks.definition_of(name)
    if definition is None:
        raise BgSupervisorError(f"the task {name!r} is not loaded in this process")
    return definition


@contextlib.contextmanager
def _stopping_timers() -> Iterator[None]:
    try:
        yield
    finally:
        leftovers.stop_timers()
