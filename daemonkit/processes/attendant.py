"""The thread of a pool: it begins when it is first needed, and can be woken while it sleeps in poll(2)."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class Attendant:
    """A thread, and the descriptor that wakes it (eventfd(2))."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.RLock()  # a descriptor that is closed may soon be somebody else's
        self._thread: threading.Thread | None = None
        self._wakeup = -1
        self._is_asked = False

    def attend(self, run: Callable[[], None]) -> None:
        """Start it, or wake it; it does ``run``, and ``end`` last.

        Raises:
            OSError: there is no descriptor for it.
            RuntimeError: there is no room for one more thread.
        """
        if self._thread is not None:
            self.wake()
            return
        try:
            self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=run, name="daemonkit pool", daemon=True)
            self._thread.start()
        except BaseException:  # there is no room for it; or control-C: if it runs, it is not ours, and ends at once
            self._thread = None
            self.end()
            raise

    def wake(self) -> bool:
        """Have it look at everything; tell whether it is there."""
        with self._lock:
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)
            return self._wakeup >= 0

    def ask(self) -> None:
        """As ``wake``, and nothing while it has been asked and has not said yet that it ``looks``; under one lock."""
        if not self._is_asked:
            self.wake()
            self._is_asked = True

    def looks(self) -> None:
        """In the thread, under the lock of those that ask: from now on it is to be asked again."""
        self._is_asked = False

    def sleep(self, poll: select.poll, pause: float | None) -> set[int]:
        """In the thread: sleep for ``pause`` milliseconds at most; what of ``poll`` is ready."""
        poll.register(self._wakeup, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(pause)}
        if self._wakeup in ready:
            os.eventfd_read(self._wakeup)
            ready.discard(self._wakeup)
        return ready

    def is_current(self) -> bool:
        """Whether the caller is the thread."""
        return self._thread is threading.current_thread()

    def join(self) -> None:
        """Wait until it has ended."""
        if self._thread is not None and not self.is_current():
            self._thread.join()

    def end(self) -> None:
        """It is woken no more."""
        with self._lock:
            wakeup, self._wakeup = self._wakeup, -1
            if wakeup >= 0:
                os.close(wakeup)

    def forsake(self) -> None:
        """We are a fork: it is not here."""
        self._lock = threading.RLock()
        self._thread = None
        self.end()
