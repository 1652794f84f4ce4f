"""Processes that are kept for tasks that are many and short, each with a broker's connection of its own.

Nobody touches a task here, so it must be done, and told, within its ttr.  Short ones are reserved several at a time,
and told several at a time: one step at the broker for all of them.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from daemonkit.errors import PayloadError
from daemonkit.processes.stopflag import LONGEST, StopFlag
from daemonkit.queue import current, errand, payload
from daemonkit.queue.broker import Broker, Delete, Outcome, Release, Reservation, Touch
from daemonkit.queue.connect import connect
from daemonkit.queue.link import Link, next_look
from daemonkit.queue.run import LOST, PAUSE, REASON, bury, fail
from daemonkit.queue.task import Task

log = logging.getLogger("daemonkit.queue")

_MOST: Final = 32  # tasks that are reserved at a time
_BATCH_TIME: Final = 0.02  # seconds that a batch may take: a stop, and what is more urgent, wait for its end


class Prefork:
    """One such process."""

    def __init__(self, url: str, tasks: Mapping[str, Task[..., Any]], stop: StopFlag) -> None:
        """Consume the one queue of ``tasks`` from the broker at ``url``."""
        self._url = url
        self._tasks = tasks
        self._stop = stop
        self._queue = next(iter(tasks.values())).policy.queue
        self._batch = 1
        self._told_at = 0.0  # monotonic seconds
        self._link = Link(self._connect, self._announce, stop.doing)

    def run(self, hooks: tuple[Callable[[], Any], ...]) -> None:
        """Consume until the flag is set."""
        for hook in hooks:
            hook()
        while not self._stop.is_set():
            self._turn()
        if self._link.outcomes:
            self._link.exchange({}, 0, time.monotonic())
        self._link.give_up()
        self._link.close()

    def _connect(self) -> Broker:
        broker = connect(self._url)
        broker.watch()
        if count := broker.recover():
            log.warning("%d task(s) of a consumer that has ended are tried again", count)
        return broker

    def _announce(self, broker: Broker) -> None:
        broker.announce([self._queue], 1)

    def _turn(self) -> None:
        now = time.monotonic()
        if self._link.wants_at > now:
            self._sleep()
            return
        found = self._link.exchange({self._queue: self._batch}, self._batch, now)
        if found is None:
            return
        for reservation in found.lost:
            log.error("%s is no longer ours: it took longer than its ttr, or the broker was restarted", reservation)
        self._link.look(now if found.reserved else next_look(found, self._batch, now))
        began = time.monotonic()
        for number, reservation in enumerate(found.reserved):
            now, end = time.monotonic(), self._link.must_be_told_at(reservation)
            if self._stop.is_set() or now >= end or now - began > _BATCH_TIME * 5:  # one of them was no short one
                self._link.outcomes += [Release(each) for each in found.reserved[number:]]
                self._batch = 1
                return
            self._link.outcomes.append(self._do(reservation, end - now))
        if found.reserved:
            each = (time.monotonic() - began) / len(found.reserved)
            self._batch = max(min(int(_BATCH_TIME / each), self._batch * 2, _MOST), 1)

    def _sleep(self) -> None:
        poll, now = select.poll(), time.monotonic()
        poll.register(self._stop.fileno(), select.POLLIN)
        broker = self._link.fileno(now)
        if broker is not None:
            poll.register(broker, select.POLLIN)
        seconds = max(self._link.wants_at - now, 0.0)  # after fileno, which may have found the connection lost
        patience = min(seconds, self._stop.patience())
        ready = {fd for fd, _ in poll.poll(patience * 1000 + 0.999)}
        if not ready and patience < seconds:
            self._stop.rest()
            ready = {fd for fd, _ in poll.poll(min(seconds - patience, LONGEST) * 1000 + 0.999)}
        if self._stop.fileno() in ready:
            self._stop.drain()
        if broker in ready:
            self._link.heard(time.monotonic())

    def _do(self, reservation: Reservation, most: float) -> Outcome:
        """Do it in ``most`` seconds: the others of the batch, that are done or wait, run out with it."""
        try:
            call = payload.decode(reservation.body)
            task = self._tasks[call.name_among(self._tasks)]
            task.check(call)
        except PayloadError as error:
            return bury(reservation, str(error))
        policy, attempt = task.policy, reservation.failures + 1
        if reservation.failures > policy.max_retries + LOST:
            return bury(reservation, f"begun {reservation.failures} times, and each time its process has died or hung")
        running = current.Running(reservation.queue, reservation.first_id, reservation.token, attempt)
        current.begin(running, lambda progress: self._tell(reservation, progress))
        kind, words = errand.perform(task, call, min(policy.soft_timeout or policy.timeout or most, most))
        if kind == errand.DONE:
            return Delete(reservation, words if policy.keep_result else None, policy.keep_result)
        return fail(reservation, policy, words.decode(errors="replace")[:REASON])

    def _tell(self, reservation: Reservation, progress: str) -> None:
        """A task has come so far: what it says too soon after the last is left out."""
        if (now := time.monotonic()) >= self._told_at + PAUSE:
            self._told_at = now
            with current.undisturbed():
                self._link.tell(Touch(reservation, progress), now)
