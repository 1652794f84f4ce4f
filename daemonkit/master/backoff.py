"""How long to wait before something that ended unasked is started again."""

from __future__ import annotations

from collections import deque
from typing import Final

from daemonkit.core.chance import about
from daemonkit.processes.worker import Restarts

_MOST_DOUBLINGS: Final = 60  # beyond, a float has no room


class Backoff:
    """Counts the ends of one worker's place."""

    def __init__(self) -> None:
        """Nothing has ended yet."""
        self._ends: deque[float] = deque()
        self._in_a_row = 0

    @property
    def count(self) -> int:
        """The ends within the window."""
        return len(self._ends)

    def wait(self, policy: Restarts, now: float, lived: float) -> float | None:
        """Seconds to wait after an end at ``now`` of what has ``lived`` so long; None: it is not to be started again.

        Nothing at first, then longer and longer, until one has lived for the longest wait.
        """
        while self._ends and now - self._ends[0] > policy.window:
            self._ends.popleft()
        self._ends.append(now)
        if len(self._ends) > policy.most:
            return None
        self._in_a_row = 1 if lived >= policy.longest else self._in_a_row + 1
        if self._in_a_row == 1:
            return 0.0
        doubled = policy.backoff * 2.0 ** min(self._in_a_row - 2, _MOST_DOUBLINGS)
        return about(min(doubled, policy.longest), 0.2)
