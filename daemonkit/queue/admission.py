"""How many more tasks the memory lets begin: the kernel is never to kill one for want of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final

from daemonkit.core.memory import Memory

log = logging.getLogger("daemonkit.queue")

# Bytes of a task's process that its resident size does not show: page tables and the kernel's own (a third of a
# megabyte), and copies of the pages that it had shared with its parent (one and a half, and more with more imports).
_LEAST: Final = 5 * 2**19
_KERNEL: Final = 2**19
NO_LIMIT: Final = 2**31
SHOWN: Final = 0.25  # seconds after which a process has shown what it needs
_FIRST: Final = 4  # tasks that begin when nothing is known
_PLENTY: Final = 10  # times as much as is under way: half of that at once, and without a look for so long
_GLANCE: Final = 0.02  # seconds for which a look is good otherwise
_QUIET: Final = 60.0  # seconds between two complaints
SAMPLES: Final = 3
_PAUSE: Final = 0.1  # seconds between two times that samples are taken,
_EFFORT: Final = 0.01  # or such a part of all time: among hundreds of processes each takes a millisecond
_SHARE: Final = 0.05  # of each task that has ended, in what the next is thought to need,
_SHARE_MORE: Final = 0.5  # if that was more than thought
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Admission:
    """Looks at the memory before tasks are reserved.

    A process shows what it needs only when it has run for a moment.  So no more begin than have shown it already, and
    for each that has not, what the others need is set aside.
    """

    def __init__(self, min_free: int, server: int) -> None:
        """Leave ``min_free`` bytes free, 0: do not look; the processes are forks of ``server``, a PID."""
        self._min_free = min_free
        self._server = server
        self._memory = Memory()
        self._need = float(_LEAST)  # bytes of a task's process that it does not share with the server
        self._shared = _resident(server)
        self._ended = 0
        self._seen = 0.0  # what those need that were looked at last
        self._sample_at = 0.0
        self._good_until = 0.0  # nobody need look
        self._granted = 0  # nor until so many have begun
        self._tell_at = 0.0

    def room(self, living: int, hidden: int, some: Callable[[], list[int]]) -> int:
        """How many tasks may begin now, as far as memory goes.

        Args:
            living: how many are under way.
            hidden: of them, who have not shown yet what they need.
            some: tells the PIDs of some of the others, to look at.
        """
        if not self._min_free:
            return NO_LIMIT
        now, begun = time.monotonic(), living + self._ended
        if now >= self._good_until or self._granted <= begun:
            self._sample(now, some)
            room = self._look(now, living, hidden)
            if room > _PLENTY * (living + _FIRST) and self._ended > _FIRST:
                room, self._good_until = room // 2, now + SHOWN
            else:
                room, self._good_until = min(room, max(_FIRST, begun - hidden) - hidden), now + _GLANCE
            self._granted = begun + room
        return max(self._granted - begun, 0)

    def _sample(self, now: float, some: Callable[[], list[int]]) -> None:
        if now < self._sample_at:
            return
        self._shared = _resident(self._server)  # it learns what tasks import
        sizes = [size for pid in some() if (size := _own(pid))]
        self._seen = sum(sizes) / len(sizes) if sizes else 0.0
        end = time.monotonic()
        self._sample_at = end + max(_PAUSE, (end - now) / _EFFORT)

    def _look(self, now: float, living: int, hidden: int) -> int:
        need = max(self._need, self._seen)
        available = self._memory.available()
        room = int((available - self._min_free) / need) - hidden
        if room <= 0 and now >= self._tell_at:
            self._tell_at = now + _QUIET
            log.warning(
                "no task is begun until there is memory: %.0f MB are free, min_free_memory is %.0f MB",
                available / 2**20,
                self._min_free / 2**20,
            )
        return room

    def learn(self, max_rss: int) -> None:
        """A task has ended whose process has had up to ``max_rss`` bytes."""
        self._ended += 1
        need = max(max_rss - self._shared, 0) + _LEAST
        self._need += (need - self._need) * (_SHARE if need < self._need else _SHARE_MORE)


def _own(pid: int) -> int:
    """What it shares with nobody, and what the kernel needs for it (proc(5), smaps_rollup); 0: it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = [line.split() for line in file if line.startswith(b"Private_")]
    except OSError:
        return 0
    return sum(int(size) * 1024 for _, size, _ in lines) + _KERNEL


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0  # it has ended
