"""What works in a thread of its own: finished before the interpreter ends, and let go of by a fork."""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from typing import Protocol


class Lasting(Protocol):
    """Something with a thread."""

    def close(self) -> None:
        """Accept no more."""
        ...

    def join(self) -> None:
        """Wait until all that was accepted is done."""
        ...

    def forsake(self) -> None:
        """This process is a fork of the one that it belongs to."""
        ...


@functools.cache
def lasting() -> weakref.WeakSet[Lasting]:
    """All of them: to be added to."""
    them: weakref.WeakSet[Lasting] = weakref.WeakSet()

    def finish() -> None:
        for each in list(them):
            each.close()
        for each in list(them):
            each.join()

    def forsake() -> None:
        for each in list(them):
            each.forsake()
        them.clear()

    atexit.register(finish)
    os.register_at_fork(after_in_child=forsake)
    return them
