"""The consumer: reserves tasks, has each run in a child of its own, and tells the broker what came of it.

It is a worker of the daemon.  Its children come from a fork server below it, which was forked before the broker's
connection was opened, so no child has that (law 3).  While a child lives, the consumer touches its task: ttr is for
consumers that have died, and may be short however long a task takes.
"""

from __future__ import annotations

import itertools
import logging
import math
import select
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from daemonkit.core.limits import raise_descriptors
from daemonkit.core.logs import Sink
from daemonkit.errors import ForkServerLost, PayloadError
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.stopflag import StopFlag
from daemonkit.processes.worker import Worker
from daemonkit.queue import errand, payload
from daemonkit.queue.admission import SAMPLES, SHOWN, Admission
from daemonkit.queue.broker import Broker, Delete, Release, Reservation
from daemonkit.queue.ceiling import Ceiling
from daemonkit.queue.connect import connect
from daemonkit.queue.crew import Crew
from daemonkit.queue.link import Link, next_look
from daemonkit.queue.prefork import Prefork
from daemonkit.queue.run import LOST, Run, bury, fail
from daemonkit.queue.task import Task

log = logging.getLogger("daemonkit.queue")

LAST_WORDS: Final = 1.0  # seconds before graceful_timeout is up, in which what is not done is given back
_AHEAD: Final = 32  # tasks that are reserved and whose processes are not there yet: others could do what waits here
_SOON: Final = 0.01  # seconds in which some of those have begun
_LONGEST: Final = 3600.0  # seconds: a longer wait is made of these (poll(2) takes 24 days at most)
_HUNG: Final = 5.0  # seconds after its time-out in which a task that is not forked may end by itself
_SILENT: Final = 10.0  # seconds that a broker may be silent before it is taken for lost (queue.redis, queue.beanstalk)
_EACH: Final = 2  # descriptors of a task, at most
_NO_MEMORY: Final = "no task is begun until there is memory, see min_free_memory"
_OTHERS: Final = 64  # descriptors of a consumer that are no task's


class Settings(NamedTuple):
    """What the consumer has to know of the daemon."""

    daemon: str  # its name
    broker: str
    concurrency: int
    graceful_timeout: float
    min_free_memory: int  # bytes
    sink: Sink  # the log
    hooks: tuple[Callable[[], Any], ...]  # to be run in each child first


class Consumer:
    """One process with one connection."""

    def __init__(self, name: str, settings: Settings, tasks: Mapping[str, Task[..., Any]], stop: StopFlag) -> None:
        """Fork a fork server; the broker's connection is opened later."""
        self._settings = settings
        self._tasks = tasks
        self._stop = stop
        self._runs: dict[int, Run] = {}  # by the child's id
        self._look_at = math.inf  # when the first of them may want something (monotonic seconds)
        self._busy: Counter[str] = Counter()  # of them, by queue
        self._ceiling = Ceiling(settings.concurrency)
        self._end: float | None = None  # when what is left is to be given back; None: there is no stop
        self._link = Link(self._connect, self._announce, stop.doing)
        self._crew = Crew(
            f"{settings.daemon}: {name}",
            lambda wire: errand.Errands(tasks, settings.daemon, wire, settings.hooks, settings.sink),
            stop.close,
        )
        self._admission = Admission(settings.min_free_memory, self._crew.server)

    def run(self) -> None:
        """Consume until the flag is set; then finish or give back what is in hand."""
        raise_descriptors(self._settings.concurrency * _EACH + _OTHERS)
        while not self._is_over():
            self._turn()
        self._link.give_up()
        self._crew.close()
        self._link.close()

    def _is_over(self) -> bool:
        if not self._stop.is_set():
            return False
        if self._end is None:
            self._end = time.monotonic() + max(self._settings.graceful_timeout - LAST_WORDS, 0.0)
        return not self._runs and (not self._link.outcomes or self._link.is_down)

    def _turn(self) -> None:
        self._sleep()
        try:
            self._crew.receive()
        except ForkServerLost:
            raise SystemExit("the consumer's fork server has ended") from None  # our successor gets what is ours back
        self._read()
        now = time.monotonic()
        self._give_up_all(now)
        if now >= self._look_at:
            self._attend(now)
        self._exchange(now)

    def _sleep(self) -> None:
        poll, now = select.poll(), time.monotonic()
        poll.register(self._stop.fileno(), select.POLLIN)
        self._crew.register(poll)
        broker = self._link.fileno(now) if self._room() else None
        if broker is not None:
            poll.register(broker, select.POLLIN)
        ends = (self._link.wants_at, math.inf if self._end is None else self._end)
        due = min(*ends, self._look_at)
        left = None if due == math.inf else min(max(due - now, 0.0), _LONGEST)
        ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000 + 0.999)}
        if self._stop.fileno() in ready:
            self._stop.drain()
        if broker in ready:
            self._link.heard(now)

    def _room(self) -> int:
        return 0 if self._stop.is_set() else self._ceiling.room(len(self._runs))

    def _rooms(self) -> dict[str, int]:
        """How many more of each queue may run."""
        rooms: dict[str, int] = {}
        for task in self._tasks.values():
            most = task.policy.concurrency or self._settings.concurrency
            rooms[task.policy.queue] = min(most, rooms.get(task.policy.queue, most))
        return {queue: most - self._busy[queue] for queue, most in rooms.items()}

    def _exchange(self, now: float) -> None:
        """Tell the broker what is done, and get more, if there is anything to tell or to get."""
        if now < self._link.wants_at:
            return
        room = self._room()
        unborn, hidden = self._young(now)
        ahead = max(_AHEAD - unborn, 0)
        fit = self._admission.room(len(self._runs), hidden, lambda: self._some_after(hidden)) if room else 0
        allowed = min(room, fit, ahead)
        found = self._link.exchange(self._rooms(), allowed, now)
        if found is None:
            return
        is_short = allowed < room and len(found.reserved) >= allowed  # of memory, or of processes that have begun
        self._link.show(_NO_MEMORY if is_short and not fit else None)
        self._link.look(now + (SHOWN if fit < ahead else _SOON) if is_short else next_look(found, room, now))
        for reservation in found.lost:
            self._lose(reservation)
        for reservation in found.reserved:
            self._begin(reservation)

    def _young(self, now: float) -> tuple[int, int]:
        """How many have no process yet, and how many have not shown what memory they need."""
        unborn = hidden = 0
        for run in reversed(self._runs.values()):
            if run.child.pid is None:
                unborn += 1
            elif now - run.began >= SHOWN:
                break  # the others are older
            hidden += 1
        return unborn, hidden

    def _some_after(self, hidden: int) -> list[int]:
        """PIDs of some that have shown it."""
        runs = itertools.islice(reversed(self._runs.values()), hidden, hidden + SAMPLES)
        return [run.child.pid for run in runs if run.child.pid]

    def _connect(self) -> Broker:
        broker = connect(self._settings.broker)
        broker.watch()
        if count := broker.recover():
            log.warning("%d task(s) of a consumer that has ended are tried again", count)
        names = [name for name, task in self._tasks.items() if task.policy.keep_result]
        if names and not broker.keeps_results:
            log.warning("%s keeps no results: keep_result of %s does nothing", broker.url, ", ".join(names))
        return broker

    def _announce(self, broker: Broker) -> None:
        broker.announce({task.policy.queue for task in self._tasks.values()}, self._settings.concurrency)

    def _begin(self, reservation: Reservation) -> None:
        try:
            call = payload.decode(reservation.body)
            name = call.name_among(self._tasks)
            self._tasks[name].check(call)
            policy = self._tasks[name].policy
            request = errand.request(name, call, reservation, policy)
        except PayloadError as error:
            self._link.outcomes.append(bury(reservation, str(error)))
            return
        if reservation.failures > policy.max_retries + LOST:
            reason = f"begun {reservation.failures} times, and each time its consumer has died or hung"
            self._link.outcomes.append(bury(reservation, reason))
            return
        run = Run(reservation, policy, time.monotonic(), self._link.asked)
        try:
            run.child, run.stderr = self._crew.spawn(request, self._ended, lambda data: self._relay(run, data))
        except OSError as error:
            if isinstance(error, ForkServerLost):
                return  # we end, too, and our successor gets back what is ours
            self._ceiling.lower(len(self._runs), error)
            self._link.outcomes.append(Release(reservation))
            return
        self._runs[run.child.id] = run
        self._busy[reservation.queue] += 1
        self._look_at = min(self._look_at, run.moment)

    def _ended(self, row: Child, receipt: Receipt) -> None:
        self._read()  # its last words were sent before its end was told
        run = self._runs.pop(row.id)
        self._busy[run.reservation.queue] -= 1
        printed = self._crew.last_words(run.stderr)
        self._link.look(0.0)
        self._admission.learn(receipt.max_rss)
        if not run.is_ours:
            return
        if run.kind == errand.DONE:
            keep = run.policy.keep_result
            self._link.outcomes.append(Delete(run.reservation, run.words if keep else None, keep))
        elif run.is_given_back:
            self._link.outcomes.append(Release(run.reservation))
        else:
            self._link.outcomes.append(fail(run.reservation, run.policy, run.reason(receipt, printed)))

    def _relay(self, run: Run, data: bytes) -> None:
        """A task has printed that on stderr."""
        title = errand.title_of(self._settings.daemon, run.reservation.queue, run.reservation.id)
        text = data.decode(errors="backslashreplace")
        self._settings.sink.relay(title, run.child.pid or 0, logging.WARNING, text)

    def _read(self) -> None:
        for message in self._crew.words():
            run = self._runs.get(message.id)
            if run is None:
                continue
            if message.kind == errand.PROGRESS:
                run.pulse.tell(bytes(message.payload).decode(errors="replace"), time.monotonic())
                self._look_at = min(self._look_at, run.moment)
            elif message.kind == errand.LEARNED:
                self._crew.learn(bytes(message.payload))
            else:
                run.kind, run.words = message.kind, bytes(message.payload)

    def _attend(self, now: float) -> None:
        """Kill what takes too long, touch the others."""
        for run in self._runs.values():
            if run.due <= now:
                run.due, run.words = math.inf, f"took longer than its timeout, {run.policy.timeout:g} s".encode()
                run.child.kill_tree()
            if run.pulse.at <= now:
                outcome = run.pulse.touch(now)
                if run.is_ours:
                    self._link.outcomes.append(outcome)
        self._look_at = min((run.moment for run in self._runs.values()), default=math.inf)

    def _give_up_all(self, now: float) -> None:
        """Kill them when the time to finish is up."""
        if self._end is not None and self._end <= now:
            self._end = math.inf
            for run in self._runs.values():
                run.is_given_back = True
                run.child.kill_tree()

    def _lose(self, reservation: Reservation) -> None:
        """Somebody else may have it by now: end what is still being done for it."""
        log.error("%s is no longer ours: its ttr was up, or the broker was restarted", reservation)
        for run in self._runs.values():
            if run.reservation is reservation:
                run.is_ours = False
                run.child.kill_tree()


def workers(tasks: Mapping[str, Task[..., Any]], settings: Settings) -> list[Worker]:
    """The workers that consume the queues of ``tasks``: one for all whose tasks are forked, and one for each other."""
    by_queue: dict[str, dict[str, Task[..., Any]]] = {}
    for name, task in tasks.items():
        by_queue.setdefault(task.policy.queue if task.policy.mode == "prefork" else "", {})[name] = task
    forked = by_queue.pop("", {})
    made = [_prefork(queue, those, settings) for queue, those in by_queue.items()]
    return [_consumer(forked, settings), *made] if forked else made


def _consumer(tasks: Mapping[str, Task[..., Any]], settings: Settings) -> Worker:
    name = f"consumer {','.join(sorted({task.policy.queue for task in tasks.values()}))}"

    def consume(stop: StopFlag) -> None:
        Consumer(name, settings, tasks, stop).run()

    return Worker(name, consume, is_titled=True)


def _prefork(queue: str, tasks: Mapping[str, Task[..., Any]], settings: Settings) -> Worker:
    caps = [task.policy.concurrency for task in tasks.values() if task.policy.concurrency]
    longest = _HUNG + max(_SILENT, *(task.policy.timeout or task.policy.ttr for task in tasks.values()))

    def consume(stop: StopFlag) -> None:
        Prefork(settings.broker, tasks, stop).run(settings.hooks)

    return Worker(
        f"consumer {queue}",
        consume,
        processes=min([settings.concurrency, *caps]),
        heartbeat_timeout=longest,
        is_titled=True,
    )
