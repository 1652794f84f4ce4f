"""A named worker: what is declared of it, and the flag that its function looks at between two pieces of work."""

from __future__ import annotations

import contextlib
import enum
import math
import os
import random
import select
import signal
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from daemonkit.processes.wire import Wire

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_LOOK: Final = 1.0  # seconds between two looks at our own memory
SHARE: Final = 4  # beats are sent this often within a heartbeat_timeout
MOST: Final = 10_000  # processes of one worker
LONGEST: Final = 3600.0  # seconds: a wait without end is made of these


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


class StopFlag:
    """Whether the worker is to end: look at it between two pieces of work."""

    def __init__(self, notes: Wire, number: int, worker: Worker) -> None:
        """Send notes as child ``number``; SIGTERM sets the flag."""
        self._notes = notes
        self._number = number
        self._limits = _with_jitter(worker.recycling)
        self._interval = None if worker.heartbeat_timeout is None else worker.heartbeat_timeout / SHARE
        self._is_set = False
        self._is_ready = False
        self._looks = 0
        self._born = self._beaten = self._measured = time.monotonic()
        self._wakeup, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        self._explicit = worker.readiness

    def is_set(self) -> bool:
        """Whether to end now.  A look counts as a piece of work done, as a heartbeat, and the first as readiness."""
        self._looks += 1
        return self._look()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep for ``timeout`` seconds (None: until the stop), ended at once by a stop; tell whether to end now."""
        end = None if timeout is None else time.monotonic() + timeout
        self._looks += 1
        while not self._look():
            left = LONGEST if end is None else end - time.monotonic()
            if left <= 0:
                return False
            self._sleep(min(left, self._interval or left, self._age_left()))
        return True

    def ready(self) -> None:
        """Say that the set-up is done and work begins; further calls do nothing."""
        if not self._is_ready:
            self._is_ready = True
            self._notes.send(Note.READY, self._number)

    def doing(self, words: str) -> None:
        """Have ``daemonkit status`` show ``words``, up to 200 characters, until this worker says something else."""
        self._notes.send(Note.DOING, self._number, words[:200].encode(errors="replace"))

    def fileno(self) -> int:
        """Readable when the flag may have been set, for who waits for other things as well; then call ``drain``."""
        return self._wakeup

    def drain(self) -> None:
        """Take in what the descriptor has told."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)

    def close(self) -> None:
        """Give the descriptors back, in a process that was forked."""
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)
        os.close(self._writer)

    def heartbeat(self) -> None:
        """Say that a long piece of work makes progress, for a worker with a heartbeat_timeout."""
        self._beat(time.monotonic())

    def patience(self) -> float:
        """Seconds that may pass without a look; who has nothing to do then, says ``rest``."""
        return LONGEST if self._interval is None or self._beaten == -math.inf else self._interval

    def rest(self) -> None:
        """Say that there is nothing to do: no heartbeat is missed until the next look at the flag."""
        if self._interval is not None:
            self._beaten = -math.inf  # the next look is one, and is told
            self._notes.send(Note.REST, self._number)

    def _look(self) -> bool:
        if not self._explicit:
            self.ready()
        now = time.monotonic()
        self._beat(now)
        if not self._is_set and (why := self._worn(now)):
            self._is_set = True
            self._notes.send(Note.RECYCLE, self._number, why.encode())
        return self._is_set

    def _beat(self, now: float) -> None:
        if self._interval is not None and now - self._beaten >= self._interval:
            self._beaten = now
            self._notes.offer(Note.BEAT, self._number)  # a master that is busy must not hold up the work

    def _worn(self, now: float) -> str | None:
        limits = self._limits
        if limits.max_tasks is not None and self._looks > limits.max_tasks:
            return f"{self._looks - 1} pieces of work, max_tasks"
        if limits.max_age is not None and now - self._born >= limits.max_age:
            return f"{now - self._born:.0f} s old, max_age"
        if limits.max_rss is not None and now - self._measured >= _LOOK:
            self._measured = now
            if (size := _resident()) > limits.max_rss:
                return f"{size / 2**20:.0f} MB of memory, max_rss"
        return None

    def _age_left(self) -> float:
        if self._limits.max_age is None:
            return LONGEST
        return max(self._born + self._limits.max_age - time.monotonic(), 0.001)

    def _sleep(self, timeout: float) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if poll.poll(max(int(timeout * 1000 + 0.999), 1)):
            os.read(self._wakeup, 4096)

    def _on_term(self, number: int, frame: object) -> None:
        self._is_set = True
        # Again, for a wait in another thread, which may have read the wakeup byte before we came to run.
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"!")


def _with_jitter(limits: Recycling) -> Recycling:
    factor = 1 + random.random() * limits.jitter
    return Recycling(
        None if limits.max_tasks is None else max(round(limits.max_tasks * factor), 1),
        None if limits.max_age is None else limits.max_age * factor,
        None if limits.max_rss is None else round(limits.max_rss * factor),
    )


def _resident() -> int:
    """Our resident bytes (proc(5), statm)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE
