"""Durations as people write them: ``90``, ``"5m"``, ``"1h 30m"``."""

from __future__ import annotations

import functools
import math
import re

from daemonkit.errors import UsageError

_MILLISECONDS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_MEANT = {
    "msec": "ms",
    "millisecond": "ms",
    "sec": "s",
    "second": "s",
    "min": "m",
    "minute": "m",
    "hr": "h",
    "hour": "h",
    "day": "d",
    "week": "w",
}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([^\W\d_]*)\s*")
_HOW = 'write a number of seconds, or text such as "90s", "5m" or "1h30m"'


def seconds(value: float | int | str, *, what: str) -> float:
    """The duration in seconds: a number, or text in the units ms, s, m, h, d and w, or without a unit.

    ``what`` is what the value was given to, for the message: ``"@every"``, ``"key ttr in /etc/x.toml"``.
    Raises `UsageError` for anything that is not a duration of 0 or more.
    """
    if isinstance(value, str):
        result = _read(value, what)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(value, what, f"not a duration; {_HOW}")
    else:
        result = _as_float(value)
    if result < 0:
        raise _wrong(value, what, "a duration cannot be negative")
    if not math.isfinite(result):
        raise _wrong(value, what, "a duration must be finite")
    return result


def positive_seconds(value: float | int | str, *, what: str) -> float:
    """The same as `seconds`, for what must take time: raises `UsageError` for 0 as well."""
    result = seconds(value, what=what)
    if result == 0:
        raise _wrong(value, what, "must be longer than 0")
    return result


@functools.lru_cache(maxsize=256)  # 100,000 jobs have few intervals
def describe(seconds: float) -> str:
    """The duration for people, its two largest units rounded down: ``"250ms"``, ``"1m30s"``, ``"3d4h"``."""
    if seconds < 0:
        return "-" + describe(-seconds)
    if not math.isfinite(seconds):
        return str(seconds)
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "<1ms" if seconds else "0s"
    whole, rest = divmod(milliseconds, 1000)
    if whole < 60:
        return f"{whole}.{rest:03}".rstrip("0").rstrip(".") + "s"
    larger, smaller = ("m", "s") if whole < 3600 else ("h", "m") if whole < 86_400 else ("d", "h")
    count, rest = divmod(milliseconds, _MILLISECONDS[larger])
    below = rest // _MILLISECONDS[smaller]
    return f"{count}{larger}{below}{smaller}" if below else f"{count}{larger}"


def _read(text: str, what: str) -> float:
    """The sum of the parts of ``text``, or the number that it is."""
    rest = text.strip()
    if rest.startswith("-"):
        raise _wrong(text, what, "a duration cannot be negative")
    total, parts = 0.0, 0
    while rest:
        part = _PART.match(rest)
        if part is None:
            raise _wrong(text, what, f"not a duration; {_HOW}")
        number, unit = part.groups()
        rest, parts = rest[part.end() :], parts + 1
        if not unit and (rest or parts > 1):
            raise _wrong(text, what, f'{number} lacks its unit; use ms, s, m, h, d or w, as in "1h30m"')
        total += float(number) * _unit(number, unit or "s", text, what) / 1000
    if not parts:
        raise _wrong(text, what, f"not a duration; {_HOW}")
    return total


def _unit(number: str, unit: str, text: str, what: str) -> int:
    """The unit's length in milliseconds."""
    if unit in _MILLISECONDS:
        return _MILLISECONDS[unit]
    lower = unit.lower()
    meant = lower if lower in _MILLISECONDS else _MEANT.get(lower.removesuffix("s"))
    hint = f' (did you mean "{number}{meant}"?)' if meant else ""
    reason = f'"{unit}" is not a unit of time{hint}; use ms, s, m, h, d or w, as in "1h30m"'
    raise _wrong(text, what, reason)


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an int beyond 1.8e308
        return math.inf


def _wrong(value: object, what: str, why: str) -> UsageError:
    shown = repr(value)
    if isinstance(value, str):
        shown = f'"{shown[1:-1]}"'
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return UsageError(f"{what}({shown}): {why}" if what.startswith("@") else f"{what} = {shown}: {why}")
