"""Steps of a command that ^C does not divide."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Final

_ENDS: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Signals that end us wait: what is there twice, or is ours for its whole ttr, would stay so.

    For a command, which has one thread; in the process of a task there is ``current.undisturbed``.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
