"""What a task has been through, in a line before its body: for a broker that has no place for that beside it."""

from __future__ import annotations

import bisect
import json
from typing import Final, NamedTuple

_HEAD: Final = b"daemonkit/1 "
_MOST: Final = 2**31  # failures


class History(NamedTuple):
    """Of a task that was put anew."""

    failures: int = 0
    reason: str | None = None
    was: str | None = None  # the id by which it was put


def wrap(body: bytes, history: History, most: int) -> bytes | None:
    """``body`` after its history, whose reason is cut, in no more than ``most`` bytes; None if it does not fit."""
    room, reason = most - len(body), history.reason or ""

    def size(length: int) -> int:
        return len(_line(history._replace(reason=reason[:length])))

    if len(_line(history)) > room:
        length = bisect.bisect(range(len(reason) + 1), room, key=size) - 1
        if length < 0:
            return None
        history = history._replace(reason=reason[:length])
    return _line(history) + body


def unwrap(data: bytes) -> tuple[bytes, History]:
    """The body, and its history; one without any has none."""
    if data.startswith(_HEAD):
        line, _, body = data.partition(b"\n")
        try:
            words = json.loads(line.removeprefix(_HEAD))
            failures, reason, was = words["failures"], words["reason"], words["was"]
        except (ValueError, TypeError, KeyError, RecursionError):  # anybody may have written it
            return data, History()
        is_count = type(failures) is int and 0 <= failures < _MOST
        if is_count and isinstance(reason, str | None) and (was is None or _is_id(was)):
            return body, History(failures, reason and reason.encode(errors="replace").decode(), was)
    return data, History()


def _is_id(was: object) -> bool:
    return isinstance(was, str) and len(was) < 64 and was.isascii() and was.isprintable()


def plain(body: bytes) -> bytes:
    """``body`` as it is put first: as it is, unless it looks as if it had a history."""
    return _line(History()) + body if body.startswith(_HEAD) else body


def _line(history: History) -> bytes:
    return _HEAD + json.dumps(history._asdict()).encode() + b"\n"
