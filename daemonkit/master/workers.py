"""Named workers: so many places each, and the places of processes that are on their way in or out."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from daemonkit.core.job import Job
from daemonkit.core.timer import Timer
from daemonkit.master.place import Event, Place, Schedule, State
from daemonkit.master.server import Server
from daemonkit.processes.children import Child
from daemonkit.processes.worker import Worker

log = logging.getLogger("daemonkit")


class Workers:
    """All the places."""

    def __init__(self, timer: Timer, on_fatal: Callable[[Place], None]) -> None:
        """Nothing runs before ``begin``; ``on_fatal`` is told of an essential worker that was given up."""
        self.timer = timer
        self.ready_timeout = 60.0  # seconds
        self.stop_schedule: Schedule = ()
        self.server: Server | None = None  # that new processes come from
        self._places: dict[str, list[Place]] = {}
        self._beside: list[Place] = []  # on trial, or with a process that is to end
        self.openers: dict[str, Callable[[], socket.socket]] = {}  # make what a worker's process is given, by its name
        self.get_token: Callable[[], int] = lambda: 0  # of the leadership
        self._leaders: dict[str, Worker] = {}  # that run only while the daemon leads
        self._is_leading = False
        self._parting: set[Place] = set()  # of the last leadership, on their way out
        self._deadline: Job | None = None  # until when they have to be
        self._on_parted: list[Callable[[], object]] = []
        self._on_quiet: list[Callable[[], None]] = []
        self._on_fatal = on_fatal

    def __iter__(self) -> Iterator[Place]:
        for places in self._places.values():
            yield from places

    def begin(self, workers: Mapping[str, Worker]) -> None:
        """Start all that are declared, but for those that wait until the daemon leads."""
        for worker in workers.values():
            self.scale(worker, worker.processes)

    def begin_leaders(self) -> None:
        """The daemon leads: start those that have waited for that, when those of its last leadership have ended."""
        self._is_leading = True
        if not self._parting:
            for worker in self._leaders.values():
                self._set_count(worker, worker.processes)

    def end_leaders(self, within: float) -> None:
        """The daemon leads no more: stop them, and kill those that are there ``within`` seconds."""
        self._is_leading = False
        leaving = [place for place in [*self, *self._beside] if place.worker.leader]
        for worker in self._leaders.values():
            self._set_count(worker, 0)
        self._parting |= {place for place in leaving if place.state is not State.IDLE}
        if self._parting and self._deadline is None:
            self._deadline = self.timer.once("end of the leader's workers", within, self._kill_parting)

    def when_parted(self, func: Callable[[], object]) -> None:
        """Call ``func`` once none that ``end_leaders`` was to end is there any more."""
        self._on_parted.append(func)
        self._tell_parted()

    def resume(self) -> None:
        """Start again what ``stop`` has ended."""
        for place in self:
            if place.state is State.IDLE:
                place.fill()

    def use(self, server: Server | None) -> None:
        """Let all that are started from now on come from ``server``; None: they wait until there is one."""
        self.server = server
        for place in [*self, *self._beside]:
            place.source = None
            if server:
                place.react(Event.SERVER)

    def go_back(self, fresh: Server, failed: Callable[[str], object]) -> None:
        """Replace again what comes from ``fresh``; ``failed`` is told of each process that could not be, and stays."""

        def went(error: str | None) -> None:
            if error is not None:
                failed(error)

        for place in list(self):
            if place.source is fresh and not fresh.is_lost:  # else its end will be told
                place.replace(None, went)

    def scale(self, worker: Worker, count: int) -> None:
        """Have ``count`` processes of ``worker``; those with the highest index go first."""
        if worker.leader:
            self._leaders[worker.name] = worker = worker._replace(processes=count)
            if not self._is_leading or self._parting:
                self._places.setdefault(worker.name, [])
                return
        self._set_count(worker, count)

    def _set_count(self, worker: Worker, count: int) -> None:
        places = self._places.setdefault(worker.name, [])
        leaving = places[count:]
        del places[count:]
        for place in leaving:
            self.add_beside(place)
            place.stop()
        for index in range(len(places), count):
            places.append(Place(self, worker, index))
        for place in places:
            if place.state in (State.IDLE, State.FATAL):
                place.refill()

    def count(self, name: str) -> int:
        """How many places ``name`` has."""
        return len(self._places[name])

    def stop(self, *, last: bool) -> None:
        """Stop all, at the same time: those that are the ``last`` to go, or those that are not."""
        for place in [*self, *self._beside]:
            if place.worker.is_last is last:
                place.stop()

    def last_children(self) -> list[Child]:
        """The processes of those that are the last to go."""
        lives = [place.life for place in [*self, *self._beside] if place.worker.is_last]
        return [life.child for life in lives if life is not None and life.child is not None]

    def add_beside(self, place: Place) -> None:
        """A place that is none of the number, until it is idle."""
        self._beside.append(place)

    def put(self, fresh: Place, old: Place) -> None:
        """Let ``fresh``, which was beside, stand where ``old`` stood."""
        places = self._places[old.worker.name]
        if old not in places:
            fresh.stop()  # scaled away meanwhile
            return
        self._beside.remove(fresh)
        places[places.index(old)] = fresh
        self.add_beside(old)

    def gone(self, place: Place) -> None:
        """A place has become idle."""
        if place in self._beside:
            self._beside.remove(place)
        if place in self._parting:
            self._parting.discard(place)
            self._tell_parted()
        self._tell_quiet()

    def when_quiet(self, func: Callable[[], None]) -> None:
        """Call ``func`` once no process is on its way in or out."""
        self._on_quiet.append(func)
        self._tell_quiet()

    def gave_up(self, place: Place) -> None:
        """A place is fatal."""
        if place.worker.essential:
            self._on_fatal(place)

    def describe(self) -> list[dict[str, Any]]:
        """One object a place, for ``status``."""
        return [place.describe() for place in [*self, *self._beside]]

    def _kill_parting(self) -> None:
        for place in self._parting:
            if place.life is not None:
                log.error("worker %s: killed: it has not ended before another may lead", place.name)
                place.life.signal(signal.SIGKILL)

    def _tell_parted(self) -> None:
        if self._parting:
            return
        if self._deadline is not None:
            self.timer.pause(self._deadline)
            self._deadline = None
        waiting, self._on_parted = self._on_parted, []
        for func in waiting:
            func()
        if self._is_leading:
            self.begin_leaders()

    def _tell_quiet(self) -> None:
        if not self._beside:
            waiting, self._on_quiet = self._on_quiet, []
            for func in waiting:
                func()
