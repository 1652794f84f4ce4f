"""A million tasks of backlog on each engine: what a put and a reservation cost with it and without, and who grows.

Two stores of a kind, one with the backlog and one without, are measured by turns.  "Reserved" is what a kept process
does: 32 at a time, the last 32 deleted in the same step.  The memory is that of a daemon's processes, at the first task
that is done and after so many seconds of work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from queue_rig import Queue, queue, servers
from queue_subjects import Subject, ours
from rig import as_a_user, box, goal, table

from daemonkit.queue.broker import Broker, Delete, NewTask
from daemonkit.queue.connect import connect

BODY = b'{"task": "run", "args": ["noop", 0], "kwargs": {}}'
FIRST = BODY.replace(b"noop", b"mark")
BATCH = 32
AT_ONCE = 1000  # tasks of one put, when the backlog is made
SAMPLES = 21  # of which the median counts


class Rates(NamedTuple):
    """A second."""

    put: float  # one by one
    put_many: float  # by 100
    reserve: float


def main() -> None:
    """One engine after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of work, in which memory is watched")
    parser.add_argument("--only", default="", help="engines whose name has this in it")
    options = parser.parse_args()
    as_a_user()
    kept = [each for each in ours() if "prefork" in each.name and options.only.lower() in each.name.lower()]
    rows, shares, growths = [], {}, {}
    with box() as path:
        for subject in kept:
            name = subject.name.rpartition(", ")[2]
            empty, full, before, after = measure(subject, path, options.tasks, options.seconds)
            shares[name] = [now / once for now, once in zip(full, empty, strict=True)]
            growths[name] = after / before
            rows += [[name, "0", *empty, "", ""], [name, f"{options.tasks:,}", *full, before / 2**20, after / 2**20]]
    head = ["", "backlog", "put/s", "put_many/s, by 100", "reserved/s", "memory MB", f"... {options.seconds:g} s later"]
    table("With a backlog and without", head, rows)
    for name, values in shares.items():
        for what, share in zip(Rates._fields, values, strict=True):
            goal(f"{name}: {what}, of the rate when empty", share, 0.8, at_least=True)
        goal(f"{name}: memory, of that at the first task", growths[name], 1.1)


def measure(subject: Subject, path: Path, tasks: int, seconds: float) -> tuple[Rates, Rates, float, float]:
    """The rates without and with a backlog, and the memory of a daemon's processes at its beginning and later."""
    with ExitStack() as stack:
        made = [stack.enter_context(_queue(subject, path / f"{subject.slug}-{kind}")) for kind in ("empty", "full")]
        brokers = [stack.enter_context(closing(connect(each.environ["DAEMONKIT_BROKER"]))) for each in made]
        for _ in range(tasks // AT_ONCE):
            brokers[1].put_many(subject.slug, [NewTask(BODY)] * AT_ONCE)
        empty, full = rates(brokers, subject.slug)
        brokers[1].put(subject.slug, NewTask(FIRST, priority=0))
        return (empty, full, *growth(made[1], seconds))


@contextmanager
def _queue(subject: Subject, path: Path) -> Iterator[Queue]:
    with servers(path) as place, queue(subject, place) as made:
        yield made


def rates(brokers: Sequence[Broker], name: str) -> list[Rates]:
    """By turns, so that each broker and each kind has the same luck; about as many are put as are taken."""
    samples: list[list[list[float]]] = [[[], [], []] for _ in brokers]
    for _ in range(SAMPLES):
        for broker, found in zip(brokers, samples, strict=True):
            found[0].append(timed(partial(singly, broker, name, 200), 200))
            found[1].append(timed(partial(by_hundreds, broker, name, 2000), 2000))
            found[2].append(timed(partial(reserve, broker, name, 2200), 2200))
    return [Rates(*map(statistics.median, found)) for found in samples]


def timed(act: Callable[[], None], count: int) -> float:
    """How many a second."""
    began = time.perf_counter()
    act()
    return count / (time.perf_counter() - began)


def singly(broker: Broker, name: str, count: int) -> None:
    """Put."""
    for _ in range(count):
        broker.put(name, NewTask(BODY))


def by_hundreds(broker: Broker, name: str, count: int) -> None:
    """Put."""
    for _ in range(count // 100):
        broker.put_many(name, [NewTask(BODY)] * 100)


def reserve(broker: Broker, name: str, count: int) -> None:
    """Reserve, and delete."""
    outcomes: Sequence[Delete] = ()
    while count > 0:
        most = min(BATCH, count)
        found = broker.exchange(outcomes, {name: most}, most).reserved
        outcomes = [Delete(each) for each in found]
        count -= len(found)
        assert found
    broker.exchange(outcomes, {}, 0)


def growth(made: Queue, seconds: float) -> tuple[float, float]:
    """Bytes of the daemon's processes when they have begun, and later."""
    made.start()
    made.await_marks("mark", 1)
    before = made.cost().pss
    time.sleep(seconds)
    return before, made.cost().pss


if __name__ == "__main__":
    main()
