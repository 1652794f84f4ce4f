"""What a task has been through, in a line before its body: for a broker that has no place for that beside it."""

from __future__ import annotations

import json
from typing import Final, NamedTuple

_HEAD: Final = b"daemonkit/1 "
_NOTHING: Final = 200  # bytes that the line may take without the reason


class History(NamedTuple):
    """Of a task that was put anew."""

    failures: int = 0
    reason: str | None = None
    was: str | None = None  # the id before


def wrap(body: bytes, history: History, most: int) -> bytes | None:
    """``body`` with its history before it, in no more than ``most`` bytes; None if it does not fit."""
    reason = history.reason
    while True:
        line = _HEAD + json.dumps(history._replace(reason=reason)._asdict()).encode() + b"\n"
        if (over := len(line) + len(body) - most) <= 0:
            return line + body
        if not reason:
            return None
        reason = reason[: max(len(reason) - max(over // 6, 1), 0)]  # a character takes up to 6 bytes, more if astral


def unwrap(data: bytes) -> tuple[bytes, History]:
    """The body, and its history; one without any has none."""
    if data.startswith(_HEAD):
        line, _, body = data.partition(b"\n")
        try:
            words = json.loads(line.removeprefix(_HEAD))
            failures, reason, was = words["failures"], words["reason"], words["was"]
        except (ValueError, TypeError, KeyError):
            return data, History()
        if type(failures) is int and isinstance(reason, str | None) and isinstance(was, str | None):
            return body, History(failures, reason, was)
    return data, History()


def plain(body: bytes) -> bytes:
    """``body`` as it is put first: as it is, unless it looks as if it had a history."""
    return _HEAD + json.dumps(History()._asdict()).encode() + b"\n" + body if body.startswith(_HEAD) else body
