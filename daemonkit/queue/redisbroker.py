"""The broker in Redis: sorted sets, a hash a task, and scripts that do each step at once, by the server's clock.

Nothing is sent twice but what may be: the library's own retries are off, puts carry a request's number, and what was
reserved by a reply that was lost is given back by us as soon as we are connected again.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from daemonkit.errors import BrokerError, BrokerFull
from daemonkit.queue import scripts
from daemonkit.queue.broker import (
    DEFAULT_PRIORITY,
    DEFAULT_TTR,
    Broker,
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
from daemonkit.queue.checks import check_queue, check_seconds, check_task, is_queue
from daemonkit.queue.owner import is_dead, myself
from daemonkit.queue.redis import Connection
from daemonkit.queue.redisvalues import as_task, is_id, milliseconds, told

PREFIX: Final = "{daemonkit}:"
_LATE: Final = "it was not done within its ttr"
_DEAD: Final = "the process that had reserved it has ended"


class RedisBroker(Broker):
    """A connection, and one more to be told of changes."""

    def __init__(self, url: str, prefix: str = PREFIX) -> None:
        """Connect to ``url``: redis://, rediss://, unix:// as the library redis knows them, or sentinel://.

        Args:
            url: ``sentinel://host1:26379,host2:26379/service/0`` asks sentinels for the master.
            prefix: of all keys.

        Raises:
            UsageError: the URL cannot be meant.
            BrokerError: the server cannot be reached, is too old, or throws tasks away when its memory is full.
        """
        self._prefix = prefix
        self._owner = myself()
        self._held: dict[str, str] = {}  # token -> id of what we have reserved, as far as we know
        self._is_in_doubt = False
        self._announced_as = ""  # what we consume, as the server has it
        self._queues: frozenset[str] = frozenset()  # those that we are told of
        self._connection = Connection(url)
        self.url = self._connection.url
        self._do = self._connection.do
        self._do(lambda client: None)

    def put_many(self, queue: str, tasks: Sequence[NewTask]) -> list[str]:
        check_queue(queue)
        for task in tasks:
            check_task(queue, task)
        if not tasks:
            return []
        arguments: list[Any] = [uuid.uuid4().hex, queue]
        for task in tasks:
            arguments += [
                task.body,
                task.priority,
                milliseconds(task.delay),
                max(milliseconds(task.ttr), 1),
                task.key or "",
            ]
        try:
            ids = self._run(scripts.PUT, arguments)
        except BrokerFull:
            raise
        except BrokerError:
            ids = self._run(scripts.PUT, arguments)  # once more: it is known there, if it has come through
        return [id.decode() for id in ids]

    def exchange(self, outcomes: Iterable[Outcome], room: Mapping[str, int], count: int) -> Exchange:
        outcomes = tuple(outcomes)
        if not outcomes and (count <= 0 or not any(most > 0 for most in room.values())):
            return Exchange([], [])
        if self._is_in_doubt:
            self._run(scripts.DISOWN, [self._owner, "", *self._held])
            self._is_in_doubt = False
        arguments: list[Any] = [self._owner, max(count, 0), _LATE, self._announced_as, len(outcomes)]
        for outcome in outcomes:
            arguments += told(outcome)
        for queue, most in room.items():
            arguments += [queue, most, DEFAULT_PRIORITY, milliseconds(DEFAULT_TTR)]
        self._is_in_doubt = True
        lost, found, due = self._run(scripts.EXCHANGE, arguments)
        self._is_in_doubt = False
        for outcome in outcomes:
            if not isinstance(outcome, Touch):
                self._held.pop(str(outcome.reservation.token), None)
        reserved = [self._reservation(*each) for each in found]
        return Exchange(reserved, [outcomes[n - 1].reservation for n in lost], None if due < 0 else due / 1000)

    def _reservation(self, *values: Any) -> Reservation:
        queue, id, token, body, priority, ttr, failures, key = values
        self._held[str(token)] = id.decode()
        return Reservation(
            queue.decode(),
            id.decode(),
            token,
            body,
            int(priority),
            int(ttr) / 1000,
            int(failures),
            key=key.decode() or None,
        )

    def recover(self) -> int:
        owners = {
            owner.decode()
            for queue in self._all_queues()
            for owner in self._fields(self._ids(queue, State.RESERVED), "owner")
            if owner is not None
        }
        dead = [owner for owner in owners if is_dead(owner)]
        return sum(self._run(scripts.DISOWN, [owner, _DEAD]) for owner in dead)

    def announce(self, queues: Iterable[str], concurrency: int) -> None:
        self._queues = frozenset(queues)
        self._announced_as = words = json.dumps([sorted(self._queues), concurrency])
        dead = [owner for owner, _, _ in self._announced() if is_dead(owner)]
        self._run(scripts.ANNOUNCE, [self._owner, words, *dead])
        self._connection.stop_listening()  # to be told of others' lists under these names as well
        self.watch()  # before anything is looked for: what comes meanwhile is not missed

    def consumers(self) -> list[ConsumerInfo]:
        owners: list[bytes] = [
            owner
            for queue in self._all_queues()
            for owner in self._fields(self._ids(queue, State.RESERVED), "owner")
            if owner
        ]
        return [
            ConsumerInfo(owner, tuple(queues), concurrency, owners.count(owner.encode()))
            for owner, queues, concurrency in self._announced()
            if not is_dead(owner)
        ]

    def _announced(self) -> list[tuple[str, list[str], int]]:
        found = self._do(lambda client: client.hgetall(self._key("consumers")))
        return sorted((owner.decode(), *json.loads(words)) for owner, words in found.items())

    def watch(self) -> int:
        kinds = ["wake"] if self._queues else ["wake", "result"]  # a consumer waits for nobody's
        return self._connection.listen([*(self._key(kind, "") for kind in kinds), *self._queues])

    def drain(self) -> None:
        self._connection.hear()

    def kick(self, queue: str, bound: int) -> int:
        self._take_in(queue)
        kicked = 0
        while kicked < bound and (step := self._kick_some(queue, min(bound - kicked, 1000))):
            kicked += step
            if not self._ids(queue, State.BURIED, 1):
                break  # delayed ones only if there was no buried one
        return kicked

    def _kick_some(self, queue: str, bound: int) -> int:
        return int(self._run(scripts.KICK, [check_queue(queue), bound]))

    def kick_task(self, id: str) -> bool:
        return self._by_hand("kick", id)

    def delete_task(self, id: str) -> bool:
        return self._by_hand("delete", id)

    def bury_task(self, id: str, reason: str) -> bool:
        return self._by_hand("bury", id, reason)

    def _by_hand(self, what: str, id: str, reason: str = "") -> bool:
        return is_id(id) and bool(self._run(scripts.BY_HAND, [what, id, reason]))

    def peek(self, id: str) -> Task | None:
        return next(iter(self._tasks([id])), None) if is_id(id) else None

    def peek_state(self, queue: str, state: State, count: int = 1) -> list[Task]:
        self._take_in(queue)
        return [task for task in self._tasks(self._ids(check_queue(queue), state, count)) if task.state is state]

    def _tasks(self, ids: list[str]) -> list[Task]:
        def read(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipe:
                for id in ids:
                    pipe.hget(self._key("task", id), "queue")
                queues = [(each or b"").decode() for each in pipe.execute()]
            with client.pipeline(transaction=True) as pipe:  # what is told of a task belongs to its state
                pipe.time()
                for id in ids:
                    pipe.hgetall(self._key("task", id))
                for id, queue in zip(ids, queues, strict=True):
                    for state in State:
                        pipe.zscore(self._key(state.value, queue), f"{int(id):016d}")
                found: list[Any] = pipe.execute()
                return found

        (seconds, micros), *rest = self._do(read)
        hashes, scores = rest[: len(ids)], rest[len(ids) :]
        now = seconds * 1000 + micros // 1000
        tasks = []
        for n, (id, values) in enumerate(zip(ids, hashes, strict=True)):
            places = dict(zip(State, scores[n * 4 : n * 4 + 4], strict=True))
            state = next((state for state, score in places.items() if score is not None), None)
            if state is not None:
                tasks.append(as_task(id, state, places[state], values, now))
        return tasks

    def result(self, id: str) -> bytes | None:
        if not is_id(id):
            return None
        found: bytes | None = self._do(lambda client: client.get(self._key("result", id)))
        return found or None

    def _take_in(self, queue: str) -> None:
        """Make tasks of what others have pushed onto the list of that name, as an exchange does."""
        words = [self._owner, 0, _LATE, "", 0, check_queue(queue), 0, DEFAULT_PRIORITY, milliseconds(DEFAULT_TTR)]
        while self._do(lambda client: client.type(queue)) == b"list":
            self._run(scripts.EXCHANGE, words)

    def stats(self) -> list[QueueStats]:
        for _, announced, _ in self._announced():
            for queue in announced:
                self._take_in(queue)
        queues = self._all_queues()
        for queue in queues:
            self._take_in(queue)

        def read(client: Any) -> list[Any]:
            with client.pipeline(transaction=True) as pipe:
                for queue in queues:
                    for state in State:
                        pipe.zcard(self._key(state.value, queue))
                    pipe.pttl(self._key("paused", queue))
                    pipe.get(self._key("paused", queue))
                found: list[Any] = pipe.execute()
                return found

        values = self._do(read)
        found = []
        for n, queue in enumerate(queues):
            ready, delayed, reserved, buried, left, reason = values[n * 6 : n * 6 + 6]
            paused = left / 1000 if left > 0 else None
            if ready or delayed or reserved or buried or paused is not None:
                why = reason.decode() or None if reason is not None and paused is not None else None
                found.append(QueueStats(queue, ready, delayed, reserved, buried, paused, why))
        return found

    def stores(self) -> frozenset[str]:
        return frozenset([self._run(scripts.STORE, [uuid.uuid4().hex]).decode()])

    def ahead(self, task: Task) -> int:
        key = self._key("ready", task.queue)
        return int(self._do(lambda client: client.zrank(key, f"{int(task.id):016d}")) or 0)

    def pause(self, queue: str, seconds: float, reason: str | None = None) -> None:
        left = milliseconds(check_seconds(seconds, "pause"))
        self._run(scripts.PAUSE, [check_queue(queue), left, reason or ""])

    def empty(self, queue: str, states: Iterable[State] = (State.READY, State.DELAYED, State.BURIED)) -> int:
        self._take_in(queue)
        deleted, words = 0, [queue, *(state.value for state in states)]
        while step := self._run(scripts.EMPTY, words):
            deleted += step
        return deleted

    def doctor(self) -> list[str]:
        info, lines = self._do(lambda client: client.info()), []
        settings = self._connection.settings("appendonly", "appendfsync", "maxmemory", "save")
        lines.append(f"Redis {info['redis_version']} at {self.url}, {info['role']}, {info['used_memory_human']} used")
        if settings is None:
            lines.append("the server does not tell its settings (CONFIG GET): see appendonly and appendfsync there")
        elif settings.get("appendonly") == "yes":
            lines.append(_FSYNC.get(settings.get("appendfsync", ""), "see appendfsync in the server's configuration"))
        elif settings.get("save"):
            lines.append(f"A POWER CUT LOSES ALL SINCE THE LAST SNAPSHOT (save {settings['save']}): set appendonly yes")
        else:
            lines.append("A POWER CUT, CRASH OR RESTART OF THE SERVER LOSES ALL: set appendonly yes")
        if settings and settings.get("maxmemory") == "0":
            lines.append("maxmemory is not set: the kernel may kill the server when the machine's memory is full")
        known = {*self._all_queues(), *(queue for _, queues, _ in self._announced() for queue in queues)}
        lists = self._do(lambda client: [key.decode(errors="replace") for key in client.scan_iter(_type="list")])
        for name in sorted(name for name in lists if name not in known and is_queue(name)):
            lines.append(
                f"the list {name} is no queue that anybody has consumed yet; is it one? queue peek {name} takes it in"
            )
        if info.get("connected_slaves"):
            lines.append("a fail-over to a replica loses the last puts: replication does not wait for it")
        return lines

    def close(self) -> None:
        with contextlib.suppress(BrokerError):
            if self._queues:
                self._do(lambda client: client.hdel(self._key("consumers"), self._owner))
        self._connection.close()

    def _all_queues(self) -> list[str]:
        return sorted(name.decode() for name in self._do(lambda client: client.smembers(self._key("queues"))))

    def _ids(self, queue: str, state: State, count: int = 0) -> list[str]:
        key = self._key(state.value, queue)
        return [str(int(member)) for member in self._do(lambda client: client.zrange(key, 0, count - 1))]

    def _fields(self, ids: list[str], field: str) -> list[Any]:
        def read(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipe:
                for id in ids:
                    pipe.hget(self._key("task", id), field)
                found: list[Any] = pipe.execute()
                return found

        return self._do(read) if ids else []

    def _key(self, *words: str) -> str:
        return self._prefix + ":".join(words)

    def _run(self, script: str, arguments: list[Any]) -> Any:
        return self._connection.run(script, self._prefix, arguments)


_FSYNC: Final = {
    "always": "a power cut loses nothing that was accepted (appendfsync always)",
    "everysec": "a power cut loses the puts of the last second or two (appendfsync everysec)",
    "no": "a power cut loses what the kernel had not written, up to 30 s (appendfsync no)",
}
