"""What a worker looks at between two pieces of work: whether it is to end, and it is seen that it lives."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import time
from typing import Final

from daemonkit.core.chance import chance
from daemonkit.processes.wire import Wire
from daemonkit.processes.worker import SHARE, Note, Recycling, Worker

LONGEST: Final = 3600.0  # seconds: a wait without end is made of these
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_LOOK: Final = 1.0  # seconds between two looks at our own memory


class StopFlag:
    """Whether the worker is to end: look at it between two pieces of work."""

    def __init__(self, notes: Wire, number: int, worker: Worker) -> None:
        """Send notes as child ``number``; SIGTERM sets the flag."""
        self._notes = notes
        self._number = number
        self._wear = Wear(worker.recycling)
        self._interval = None if worker.heartbeat_timeout is None else worker.heartbeat_timeout / SHARE
        self._is_set = False
        self._is_ready = False
        self._beaten = time.monotonic()
        self._wakeup, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        self._explicit = worker.readiness

    def is_set(self) -> bool:
        """Whether to end now.  A look counts as a piece of work done, as a heartbeat, and the first as readiness."""
        self._wear.looks += 1
        return self._look()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep for ``timeout`` seconds (None: until the stop), ended at once by a stop; tell whether to end now."""
        end = None if timeout is None else time.monotonic() + timeout
        self._wear.looks += 1
        while not self._look():
            left = LONGEST if end is None else end - time.monotonic()
            if left <= 0:
                return False
            self._sleep(min(left, self._interval or left, self._wear.left()))
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
        if not self._is_set and (why := self._wear.why(now)):
            self._is_set = True
            self._wake()
            self._notes.send(Note.RECYCLE, self._number, why.encode())
        return self._is_set

    def _beat(self, now: float) -> None:
        if self._interval is not None and now - self._beaten >= self._interval:
            self._beaten = now
            self._notes.offer(Note.BEAT, self._number)  # a master that is busy must not hold up the work

    def _sleep(self, timeout: float) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if poll.poll(max(int(timeout * 1000 + 0.999), 1)):
            self.drain()  # another thread may have been quicker
            if self._is_set:
                self._wake()  # what we have read may have been meant for others, too

    def _on_term(self, number: int, frame: object) -> None:
        self._is_set = True
        self._wake()  # the byte that the signal itself has written may have been read before we came to run

    def _wake(self) -> None:
        """End the waits of all threads, once the flag is set."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"!")


class Wear:
    """How much a worker has done, against what it may do before a fresh one takes its place."""

    def __init__(self, limits: Recycling) -> None:
        """Begin now."""
        self.looks = 0  # at the flag
        self._limits = _with_jitter(limits)
        self._born = self._measured = time.monotonic()

    def why(self, now: float) -> str | None:
        """Why it is to be replaced; None: it is not."""
        limits = self._limits
        if limits.max_tasks is not None and self.looks > limits.max_tasks:
            return f"{self.looks - 1} pieces of work, max_tasks"
        if limits.max_age is not None and now - self._born >= limits.max_age:
            return f"{now - self._born:.0f} s old, max_age"
        if limits.max_rss is not None and now - self._measured >= _LOOK:
            self._measured = now
            if (size := _resident()) > limits.max_rss:
                return f"{size / 2**20:.0f} MB of memory, max_rss"
        return None

    def left(self) -> float:
        """Seconds that may be slept before it is too old."""
        if self._limits.max_age is None:
            return LONGEST
        return max(self._born + self._limits.max_age - time.monotonic(), 0.001)


def _with_jitter(limits: Recycling) -> Recycling:
    factor = 1 + chance() * limits.jitter
    return Recycling(
        None if limits.max_tasks is None else max(round(limits.max_tasks * factor), 1),
        None if limits.max_age is None else limits.max_age * factor,
        None if limits.max_rss is None else round(limits.max_rss * factor),
    )


def _resident() -> int:
    """Our resident bytes (proc(5), statm)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE
