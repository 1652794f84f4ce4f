"""signalfd(2), for which Python has no name: signals that are read like a file, and handled by nobody."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from typing import Final

_CLOEXEC: Final = os.O_CLOEXEC  # the same numbers, by definition
_NONBLOCK: Final = os.O_NONBLOCK
_WORD: Final = 8 * ctypes.sizeof(ctypes.c_ulong)
_SIZE: Final = 128  # bytes of one struct signalfd_siginfo


def open_signalfd(numbers: Iterable[int]) -> int:
    """Block the signals ``numbers``, and return a descriptor that is readable when one of them waits.

    Raises:
        OSError: no room for a descriptor.
    """
    wanted = set(numbers)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    mask = (ctypes.c_ulong * (1024 // _WORD))()  # glibc's sigset_t; musl's is not longer
    for number in wanted:
        mask[(number - 1) // _WORD] |= 1 << (number - 1) % _WORD
    fd: int = ctypes.CDLL(None, use_errno=True).signalfd(-1, ctypes.byref(mask), _CLOEXEC | _NONBLOCK)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"signalfd: {os.strerror(code)}")
    return fd


def drain(fd: int) -> None:
    """Take what has come; several of one kind are one."""
    os.read(fd, 64 * _SIZE)
