"""A named worker: what is declared of it, and what it tells the master."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final, NamedTuple

SHARE: Final = 4  # beats are sent this often within a heartbeat_timeout
MOST: Final = 10_000  # processes of one worker


class Note(enum.IntEnum):
    """What a worker tells the master."""

    READY = 1
    BEAT = 2
    RECYCLE = 3  # payload: why
    LOADED = 4  # from a fork server that has read the script; payload: its workers, pickled
    FAILED = 5  # ... that could not; payload: the traceback
    DOING = 6  # payload: what it does, for ``status``
    REST = 7  # there is nothing to do, and no heartbeat until there is


class Recycling(NamedTuple):
    """After how much a worker is to make room for a fresh one; None: never."""

    max_tasks: int | None = None  # looks at the flag
    max_age: float | None = None  # seconds
    max_rss: int | None = None  # bytes
    jitter: float = 0.1  # each limit is exceeded by a random part of itself up to this, so that not all go at once


class Restarts(NamedTuple):
    """What happens when a worker ends unasked."""

    most: int = 10  # restarts within ``window``; one more and it is fatal
    window: float = 60.0  # seconds
    backoff: float = 1.0  # seconds before the second restart in the window, doubled for each further one
    longest: float = 30.0  # seconds


class Worker(NamedTuple):
    """One declaration."""

    name: str
    func: Callable[..., Any] | None  # None: a program
    argv: tuple[str, ...] = ()
    processes: int = 1
    wants_index: bool = False
    readiness: bool = False  # it says itself when it is ready
    essential: bool = False  # the daemon ends with it when it is fatal
    heartbeat_timeout: float | None = None  # seconds
    stop_schedule: tuple[tuple[int, float], ...] | None = None  # None: the daemon's
    recycling: Recycling = Recycling()
    restarts: Restarts = Restarts()
    is_titled: bool = False  # its name is all of its title
    leader: bool = False  # it runs only while the daemon leads
    is_last: bool = False  # it is stopped when all others have ended
    wants_fds: bool = False  # it is called with the flag and descriptors: see master.workers

    def title(self, index: int) -> str:
        """Of process ``index``, after the daemon's name."""
        if self.is_titled:
            return f"{self.name}-{index}" if index else self.name
        return f"worker {self.name}-{index}"
