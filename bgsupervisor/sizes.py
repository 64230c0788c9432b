"""How sizes and counts are written in sentences; knows nothing of what has them."""

from __future__ import annotations

__all__ = ["compared", "number", "size"]

_STEP = 1024
_UNITS = ("KiB", "MiB", "GiB", "TiB")
_SIX_DIGITS = 1e6
_PLAIN_BELOW = 1e15


def size(size_bytes: float) -> str:
    """Return a size in its largest unit with at most one decimal: 812 bytes, 76.3 MiB, 2 GiB."""
    if size_bytes < _STEP:
        return f"{size_bytes:.0f} byte{'s' * (size_bytes != 1)}"
    value, units = size_bytes / _STEP, iter(_UNITS)
    unit = next(units)
    for larger in units:
        if round(value, 1) < _STEP:
            break
        value, unit = value / _STEP, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def compared(size_bytes: int, limit_bytes: int) -> tuple[str, str]:
    """Return a size and a limit as text; in bytes where a rounded size would look like the limit itself."""
    words = size(size_bytes), size(limit_bytes)
    return words if words[0] != words[1] else (f"{size_bytes:,} bytes", f"{limit_bytes:,} bytes")


def number(value: float) -> str:
    """Return a number without an exponent below a quadrillion: 80000000, 0.5, 33.3333."""
    if abs(value) < _PLAIN_BELOW and (value == int(value) or abs(value) >= _SIX_DIGITS):
        return str(round(value))
    return f"{value:g}"
