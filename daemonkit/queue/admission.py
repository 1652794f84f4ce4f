"""How many more tasks the memory lets begin: the kernel is never to kill one for want of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Final

from daemonkit.core.memory import Memory

log = logging.getLogger("daemonkit.queue")

_LEAST: Final = 2**20  # bytes that a task's process is thought to need at least
NO_LIMIT: Final = 2**31
SHOWN: Final = 0.25  # seconds after which a process has shown what it needs
_FIRST: Final = 4  # tasks that begin when nothing is known
_PLENTY: Final = 10  # times as much as is under way
_QUIET: Final = 60.0  # seconds between two complaints
_SAMPLES: Final = 8
_SHARE: Final = 0.05  # of each task that has ended, in what the next is thought to need,
_SHARE_MORE: Final = 0.5  # if that was more than thought
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Admission:
    """Looks at the memory before tasks are reserved.

    A process shows what it needs only when it has run for a moment.  So no more begin than have shown it already, and
    for each that has not, what the others need is set aside.
    """

    def __init__(self, min_free: int) -> None:
        """Leave ``min_free`` bytes free; 0: do not look."""
        self._min_free = min_free
        self._memory = Memory()
        self._need = float(_LEAST)  # bytes of a task's process that it does not share with us
        self._shared = _resident()
        self._ended = 0
        self._plenty_until = 0.0  # there is so much that nobody need look
        self._tell_at = 0.0

    def room(self, living: Sequence[tuple[int | None, float]]) -> int:
        """How many tasks may begin now, as far as memory goes.

        Args:
            living: of those that are under way, oldest first: the PID, if it is known, and the age in seconds.
        """
        now = time.monotonic()
        if not self._min_free or now < self._plenty_until:
            return NO_LIMIT
        shown = [pid for pid, age in living if pid is not None and age >= SHOWN]
        hidden = len(living) - len(shown)
        sizes = [size - self._shared for pid in shown[-_SAMPLES:] if (size := _resident(pid))]
        need = max(self._need, sum(sizes) / len(sizes) if sizes else 0.0)
        available = self._memory.available()
        room = int((available - self._min_free) / need) - hidden
        if room > _PLENTY * (len(living) + _FIRST) and self._ended > _FIRST:
            self._plenty_until = now + SHOWN
            return NO_LIMIT
        if room <= 0 and now >= self._tell_at:
            self._tell_at = now + _QUIET
            log.warning(
                "no task is begun until there is memory: %.0f MB are free, min_free_memory is %.0f MB",
                available / 2**20,
                self._min_free / 2**20,
            )
        return max(min(room, max(_FIRST, len(shown) + self._ended) - hidden), 0)

    def learn(self, max_rss: int) -> None:
        """A task has ended whose process has had up to ``max_rss`` bytes."""
        self._ended += 1
        need = max(max_rss - self._shared, _LEAST)
        self._need += (need - self._need) * (_SHARE if need < self._need else _SHARE_MORE)


def _resident(pid: int | str = "self") -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0  # it has ended
