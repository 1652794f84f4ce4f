"""Named workers: so many places each, and the places of processes that are on their way in or out."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from daemonkit.core.timer import Timer
from daemonkit.master.leaders import Leaders
from daemonkit.master.place import Event, Place, Schedule, State
from daemonkit.master.server import Server
from daemonkit.processes.children import Child
from daemonkit.processes.worker import Worker


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
        self.leaders = Leaders(timer, self._set_count)
        self._on_quiet: list[Callable[[], None]] = []
        self._on_fatal = on_fatal

    def __iter__(self) -> Iterator[Place]:
        for places in self._places.values():
            yield from places

    def begin(self, workers: Mapping[str, Worker]) -> None:
        """Start all that are declared, but for those that wait until the daemon leads."""
        for worker in workers.values():
            self.scale(worker, worker.processes)

    def end_leaders(self, within: float) -> None:
        """The daemon leads no more: stop what runs only while it does, and kill what is there ``within`` seconds."""
        self.leaders.end([*self, *self._beside], within)

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
        (self.leaders.scale if worker.leader else self._set_count)(worker, count)

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
        self.leaders.gone(place)
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

    def _tell_quiet(self) -> None:
        if not self._beside:
            waiting, self._on_quiet = self._on_quiet, []
            for func in waiting:
                func()
