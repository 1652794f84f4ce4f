"""Children that are killed at their limit, whatever their master does: it may be busy, or may not know."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

Limit = Callable[[bytes], float]


class Limited:
    """Those of one fork server that live."""

    def __init__(self, limit: Limit | None) -> None:
        """``limit`` tells when a child is to be killed, see ``ForkServer``; without it there is none."""
        self._limit = limit
        self._asked: dict[int, bytes] = {}  # by what they were asked for
        self._look_at = math.inf  # seconds of CLOCK_BOOTTIME: the first limit, unless it has been put off since

    def add(self, number: int, payload: bytes) -> None:
        """Child ``number`` has a limit."""
        self._asked[number] = payload
        self._look_at = 0.0  # at once: only then is it known when its limit comes

    def remove(self, number: int) -> None:
        """It has ended."""
        if self._asked.pop(number, None) is not None and not self._asked:
            self._look_at = math.inf

    def __bool__(self) -> bool:
        return bool(self._asked)

    @property
    def look_at(self) -> float:
        """When ``late`` is to be called at the latest (monotonic seconds)."""
        if self._look_at == math.inf:
            return math.inf
        return time.monotonic() + self._look_at - time.clock_gettime(time.CLOCK_BOOTTIME)

    def late(self) -> list[int]:
        """Those whose limit has come, each told once."""
        assert self._limit is not None
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        limits = {number: self._limit(payload) for number, payload in self._asked.items()}
        late = [number for number, limit in limits.items() if limit <= now]
        for number in late:
            del self._asked[number]
        self._look_at = min((limit for limit in limits.values() if limit > now), default=math.inf)
        return late
