"""What a function says of itself, without ``inspect``: that is rarely wanted, and a tenth of a daemon's memory."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any, Final

_SPECIAL: Final = 0x20 | 0x80 | 0x200  # flags of generators, coroutines, asynchronous generators (inspect, CO_*)


def plain_code(function: Any) -> CodeType | None:
    """The code of what a ``def`` has made, as nearly all functions are; None: ``inspect`` is to be asked.

    That is what wraps another function, has no code in Python, or does not run when it is called: coroutines and
    generators.
    """
    if type(function) is not FunctionType or hasattr(function, "__wrapped__"):
        return None
    code = function.__code__
    return None if code.co_flags & _SPECIAL else code
