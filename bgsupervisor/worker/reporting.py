"""Reports the error of a body to the application's logging, excepthook and error trackers; knows no process."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import types
from typing import TYPE_CHECKING

from bgsupervisor.errors import BgSupervisorError
from bgsupervisor.sanitize import clean

if TYPE_CHECKING:
    from bgsupervisor.ipc.messages import AttemptResult, Run

__all__ = ["flush", "headline", "prepare", "report"]

LOGGER = "bgsupervisor.task"
PROVIDERS = (
    ("opentelemetry.trace", "get_tracer_provider"),
    ("opentelemetry.metrics", "get_meter_provider"),
    ("opentelemetry._logs", "get_logger_provider"),
)
"""Getters of OpenTelemetry's providers, which may buffer telemetry; those of the SDK have `force_flush`."""

_reported: BaseException | None = None
_hook_before = sys.__excepthook__


def prepare() -> None:
    """Set the excepthook that a hook of the application calls last, before the application is loaded."""
    global _hook_before
    if sys.excepthook is not _last_hook:
        _hook_before, sys.excepthook = sys.excepthook, _last_hook


def report(error: BaseException, end: AttemptResult, assignment: Run) -> None:
    """Log the error that ended a body, and call the excepthook of the application.

    Both get only the frames of the application: ours contain the task's data, and an error tracker may send the local
    variables of each frame. An end that was wanted (`Reason.wanted`) is no error: it has no traceback, and no hook is
    called.
    """
    if end.reason is None:
        return
    _keep_frames_of_application(error)
    # Got by name only now: `logging.config` disables the loggers that exist when the application configures it.
    logging.getLogger(LOGGER).log(
        logging.INFO if end.reason.wanted else logging.ERROR,
        "%s%s: %s",
        headline(assignment.id, assignment.name, assignment.attempt),
        end.reason,
        clean(end.detail or ""),
        exc_info=None if end.reason.wanted else error,
        extra={
            "task_id": assignment.id,
            "task_name": assignment.name,
            "task_attempt": assignment.attempt,
            "task_reason": str(end.reason),
        },
    )
    if not end.reason.wanted:
        _call_hook(error)


def headline(id: int, name: str, attempt: int) -> str:
    """Return the beginning of the record of an attempt's end; a log with this line has the traceback."""
    return f"task {id} ({clean(name)}), attempt {attempt}, ended: "


def flush() -> None:
    """Flush the error trackers that are loaded; each blocks for as long as it is configured to."""
    sentry = sys.modules.get("sentry_sdk")
    if sentry is not None:
        with contextlib.suppress(Exception):
            sentry.flush()
    for module, getter in PROVIDERS:
        with contextlib.suppress(Exception):
            provider = getattr(sys.modules[module], getter)()
            provider.force_flush()


def _call_hook(error: BaseException) -> None:
    global _reported  # noqa: PLW0603 - `_last_hook` is called by others and gets no more than a hook does
    if sys.excepthook is _last_hook:
        return
    _reported = error
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException:  # noqa: BLE001 - a hook must not change how the task has ended
        traceback.print_exc()
    finally:
        _reported = None


def _last_hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Ignore the exception that was logged just now: its traceback would stand twice in the task's log."""
    if error is not _reported:
        _hook_before(kind, error, trace)


def _keep_frames_of_application(error: BaseException) -> None:
    """Remove our own frames from the tracebacks of an exception and of its causes.

    A cause that we caught never reached the application. None of its frames is kept: they, and those below them, are
    of libraries that got the data from us.
    """
    error.__traceback__ = _chained(_of_application(error))
    seen = {id(error)}
    waiting = [(one, False) for one in _causes_of(error)]
    while waiting:
        cause, is_below_us = waiting.pop()
        if id(cause) not in seen:
            seen.add(id(cause))
            is_below_us = is_below_us or (cause.__traceback__ is not None and _is_ours(cause.__traceback__))
            cause.__traceback__ = None if is_below_us else _chained(_of_application(cause))
            waiting += [(one, is_below_us) for one in _causes_of(cause)]


def _causes_of(error: BaseException) -> list[BaseException]:
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return [one for one in (error.__cause__, error.__context__, *parts) if one is not None]


def _of_application(error: BaseException) -> list[types.TracebackType]:
    """Return the links of a traceback that are not ours; for an error of ours, none below our frames."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        if not _is_ours(trace):
            frames.append(trace)
        elif frames and isinstance(error, BgSupervisorError):
            break
        trace = trace.tb_next
    return frames


def _is_ours(trace: types.TracebackType) -> bool:
    return str(trace.tb_frame.f_globals.get("__name__")).startswith("bgsupervisor.")


def _chained(frames: list[types.TracebackType]) -> types.TracebackType | None:
    trace = None
    for one in reversed(frames):
        trace = types.TracebackType(trace, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return trace
