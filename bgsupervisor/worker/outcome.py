"""The result of an attempt whose body raised; knows no process, no table and no connection."""

from __future__ import annotations

import traceback
from typing import NamedTuple

from bgsupervisor.errors import Cancelled, DataInvalid, DataTooLarge, Deadlock
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.statuses import Reason

__all__ = ["Progress", "exit_code", "exit_text", "result_of_exception", "storable"]

MESSAGE_CHARS = 1000
ERROR_CHARS = 64 * 1024
"""A longer traceback keeps its beginning and its end."""


class Progress(NamedTuple):
    """The progress that a body has reported."""

    done: float | None = None
    total: float | None = None
    message: str | None = None

    def then(self, done: float | None, total: float | None, message: str | None) -> Progress:
        """Return the progress after another report; None keeps the earlier value."""
        return Progress(
            self.done if done is None else float(done),
            self.total if total is None else float(total),
            self.message if message is None else storable(str(message))[:MESSAGE_CHARS],
        )


def result_of_exception(error: BaseException, *, how: str) -> AttemptResult:
    """Return the result of an attempt whose body raised *error*; *how* describes the end of a cancelled one."""
    trace = _traceback(error)
    cancelled = _cancelled_in(error)
    if cancelled is not None and cancelled.reason in set(Reason):
        why = cancelled.why or (f"cancelled by {cancelled.by}" if cancelled.by else "cancelled")
        return AttemptResult(reason=Reason(cancelled.reason), detail=f"{why}; {how}", error=trace)
    if isinstance(error, SystemExit):
        code = exit_code(error)
        return AttemptResult(reason=Reason.EXITED, detail=_exit_detail(error, code), exit_code=code, error=trace)
    if isinstance(error, Deadlock):
        return AttemptResult(reason=Reason.DEADLOCKED, detail=storable(str(error))[:1000], error=trace)
    if isinstance(error, (DataInvalid, DataTooLarge)):
        return AttemptResult(reason=Reason.RAISED, detail=storable(str(error))[:1000], error=trace)
    lines = traceback.format_exception_only(error)
    text = "".join(lines[-1:] if isinstance(error, SyntaxError) else lines).strip()  # before it come file and line
    return AttemptResult(reason=Reason.RAISED, detail=storable(text)[:1000], error=trace)


def storable(text: str) -> str:
    """Return *text* with what no database stores (lone surrogates, NUL) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _traceback(error: BaseException) -> str:
    text = storable("".join(traceback.format_exception(error)))
    if len(text) <= ERROR_CHARS:
        return text
    half = ERROR_CHARS // 2
    return f"{text[:half]}\n... {len(text) - ERROR_CHARS} characters left out ...\n{text[-half:]}"


def _cancelled_in(error: BaseException | None) -> Cancelled | None:
    """Return the Cancelled that caused an exception: a finally block may have raised another on the way."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Cancelled):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def exit_code(error: SystemExit) -> int:
    """Return the exit code of a process that raises *error*: the low 8 bits of a number, 1 for a text."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def exit_text(error: SystemExit) -> str | None:
    """Return the text that Python prints for *error* on stderr; None for a code."""
    if error.code is None or isinstance(error.code, int):
        return None
    try:
        return str(error.code)
    except Exception:  # noqa: BLE001 - an object of the body's
        return f"<{type(error.code).__qualname__} that cannot be shown>"


def _exit_detail(error: SystemExit, code: int) -> str:
    text = exit_text(error)
    if text is not None:
        return storable(f"the body called sys.exit with code {code}: {text or 'an empty text'}")[:1000]
    given = error.code
    if isinstance(given, int) and given != code:
        return f"the body called sys.exit with code {_short(given)}, of which a process keeps the low 8 bits: {code}"
    return f"the body called sys.exit with code {code}"


def _short(number: int) -> str:
    return str(number) if number.bit_length() <= 64 else f"{number:#x}"[:18] + "..."  # noqa: PLR2004 - what reads well
