"""When the time of running calls is up."""

from __future__ import annotations

import heapq
import itertools
import time
import weakref
from typing import Final

from daemonkit.processes.assignment import Assignment

_LONGEST: Final = 3_600_000  # milliseconds of one sleep


class Deadlines:
    """Those of the calls that have a bound."""

    def __init__(self) -> None:
        """None yet."""
        # Weak: a call that was done long ago, with its result, is not kept for one before it that is not.
        self._heap: list[tuple[float, int, weakref.ref[Assignment]]] = []
        self._order = itertools.count()

    def add(self, call: Assignment, timeout: float) -> bool:
        """``call`` begins, and has ``timeout`` seconds; tell whether its time is up before that of all others."""
        heapq.heappush(self._heap, (time.monotonic() + timeout, next(self._order), weakref.ref(call)))
        return self._heap[0][2]() is call

    def pause(self) -> float | None:
        """Milliseconds until a call's time is up, or so many as poll(2) takes; None: no call has a bound."""
        if not self._heap:
            return None
        return min(max(0.0, self._heap[0][0] - time.monotonic()) * 1000 + 1, _LONGEST)

    def late(self) -> list[Assignment]:
        """Those whose time is up, each told once; what is done is forgotten."""
        found: list[Assignment] = []
        if not self._heap:
            return found
        now = time.monotonic()
        while self._heap:
            due, _, known = self._heap[0]
            call = known()
            is_over = call is None or call.done()
            if due > now and not is_over:
                break
            heapq.heappop(self._heap)
            if call is not None and not is_over:
                found.append(call)
        return found
