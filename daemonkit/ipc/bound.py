"""The bound of a wait, also of those system calls that know none: msgsnd(2), msgrcv(2), flock(2)."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

from daemonkit.errors import IpcError, UsageError

_SIGEV_THREAD_ID: Final = 4  # timer_create(2)
_AGAIN: Final = 0.01  # seconds until a thread is interrupted once more, if it was not yet waiting the first time
_LONGEST: Final = 10**9  # seconds; more would overflow what the kernel's timers take

_libc = ctypes.CDLL(None, use_errno=True)
# glibc before 2.34 has the timers in another library.
_timers = _libc if hasattr(_libc, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)


class Bound:
    """How long may still be waited."""

    def __init__(self, timeout: float | None) -> None:
        """Begin now.

        Args:
            timeout: seconds from now; 0 does not wait, None waits for ever.

        Raises:
            UsageError: it is less than 0, or no number.
        """
        if timeout is not None and (not isinstance(timeout, int | float) or not timeout >= 0):
            raise UsageError(f"wait for {timeout!r} seconds: use 0 or more, or None to wait for ever")
        self._end = None if timeout is None or timeout > _LONGEST else time.monotonic() + timeout

    def left(self) -> float | None:
        """Seconds, at least 0; None is for ever."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)


class _Sigevent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_char * 44),
    ]


class _Setting(ctypes.Structure):
    _fields_ = [
        ("again_seconds", ctypes.c_long),
        ("again_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    ]


@contextlib.contextmanager
def interrupted_after(seconds: float | None) -> Iterator[None]:
    """Have the system call that this thread waits in end with EINTR after that time (timer_create(2)).

    Nothing else of the process takes notice: the signal is a real-time one that nobody uses, it goes to this thread
    alone, and its handler is a function of the C library that does nothing.  None or 0 leaves the call alone.

    Raises:
        IpcError: all real-time signals are in use, or the kernel gives no timer.
    """
    if not seconds:
        yield
        return
    number = _free_signal()
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    timer = ctypes.c_void_p()
    event = _Sigevent(signal=number, notify=_SIGEV_THREAD_ID, thread=threading.get_native_id())
    again = int(_AGAIN * 1e9)
    setting = _Setting(0, again, int(seconds), max(int(seconds % 1 * 1e9), 1))
    try:
        if _timers.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) != 0:
            raise IpcError("make a timer for a wait: the kernel gives none; see RLIMIT_SIGPENDING in getrlimit(2)")
        try:
            _timers.timer_settime(timer, 0, ctypes.byref(setting), None)
            yield
        finally:
            _timers.timer_delete(timer)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _free_signal() -> int:
    """A real-time signal without a handler, or with the one that does nothing, which it has afterwards.

    It stays so: another thread may be waiting by it, and without a handler it would end the process.
    """
    nothing = ctypes.cast(_libc.abs, ctypes.c_void_p).value
    install = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(("signal", _libc))
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN, -1):
        if signal.getsignal(number) is not signal.SIG_DFL:
            continue
        before = install(number, nothing)
        if before in (None, nothing):  # None is SIG_DFL
            signal.siginterrupt(number, True)  # flock(2) would be taken up again otherwise
            return number
        install(number, before)
    raise IpcError("bound a wait: every real-time signal is in use; wait without a time-out, or free one")
