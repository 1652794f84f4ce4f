"""One worker's place, in which processes come and go: a small state machine.

What an event leads to in a state is one cell of a table.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from daemonkit.core.job import Job
from daemonkit.errors import ForkServerLost
from daemonkit.master.backoff import Backoff
from daemonkit.master.entrance import Request
from daemonkit.master.server import Server
from daemonkit.master.status import describe_child
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.worker import SHARE, Note, Worker

if TYPE_CHECKING:
    from daemonkit.master.workers import Workers

log = logging.getLogger("daemonkit")

SETTLED: Final = 1.0  # seconds after which one that never looks at its flag, such as a program, counts as ready

Schedule = tuple[tuple[int, float], ...]
OnTrial = Callable[[str | None], None]


class State(enum.Enum):
    """Of one place."""

    IDLE = "idle"
    WAITING = "waiting for a fork server"
    STARTING = "starting"
    READY = "ready"
    RECYCLING = "recycling"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FATAL = "fatal"


class Event(enum.Enum):
    """What happens to it."""

    READY = "the process says that it is"
    SETTLED = "it has run for a while and says nothing"
    RECYCLE = "it says that it is worn, and ends"
    STOP = "it is told to end"
    ENDED = "the process has ended"
    LOST = "it has ended with its fork server"
    SERVER = "there is a fork server again"
    RESPAWN = "it has waited long enough"


class Life:
    """One process in a place, from its request to its end."""

    def __init__(self, server: Server) -> None:
        """A child of ``server`` is to be asked for."""
        self.server = server
        self.child: Child | None = None
        self.since: float | None = None  # seconds since the epoch; None: not forked yet
        self.heard = time.monotonic()  # when it said something last
        self.rests = False  # it has nothing to do, and so no heartbeat
        self.is_watched = False  # there is an alarm for its heart
        self.why = ""  # it is to end, or has ended, for this reason
        self.words = ""  # what its function raised
        self.doing: str | None = None  # in its own words

    def signal(self, number: int) -> None:
        """Send it a signal; KILL goes to its whole tree."""
        if self.child is not None:
            self.server.signal(self.child, number)


class Place:
    """Keeps one process of a worker alive."""

    def __init__(self, workers: Workers, worker: Worker, index: int, source: Server | None = None) -> None:
        """An empty place; ``fill`` starts the process, from ``source`` (None: the fork server of the day)."""
        self.worker = worker
        self.index = index
        self.source = source
        self.state = State.IDLE
        self.restarts = 0  # of processes that ended unasked
        self.last: Receipt | None = None
        self.life: Life | None = None
        self._workers = workers
        self._backoff = Backoff()
        self._alarms: list[Job] = []
        self._on_trial: OnTrial | None = None  # told whether it came up, once

    @property
    def name(self) -> str:
        """As in ps: crunch-0."""
        return f"{self.worker.name}-{self.index}"

    def fill(self) -> None:
        """Start the process."""
        server = self.source or self._workers.server
        self.state, self.life = State.WAITING, None
        if server is None:
            return
        self.worker = server.workers.get(self.worker.name, self.worker)  # new code may have declared it anew
        token = self._workers.get_token() if self.worker.leader else 0
        if self.worker.leader and not token:
            self._stand_by()
            return
        self.life = life = Life(server)
        request: Request = {"kind": "worker", "name": self.worker.name, "index": self.index, "token": token}
        opener = self._workers.openers.get(self.worker.name)
        try:
            with opener() if opener else contextlib.nullcontext() as given:
                fds = [given.fileno()] if given else []
                life.child = server.spawn(request, self._ended, self._started, self._noted, fds)
        except ForkServerLost:
            self.life = None  # there will be another
            if self._on_trial:
                self._fail_trial("its fork server has ended")
            return
        self.state = State.STARTING
        if self._on_trial:  # also one that cannot be forked has its bound
            self._after(self._workers.ready_timeout, self._too_late)

    def _stand_by(self) -> None:
        """The daemon leads no more; to find that out may have stopped us already."""
        if self._on_trial:
            self._fail_trial("the daemon leads no more")
        elif self.state is State.WAITING:
            self._leave()

    def refill(self) -> None:
        """Start the process of a place that was given up, as if nothing had been."""
        self._backoff = Backoff()
        self.fill()

    def replace(self, source: Server | None, done: OnTrial | None = None) -> None:
        """Let a process from ``source`` (None: the server of the day) take over; ``done`` is told why not, or None.

        The old process goes on until the new one is ready, and stays if that never is.
        """
        fresh = Place(self._workers, self.worker, self.index, source)
        fresh.restarts = self.restarts

        def came_up(error: str | None) -> None:
            if error is None:
                self._workers.put(fresh, self)
                self.stop()
            if done:
                done(error)

        fresh._on_trial = came_up
        self._workers.add_beside(fresh)
        fresh.fill()

    def stop(self) -> None:
        """End the process by its stop schedule; the place is idle when it has ended."""
        self.react(Event.STOP)

    def react(self, event: Event) -> None:
        """Do what ``event`` leads to."""
        action = TABLE.get((self.state, event))
        if action is not None:
            action(self)

    def describe(self) -> dict[str, Any]:
        """For ``status``."""
        life = self.life
        return describe_child(
            self.worker.title(self.index),
            life.child.pid if life and life.child else None,
            self.state.value,
            life.since if life else None,
            self.restarts,
            str(self.last) if self.last else None,
            life.doing if life else None,
        )

    def _started(self, child: Child) -> None:
        if self.life is None:
            return
        self.life.since, self.life.heard = time.time(), time.monotonic()
        if not self.worker.readiness:
            self._after(SETTLED, lambda: self.react(Event.SETTLED))
        elif not self._on_trial:
            self._after(self._workers.ready_timeout, self._too_late)

    def _noted(self, note: Note, payload: bytes) -> None:
        if self.life is None:
            return
        self.life.heard = time.monotonic()
        if note in (Note.REST, Note.BEAT):
            self.life.rests = note == Note.REST
        if note == Note.READY:
            self.react(Event.READY)
        elif note == Note.BEAT and self.state is State.READY:
            self._watch_heart(self.life)
        elif note == Note.FAILED:
            self.life.words = payload.decode(errors="replace")
        elif note == Note.DOING:
            self.life.doing = payload.decode(errors="replace")
        elif note == Note.RECYCLE:
            self.life.why = payload.decode()
            self.react(Event.RECYCLE)

    def _ended(self, child: Child, receipt: Receipt) -> None:
        if self.life is None:
            return
        is_lost, since = self.life.server.is_lost, self.life.since
        if is_lost and since is not None:
            receipt = receipt._replace(wall=max(time.time() - since, 0.0))
        self.last, self.life.child = receipt, None
        self._forget_alarms()
        self.react(Event.LOST if is_lost else Event.ENDED)

    def _become_ready(self) -> None:
        self.state = State.READY
        if self.life:
            self.life.heard = time.monotonic()
            self._watch_heart(self.life)
        self._tell_trial(None)

    def _begin_to_stop(self) -> None:
        self.state = State.STOPPING
        self._forget_alarms()
        self._step(self._schedule)

    def _begin_to_recycle(self) -> None:
        """It ends by itself, as after the first signal of the schedule; the rest is for one that does not."""
        self.state = State.RECYCLING
        self._forget_alarms()
        (_, patience), *rest = self._schedule
        self._after(patience, lambda: self._step(tuple(rest)))

    @property
    def _schedule(self) -> Schedule:
        return self.worker.stop_schedule or self._workers.stop_schedule

    def _step(self, schedule: Schedule) -> None:
        """Send the first signal of the schedule, and the rest later, while the process is there."""
        if self.life is None:
            return
        if not schedule:  # it did not end with KILL
            self.life.signal(signal.SIGKILL)
            return
        (number, patience), *rest = schedule
        self.life.signal(number)
        self._after(patience, lambda: self._step(tuple(rest)))

    def _renew(self) -> None:
        if self._on_trial:  # a fresh one would be worn as soon
            self._fail_trial(f"was not ready when it was worn: {self.life.why if self.life else ''}")
            return
        log.info("worker %s: recycled: %s", self.name, self.life.why if self.life else "")
        self.fill()

    def _leave(self) -> None:
        """It is not to run, and does not."""
        self._empty()
        self._workers.gone(self)

    def _empty(self) -> None:
        self._forget_alarms()
        self.state, self.life = State.IDLE, None
        self._on_trial = None

    def _seek_server(self) -> None:
        if self._on_trial:
            self._fail_trial("its fork server has ended")
            return
        self.restarts += 1
        self.source = None
        self.fill()

    def _crashed(self) -> None:
        """It has ended unasked: respawn it at once, then later and later, then no more."""
        life, last, now = self.life, self.last, time.monotonic()
        if life is None or last is None:
            return
        why = f"{words} ({last})" if (words := life.why or _reason(life, last)) else str(last)
        if self._on_trial:
            trace = life.words.partition("\n")[2]
            self._fail_trial(f"{why}\n{trace}".rstrip())
            return
        delay = self._backoff.wait(self.worker.restarts, now, last.wall)
        if delay is None:
            count, window = self._backoff.count, self.worker.restarts.window
            log.critical("worker %s: %s; ended %d times within %g s: given up as fatal", self.name, why, count, window)
            self.state = State.FATAL
            self._workers.gave_up(self)
            return
        self.restarts += 1
        log.error("worker %s: %s; respawned %s", self.name, why, f"in {delay:.1f} s" if delay else "at once")
        if delay:
            self.state = State.BACKOFF
            self._after(delay, lambda: self.react(Event.RESPAWN))
        else:
            self.fill()

    def _fail_trial(self, why: str) -> None:
        told = self._on_trial
        self._empty()
        if told:
            told(f"worker {self.name}: {why}")
        self._workers.gone(self)  # only now: who waits for quiet wants to know how it went

    def _tell_trial(self, error: str | None) -> None:
        told, self._on_trial = self._on_trial, None
        if told:
            told(error)

    def _watch_heart(self, life: Life) -> None:
        if not self.worker.heartbeat_timeout or life.is_watched:
            return
        # A look within a share of it after the last that was told, is not told.
        allowed, now = self.worker.heartbeat_timeout * (1 + 1 / SHARE), time.monotonic()
        due, life.is_watched = max(life.heard + allowed, now), True

        def look() -> None:
            life.is_watched = False
            if self.state is not State.READY or self.life is not life or life.rests:
                return
            now = time.monotonic()
            if now - due > allowed / SHARE:  # it is we who did not listen
                life.heard = now
            if now - life.heard < allowed:
                self._watch_heart(life)
                return
            life.why = f"hung: no heartbeat for {now - life.heard:.1f} s"
            life.signal(signal.SIGKILL)

        self._after(due - now, look)

    def _too_late(self) -> None:
        if self.state is State.STARTING and self.life:
            self.life.why = f"was not ready within ready_timeout, {self._workers.ready_timeout:g} s"
            self.life.signal(signal.SIGKILL)

    def _after(self, delay: float, func: Callable[[], object]) -> None:
        self._alarms = [alarm for alarm in self._alarms if alarm.planned is not None]
        self._alarms.append(self._workers.timer.once(f"worker {self.name}", delay, func))

    def _forget_alarms(self) -> None:
        for alarm in self._alarms:
            self._workers.timer.pause(alarm)
        self._alarms.clear()


def _reason(life: Life, last: Receipt) -> str:
    return "returned without having been asked to stop" if last.is_clean else life.words.partition("\n")[0]


# What is not in the table changes nothing: a signal that crosses an end, a note that comes late.
TABLE: Final[dict[tuple[State, Event], Callable[[Place], None]]] = {
    (State.IDLE, Event.STOP): Place._leave,
    (State.WAITING, Event.SERVER): Place.fill,
    (State.WAITING, Event.STOP): Place._leave,
    (State.STARTING, Event.READY): Place._become_ready,
    (State.STARTING, Event.SETTLED): Place._become_ready,
    (State.STARTING, Event.RECYCLE): Place._begin_to_recycle,
    (State.STARTING, Event.STOP): Place._begin_to_stop,
    (State.STARTING, Event.ENDED): Place._crashed,
    (State.STARTING, Event.LOST): Place._seek_server,
    (State.READY, Event.RECYCLE): Place._begin_to_recycle,
    (State.READY, Event.STOP): Place._begin_to_stop,
    (State.READY, Event.ENDED): Place._crashed,
    (State.READY, Event.LOST): Place._seek_server,
    (State.RECYCLING, Event.STOP): Place._begin_to_stop,
    (State.RECYCLING, Event.ENDED): Place._renew,
    (State.RECYCLING, Event.LOST): Place._seek_server,
    (State.STOPPING, Event.ENDED): Place._leave,
    (State.STOPPING, Event.LOST): Place._leave,
    (State.BACKOFF, Event.RESPAWN): Place.fill,
    (State.BACKOFF, Event.STOP): Place._leave,
    (State.FATAL, Event.STOP): Place._leave,
}
