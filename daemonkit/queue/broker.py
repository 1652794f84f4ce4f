"""The contract of a broker: the life of a task, as beanstalkd has it, the same on every engine.

::

    put ---> delayed ---> ready ---> reserved ---> deleted
                            ^            |
                            |            +-> released: ready or delayed again
                            |            +-> its time to run (ttr) is up: ready again
                            +--- kick <--+-> buried

A task is handed out at least once.  Whoever has reserved it says what came of it before its ttr is up, or touches it;
each reservation has a token, which grows, and what is said with an older one changes nothing.

Lower priorities come first, equal ones in the order of their puts.  Times are seconds, bodies are bytes that the broker
does not look into.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final, NamedTuple

DEFAULT_PRIORITY: Final = 1024
MOST_PRIORITY: Final = 2**32 - 1
DEFAULT_TTR: Final = 60.0
NAME_LENGTH: Final = 200  # characters of a queue's name


class State(enum.StrEnum):
    """Where a task is."""

    READY = "ready"
    DELAYED = "delayed"
    RESERVED = "reserved"
    BURIED = "buried"


class NewTask(NamedTuple):
    """What is put."""

    body: bytes
    priority: int = DEFAULT_PRIORITY
    delay: float = 0.0
    ttr: float = DEFAULT_TTR
    key: str | None = None  # a second put with the key of a task that is there is no second task


class Reservation(NamedTuple):
    """A task that is ours until its ttr is up."""

    queue: str
    id: str
    token: int  # grows with each reservation of the queue: a fencing number
    body: bytes
    priority: int
    ttr: float
    failures: int  # since it was put or kicked: releases with a reason, and reservations that nobody ended
    was: str | None = None  # the id by which it was put, where the broker has given it another since
    key: str | None = None

    def __str__(self) -> str:
        renamed = f" (put as {self.was})" if self.was else ""
        return f"task {self.id}{renamed} of {self.queue}"

    @property
    def first_id(self) -> str:
        """The id by which it was put: the same for each attempt."""
        return self.was or self.id


class Delete(NamedTuple):
    """It is done; its result, if there is one, is kept for a while."""

    reservation: Reservation
    result: bytes | None = None
    keep: float = 0.0  # seconds


class Release(NamedTuple):
    """It goes back, after ``delay``; with a ``reason`` that counts as a failure."""

    reservation: Reservation
    delay: float = 0.0
    reason: str | None = None
    priority: int | None = None  # None: it stays


class Bury(NamedTuple):
    """It is put aside, until somebody has looked at it and kicks or deletes it."""

    reservation: Reservation
    reason: str


class Touch(NamedTuple):
    """It is being worked on: its ttr begins anew."""

    reservation: Reservation
    progress: str | None = None  # how far it has come; None: as before


Outcome = Delete | Release | Bury | Touch


class Task(NamedTuple):
    """A task as it stands, for people."""

    queue: str
    id: str
    state: State
    body: bytes
    priority: int
    ttr: float
    age: float  # seconds since it was put
    left: float | None  # seconds until it is ready again: delayed, reserved
    reserves: int
    timeouts: int  # reservations that nobody ended
    releases: int
    buries: int
    kicks: int
    failures: int
    reason: str | None  # of the last failure
    owner: str | None  # who has reserved it
    progress: str | None  # how far it has come, in its own words
    key: str | None = None


class QueueStats(NamedTuple):
    """A queue as it stands."""

    queue: str
    ready: int
    delayed: int
    reserved: int
    buried: int
    paused: float | None  # seconds for which nothing is handed out; None: it is not paused
    pause_reason: str | None


class ConsumerInfo(NamedTuple):
    """A consumer that has announced itself, and lives as far as the broker can know."""

    owner: str
    queues: tuple[str, ...]
    concurrency: int | None  # None: the broker does not know
    busy: int  # tasks that it has reserved


class Exchange(NamedTuple):
    """What came of an ``exchange``."""

    reserved: list[Reservation]
    lost: list[Reservation]  # those whose outcome came too late: they are no longer ours
    due: float | None = None  # seconds until something is ready by itself; None: nothing will be, or ``watch`` tells
    trouble: str | None = None  # a part of the broker cannot be used, while the rest goes on


class Broker(abc.ABC):
    """One connection, for one process: not to be used after a fork, nor by two threads at once.

    Every method may raise BrokerError: the broker cannot be reached, or refuses; and UsageError for an argument that
    cannot be meant, before anything is sent.
    """

    url: str
    keeps_keys: ClassVar[bool] = True  # otherwise a put with one raises UsageError
    keeps_results: ClassVar[bool] = True  # otherwise they are dropped, and ``result`` raises UsageError

    @abc.abstractmethod
    def put_many(self, queue: str, tasks: Sequence[NewTask]) -> list[str]:
        """Put ``tasks``, all or none; return their ids, in order.

        Raises PutUncertain when nobody can know which of the two.

        When this returns, they are kept: what that is worth when the machine loses power, ``doctor`` tells.
        """

    @abc.abstractmethod
    def exchange(self, outcomes: Iterable[Outcome], room: Mapping[str, int], count: int) -> Exchange:
        """Say what came of reservations, and reserve; in as few steps as the engine can.

        Args:
            outcomes: each of another reservation.
            room: from which queues, and how many of each at most.
            count: how many at most; 0: none.

        Does not wait: see ``watch``.
        """

    @abc.abstractmethod
    def recover(self) -> int:
        """Give back what dead consumers had reserved, as far as the engine can know; return how many."""

    @abc.abstractmethod
    def announce(self, queues: Iterable[str], concurrency: int) -> None:
        """Let others know that we take tasks of ``queues``, so many at once; ``close`` takes that back."""

    @abc.abstractmethod
    def consumers(self) -> list[ConsumerInfo]:
        """Those that have announced themselves."""

    @abc.abstractmethod
    def watch(self) -> int:
        """A descriptor that is readable when there may be more to get than the last ``exchange`` has given.

        To be called each time before it is waited for; call ``drain`` before looking.
        """

    @abc.abstractmethod
    def drain(self) -> None:
        """Take in what the descriptor of ``watch`` has told."""

    @abc.abstractmethod
    def kick(self, queue: str, bound: int) -> int:
        """Make up to ``bound`` tasks ready, buried ones first, or delayed ones if none is buried; return how many."""

    @abc.abstractmethod
    def kick_task(self, id: str) -> bool:
        """Make a buried or delayed task ready, its failures forgotten; False: there is none of that id."""

    @abc.abstractmethod
    def delete_task(self, id: str) -> bool:
        """Delete a task that is not reserved; False: there is none of that id."""

    @abc.abstractmethod
    def bury_task(self, id: str, reason: str) -> bool:
        """Put a ready or delayed task aside; False: there is none of that id."""

    @abc.abstractmethod
    def peek(self, id: str) -> Task | None:
        """A task, whatever its state."""

    @abc.abstractmethod
    def peek_state(self, queue: str, state: State, count: int = 1) -> list[Task]:
        """The first tasks in ``state``: those that will leave it first; of buried ones those that were buried first."""

    @abc.abstractmethod
    def result(self, id: str) -> bytes | None:
        """The result of a task that is done, while it is kept; ``watch`` tells also of results that come."""

    @abc.abstractmethod
    def stats(self) -> list[QueueStats]:
        """All queues that have tasks, or are paused, by name."""

    @abc.abstractmethod
    def ahead(self, task: Task) -> int | None:
        """How many ready tasks of its queue come before ``task``, which is ready; None: the broker does not know."""

    @abc.abstractmethod
    def stores(self) -> frozenset[str]:
        """What names each store behind this in the whole world: an emptied or restarted one may be another."""

    @abc.abstractmethod
    def doctor(self) -> list[str]:
        """What would be lost when, and what else is to be known, in sentences."""

    @abc.abstractmethod
    def pause(self, queue: str, seconds: float, reason: str | None = None) -> None:
        """Hand out nothing of ``queue`` for so long; whoever connects next sees that, too.  0: no longer."""

    @abc.abstractmethod
    def empty(self, queue: str, states: Iterable[State] = (State.READY, State.DELAYED, State.BURIED)) -> int:
        """Delete all tasks of ``queue`` in ``states``; return how many."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection.  What it has reserved stays so until its ttr is up."""

    def put(self, queue: str, task: NewTask) -> str:
        """Put one task; return its id."""
        return self.put_many(queue, [task])[0]

    def reserve(self, *queues: str, count: int = 1) -> list[Reservation]:
        """Reserve up to ``count`` tasks that are ready in any of ``queues``."""
        return self.exchange((), dict.fromkeys(queues, count), count).reserved

    def touch(self, reservation: Reservation) -> bool:
        """Let the ttr begin anew; False: it is no longer ours."""
        return self._settle(Touch(reservation))

    def delete(self, reservation: Reservation) -> bool:
        """It is done; False: it is no longer ours."""
        return self._settle(Delete(reservation))

    def release(
        self, reservation: Reservation, delay: float = 0.0, reason: str | None = None, priority: int | None = None
    ) -> bool:
        """Give it back; with a ``reason`` as a failure.  False: it is no longer ours."""
        return self._settle(Release(reservation, delay, reason, priority))

    def bury(self, reservation: Reservation, reason: str) -> bool:
        """Put it aside; False: it is no longer ours."""
        return self._settle(Bury(reservation, reason))

    def _settle(self, outcome: Outcome) -> bool:
        return not self.exchange((outcome,), {}, 0).lost
