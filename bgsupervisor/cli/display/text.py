"""Times, durations, sizes and text of others as people read them; knows no tasks."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from bgsupervisor.sanitize import clean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

__all__ = ["age", "clean", "cut", "duration", "listed", "local", "padded", "short_duration", "size", "width"]

ELLIPSIS = "…"
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_TENTHS_BELOW = 10
_BINARY = 1024


def width(text: str) -> int:
    """Return how many columns *text* takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in {"Cf", "Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def cut(text: str, columns: int) -> str:
    """Return *text* in at most *columns* columns, with an ellipsis where it was cut."""
    if width(text) <= columns:
        return text
    kept, left = "", columns - 1
    for character in text:
        left -= _columns(character)
        if left < 0:
            break
        kept += character
    return kept.rstrip() + ELLIPSIS if columns > 0 else ""


def listed(names: Sequence[str], *, most: int) -> str:
    """Return names in one text; beyond *most* they are counted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """Return *text* filled up with blanks to *columns* columns; *right* puts it at the right end."""
    blanks = " " * (columns - width(text))
    return blanks + text if right else text + blanks


def local(moment: datetime, *, now: datetime) -> str:
    """Return *moment* in local time: the time alone for today, else with its date."""
    here = moment.astimezone()
    if here.date() == now.astimezone().date():
        return here.strftime("%H:%M:%S")
    return here.strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Return a duration in words: 25 s, 5 min, 3 h 20 min, 2 days 4 h."""
    seconds = max(0.0, seconds)
    if seconds < _MINUTE_S:
        return f"{int(seconds)} s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f} min"
    if seconds < _DAY_S:
        minutes = seconds % _HOUR_S // _MINUTE_S
        return f"{seconds // _HOUR_S:.0f} h" + (f" {minutes:.0f} min" if minutes else "")
    days, hours = seconds // _DAY_S, seconds % _DAY_S // _HOUR_S
    return f"{days:.0f} day{'s' * (days > 1)}" + (f" {hours:.0f} h" if hours else "")


def short_duration(seconds: float) -> str:
    """Return a duration in at most 7 characters without a blank: 120ms, 2.1s, 34s, 12m05s, 3h12m, 5d03h."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{int(seconds * 1000)}ms"
    if seconds < _TENTHS_BELOW:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < _MINUTE_S:
        return f"{whole}s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S}m{whole % _MINUTE_S:02d}s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S}h{whole % _HOUR_S // _MINUTE_S:02d}m"
    return f"{whole // _DAY_S}d{whole % _DAY_S // _HOUR_S:02d}h"


def age(moment: datetime, *, now: datetime) -> str:
    """Return how far *moment* is from *now*, in its largest unit: "5 min ago" or "in 3 days"."""
    seconds = (now - moment).total_seconds()
    words = " ".join(duration(abs(seconds)).split()[:2])
    return f"in {words}" if seconds < 0 else f"{words} ago"


def size(size_bytes: float) -> str:
    """Return a size in at most 5 characters without a blank: 812K, 120M, 1.2G."""
    value, units = size_bytes / _BINARY, iter("KMGT")
    unit = next(units)
    for larger in units:
        if value < _BINARY - 0.5:
            break
        value, unit = value / _BINARY, larger
    return f"{value:.1f}{unit}" if unit in "GT" and value < _TENTHS_BELOW else f"{value:.0f}{unit}"
