"""Numbers of bytes, as people write them."""

from __future__ import annotations

from typing import Any, Final

from daemonkit.errors import UsageError

_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30}


def in_bytes(value: Any, what: str, least: int = 1) -> int:
    """``value`` as a number of bytes: a number, or text such as "200M", "1G".

    Raises:
        UsageError: it is neither, or less than ``least``.
    """
    if isinstance(value, str):
        number, unit = value.strip().upper().removesuffix("B"), 1
        if number and number[-1] in _UNITS:
            number, unit = number[:-1], _UNITS[number[-1]]
        value = int(number) * unit if number.strip().isdecimal() else value
    if type(value) is not int or value < least:
        raise UsageError(f'{what}={value!r} must be a number of bytes, or text such as "200M", "1G"')
    return value
