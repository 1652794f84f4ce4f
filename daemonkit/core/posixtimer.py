"""A timer of our own beside the one alarm of the process: timer_create(2), from libc."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Final

_SIGEV_SIGNAL: Final = 0
_LEAST: Final = 1_000_000  # nanoseconds


class _SigEvent(ctypes.Structure):
    """``struct sigevent``: 64 bytes (sigevent(7))."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class PosixTimer:
    """Sends this process a signal at a time on the monotonic clock; neither fork nor exec hands it on."""

    def __init__(self, number: int) -> None:
        """Make a timer that sends signal ``number``; it is not armed.

        Raises:
            OSError: the kernel, or this libc, has none for us.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._id = ctypes.c_void_p()
        event = _SigEvent(signo=number, notify=_SIGEV_SIGNAL)
        try:
            self._check(self._libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)))
        except AttributeError as error:  # glibc before 2.34 keeps it in another library
            raise OSError(str(error)) from None

    def arm(self, due: int) -> None:
        """Send the signal at ``due`` (monotonic nanoseconds), and not at an earlier time that was set; 0 disarms."""
        # Relative: an absolute time of a clock that is only pretended to us would ring at once, again and again.
        left = max(due - time.monotonic_ns(), _LEAST) if due else 0
        spec = (ctypes.c_long * 4)(0, 0, left // 10**9, left % 10**9)  # struct itimerspec: the interval, the value
        self._check(self._libc.timer_settime(self._id, 0, ctypes.byref(spec), None))

    def close(self) -> None:
        """Give the timer back."""
        self._libc.timer_delete(self._id)

    def _check(self, result: int) -> None:
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"use a POSIX timer: {os.strerror(error)}")
