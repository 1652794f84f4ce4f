"""What the daemon's one thread is doing now, readable from outside while it does it.

A job that blocks also blocks the control socket.  So the name of the code in hand is written into a memfd
(memfd_create(2)) that ``status`` finds under /proc/PID/fd: no file to clean up, no system call per job.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import Final, NamedTuple

NAME: Final = "daemonkit-board"
_SIZE: Final = 512
_LAYOUT: Final = struct.Struct("=q240p")


class Activity(NamedTuple):
    """The code in hand: its name and for how many seconds it has been running."""

    name: str
    seconds: float


class Board:
    """The writing side."""

    def __init__(self) -> None:
        """Make an empty board; it lives as long as the process."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        self._map = mmap.mmap(fd, _SIZE)
        self._fd = fd  # kept open: it is the name under which readers find the board

    def enter(self, name: str, now: int) -> None:
        """``name`` has begun at ``now`` (monotonic nanoseconds)."""
        _LAYOUT.pack_into(self._map, 0, now, name.encode()[:239])

    def close(self) -> None:
        """Take the board down."""
        self._map.close()
        os.close(self._fd)

    def leave(self) -> None:
        """The code in hand has ended."""
        _LAYOUT.pack_into(self._map, 0, 0, b"")


def read(pid: int) -> Activity | None:
    """What process ``pid`` is doing; None if nothing, or if that may not be seen."""
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{number}"
            if os.readlink(path).startswith(f"/memfd:{NAME}"):
                with open(path, "rb") as file:
                    began, name = _LAYOUT.unpack(file.read(_LAYOUT.size))
                return Activity(name.decode(errors="replace"), (time.monotonic_ns() - began) / 1e9) if began else None
    except OSError:
        return None
    return None
