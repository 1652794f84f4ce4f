"""What the processes of tasks print on stderr: it goes to the log, and the last of it is kept for whoever asks why."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Final

KEPT: Final = 2000  # bytes
_READ: Final = 65536
_CAPACITY: Final = 65536  # of a pipe (pipe(7))
_LONGEST: Final = 8192  # bytes of a line; more is broken

Tell = Callable[[bytes], None]


class Stderr:
    """The reading end of one process's stderr."""

    def __init__(self, tell: Tell) -> None:
        """Make the pipe.

        Args:
            tell: called with what was printed, in whole lines; what has no end yet waits for it.

        Raises:
            OSError: EMFILE: there is no room for it.
        """
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._tell = tell
        self._line = b""
        self._kept = b""

    def started(self) -> None:
        """The process has the other end."""
        os.close(self.writer)
        self.writer = -1

    def read(self) -> bool:
        """Take in some of what has been printed, so that who prints much holds up nobody; False: there is nothing."""
        try:
            data = os.read(self.reader, _READ)
        except BlockingIOError:
            return False
        self._kept = (self._kept + data)[-KEPT:]
        lines, end, self._line = (self._line + data).rpartition(b"\n")
        if end:
            self._tell(lines)
        if len(self._line) > _LONGEST:
            self._tell(self._line)
            self._line = b""
        return bool(data)

    def close(self) -> str:
        """Return the last lines; nothing more is taken in."""
        for _ in range(_CAPACITY // _READ + 1):  # who was left behind may print for ever
            if not self.read():
                break
        os.close(self.reader)
        if self.writer >= 0:
            os.close(self.writer)
        if self._line:
            self._tell(self._line)
        return self._kept.decode(errors="backslashreplace").strip()


class Stderrs:
    """Those of all processes, and what is readable when one has printed something."""

    def __init__(self) -> None:
        """None yet."""
        self._epoll = select.epoll()
        self._open: dict[int, Stderr] = {}
        self.fileno = self._epoll.fileno

    def add(self, stderr: Stderr) -> None:
        """Hear of it."""
        self._epoll.register(stderr.reader, select.EPOLLIN)
        self._open[stderr.reader] = stderr

    def remove(self, stderr: Stderr) -> str:
        """Its process has ended: return its last lines."""
        if self._open.pop(stderr.reader, None):
            self._epoll.unregister(stderr.reader)
        return stderr.close()

    def read(self) -> None:
        """Take in what has been printed, of each some."""
        for fd, events in self._epoll.poll(0):
            if events & select.EPOLLIN:
                self._open[fd].read()
            else:  # nobody has the other end any more: that would be told again and again
                del self._open[fd]
                self._epoll.unregister(fd)

    def close(self) -> None:
        """Hear no more."""
        self._epoll.close()


def print_there() -> None:
    """Let ``sys.stderr`` be descriptor 2 as it is, in a process whose children will have pipes there."""
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
