"""What Linux lets a process say about itself (prctl(2)), as far as Python has no name for it."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_PDEATHSIG: Final = 1
_CHILD_SUBREAPER: Final = 36

# PyDLL, and no errno of its own: each child calls this first of all, and whatever page that touches is copied for it.
_call = ctypes.PyDLL(None).prctl


def become_subreaper(wanted: bool = True) -> None:
    """Adopt the orphans among our descendants, as init would (PR_SET_CHILD_SUBREAPER); a fork does not inherit it."""
    if _call(_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        raise _refused("PR_SET_CHILD_SUBREAPER")


def die_with_parent(number: int) -> None:
    """Have the kernel send us ``number`` when the *thread* that forked us ends (PR_SET_PDEATHSIG); 0: nothing.

    If that may have ended before the call, compare ``os.getppid()`` with its number afterwards.
    """
    if _call(_PDEATHSIG, number, 0, 0, 0) != 0:
        raise _refused("PR_SET_PDEATHSIG")


def _refused(option: str) -> OSError:
    return OSError(errno.EINVAL, f"prctl({option}): {os.strerror(errno.EINVAL)}")  # the only reason that there is
