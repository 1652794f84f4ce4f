"""What Linux lets a process say about itself (prctl(2)), as far as Python has no name for it."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_PDEATHSIG: Final = 1
_CHILD_SUBREAPER: Final = 36

_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper(wanted: bool = True) -> None:
    """Adopt the orphans among our descendants, as init would (PR_SET_CHILD_SUBREAPER); a fork does not inherit it."""
    _prctl(_CHILD_SUBREAPER, int(wanted))


def die_with_parent(number: int) -> None:
    """Have the kernel send us ``number`` when the *thread* that forked us ends (PR_SET_PDEATHSIG).

    If that may have ended before the call, compare ``os.getppid()`` with its number afterwards.
    """
    _prctl(_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")
