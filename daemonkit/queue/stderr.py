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

    def read(self) -> None:
        """Take in what has been printed."""
        try:
            while data := os.read(self.reader, _READ):
                self._kept = (self._kept + data)[-KEPT:]
                lines, end, self._line = (self._line + data).rpartition(b"\n")
                if end:
                    self._tell(lines)
        except BlockingIOError:
            return

    def close(self) -> str:
        """Return the last lines; nothing more is taken in."""
        self.read()
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
        self._epoll.register(stderr.reader, select.EPOLLIN | select.EPOLLET)  # of its end once, too
        self._open[stderr.reader] = stderr

    def remove(self, stderr: Stderr) -> str:
        """Its process has ended: return its last lines."""
        del self._open[stderr.reader]
        self._epoll.unregister(stderr.reader)  # a process that was left has the pipe, too, and may print on
        return stderr.close()

    def read(self) -> None:
        """Take in what has been printed."""
        for fd, _ in self._epoll.poll(0):
            self._open[fd].read()

    def close(self) -> None:
        """Hear no more."""
        self._epoll.close()


def print_there() -> None:
    """Let ``sys.stderr`` be descriptor 2 as it is, in a process whose children will have pipes there."""
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
