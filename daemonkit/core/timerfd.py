"""timerfd_create(2): from the standard library where it has it (3.13), else from libc."""

from __future__ import annotations

import os
import sys
import time
from typing import Final

TFD_NONBLOCK: Final = 0o4000
TFD_CLOEXEC: Final = 0o2000000
TFD_TIMER_ABSTIME: Final = 1
TFD_TIMER_CANCEL_ON_SET: Final = 2
_FAR: Final = 2**31  # seconds since the epoch: a time that is not reached before the clock is set


def monotonic() -> int:
    """A timer on the monotonic clock, disarmed."""
    return _create(time.CLOCK_MONOTONIC)


def arm(fd: int, due: int) -> None:
    """Make ``fd`` readable at ``due`` (monotonic nanoseconds); 0 disarms."""
    _settime(fd, TFD_TIMER_ABSTIME, due)


def on_clock_step() -> int:
    """A descriptor that becomes readable when the wall clock is set, or the machine wakes from suspend."""
    fd = _create(time.CLOCK_REALTIME)
    watch_clock(fd)
    return fd


def watch_clock(fd: int) -> None:
    """Arm ``fd`` for the next step of the wall clock."""
    _settime(fd, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, (int(time.time()) + _FAR) * 10**9)


def acknowledge(fd: int) -> None:
    """Read ``fd`` empty; ECANCELED is how the kernel says that the clock was set."""
    try:
        os.read(fd, 8)
    except OSError:
        return  # EAGAIN or ECANCELED: read all the same


if sys.version_info >= (3, 13):

    def _create(clock: int) -> int:
        return os.timerfd_create(clock, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)

    def _settime(fd: int, flags: int, due: int) -> None:
        os.timerfd_settime_ns(fd, flags=flags, initial=due)

else:
    # ctypes is loaded when a timer is wanted: most daemons have none, and start sooner.

    def _create(clock: int) -> int:
        import ctypes

        fd: int = ctypes.CDLL(None, use_errno=True).timerfd_create(clock, TFD_NONBLOCK | TFD_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "timerfd_create")
        return fd

    def _settime(fd: int, flags: int, due: int) -> None:
        import ctypes

        spec = (ctypes.c_long * 4)(0, 0, due // 10**9, due % 10**9)  # struct itimerspec: the interval, the value
        if ctypes.CDLL(None, use_errno=True).timerfd_settime(fd, flags, ctypes.byref(spec), None) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "timerfd_settime")
