"""Names that look like options of a task and are none, and what to write instead; knows no task."""

from __future__ import annotations

import difflib

__all__ = ["advice"]

OPTIONS = ("name", "timeout_s", "stall_s", "memory_limit_bytes", "secret")

_RETRIES = "a task is tried again only by `bgsupervisor retry` or `service.retry()`; catch and repeat in the body"
_AT_REQUEST = "it is given with each request, as in `service.request(..., {}=...)`"
_OTHERS = {
    # Celery, RQ, Huey, Dramatiq, Procrastinate, arq, Django-Q and taskiq
    "timeout_s": (
        "timeout", "time_limit", "hard_time_limit", "soft_time_limit", "job_timeout", "task_timeout", "max_runtime",
        "timeout_ms", "timeout_seconds", "max_age",
    ),
    "stall_s": ("stall", "stall_timeout", "stalled_timeout", "heartbeat_timeout"),
    "memory_limit_bytes": ("memory_limit", "max_memory", "max_memory_bytes", "memory_limit_mb", "max_rss"),
    "secret": ("secrets", "sensitive", "sensitive_data", "sensitive_kwargs", "secret_fields"),
    "name": ("task_name", "actor_name", "func_name"),
}  # fmt: skip
_MEANT = {other: option for option, others in _OTHERS.items() for other in others}
_RETRY_NAMES = {
    "retry", "retries", "max_retries", "max_tries", "max_attempts", "attempts", "retry_delay", "default_retry_delay",
    "retry_backoff", "retry_jitter", "retry_when", "retry_on", "autoretry_for", "min_backoff", "max_backoff",
}  # fmt: skip
_REQUEST_NAMES = {
    "priority": "priority", "unique": "unique", "unique_key": "unique", "queueing_lock": "unique",
    "countdown": "delay_s", "delay": "delay_s", "delay_s": "delay_s", "eta": "run_at", "run_at": "run_at",
    "schedule_in": "delay_s", "depends_on": "after", "after": "after",
}  # fmt: skip
_ELSEWHERE = {
    "queue": "there is one queue; order it by the priority of each request",
    "queue_name": "there is one queue; order it by the priority of each request",
    "rate_limit": "let the body hold a lock with permits, as in `self.lock(name, permits=2)`",
    "expires": "nothing expires; let the body look at its data and return",
    "ignore_result": "a result is kept as long as its task, `keep_days`",
    "result_ttl": "a result is kept as long as its task, `keep_days`",
    "store_results": "a result is kept as long as its task, `keep_days`",
    "acks_late": "a body starts at most once per attempt, so there is nothing to set",
}

CLOSE = 0.85
"""From this ratio of difflib on a name is a slip of the pen: `timout_s` for `timeout_s`, not `time` or `total_s`."""


def advice(name: str) -> str | None:
    """Return what to do about a name that was meant as an option and is none; None for any other name."""
    if name in OPTIONS:
        return None
    lower = name.lower()
    meant = _MEANT.get(lower)
    if meant is None:
        meant = next(iter(difflib.get_close_matches(lower, OPTIONS[1:], n=1, cutoff=CLOSE)), None)
    if meant is not None:
        return f"did you mean {meant}?"
    if lower in _RETRY_NAMES:
        return _RETRIES
    if lower in _REQUEST_NAMES:
        return _AT_REQUEST.format(_REQUEST_NAMES[lower])
    return _ELSEWHERE.get(lower)
