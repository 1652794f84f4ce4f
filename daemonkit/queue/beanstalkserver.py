"""One beanstalkd of those that a broker uses, and what we have reserved there.

The server has no token, no place for reasons and failures, and no fractions of a second.  The token is the consumer's
clock.  A task that has failed is put anew with its history before its body, then deleted: its id is another one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from daemonkit.errors import BrokerError, BrokerFull, PutUncertain, TaskTooLarge
from daemonkit.queue.beanstalk import Connection, put
from daemonkit.queue.beanstalkline import INSTANCE, Line
from daemonkit.queue.broker import Bury, Delete, NewTask, Outcome, Release, Reservation, Touch
from daemonkit.queue.history import History, plain, unwrap, wrap

_ANYBODYS: Final = ("ready", "delayed")  # states
_MOST: Final = 32  # tasks that are reserved in one round trip


class Refused(BrokerError):
    """The server puts nothing at present: it was told to drain, or cannot be reached; another one may."""


class Server:
    """At the other end of its ``line``."""

    def __init__(self, where: str, patience: float) -> None:
        """Nothing is sent yet; see ``Line``."""
        self.line = Line(where, patience, self._take_up)
        # What we hold is about to run out, as the server has said: it will not see that it has, before we ask again.
        self.is_late = False
        self._held: dict[int, Reservation] = {}  # by the job's number
        self._settled: set[int] = set()  # tokens of those that have been told, or may have been
        self._forsaken: list[Reservation] = []  # no longer ours, and nobody knows yet
        self._uncounted: dict[int, History] = {}  # of those that the server had no room for
        self._ripe_at: dict[int, float] = {}  # jobs that are released for a part of a second: until when (monotonic)
        self._token = 0
        self._batch = 1

    def _take_up(self, connection: Connection, is_another: bool) -> None:
        """Over a new ``connection``: what the lost one held, is nobody's now; its children may still be at work."""
        self._ripe_at.clear()  # the server knows them, too, if only to the second
        if is_another:  # another life of the server, in which a number may be another job's
            self._forsaken += self._held.values()
            self._held.clear()
            self._settled.clear()
            self._uncounted.clear()
        jobs = list(self._held)
        for job, reply in zip(jobs, connection.ask([b"reserve-job %d" % job for job in jobs]), strict=True):
            if reply.word == "NOT_FOUND" and (lost := self._held.pop(job)).token not in self._settled:
                self._forsaken.append(lost)

    def forsaken(self) -> list[Reservation]:
        """Those that we have lost with a connection, each told once."""
        lost, self._forsaken = self._forsaken, []
        return lost

    def job(self, id: str) -> int | None:
        """The number of the job that ``id`` names; None if it is none of this server's present life.

        Raises:
            BrokerError: it cannot be reached.
        """
        number, _, instance = id.partition("-")
        if not (number.isascii() and number.isdecimal() and len(number) < 20 and len(instance) == INSTANCE):
            return None
        self.line.begin()
        return int(number) if self.line.instance == instance else None

    def id(self, job: int) -> str:
        """What names a job outside."""
        return f"{job}-{self.line.instance}"

    def put(self, queue: str, tasks: Sequence[NewTask]) -> list[str]:
        """Put ``tasks``; return their ids.

        Raises:
            Refused: it cannot be reached, or is told to drain; nothing was put.
            BrokerFull: it has no memory, or no disk, for more; nothing was put.
            PutUncertain: the connection was lost before the answer.
            TaskTooLarge: one is larger than it takes; nothing was put.
        """
        try:
            connection = self.line.begin()
        except BrokerError as error:
            raise Refused(str(error)) from error
        bodies, most = [plain(task.body) for task in tasks], self.line.most
        if (size := max(map(len, bodies))) > most:
            raise TaskTooLarge(
                f"put into {queue}: {size} bytes; beanstalkd at {self.line.where} takes up to {most} (-z)"
            )
        commands = [
            put(task.priority, math.ceil(task.delay), math.ceil(task.ttr), body)
            for task, body in zip(tasks, bodies, strict=True)
        ]
        try:
            with self.line.losing():
                replies = connection.ask([*connection.using(queue), *commands])[-len(commands) :]
        except BrokerError as error:
            raise PutUncertain(
                f"put {len(tasks)} task(s) into {queue} at {self.line.where}: {error}; "
                "some may be there: putting them again may do them twice"
            ) from error
        done = [reply.number for reply in replies if reply.word == "INSERTED"]
        if len(done) == len(tasks):
            return [self.id(job) for job in done]
        buried = [reply.number for reply in replies if reply.word == "BURIED" and reply.number]
        self.line.ask(*[b"delete %d" % job for job in (*done, *buried)])
        if any(reply.word == "DRAINING" for reply in replies):
            raise Refused(
                f"put into {queue} at {self.line.where}: it is draining (SIGUSR1): it takes no more until restarted"
            )
        raise BrokerFull(f"put into {queue} at {self.line.where}: it has no room ({replies[-1].word}); nothing was put")

    def reserve(self, room: dict[str, int], count: int) -> list[Reservation]:
        """Reserve up to ``count`` tasks, of each queue as many as it has ``room``, which shrinks by that.

        Raises:
            BrokerError: it cannot be reached, or the connection was lost.
        """
        found: list[Reservation] = []
        try:
            self._reserve(found, room, count)
        except BrokerError:
            for reservation in found:  # which nobody will hear of: they are not to be taken again
                del self._held[number(reservation)]
            raise
        return found

    def _reserve(self, found: list[Reservation], room: dict[str, int], count: int) -> None:
        queue, job = self.line.waiter.take_given() or ("", 0)
        if room.get(queue, 0) > 0 and self.line.ask(b"stats-job %d" % job)[0].fields.get("state") in _ANYBODYS:
            first = self.take(job)
            if first is not None:
                room[first.queue] -= 1
                found.append(first)
        while len(found) < count and (queues := [queue for queue, most in room.items() if most > 0]):
            batch = min(count - len(found), self._batch, *(room[queue] for queue in queues))
            commands = self.line.connection().watching(queues)
            replies = self.line.ask(*commands, *[b"reserve-with-timeout 0"] * batch)
            taken = {reply.number: reply.data for reply in replies if reply.word == "RESERVED"}
            self.is_late = any(reply.word == "DEADLINE_SOON" for reply in replies)
            for reservation in self._learn(taken):
                room[reservation.queue] -= 1
                found.append(reservation)
            if len(taken) < batch:
                self._batch = max(len(taken), 1)
                break
            if batch == self._batch:
                self._batch = min(batch * 2, _MOST)

    def _learn(self, taken: Mapping[int, bytes]) -> list[Reservation]:
        if not taken:
            return []
        found = []
        replies = self.line.ask(*[b"stats-job %d" % job for job in taken])
        for (job, data), reply in zip(taken.items(), replies, strict=True):
            if reply.word == "OK":
                fields = reply.fields
                body, history = unwrap(data)
                history = self._uncounted.pop(job, history)
                reservation = Reservation(
                    fields["tube"],
                    self.id(job),
                    self._next_token(),
                    body,
                    int(fields["pri"]),
                    float(fields["ttr"]),
                    failures(fields, history, is_reserved=True),
                    history.was,
                )
                self._held[job] = reservation
                found.append(reservation)
        return found

    def _next_token(self) -> int:
        """Microseconds by this machine's clock, and more than the one before."""
        self._token = max(self._token + 1, time.time_ns() // 1000)
        return self._token

    def take(self, job: int) -> Reservation | None:
        """Reserve this one, ready, delayed or buried; None if it is not there, or reserved.

        Raises:
            BrokerError: it cannot be reached, or the connection was lost.
        """
        reply = self.line.ask(b"reserve-job %d" % job)[0]
        found = self._learn({job: reply.data} if reply.word == "RESERVED" else {})
        return found[0] if found else None

    @property
    def next_ripe(self) -> float | None:
        """When ``ripen`` is to be called (monotonic seconds); None: there is no need to."""
        return min(self._ripe_at.values(), default=None) if self.line.is_up else None

    def ripen(self) -> None:
        """Make ready what was released for a part of a second that is over: the server would wait for a whole one.

        Raises:
            BrokerError: it cannot be reached, or the connection was lost: the server does it later.
        """
        now = time.monotonic()
        jobs = [job for job, moment in self._ripe_at.items() if moment <= now and self.line.is_up]
        for job in jobs:
            del self._ripe_at[job]
        replies = self.line.ask(*[b"stats-job %d" % job for job in jobs]) if jobs else []
        for job, reply in zip(jobs, replies, strict=True):
            if reply.fields.get("state") == "delayed":
                # Not kicked, which would forget its failures.
                self.line.ask(b"reserve-job %d" % job, b"release %d %s 0" % (job, reply.fields["pri"].encode()))

    def _delay(self, job: int, seconds: float) -> None:
        if 0 < seconds < 1:
            self._ripe_at[job] = time.monotonic() + seconds

    def holds(self, job: int) -> bool:
        """Whether we have reserved that, as far as we know."""
        return job in self._held

    def held(self, queue: str) -> list[int]:
        """The numbers of those of ``queue`` that we have reserved."""
        return [job for job, reservation in self._held.items() if reservation.queue == queue]

    def is_of(self, reservation: Reservation) -> bool:
        """Whether that was made here, in this life of the server as far as we know."""
        return reservation.id.rpartition("-")[2] == self.line.instance

    def settle(self, outcomes: Iterable[Outcome]) -> list[Reservation]:
        """Tell the server what came of reservations; return those that are no longer ours; see ``forsaken``, too.

        Raises:
            BrokerError: it cannot be reached, or the connection was lost; call it again with the same.
        """
        self.line.connection()  # which takes again what a lost one held
        simple: dict[int, Outcome] = {}
        anew: dict[int, Release | Bury] = {}
        for outcome in outcomes:
            job = number(outcome.reservation)
            held = self._held.get(job)
            if held is None and outcome.reservation.token in self._settled:
                continue  # before the connection was lost
            if held is None or held.token != outcome.reservation.token:
                self._forsaken.append(outcome.reservation)
            elif isinstance(outcome, Bury) or (isinstance(outcome, Release) and outcome.reason is not None):
                anew[job] = outcome
            else:
                simple[job] = outcome
        lost = self._tell(simple)
        lost += [outcome.reservation for job, outcome in anew.items() if not self._put_anew(job, outcome)]
        self._settled.clear()
        return lost

    def _tell(self, outcomes: Mapping[int, Outcome]) -> list[Reservation]:
        deleted = {each.reservation.token for each in outcomes.values() if isinstance(each, Delete)}
        self._settled |= deleted  # should the answers be lost
        replies = self.line.ask(*[_command(job, outcome) for job, outcome in outcomes.items()])
        lost = []
        for outcome, reply in zip(outcomes.values(), replies, strict=True):
            if reply.word == "NOT_FOUND":
                lost.append(outcome.reservation)
            elif isinstance(outcome, Release):
                self._delay(number(outcome.reservation), outcome.delay)
            if reply.word == "NOT_FOUND" or not isinstance(outcome, Touch):
                self._drop(outcome.reservation)
        return lost

    def _drop(self, reservation: Reservation) -> None:
        del self._held[number(reservation)]
        self._settled.add(reservation.token)

    def _put_anew(self, job: int, outcome: Release | Bury) -> bool:
        """Put the task with its history, then delete it; False: it is no longer ours."""
        reservation = outcome.reservation
        if self.line.ask(b"touch %d" % job)[0].word == "NOT_FOUND":
            self._drop(reservation)
            return False
        priority = reservation.priority
        if isinstance(outcome, Release) and outcome.priority is not None:
            priority = outcome.priority
        # Before it is buried, the copy waits as long as the original: if we die in between, it is done once more.
        delay = math.ceil(reservation.ttr if isinstance(outcome, Bury) else outcome.delay)
        history = History(reservation.failures + 1, outcome.reason, reservation.first_id)
        body = wrap(reservation.body, history, self.line.most)
        copy = None if body is None else self._copy(reservation, priority, delay, body)
        if copy is None:  # no room for its history, or it is draining: what can be said without is said
            if isinstance(outcome, Release):
                self._uncounted[job] = history
            self.line.ask(_command(job, outcome))
        else:
            bury = [b"reserve-job %d" % copy, b"bury %d %d" % (copy, priority)] if isinstance(outcome, Bury) else []
            self.line.ask(*bury, b"delete %d" % job)
        if isinstance(outcome, Release):
            self._delay(copy or job, outcome.delay)
        self._drop(reservation)
        return True

    def _copy(self, reservation: Reservation, priority: int, delay: int, body: bytes) -> int | None:
        command = put(priority, delay, math.ceil(reservation.ttr), body)
        reply = self.line.ask(*self.line.connection().using(reservation.queue), command)[-1]
        if reply.word == "BURIED":
            self.line.ask(b"delete %d" % reply.number)
        return reply.number if reply.word == "INSERTED" else None


def _command(job: int, outcome: Outcome) -> bytes:
    if isinstance(outcome, Delete):
        return b"delete %d" % job
    if isinstance(outcome, Touch):
        return b"touch %d" % job
    priority = outcome.reservation.priority
    if isinstance(outcome, Bury):
        return b"bury %d %d" % (job, priority)
    if outcome.priority is not None:
        priority = outcome.priority
    return b"release %d %d %d" % (job, priority, math.ceil(outcome.delay))


def failures(fields: Mapping[str, str], history: History, *, is_reserved: bool) -> int:
    """Of a task since it was put or kicked: those that were told, and the reservations that nobody ended."""
    reserves, releases, buries = (int(fields[name]) for name in ("reserves", "releases", "buries"))
    told = 0 if int(fields["kicks"]) else history.failures
    return told + max(reserves - releases - buries - is_reserved, 0)


def number(reservation: Reservation) -> int:
    """Of its job."""
    return int(reservation.id.partition("-")[0])
