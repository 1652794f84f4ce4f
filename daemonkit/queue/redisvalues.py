"""Tasks and outcomes as the scripts in Redis have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from daemonkit.queue.broker import Bury, Delete, Outcome, Release, State, Task, Touch


def told(outcome: Outcome) -> list[Any]:
    """The arguments of EXCHANGE for one."""
    reservation = outcome.reservation
    what, delay, priority = "touch", 0.0, ""
    reason: str | bytes = (outcome.progress if isinstance(outcome, Touch) else None) or ""
    if isinstance(outcome, Delete):
        what = "delete"
        if outcome.result is not None:
            delay, reason = outcome.keep, outcome.result
    elif isinstance(outcome, Bury):
        what, reason = "bury", outcome.reason
    elif isinstance(outcome, Release):
        what = "release" if outcome.reason is None else "fail"
        delay, reason = outcome.delay, outcome.reason or ""
        priority = "" if outcome.priority is None else str(outcome.priority)
    return [what, reservation.id, reservation.token, milliseconds(delay), reason, priority]


def as_task(id: str, state: State, score: float, values: Mapping[bytes, bytes], now: int) -> Task:
    """A task from its hash, and from its score in the set of its ``state``; ``now`` in milliseconds."""

    def number(name: bytes) -> int:
        return int(values.get(name, b"0"))

    reason, owner, progress = (values.get(name) for name in (b"reason", b"owner", b"progress"))
    left = max(score - now, 0) / 1000 if state in (State.DELAYED, State.RESERVED) else None
    return Task(
        values[b"queue"].decode(),
        id,
        state,
        values[b"body"],
        number(b"priority"),
        number(b"ttr") / 1000,
        max(now - number(b"made"), 0) / 1000,
        left,
        number(b"reserves"),
        number(b"timeouts"),
        number(b"releases"),
        number(b"buries"),
        number(b"kicks"),
        number(b"failures"),
        reason.decode(errors="replace") if reason is not None else None,
        owner.decode() if owner is not None else None,
        progress.decode(errors="replace") if progress is not None else None,
        values[b"key"].decode() if b"key" in values else None,
    )


def is_id(id: str) -> bool:
    """Whether that can be one."""
    return id.isascii() and id.isdecimal() and 0 < len(id) <= 16


def milliseconds(seconds: float) -> int:
    """Rounded up."""
    return math.ceil(seconds * 1000)
