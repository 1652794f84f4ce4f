"""One lock over each fork: whoever uses a broker's connection holds it, so none is in use when the process forks.

One for all: two would be taken in one order by a put, and in the other by a fork.
"""

from __future__ import annotations

import logging  # noqa: F401 - it has a lock over forks, too, which is to be taken after ours: the last hook runs first
import os
import threading
from collections.abc import Callable

exclusively = threading.RLock()
before_fork: list[Callable[[], object]] = []  # called while the lock is held


def _enter() -> None:
    exclusively.acquire()
    for each in before_fork:
        each()


os.register_at_fork(before=_enter, after_in_parent=exclusively.release, after_in_child=exclusively.release)
