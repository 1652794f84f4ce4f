"""Workers that run only while the daemon leads: all of one leadership have ended before those of the next begin."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable

from daemonkit.core.job import Job
from daemonkit.core.timer import Timer
from daemonkit.master.place import Place, State
from daemonkit.processes.worker import Worker

log = logging.getLogger("daemonkit")


class Leaders:
    """Those of all workers that were declared with ``leader=True``."""

    def __init__(self, timer: Timer, set_count: Callable[[Worker, int], None]) -> None:
        """The daemon does not lead yet; ``set_count`` lets so many processes of a worker be."""
        self._timer = timer
        self._set_count = set_count
        self._workers: dict[str, Worker] = {}
        self._is_leading = False
        self._parting: set[Place] = set()  # of the last leadership, on their way out
        self._deadline: Job | None = None  # until when they have to be
        self._on_parted: list[Callable[[], object]] = []

    def scale(self, worker: Worker, count: int) -> None:
        """Have ``count`` processes of ``worker`` while the daemon leads."""
        self._workers[worker.name] = worker = worker._replace(processes=count)
        self._set_count(worker, count if self._is_leading and not self._parting else 0)

    def begin(self) -> None:
        """The daemon leads: start all, when those of its last leadership have ended."""
        self._is_leading = True
        if not self._parting:
            for worker in self._workers.values():
                self._set_count(worker, worker.processes)

    def end(self, places: Iterable[Place], within: float) -> None:
        """The daemon leads no more: stop those of ``places``, and kill them if they are there ``within`` seconds."""
        self._is_leading = False
        leaving = [place for place in places if place.worker.leader]
        for worker in self._workers.values():
            self._set_count(worker, 0)
        self._parting |= {place for place in leaving if place.state is not State.IDLE}
        if self._parting and self._deadline is None:
            self._deadline = self._timer.once("end of the leader's workers", within, self._kill)

    def when_parted(self, func: Callable[[], object]) -> None:
        """Call ``func`` once none that ``end`` was to end is there any more."""
        self._on_parted.append(func)
        self._tell_parted()

    def gone(self, place: Place) -> None:
        """A place has become idle."""
        if place in self._parting:
            self._parting.discard(place)
            self._tell_parted()

    def _kill(self) -> None:
        for place in self._parting:
            if place.life is not None:
                log.error("worker %s: killed: it has not ended before another may lead", place.name)
                place.life.signal(signal.SIGKILL)

    def _tell_parted(self) -> None:
        if self._parting:
            return
        if self._deadline is not None:
            self._timer.pause(self._deadline)
            self._deadline = None
        waiting, self._on_parted = self._on_parted, []
        for func in waiting:
            func()
        if self._is_leading:
            self.begin()
