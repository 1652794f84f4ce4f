"""What a function says of itself, without ``inspect``: that is rarely wanted, and a tenth of a daemon's memory."""

from __future__ import annotations

from functools import partial
from types import CodeType, FunctionType
from typing import Any, Final

_GENERATOR: Final = 0x20  # inspect, CO_GENERATOR
_ASYNC: Final = 0x80 | 0x200  # CO_COROUTINE, CO_ASYNC_GENERATOR
_SPECIAL: Final = _GENERATOR | _ASYNC


def plain_code(function: Any) -> CodeType | None:
    """The code of what a ``def`` has made, as nearly all functions are; None: ``inspect`` is to be asked.

    That is what wraps another function, has no code in Python, or does not run when it is called: coroutines and
    generators.
    """
    if type(function) is not FunctionType or hasattr(function, "__wrapped__"):
        return None
    code = function.__code__
    return None if code.co_flags & _SPECIAL else code


def why_not_run(function: Any) -> str | None:
    """Why a call of the function runs none of its lines; None: it runs them."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(function, "__code__", None)
    flags = getattr(code, "co_flags", 0)
    if flags & _ASYNC:
        return "is async; daemonkit calls plain functions: use asyncio.run() inside one"
    return "is a generator; daemonkit calls plain functions, without yield" if flags & _GENERATOR else None
