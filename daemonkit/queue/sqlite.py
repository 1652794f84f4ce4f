"""The broker in a file: SQLite, with a write-ahead log.  No server, one host, and it is kept when the power fails."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from daemonkit.core import inotify
from daemonkit.errors import BrokerError, UsageError
from daemonkit.queue import statements as sql
from daemonkit.queue.broker import (
    Broker,
    Bury,
    ConsumerInfo,
    Delete,
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
from daemonkit.queue.database import Database
from daemonkit.queue.owner import is_dead, myself

log = logging.getLogger("daemonkit.queue")

_STATES: Final = (State.READY, State.DELAYED, State.RESERVED, State.BURIED)  # as their numbers in the table
_NUMBER: Final = {state: number for number, state in enumerate(_STATES)}
_ORDER: Final = ("priority, task.id", "due, task.id", "due, task.id", "due, task.id")
_OPTIONS: Final = ("FULL", "NORMAL")
_LOOK: Final = 250  # milliseconds between two looks where nothing can be watched
_BRIEF: Final = 0.2  # seconds that a consumer waits for a writer before it goes on with its own affairs
_LATE: Final = "it was not done within its ttr"
_DEAD: Final = "the process that had reserved it has ended"


class SqliteBroker(Broker):
    """A queue in a file."""

    def __init__(self, path: str, synchronous: str = "FULL", *, make: bool = True) -> None:
        """Open ``path``.

        Args:
            path: absolute.
            synchronous: "FULL": what was accepted is on the disk.  "NORMAL", faster: it is after a moment; a power cut
                in between loses the last puts, and repeats the last tasks (sqlite.org/pragma.html).
            make: if it is not there.

        Raises:
            UsageError: ``synchronous`` is neither.
            BrokerError: the file cannot be used.
        """
        if synchronous not in _OPTIONS:
            raise UsageError(f"sqlite: synchronous={synchronous!r} is not one of {', '.join(_OPTIONS)}")
        self.url = f"sqlite:{path}"
        self._database = Database(path, synchronous, make=make)
        self._queues: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._owner = myself()
        self._watch: inotify.Watch | None = None
        self._watched = 0
        self._is_behind = False  # somebody writes for longer than we would wait
        self._silent = -1  # in place of a watch that cannot be had: never readable
        self._is_announced = False
        self._forget_boot()

    def put_many(self, queue: str, tasks: Sequence[NewTask]) -> list[str]:
        for task in tasks:
            check_task(queue, task)
        wall = _wall()
        with self._database.writing() as connection:
            number = self._number(connection, queue)
            return [str(_put(connection, number, task, wall)) for task in tasks]

    def exchange(self, outcomes: Iterable[Outcome], room: Mapping[str, int], count: int) -> Exchange:
        outcomes = tuple(outcomes)
        wanted = [(queue, min(most, count)) for queue, most in room.items() if min(most, count) > 0]
        if not outcomes and not self._has_some([queue for queue, _ in wanted]):
            return Exchange([], [], self._due() if wanted else None)
        with self._database.writing() as connection:
            lost = [outcome.reservation for outcome in outcomes if not _settle(connection, outcome)]
            reserved = self._reserve(connection, wanted, count) if wanted else []
            due = self._next_due(connection) if wanted else None  # what is due nobody has room for, is nobody's hurry
        return Exchange(reserved, lost, due)

    def _has_some(self, queues: list[str]) -> bool:
        """Whether a transaction is worth it: an idle look must not write."""
        if not queues:
            return False
        with self._database.reading() as connection:
            for queue in queues:
                number = self._queues.get(queue) or self._find(connection, queue)
                if number and connection.execute(sql.FIRST, (number, 1)).fetchall():
                    return True
            delayed, reserved, _ = connection.execute(sql.EARLIEST, (0,)).fetchone()
        return (delayed is not None and delayed <= _wall()) or (reserved is not None and reserved <= _monotonic())

    def _reserve(self, connection: sqlite3.Connection, wanted: list[tuple[str, int]], count: int) -> list[Reservation]:
        wall, monotonic = _wall(), _monotonic()
        connection.execute(sql.EXPIRE, (_LATE, monotonic))
        connection.execute(sql.RIPEN, (wall,))
        paused = {row[0] for row in connection.execute(sql.PAUSED, (wall,))}
        numbers = [(self._find(connection, queue), most) for queue, most in wanted]
        parameters = [each for pair in numbers if pair[0] and pair[0] not in paused for each in pair]
        if not parameters:
            return []
        each = " UNION ALL ".join([sql.FIRST] * (len(parameters) // 2))
        rows = connection.execute(sql.FIRST_OF_ALL.format(each=each), (*parameters, count)).fetchall()
        if not rows:
            return []
        # Not from 0: what comes of a reservation in a file that was replaced is not to be taken for one in the next.
        connection.execute(sql.NEXT_TOKENS, (time.time_ns() // 1000, len(rows)))
        token: int = connection.execute(sql.TOKEN).fetchone()[0] - len(rows)
        reserved = []
        for number, queue, priority, ttr, failures, key, body in rows:
            token += 1
            connection.execute(sql.RESERVE, (monotonic + ttr, token, self._owner, number))
            name, seconds = self._names[queue], ttr / 1000
            reserved.append(Reservation(name, str(number), token, body, priority, seconds, failures, key=key))
        return reserved

    def recover(self) -> int:
        with self._database.reading() as connection:
            dead = [owner for (owner,) in connection.execute(sql.OWNERS).fetchall() if is_dead(owner)]
        if not dead:
            return 0
        with self._database.writing() as connection:
            return sum(connection.execute(sql.DISOWN, (_DEAD, owner)).rowcount for owner in dead)

    def announce(self, queues: Iterable[str], concurrency: int) -> None:
        dead = [each.owner for each in self._announced() if is_dead(each.owner)]
        with self._database.writing() as connection:
            connection.executemany(sql.RENOUNCE, [(owner,) for owner in dead])
            connection.execute(sql.ANNOUNCE, (self._owner, " ".join(sorted(queues)), concurrency))
        self._is_announced = True

    def consumers(self) -> list[ConsumerInfo]:
        return [each for each in self._announced() if not is_dead(each.owner)]

    def _announced(self) -> list[ConsumerInfo]:
        with self._database.reading() as connection:
            rows = connection.execute(sql.CONSUMERS).fetchall()
        return [ConsumerInfo(owner, tuple(queues.split()), most, busy) for owner, queues, most, busy in rows]

    def _forget_boot(self) -> None:
        """After a boot nobody has anything reserved, and the monotonic clock has begun anew."""
        boot = _boot()
        with self._database.reading() as connection:
            (known,) = connection.execute("SELECT boot FROM counter").fetchone()
        if known != boot:
            with self._database.writing() as connection:
                for (owner,) in connection.execute(sql.OWNERS).fetchall():
                    connection.execute(sql.DISOWN, (_DEAD, owner))
                connection.execute("UPDATE counter SET boot=?", (boot,))

    def watch(self) -> int:
        if self._watch is not None and self._watched == self._database.opened:
            return self._watch.fd
        if self._watch is not None:  # of a log that is closed, and may be gone
            self._watch.close()
            self._watch = None
        if self._silent < 0:
            with self._database.reading():  # it is open, and so is its log
                self._watched = self._database.opened
            try:
                self._watch = inotify.Watch(f"{self._database.path}-wal", inotify.IN_MODIFY | inotify.IN_ATTRIB)
                os.utime(f"{self._database.path}-wal")  # an event: what came before it was watched is to be looked for
                return self._watch.fd
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENOSPC):
                    raise BrokerError(f"watch {self._database.path}-wal: {error.strerror}") from error
                log.warning("no inotify instance is left (fs.inotify.max_user_instances): %s is looked at", self.url)
                self._silent = os.eventfd(0, os.EFD_CLOEXEC)
        return self._silent

    def drain(self) -> None:
        if self._watch is not None and self._watch.wait(0):
            self._is_behind = not self._database.await_writer(_BRIEF)

    def _due(self) -> float | None:
        with self._database.reading() as connection:
            return self._next_due(connection)

    def _next_due(self, connection: sqlite3.Connection) -> float | None:
        wall = _wall()
        delayed, reserved, paused = connection.execute(sql.EARLIEST, (wall,)).fetchone()
        left = [due - wall for due in (delayed, paused) if due is not None]
        if reserved is not None:
            left.append(reserved - _monotonic())
        if self._silent >= 0 or self._is_behind:
            left.append(_LOOK)
        return max(min(left), 0) / 1000 if left else None

    def kick(self, queue: str, bound: int) -> int:
        with self._database.writing() as connection:
            number = self._find(connection, check_queue(queue))
            for state in (sql.BURIED, sql.DELAYED):
                if count := connection.execute(sql.KICK, (number, state, bound)).rowcount:
                    return count
        return 0

    def kick_task(self, id: str) -> bool:
        return self._change(sql.KICK_TASK, id)

    def delete_task(self, id: str) -> bool:
        number = _id(id)
        with self._database.writing() as connection:
            if not connection.execute(sql.DELETE_TASK, (number,)).rowcount:
                return False
            connection.execute(sql.DELETE_BODY, (number,))
            return True

    def bury_task(self, id: str, reason: str) -> bool:
        return self._change(sql.BURY_TASK, id, _wall(), reason)

    def _change(self, statement: str, id: str, *values: Any) -> bool:
        number = _id(id)
        with self._database.writing() as connection:
            return connection.execute(statement, (*values, number)).rowcount > 0

    def peek(self, id: str) -> Task | None:
        with self._database.reading() as connection:
            row = connection.execute(f"{sql.PEEK} task.id=?", (_id(id),)).fetchone()
        return row and _task(row)

    def peek_state(self, queue: str, state: State, count: int = 1) -> list[Task]:
        number = _NUMBER[state]
        where = f"{sql.PEEK} task.queue=? AND state={number} ORDER BY {_ORDER[number]} LIMIT ?"
        with self._database.reading() as connection:
            found = self._find(connection, check_queue(queue))
            return [_task(row) for row in connection.execute(where, (found, count)).fetchall()]

    def result(self, id: str) -> bytes | None:
        with self._database.reading() as connection:
            row = connection.execute(sql.RESULT, (_id(id), _wall())).fetchone()
        return None if row is None else bytes(row[0])

    def stats(self) -> list[QueueStats]:
        wall = _wall()
        with self._database.reading() as connection:
            queues = connection.execute(sql.QUEUES).fetchall()
            counts = {(queue, state): count for queue, state, count in connection.execute(sql.COUNTS).fetchall()}
            found = []
            for number, name, until, reason in queues:
                ready = connection.execute(sql.COUNT_READY, (number,)).fetchone()[0]
                delayed, reserved, buried = (counts.get((number, state), 0) for state in range(1, 4))
                left = (until - wall) / 1000 if until > wall else None
                if ready or delayed or reserved or buried or left is not None:
                    why = reason if left is not None else None
                    found.append(QueueStats(name, ready, delayed, reserved, buried, left, why))
        return found

    def pause(self, queue: str, seconds: float, reason: str | None = None) -> None:
        until = _wall() + _milliseconds(check_seconds(seconds, "pause")) if seconds else 0
        with self._database.writing() as connection:
            connection.execute(sql.PAUSE, (until, reason, self._number(connection, check_queue(queue))))

    def empty(self, queue: str, states: Iterable[State] = (State.READY, State.DELAYED, State.BURIED)) -> int:
        deleted = 0
        with self._database.writing() as connection:
            number = self._find(connection, check_queue(queue))
            for state in states:
                ids = connection.execute(sql.EMPTY, (number, _NUMBER[state])).fetchall()
                connection.executemany(sql.DELETE_BODY, ids)
                deleted += len(ids)
        return deleted

    def stores(self) -> frozenset[str]:
        with self._database.reading() as connection:
            return frozenset(connection.execute("SELECT store FROM counter").fetchone())

    def ahead(self, task: Task) -> int:
        with self._database.reading() as connection:
            return int(connection.execute(sql.AHEAD, (task.queue, task.priority, int(task.id))).fetchone()[0])

    def doctor(self) -> list[str]:
        return self._database.doctor()

    def close(self) -> None:
        if self._is_announced:
            with contextlib.suppress(BrokerError), self._database.writing() as connection:
                connection.execute(sql.RENOUNCE, (self._owner,))
        if self._watch is not None:
            self._watch.close()
        if self._silent >= 0:
            os.close(self._silent)
        self._database.close()

    def _find(self, connection: sqlite3.Connection, queue: str) -> int | None:
        if queue not in self._queues:
            for number, name in connection.execute("SELECT id, name FROM queue").fetchall():
                self._queues[name] = number
                self._names[number] = name
        return self._queues.get(queue)

    def _number(self, connection: sqlite3.Connection, queue: str) -> int:
        """The queue's number, which is given now if it has none: what others do not see yet is not remembered."""
        number = self._find(connection, queue)
        if number is None:
            connection.execute(sql.ADD_QUEUE, (queue,))
            row = connection.execute("SELECT id FROM queue WHERE name=?", (queue,)).fetchone()
            number = int(row[0])
        return number


def _put(connection: sqlite3.Connection, queue: int, task: NewTask, wall: int) -> int:
    state, due = (sql.DELAYED, wall + _milliseconds(task.delay)) if task.delay else (sql.READY, 0)
    values = (queue, state, task.priority, due, max(_milliseconds(task.ttr), 1), wall, task.key)
    row = connection.execute(sql.PUT, values).fetchall()
    if not row:
        return int(connection.execute(sql.FIND_KEY, (queue, task.key)).fetchone()[0])
    connection.execute(sql.PUT_BODY, (row[0][0], task.body))
    return int(row[0][0])


def _settle(connection: sqlite3.Connection, outcome: Outcome) -> bool:
    reservation = outcome.reservation
    id, token = int(reservation.id), reservation.token
    if isinstance(outcome, Delete):
        if not connection.execute(sql.DELETE, (id, token)).rowcount:
            return False
        connection.execute(sql.DELETE_BODY, (id,))
        if outcome.result is not None:
            wall = _wall()
            connection.execute(sql.FORGET, (wall,))
            connection.execute(sql.KEEP, (id, wall + _milliseconds(outcome.keep), outcome.result))
        return True
    if isinstance(outcome, Touch):
        return connection.execute(sql.TOUCH, (_monotonic(), outcome.progress, id, token)).rowcount > 0
    if isinstance(outcome, Bury):
        return connection.execute(sql.BURY, (_wall(), outcome.reason, id, token)).rowcount > 0
    state, due = (sql.DELAYED, _wall() + _milliseconds(outcome.delay)) if outcome.delay > 0 else (sql.READY, 0)
    is_failure = int(outcome.reason is not None)
    values = (state, due, outcome.priority, is_failure, outcome.reason, id, token)
    return connection.execute(sql.RELEASE, values).rowcount > 0


def _task(row: Sequence[Any]) -> Task:
    name, id, state, body, priority, ttr, made, due, reserves, timeouts, releases, buries, kicks, failures, *why = row
    now = {sql.DELAYED: _wall, sql.RESERVED: _monotonic}.get(state)
    left = max(due - now(), 0) / 1000 if now else None
    age = max(_wall() - made, 0) / 1000
    counts = reserves, timeouts, releases, buries, kicks, failures
    return Task(name, str(id), _STATES[state], body, priority, ttr / 1000, age, left, *counts, *why)


def _id(id: str) -> int:
    return int(id) if id.isascii() and id.isdecimal() and len(id) < 19 else -1


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _wall() -> int:
    return time.time_ns() // 1_000_000


def _monotonic() -> int:
    return time.monotonic_ns() // 1_000_000


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError as error:
        raise BrokerError(f"read the boot's id: {error.strerror}; mount /proc") from None
