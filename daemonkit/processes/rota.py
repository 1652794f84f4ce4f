"""Whose turn it is: which kept child of a pool has the next call."""

from __future__ import annotations

from typing import Final

from daemonkit.processes.assignment import Assignment
from daemonkit.processes.kept import Kept

_DEEPEST: Final = 96  # calls that a kept child has at most, one of them running: so many fit into a socket's buffer
_AHEAD: Final = 24  # short calls, enough for a while
_SHORT: Final = 0.001  # seconds: calls up to here are worth being sent ahead
_SMALL: Final = 512  # bytes: calls up to here may be sent ahead


class Rota:
    """An idle child comes first, then a busy one: short calls are sent ahead, the more the shorter they are."""

    def __init__(self) -> None:
        """No child yet."""
        self._idle: list[Kept] = []
        self._hungry: dict[Kept, None] = {}  # busy ones that may be given more
        self._depth = 1  # calls that one may have

    def first_idle(self) -> Kept | None:
        """The one that is to be given a call."""
        while self._idle:
            if self._idle[-1].is_ready:
                return self._idle[-1]
            self._idle.pop()
        return None

    def first_hungry(self, call: Assignment) -> Kept | None:
        """The busy one to which ``call`` is to be sent ahead."""
        if len(call.request) > _SMALL:
            return None
        while self._hungry:
            kept = next(iter(self._hungry))
            if kept.is_ready and 0 < len(kept.calls) < self._depth:
                return kept
            del self._hungry[kept]
        return None

    def rest(self, kept: Kept) -> None:
        """It is idle; it is the next: one that is warm is used first."""
        self._hungry.pop(kept, None)
        self._idle.append(kept)

    def work(self, kept: Kept) -> None:
        """The first idle one is so no more."""
        self._idle.pop()
        self._hungry[kept] = None

    def feed(self, kept: Kept) -> None:
        """It has one call less.  Not for every outcome: several calls at once wake it once."""
        if len(kept.calls) <= self._depth // 2:
            self._hungry[kept] = None

    def leave(self, kept: Kept) -> None:
        """It was let go."""
        self._hungry.pop(kept, None)

    def idle(self) -> list[Kept]:
        """All that are idle; what is taken out of the list is so no more."""
        self._idle = [kept for kept in self._idle if kept.is_ready]
        return self._idle

    def learn(self, seconds: float) -> None:
        """A call has taken so long."""
        if seconds >= _SHORT:
            self._depth = max(1, self._depth // 2)
        elif self._depth < _DEEPEST:
            self._depth = min(self._depth + 1 + self._depth // 8, _DEEPEST)

    def is_enough(self, kept: Kept) -> bool:
        """Whether it has short calls for a while."""
        return self._depth > _AHEAD and len(kept.calls) > _AHEAD
