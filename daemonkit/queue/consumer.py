"""The consumer: reserves tasks, has each run in a child of its own, and tells the broker what came of it.

It is a worker of the daemon.  Its children come from a fork server below it, which was forked before the broker's
connection was opened, so no child has that (law 3).  While a child lives, the consumer touches its task: ttr is for
consumers that have died, and may be short however long a task takes.
"""

from __future__ import annotations

import logging
import math
import random
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from daemonkit.core.title import take_title
from daemonkit.errors import BrokerError, ForkServerLost, PayloadError
from daemonkit.processes import child
from daemonkit.processes.children import Child, Children, fork_server
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Closed, DescriptorsLost, Message, Wire, pair
from daemonkit.processes.worker import StopFlag, Worker
from daemonkit.queue import errand, payload
from daemonkit.queue.admission import SHOWN, Admission
from daemonkit.queue.broker import Broker, Bury, Delete, Exchange, Outcome, Release, Reservation
from daemonkit.queue.connect import connect
from daemonkit.queue.run import Run
from daemonkit.queue.task import Task

log = logging.getLogger("daemonkit.queue")

LAST_WORDS: Final = 1.0  # seconds before graceful_timeout is up, in which what is not done is given back
LOST: Final = 3  # reservations that nobody ended, beyond max_retries, before a task is taken for the cause
_LONGEST: Final = 3600.0  # seconds: a longer wait is made of these (poll(2) takes 24 days at most)
_RETRY: Final = (0.1, 30.0)  # seconds between two tries of a broker that cannot be reached: the first, doubled up to


class Settings(NamedTuple):
    """What the consumer has to know of the daemon."""

    daemon: str  # its name
    broker: str
    concurrency: int
    graceful_timeout: float
    min_free_memory: int  # bytes
    become: Callable[[str], None]  # lets the log know what this process is now
    hooks: tuple[Callable[[], Any], ...]  # to be run in each child first


class Consumer:
    """One process with one connection."""

    def __init__(self, name: str, settings: Settings, tasks: Mapping[str, Task[..., Any]], stop: StopFlag) -> None:
        """Nothing is opened yet; ``run`` does all."""
        self._name = name
        self._settings = settings
        self._tasks = tasks
        self._stop = stop
        self._runs: dict[int, Run] = {}  # by the child's id
        self._outcomes: list[Outcome] = []  # not told yet
        self._retry = 0.0  # seconds; 0: the broker can be reached
        self._look_at = 0.0  # when the broker is to be asked again (monotonic seconds)
        self._admission = Admission(settings.min_free_memory)
        self._end: float | None = None  # when what is left is to be given back; None: there is no stop

    def run(self) -> None:
        """Consume until the flag is set; then finish or give back what is in hand."""
        settings = self._settings
        title = f"{settings.daemon}: {self._name}"
        self._broker: Broker | None = None
        self._start_server(title)
        while not self._is_over():
            self._turn()
        self._children.wire.close()
        child.wait_for(self._server, LAST_WORDS)
        if self._broker:
            self._broker.close()

    def _start_server(self, title: str) -> None:
        ours, theirs = pair()
        ours.setblocking(False)
        self._results = Wire(ours)
        settings = self._settings
        errands = errand.Errands(self._tasks, settings.daemon, Wire(theirs), settings.hooks, settings.become)

        def prepare() -> None:
            take_title(f"{title}: fork server")
            ours.close()
            self._stop.close()
            errands.rehearse()

        self._server, wire = fork_server(errands.enter, prepare)
        theirs.close()
        self._children = Children(wire)

    def _is_over(self) -> bool:
        if not self._stop.is_set():
            return False
        if self._end is None:
            self._end = time.monotonic() + max(self._settings.graceful_timeout - LAST_WORDS, 0.0)
        return not self._runs and not self._outcomes

    def _turn(self) -> None:
        self._sleep()
        try:
            self._children.receive()
            self._children.wire.flush()
        except (ForkServerLost, BrokenPipeError, ConnectionResetError):
            raise SystemExit("the consumer's fork server has ended") from None  # our successor gets what is ours back
        self._read()
        now = time.monotonic()
        self._expire(now)
        self._touch(now)
        self._exchange(now)

    def _sleep(self) -> None:
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        poll.register(self._results.fileno(), select.POLLIN)
        wire = self._children.wire
        poll.register(wire.fileno(), select.POLLIN | (select.POLLOUT if wire.is_waiting else 0))
        broker_fd = self._broker_fd()
        if broker_fd is not None:
            poll.register(broker_fd, select.POLLIN)
        ends = (self._look_at, math.inf if self._end is None else self._end)
        due = min((*ends, *(min(run.touch_at, run.due) for run in self._runs.values())))
        left = None if due == math.inf else min(max(due - time.monotonic(), 0.0), _LONGEST)
        ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000 + 0.999)}
        if self._stop.fileno() in ready:
            self._stop.drain()
        if self._broker and broker_fd in ready:
            self._look_at = 0.0
            try:
                self._broker.drain()
            except BrokerError as error:
                self._wait_for_broker(error, time.monotonic())

    def _broker_fd(self) -> int | None:
        """What tells of new tasks; None while none could be taken, or there is no broker."""
        if self._broker is None or self._retry or not self._room():
            return None
        try:
            return self._broker.watch()
        except BrokerError as error:
            self._wait_for_broker(error, time.monotonic())
            return None

    def _room(self) -> int:
        return 0 if self._stop.is_set() else self._settings.concurrency - len(self._runs)

    def _rooms(self) -> dict[str, int]:
        """How many more of each queue may run."""
        rooms: dict[str, int] = {}
        for task in self._tasks.values():
            most = task.policy.concurrency or self._settings.concurrency
            rooms[task.policy.queue] = min(most, rooms.get(task.policy.queue, most))
        for run in self._runs.values():
            rooms[run.reservation.queue] -= 1
        return rooms

    def _exchange(self, now: float) -> None:
        """Tell the broker what is done, and get more, if there is anything to tell or to get."""
        if not self._outcomes and now < self._look_at:
            return
        room = self._room()
        ages = [(run.child.pid, now - run.began) for run in self._runs.values()]
        allowed = min(room, self._admission.room(ages)) if room else 0
        try:
            if self._broker is None:
                self._broker = self._connect()
            outcomes, rooms = self._outcomes, self._rooms()
            found = self._broker.exchange(outcomes, rooms if allowed else {}, allowed)
            self._outcomes = []
        except BrokerError as error:
            self._wait_for_broker(error, now)
            return
        self._retry = 0.0
        for reservation in found.lost:
            self._lose(reservation)
        for reservation in found.reserved:
            self._begin(reservation)
        if allowed < room and len(found.reserved) >= allowed:
            self._look_at = now + SHOWN
        else:
            self._look_at = self._next_look(found, room, now)

    def _next_look(self, found: Exchange, room: int, now: float) -> float:
        """When to ask for more, if nobody says before that there is more."""
        if len(found.reserved) >= room:
            return math.inf  # the next end of a task makes room
        if found.reserved:
            return now  # another queue may have had room for more
        return math.inf if found.due is None else now + found.due

    def _connect(self) -> Broker:
        broker = connect(self._settings.broker)
        broker.watch()
        broker.announce({task.policy.queue for task in self._tasks.values()}, self._settings.concurrency)
        if count := broker.recover():
            log.warning("%d task(s) of a consumer that has ended are tried again", count)
        return broker

    def _wait_for_broker(self, error: BrokerError, now: float) -> None:
        first, most = _RETRY
        if not self._retry:
            log.error("%s; tried again until it can be reached", error)
        self._retry = min(self._retry * 2, most) if self._retry else first
        self._look_at = now + self._retry * random.uniform(0.8, 1.2)
        if self._stop.is_set() and not self._runs:
            log.error("what came of %d task(s) could not be told; they will be done again", len(self._outcomes))
            self._outcomes = []

    def _begin(self, reservation: Reservation) -> None:
        try:
            call = payload.decode(reservation.body)
            name = call.name_among(self._tasks)
            self._tasks[name].check(call)
        except PayloadError as error:
            self._bury(reservation, str(error))
            return
        policy = self._tasks[name].policy
        if reservation.failures > policy.max_retries + LOST:
            self._bury(reservation, f"begun {reservation.failures} times, and each time its consumer has died or hung")
            return
        run = Run(reservation, policy, time.monotonic())
        try:
            run.child = self._children.spawn(errand.request(name, reservation, policy), self._ended)
        except OSError as error:
            if isinstance(error, ForkServerLost):
                return  # we end, too, and our successor gets back what is ours
            log.error("task %s of %s: no process for it: %s; given back", reservation.id, reservation.queue, error)
            self._outcomes.append(Release(reservation, _RETRY[1]))
            return
        self._runs[run.child.id] = run

    def _bury(self, reservation: Reservation, reason: str) -> None:
        why, _, trace = reason.partition("\n")
        log.error("task %s of %s: %s; buried%s", reservation.id, reservation.queue, why, trace and f"\n{trace}")
        self._outcomes.append(Bury(reservation, reason))
        self._look_at = 0.0

    def _ended(self, row: Child, receipt: Receipt) -> None:
        self._read()  # its last words were sent before its end was told
        run = self._runs.pop(row.id)
        self._look_at = 0.0
        self._admission.learn(receipt.max_rss)
        if not run.is_ours:
            return
        if run.kind == errand.DONE:
            keep = run.policy.keep_result
            self._outcomes.append(Delete(run.reservation, run.words if keep else None, keep))
        elif run.is_given_back:
            self._outcomes.append(Release(run.reservation))
        else:
            self._fail(run, receipt)

    def _fail(self, run: Run, receipt: Receipt) -> None:
        reservation, policy = run.reservation, run.policy
        reason = run.reason(receipt)
        attempt = reservation.failures + 1
        if attempt > policy.max_retries:
            self._bury(reservation, reason)
            return
        why, _, trace = reason.partition("\n")
        delay = policy.wait(reservation.failures, random.random())
        what = f"attempt {attempt} of {policy.max_retries + 1}, again in {delay:.1f} s"
        log.warning("task %s of %s: %s; %s%s", reservation.id, reservation.queue, why, what, trace and f"\n{trace}")
        self._outcomes.append(Release(reservation, delay, reason))

    def _read(self) -> None:
        while True:
            try:
                message: Message | None = self._results.receive()
            except (Closed, DescriptorsLost):
                return
            if message is None:
                return
            run = self._runs.get(message.id)
            if run is None:
                continue
            if message.kind == errand.PROGRESS:
                run.tell(bytes(message.payload).decode(errors="replace"), time.monotonic())
            else:
                run.kind, run.words = message.kind, bytes(message.payload)

    def _expire(self, now: float) -> None:
        """Kill what takes too long, and all when the time to finish is up."""
        for run in self._runs.values():
            if run.due <= now:
                run.due, run.words = math.inf, f"took longer than its timeout, {run.policy.timeout:g} s".encode()
                run.child.kill_tree()
        if self._end is not None and self._end <= now:
            self._end = math.inf
            for run in self._runs.values():
                run.is_given_back = True
                run.child.kill_tree()

    def _touch(self, now: float) -> None:
        for run in self._runs.values():
            if run.touch_at <= now and run.is_ours:
                self._outcomes.append(run.touch(now))

    def _lose(self, reservation: Reservation) -> None:
        """Somebody else may have it by now: end what is still being done for it."""
        log.error("task %s of %s is no longer ours: the broker was told too late", reservation.id, reservation.queue)
        for run in self._runs.values():
            if run.reservation is reservation:
                run.is_ours = False
                run.child.kill_tree()


def worker(tasks: Mapping[str, Task[..., Any]], settings: Settings) -> Worker:
    """The worker that consumes the queues of ``tasks``."""
    name = f"consumer {','.join(sorted({task.policy.queue for task in tasks.values()}))}"

    def consume(stop: StopFlag) -> None:
        Consumer(name, settings, tasks, stop).run()

    return Worker(name, consume, is_titled=True)
