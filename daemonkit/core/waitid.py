"""A look at our children that raises nothing and reaps nobody (waitid(2))."""

from __future__ import annotations

import ctypes
import os

# Not os.waitid: it would raise, and an exception touches memory that every child of a fork server has copied for it.
_waitid = ctypes.PyDLL(None).waitid
_ended = ctypes.create_string_buffer(128)  # siginfo_t


def has_children() -> bool:
    """Whether this process has any child, living or ended; nobody is reaped (waitid(2), WNOWAIT)."""
    return bool(_waitid(os.P_ALL, 0, _ended, os.WEXITED | os.WNOHANG | os.WNOWAIT) == 0)
