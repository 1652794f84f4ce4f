"""What the daemon's one thread is doing now, readable from outside while it does it.

A job that blocks also blocks the control socket.  So the name of the code in hand is written into a memfd
(memfd_create(2)) that ``status`` finds under /proc/PID/fd: no file to clean up, no system call per job.  Behind it
stand the few facts that ``start`` and ``kill`` must know at once.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from typing import Final, NamedTuple

NAME: Final = "daemonkit-board"
_SIZE: Final = 8192
_FACTS: Final = 512  # where they begin
_LAYOUT: Final = struct.Struct("=q240p")
_STATE: Final = struct.Struct("=16p")


class Activity(NamedTuple):
    """The daemon's state, and the code in hand: its name ("" for none) and for how many seconds it has been running."""

    state: str
    name: str
    seconds: float


class Board:
    """The writing side."""

    def __init__(self) -> None:
        """Make an empty board; it lives as long as the process."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        self._map = mmap.mmap(fd, _SIZE)
        self._facts: dict[str, str] = {}
        self.state("starting")
        self._fd = fd  # kept open: it is the name under which readers find the board

    def enter(self, name: str, now: int) -> None:
        """``name`` has begun at ``now`` (monotonic nanoseconds)."""
        _LAYOUT.pack_into(self._map, 0, now, name.encode(errors="replace")[:239])

    def state(self, word: str) -> None:
        """The daemon is "starting", "running" or "stopping"."""
        _STATE.pack_into(self._map, _LAYOUT.size, word.encode())

    def tell(self, **facts: str) -> None:
        """Let readers know ``facts``, beside those told before."""
        self._facts |= facts
        data = json.dumps(self._facts).encode()
        if len(data) <= _SIZE - _FACTS:  # no path is so long (limits.h, PATH_MAX)
            self._map[_FACTS:] = data.ljust(_SIZE - _FACTS, b"\0")

    def close(self) -> None:
        """Take the board down."""
        self._map.close()
        os.close(self._fd)

    def leave(self) -> None:
        """The code in hand has ended."""
        _LAYOUT.pack_into(self._map, 0, 0, b"")


def read(pid: int) -> Activity | None:
    """What process ``pid`` is doing; None if that may not be seen."""
    data = _content(pid)
    if len(data) < _FACTS:
        return None
    began, name = _LAYOUT.unpack_from(data)
    (state,) = _STATE.unpack_from(data, _LAYOUT.size)
    seconds = (time.monotonic_ns() - began) / 1e9 if began else 0.0
    return Activity(state.decode(errors="replace"), name.decode(errors="replace"), seconds)


def facts(pid: int) -> dict[str, str]:
    """What process ``pid`` has told of itself; nothing if that may not be seen, or is being written."""
    try:
        found = json.loads(_content(pid)[_FACTS:].rstrip(b"\0") or b"{}")
    except (ValueError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _content(pid: int) -> bytes:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return b""
    for number in descriptors:
        path = f"/proc/{pid}/fd/{number}"
        try:
            if os.readlink(path).startswith(f"/memfd:{NAME}"):
                with open(path, "rb") as file:
                    return file.read(_SIZE)
        except OSError:
            continue  # closed meanwhile
    return b""
