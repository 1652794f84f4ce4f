"""The one place that waits: one epoll for every descriptor, the signals' wakeup pipe among them.

There is no time-out in it: the next due job is announced by SIGALRM, which is a signal, which is a byte in the
pipe.  So an idle daemon is never woken.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

Callback = Callable[[int], None]


class Loop:
    """Descriptors and what to do when they are ready."""

    def __init__(self, wakeup: int) -> None:
        """Wait on ``wakeup`` too, the reading end that ``Signals.install`` returned."""
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._wakeup = wakeup
        self.on_watch: Callback | None = None  # told of each descriptor that is new
        self._epoll.register(wakeup, READ)

    def watch(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call ``callback(events)`` whenever ``fd`` is ready; replaces an earlier watch on it."""
        if fd in self._callbacks:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
            if self.on_watch:
                self.on_watch(fd)
        self._callbacks[fd] = callback

    def close(self) -> None:
        """Give the descriptors back, in a process that was forked: the wakeup pipe's end, too."""
        self._epoll.close()
        os.close(self._wakeup)

    def watched(self) -> list[int]:
        """The descriptors that are watched, without the wakeup pipe."""
        return list(self._callbacks)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; call it before the descriptor is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def turn(self, *, wait: bool) -> bool:
        """Serve every descriptor that is ready; with ``wait``, sleep first until one is, or a signal comes.

        Tells whether any was: it may be ready again already.
        """
        served = False
        for fd, events in self._epoll.poll(-1 if wait else 0):
            if fd == self._wakeup:
                self._drain()
            elif callback := self._callbacks.get(fd):  # an earlier callback of this turn may have unwatched it
                callback(events)
                served = True
        return served

    def _drain(self) -> None:
        try:
            while len(os.read(self._wakeup, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass
