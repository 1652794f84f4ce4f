"""Whether a pool accepts calls."""

from __future__ import annotations

import os
from concurrent.futures import BrokenExecutor


class Gate:
    """Open, until something is the matter."""

    def __init__(self) -> None:
        """Open for this process, the owner."""
        self.is_closing = False
        self.is_forsaken = False  # we are a copy in a fork of the owner
        self.why_broken = ""  # empty: it is not
        self._owner = os.getpid()

    def check(self) -> None:
        """Return if it is open.

        Raises:
            RuntimeError: the pool is shut down, or belongs to another process.
            BrokenExecutor: its initializer has failed.
        """
        if self.is_forsaken:
            raise RuntimeError(f"submit: this pool belongs to pid {self._owner}; make one after the fork")
        if self.why_broken:
            raise BrokenExecutor(self.why_broken)
        if self.is_closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
