"""Calls that any thread posts, and one makes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque

from daemonkit.cluster.tree import OnChange


class Mailbox:
    """What the threads of a library have for the one that dispatches, in the order of its arrival."""

    def __init__(self) -> None:
        """Nothing is there."""
        self._calls: deque[OnChange] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._guard = threading.Lock()

    def post(self, call: OnChange) -> None:
        """From any thread: let ``dispatch`` call it."""
        self._calls.append(call)
        with self._guard:
            if self._wakeup >= 0:  # else its number may be somebody else's by now
                os.eventfd_write(self._wakeup, 1)

    def fileno(self) -> int:
        """A descriptor that is readable when something was posted; -1 after ``close``."""
        return self._wakeup

    def dispatch(self) -> bool:
        """Call, here and now, all that was posted; tell if there was anything."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        count = 0
        while self._calls:
            self._calls.popleft()()
            count += 1
        return count > 0

    def close(self) -> None:
        """From any thread: give the descriptor back, once."""
        with self._guard:
            os.close(self._wakeup)
            self._wakeup = -1
