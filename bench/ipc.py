"""System V IPC against the plain library, and a channel against multiprocessing's pipe: how much the comfort costs."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe

import sysv_ipc
from rig import as_a_user, box, goal, median, percentile, table

from daemonkit import ipc

MESSAGE = b"x" * 64
GOAL = 0.8  # of the plain library

Rates = dict[str, list[float]]


def main() -> None:
    """Each pair by turns, in rounds; the middle one of the rounds counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=100_000, help="operations a round")
    chosen = parser.parse_args()
    as_a_user()
    with box():
        semaphores(chosen.rounds, chosen.count)
        queues(chosen.rounds, chosen.count)
        channels(chosen.rounds, chosen.count // 2)
        hand_over(chosen.rounds, chosen.count // 20)


def semaphores(rounds: int, count: int) -> None:
    """Acquire and release, nobody else there; with SEM_UNDO, and without."""
    for undo in (True, False):
        ours = ipc.Semaphore(None, undo=undo)
        plain = sysv_ipc.Semaphore(ours.key)
        plain.undo = undo

        def plain_pairs(plain: sysv_ipc.Semaphore = plain) -> None:
            for _ in range(count):
                plain.acquire()
                plain.release()

        def our_pairs(ours: ipc.Semaphore = ours) -> None:
            for _ in range(count):
                ours.acquire()
                ours.release()

        title = f"Semaphore, uncontended pairs a second, {'SEM_UNDO' if undo else 'no undo'}"
        compare(title, by_turns(rounds, count, {"sysv_ipc": plain_pairs, "daemonkit": our_pairs}), "sysv_ipc", GOAL)
        ours.remove()


def queues(rounds: int, count: int) -> None:
    """One message in, one out."""
    ours = ipc.MessageQueue(None)
    plain = sysv_ipc.MessageQueue(ours.key)

    def plain_messages() -> None:
        for _ in range(count):
            plain.send(MESSAGE)
            plain.receive()

    def our_messages() -> None:
        for _ in range(count):
            ours.send(MESSAGE)
            ours.receive()

    rates = by_turns(rounds, count, {"sysv_ipc": plain_messages, "daemonkit": our_messages})
    compare("Message queue, 64 bytes in and out, messages a second", rates, "sysv_ipc", GOAL)
    ours.remove()


def channels(rounds: int, count: int) -> None:
    """Frames from a child to its parent, as fast as they can be read."""
    for size in (64, 4096, 65536, 1_000_000):
        message = b"x" * size
        number = max(count // (1 + size // 500), 20)

        def our_frames(message: bytes = message, number: int = number) -> None:
            ours, theirs = ipc.Channel.pair()
            with ours, child(lambda: theirs.send(message), number):
                theirs.close()
                for _ in range(number):
                    ours.receive()

        def pipe_frames(message: bytes = message, number: int = number) -> None:
            ours, theirs = Pipe()
            with ours, child(lambda: theirs.send_bytes(message), number):
                theirs.close()
                for _ in range(number):
                    ours.recv_bytes()

        rates = by_turns(rounds, number, {"multiprocessing.Pipe": pipe_frames, "daemonkit": our_frames})
        compare(f"Channel, {size:,} bytes, frames a second", rates, "multiprocessing.Pipe", 1.0)


def hand_over(rounds: int, count: int) -> None:
    """There and back again between two processes."""

    def our_trips() -> None:
        ours, theirs = ipc.Channel.pair()
        with ours, child(lambda: theirs.send(theirs.receive()), count):
            for _ in range(count):
                ours.send(MESSAGE)
                ours.receive()

    def pipe_trips() -> None:
        ours, theirs = Pipe()
        with ours, child(lambda: theirs.send_bytes(theirs.recv_bytes()), count):
            for _ in range(count):
                ours.send_bytes(MESSAGE)
                ours.recv_bytes()

    def queue_trips() -> None:
        queue = ipc.MessageQueue(None)
        with child(lambda: queue.send(queue.receive(1)[0], 2), count):
            for _ in range(count):
                queue.send(MESSAGE, 1)
                queue.receive(2)
        queue.remove()

    runs = {"multiprocessing.Pipe": pipe_trips, "message queue": queue_trips, "daemonkit": our_trips}
    rates = by_turns(rounds, count, runs)
    compare("Channel, round trips of 64 bytes a second", rates, "multiprocessing.Pipe", 1.0)


@contextmanager
def child(work: Callable[[], None], count: int) -> Iterator[None]:
    """A forked process that does ``work`` so often, for the time of a block."""
    pid = os.fork()
    if pid == 0:
        for _ in range(count):
            work()
        os._exit(0)
    try:
        yield
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.waitpid(pid, 0)


def by_turns(rounds: int, count: int, runs: dict[str, Callable[[], None]]) -> Rates:
    """Operations a second of each, for every round."""
    rates: Rates = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - began))
    return rates


def compare(title: str, rates: Rates, peer: str, limit: float) -> None:
    """Show them, and whether daemonkit reaches its share of ``peer``."""
    rows = [(name, median(each), percentile(each, 0.1), max(each)) for name, each in rates.items()]
    table(title, ("", "p50", "p10", "most"), rows)
    share = median([mine / theirs for mine, theirs in zip(rates["daemonkit"], rates[peer], strict=True)])
    goal(f"daemonkit by {peer}", share, limit, at_least=True)


if __name__ == "__main__":
    main()
