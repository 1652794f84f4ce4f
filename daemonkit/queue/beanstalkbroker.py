"""The broker in one beanstalkd or several that know nothing of each other.

A task is put into one of them, by turns, and what one of them has lost the others cannot know.  What beanstalkd has no
place for is refused: keys and results; and what it does not tell is left out: who has reserved a task, how many are
ahead, all tasks of a queue.  Times are whole seconds, rounded up; what we release for less than one we make ready
ourselves.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Final, TypeVar

from daemonkit.errors import BrokerError, UsageError
from daemonkit.queue import beanstalk
from daemonkit.queue.beanstalkserver import Refused, Server, failures
from daemonkit.queue.broker import (
    Broker,
    Bury,
    ConsumerInfo,
    Exchange,
    NewTask,
    Outcome,
    QueueStats,
    Reservation,
    State,
    Task,
    Touch,
)
from daemonkit.queue.checks import check_queue, check_seconds, check_task
from daemonkit.queue.history import unwrap
from daemonkit.queue.owner import myself

log = logging.getLogger("daemonkit.queue")

_SOON: Final = 1.0  # seconds before the end of a ttr, when a reserve is answered DEADLINE_SOON (protocol.txt)
_BESIDE_OTHERS: Final = 3.0  # seconds for a reply of one of several servers: meanwhile the others wait, too
_CUT: Final = 1.0  # seconds that are perhaps left beyond those that it tells, which are whole ones
_LATE: Final = "it was not done within its ttr"
_PEEKS: Final = {State.READY: b"peek-ready", State.DELAYED: b"peek-delayed", State.BURIED: b"peek-buried"}

T = TypeVar("T")


class BeanstalkBroker(Broker):
    """What one of several servers could not be told is kept, and told when it can be reached again."""

    keeps_keys: ClassVar[bool] = False
    keeps_results: ClassVar[bool] = False

    def __init__(self, url: str, servers: Sequence[str]) -> None:
        """Connect to ``servers``, each HOST:PORT or the path of a socket.

        Raises:
            BrokerError: none can be reached.
        """
        self.url = url
        patience = beanstalk.TIMEOUT if len(servers) == 1 else _BESIDE_OTHERS
        self._servers = [Server(where, patience) for where in servers]
        self._untold: dict[Server, list[Outcome]] = {server: [] for server in self._servers}
        self._turn = 0
        self._epoll: select.epoll | None = None
        self._wanted: frozenset[str] = frozenset()  # queues of which there was no more to be had
        self._any(lambda server: server.line.connection())

    def put_many(self, queue: str, tasks: Sequence[NewTask]) -> list[str]:
        """All go to one server, in one write; should that be lost meanwhile, some may be there.

        Raises:
            PutUncertain: that has happened; nothing is put again.
        """
        check_queue(queue)
        for task in tasks:
            check_task(queue, task)
            if task.key is not None:
                raise UsageError(f"put into {queue}: beanstalkd keeps no keys, so no task is unique there")
        if not tasks:
            return []
        refused: list[BrokerError] = []
        for server in self._in_turn():
            try:
                return server.put(queue, tasks)
            except Refused as error:
                refused.append(error)
        raise BrokerError("; ".join(map(str, refused)))

    def exchange(self, outcomes: Iterable[Outcome], room: Mapping[str, int], count: int) -> Exchange:
        left = {queue: most for queue, most in room.items() if most > 0} if count > 0 else {}
        told, lost = self._sorted(outcomes)
        found: list[Reservation] = []
        errors: list[BrokerError] = []
        has_worked = not (left or any(told.values()))
        for server in self._in_turn():
            try:
                if told[server]:
                    lost += server.settle(told[server])
                    told[server], has_worked = [], True
                server.ripen()
                if left and len(found) < count:
                    found += server.reserve(left, count - len(found))
                    has_worked = True
            except BrokerError as error:
                errors.append(error)
                # What is kept until it can be told: a touch would come too late.
                told[server] = [outcome for outcome in told[server] if not isinstance(outcome, Touch)]
            lost += server.forsaken()
        if errors and not has_worked:
            raise errors[0]
        self._untold = told
        self._wanted = (
            frozenset(queue for queue, most in left.items() if most > 0) if len(found) < count else frozenset()
        )
        if found:  # we may be at them for long: what a waiter is given now, would wait for that
            for server in self._servers:
                with contextlib.suppress(BrokerError), server.line.losing():  # the next exchange will tell
                    server.line.waiter.rest()
        lost = list({each.token: each for each in lost}.values())
        troubles = [server.line.trouble for server in self._servers if server.line.trouble]
        return Exchange(found, lost, self._until_look(), "; ".join(troubles) or None)

    def _sorted(self, outcomes: Iterable[Outcome]) -> tuple[dict[Server, list[Outcome]], list[Reservation]]:
        """What each server is to be told, with what it could not be told before; and what none will take."""
        told, lost = {server: list(untold) for server, untold in self._untold.items()}, []
        for outcome in outcomes:
            for server in self._servers:
                if server.is_of(outcome.reservation):
                    told[server].append(outcome)
                    break
            else:
                lost.append(outcome.reservation)
        return told, lost

    def _in_turn(self) -> list[Server]:
        """The servers, another one first each time, without those that could not be reached a moment ago."""
        self._turn += 1
        n, now = self._turn % len(self._servers), time.monotonic()
        servers = self._servers[n:] + self._servers[:n]
        return [server for server in servers if server.line.retry_at <= now] or servers

    def _until_look(self) -> float | None:
        """Seconds until a server is to be asked again that was lost, or will not wake us; None: there is none."""
        now = time.monotonic()
        # Its moment may have come since it was left out.
        left = [max(server.line.retry_at - now, 0) for server in self._servers if server.line.trouble]
        left += [_SOON for server in self._servers if server.is_late]
        left += [max(server.next_ripe - now, 0) for server in self._servers if server.next_ripe is not None]
        return min(left, default=None)

    def recover(self) -> int:
        """Nothing: the server gives back what a lost connection had reserved, at once."""
        return 0

    def announce(self, queues: Iterable[str], concurrency: int) -> None:
        names = set(queues)
        self._any(lambda server: server.line.ask(*server.line.connection().watching(names)))

    def consumers(self) -> list[ConsumerInfo]:
        """How many connections watch each queue: more is not told."""
        found = []
        for queue, fields in self._tubes().items():
            # All watch the default one, producers too, unless they have said otherwise.
            kind = "current-waiting" if queue == "default" else "current-watching"
            if count := sum(int(each[kind]) for each in fields):
                busy = sum(int(each["current-jobs-reserved"]) for each in fields)
                found.append(ConsumerInfo(f"on {count} connection(s)", (queue,), None, busy))
        return found

    def watch(self) -> int:
        if self._epoll is None:
            self._epoll = select.epoll()
        for server in self._servers if self._wanted else ():
            if server.line.retry_at <= time.monotonic():
                with server.line.losing():
                    fd = server.line.waiter.wait(self._wanted)
                with contextlib.suppress(FileExistsError):
                    self._epoll.register(fd, select.EPOLLIN)
        return self._epoll.fileno()

    def drain(self) -> None:
        if self._epoll is None:
            return
        ready = {fd for fd, _ in self._epoll.poll(0)}
        for server in self._servers:
            if server.line.waiter.fileno() in ready:
                with contextlib.suppress(BrokerError), server.line.losing():  # the next exchange will tell
                    server.line.waiter.hear()

    def kick(self, queue: str, bound: int) -> int:
        check_queue(queue)
        done = 0
        for server in self._servers:
            if bound > done:
                done += server.line.ask(*server.line.connection().using(queue), b"kick %d" % (bound - done))[-1].number
        return done

    def kick_task(self, id: str) -> bool:
        return self._with_job(id, lambda server, job: server.line.ask(b"kick-job %d" % job)[0].word == "KICKED", False)

    def delete_task(self, id: str) -> bool:
        def act(server: Server, job: int) -> bool:
            return not server.holds(job) and server.line.ask(b"delete %d" % job)[0].word == "DELETED"

        return self._with_job(id, act, False)

    def bury_task(self, id: str, reason: str) -> bool:
        """Its id is another one afterwards."""

        def act(server: Server, job: int) -> bool:
            task = self._task(server, job)
            if task is None or task.state not in (State.READY, State.DELAYED):
                return False
            reservation = server.take(job)
            if reservation is None:
                return False
            unfailed = reservation._replace(
                failures=reservation.failures - 1
            )  # to be buried is to have failed once more
            return not server.settle([Bury(unfailed, reason)])

        return self._with_job(id, act, False)

    def peek(self, id: str) -> Task | None:
        return self._with_job(id, self._task, None)

    def peek_state(self, queue: str, state: State, count: int = 1) -> list[Task]:
        """No more than the first of each server; and of those that are reserved only ours."""
        check_queue(queue)
        found: list[Task | None] = []
        for server in self._servers:
            if state is State.RESERVED:
                found += [self._task(server, job) for job in server.held(queue)]
            else:
                reply = server.line.ask(*server.line.connection().using(queue), _PEEKS[state])[-1]
                if reply.word == "FOUND":
                    found.append(self._task(server, reply.number))
        tasks = [task for task in found if task is not None and task.state is state]
        return sorted(tasks, key=lambda task: task.priority if task.left is None else task.left)[:count]

    def result(self, id: str) -> bytes | None:
        raise UsageError(f"result of task {id}: beanstalkd keeps no results; sqlite: and redis: do")

    def stats(self) -> list[QueueStats]:
        found = []
        for queue, fields in sorted(self._tubes().items()):
            ready, delayed, reserved, buried = (
                sum(int(each[f"current-jobs-{state.value}"]) for each in fields) for state in State
            )
            paused = max((float(each["pause-time-left"]) + _CUT for each in fields if int(each["pause"])), default=None)
            if ready or delayed or reserved or buried or paused is not None:
                found.append(QueueStats(queue, ready, delayed, reserved, buried, paused, None))
        return found

    def stores(self) -> frozenset[str]:
        return frozenset(server.line.ask(b"stats")[0].fields["id"] for server in self._servers)

    def ahead(self, task: Task) -> None:
        """Nobody can know."""

    def pause(self, queue: str, seconds: float, reason: str | None = None) -> None:
        """The reason is not kept; nor is the pause, over a restart of the server, or while nobody uses the queue."""
        check_queue(queue)
        whole = math.ceil(check_seconds(seconds, "pause"))
        for server in self._servers:
            server.line.ask(*server.line.connection().using(queue), b"pause-tube %s %d" % (queue.encode(), whole))

    def empty(self, queue: str, states: Iterable[State] = tuple(_PEEKS)) -> int:
        check_queue(queue)
        done = 0
        for server in self._servers:
            for state in states:
                if state in _PEEKS:
                    server.line.ask(*server.line.connection().using(queue))
                    found = server.line.ask(_PEEKS[state])[0]
                    while found.word == "FOUND":
                        deleted, found = server.line.ask(b"delete %d" % found.number, _PEEKS[state])
                        done += deleted.word == "DELETED"
        return done

    def doctor(self) -> list[str]:
        lines: list[str] = []
        for server in self._servers:
            try:
                lines += _diagnosis(server)
            except BrokerError as error:
                lines.append(str(error))
        return lines

    def close(self) -> None:
        if count := sum(map(len, self._untold.values())):
            log.error("%s: what came of %d task(s) could not be told; they will be done again", self.url, count)
        for server in self._servers:
            server.line.close()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def _any(self, act: Callable[[Server], object]) -> None:
        """Have it done by each server that can be reached; raise if none can."""
        errors = []
        for server in self._servers:
            try:
                act(server)
            except BrokerError as error:
                errors.append(error)
        if len(errors) == len(self._servers):
            raise errors[0]

    def _with_job(self, id: str, act: Callable[[Server, int], T], otherwise: T) -> T:
        """Have it done by the server whose task ``id`` is; it may be that of one that cannot be reached."""
        for server in self._servers:
            job = server.job(id)
            if job is not None:
                return act(server, job)
        return otherwise

    def _tubes(self) -> dict[str, list[dict[str, str]]]:
        """What each server says of each queue."""
        found: dict[str, list[dict[str, str]]] = {}
        for server in self._servers:
            names = server.line.ask(b"list-tubes")[0].names
            replies = server.line.ask(*[b"stats-tube " + name.encode() for name in names])
            for name, reply in zip(names, replies, strict=True):
                if reply.word == "OK":
                    found.setdefault(name, []).append(reply.fields)
        return found

    def _task(self, server: Server, job: int) -> Task | None:
        seen, stats = server.line.ask(b"peek %d" % job, b"stats-job %d" % job)
        if seen.word != "FOUND" or stats.word != "OK":
            return None
        fields = stats.fields
        body, history = unwrap(seen.data)
        state = State(fields["state"])
        is_ours = server.holds(job)
        return Task(
            fields["tube"],
            server.id(job),
            state,
            body,
            int(fields["pri"]),
            float(fields["ttr"]),
            float(fields["age"]),
            float(fields["time-left"]) + _CUT if state in (State.DELAYED, State.RESERVED) else None,
            int(fields["reserves"]),
            int(fields["timeouts"]),
            int(fields["releases"]),
            int(fields["buries"]),
            int(fields["kicks"]),
            failures(fields, history, is_reserved=state is State.RESERVED),
            history.reason or (_LATE if int(fields["timeouts"]) else None),
            myself() if is_ours else None,
            None,
        )


def _diagnosis(server: Server) -> Iterator[str]:
    fields = server.line.ask(b"stats")[0].fields
    yield f"beanstalkd {fields['version']} at {server.line.where}, up for {fields['uptime']} s"
    if fields["binlog-current-index"] == "0":
        yield "A POWER CUT, CRASH OR RESTART OF THE SERVER LOSES ALL: it has no binlog (-b DIR)"
    else:
        yield "a power cut loses the last puts, which wait for the next ones to be synced; nothing only with -f 0"
        yield "after a restart pauses are forgotten, and priorities that a release had changed"
        kept = int(fields["binlog-current-index"]) - int(fields["binlog-oldest-index"])
        if kept > 10:
            yield f"an old task keeps {kept} files of the binlog: see what is delayed or buried for long"
    if fields.get("draining") == "true":
        yield "it is draining (SIGUSR1): nothing can be put until it is restarted"
    yield f"a task may have {fields['max-job-size']} bytes (-z); lowering that loses larger ones at the next restart"
    yield "it knows no passwords: whoever reaches its port may read and delete all"
