"""How many tasks may run at once: as many as are wanted, or for a while as many as there is room for."""

from __future__ import annotations

import logging
import time
from typing import Final

log = logging.getLogger("daemonkit.queue")

_LOW: Final = 30.0  # seconds until more are tried again


class Ceiling:
    """Lowered when a process cannot be had for want of descriptors or memory."""

    def __init__(self, wanted: int) -> None:
        """Begin with as many as are ``wanted``."""
        self._wanted = wanted
        self._most = wanted
        self._low_until = 0.0  # monotonic seconds; 0: it is not lowered

    def room(self, running: int) -> int:
        """How many may begin beside those ``running``."""
        if self._low_until and time.monotonic() >= self._low_until:
            self._most, self._low_until = self._wanted, 0.0
        return max(self._most - running, 0)

    def lower(self, running: int, error: OSError) -> None:
        """There is no room for one more: be content with those that there are."""
        if running < self._most:
            self._most, self._low_until = max(running, 1), time.monotonic() + _LOW
            log.error("no more than %d tasks run at once for %g s: %s; see ulimit -n", self._most, _LOW, error.strerror)
