"""Waiting for a change, so that control-C comes out of it as itself, and leaves nobody waiting for ever."""

from __future__ import annotations

import contextlib
import threading


class Bells:
    """A lock of its own for each thread that waits: it hangs it up under the common lock, and waits without that.

    Condition.wait() gives the common lock up and takes it again in Python: control-C between the two makes a
    RuntimeError of it ("cannot release un-acquired lock").
    """

    def __init__(self) -> None:
        """Nobody waits."""
        self._hung: list[threading.Lock] = []

    def hang(self) -> threading.Lock:
        """Under the common lock: a lock that can be taken when something has changed."""
        bell = threading.Lock()
        bell.acquire()
        self._hung.append(bell)
        return bell

    def take_down(self, bell: threading.Lock) -> None:
        """Under the common lock: nobody waits for it any more."""
        with contextlib.suppress(ValueError):
            self._hung.remove(bell)

    def ring(self) -> None:
        """Under the common lock: have all of them look."""
        for bell in self._hung:
            with contextlib.suppress(RuntimeError):  # rung already, by who was interrupted before he had rung them all
                bell.release()
        self._hung.clear()
