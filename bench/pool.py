"""Pools with two children: calls a second, round trips and large results, beside peers and bare Python loops."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pickle
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, NamedTuple

import pool_calls
from rig import goal, median, percentile, table

WORKERS = 2
IN_FLIGHT = 8
LARGE = 10_000_000
MIDDLE = 64 * 1024
_LENGTH = struct.Struct("=Q")


class Figures(NamedTuple):
    """What one pool did."""

    rate: float  # calls a second
    p50: float  # ms, one call at a time
    p99: float
    middle: float  # results of 64 KB a second
    large: float  # MB/s in results of 10 MB


class Subject(NamedTuple):
    """Something that runs calls: many at a time, and one."""

    many: Callable[[Callable[..., Any], list[Any]], Any]
    one: Callable[[Callable[..., Any], Any], Any]


def figures(subject: Subject, calls: int) -> Figures:
    """Measure one subject."""
    subject.many(pool_calls.same, list(range(2 * WORKERS)))
    rate = _rate(subject, pool_calls.same, list(range(calls)))
    trips = []
    for number in range(max(calls // 10, 50)):
        began = time.perf_counter()
        subject.one(pool_calls.same, number)
        trips.append((time.perf_counter() - began) * 1000)
    middle = _rate(subject, pool_calls.blob, [MIDDLE] * max(calls // 10, 50))
    large = _rate(subject, pool_calls.blob, [LARGE] * 30) * LARGE / 1e6
    return Figures(rate, median(trips), percentile(trips, 0.99), middle, large)


def _rate(subject: Subject, function: Callable[..., Any], items: list[Any]) -> float:
    began = time.perf_counter()
    subject.many(function, items)
    return len(items) / (time.perf_counter() - began)


def of_executor(pool: Executor) -> Subject:
    """An executor of the standard library's kind."""

    def many(function: Callable[..., Any], items: list[Any]) -> None:
        for _ in pool.map(function, items):
            pass

    return Subject(many, lambda function, item: pool.submit(function, item).result())


@contextlib.contextmanager
def kit(reuse: int | None) -> Iterator[Subject]:
    """daemonkit's."""
    from daemonkit import Pool

    with Pool(WORKERS, reuse=reuse) as pool:
        yield of_executor(pool)


@contextlib.contextmanager
def executor() -> Iterator[Subject]:
    """The standard library's."""
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
        yield of_executor(pool)


@contextlib.contextmanager
def imap(per_child: int | None = None) -> Iterator[Subject]:
    """multiprocessing's pool."""
    with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=per_child) as pool:

        def many(function: Callable[..., Any], items: list[Any]) -> None:
            for _ in pool.imap(function, items):
                pass

        yield Subject(many, lambda function, item: pool.apply_async(function, (item,)).get())


@contextlib.contextmanager
def pebble() -> Iterator[Subject]:
    """pebble's."""
    from pebble import ProcessPool

    with ProcessPool(WORKERS, context=multiprocessing.get_context("fork")) as pool:

        def many(function: Callable[..., Any], items: list[Any]) -> None:
            for future in [pool.schedule(function, args=(item,)) for item in items]:
                future.result()

        yield Subject(many, lambda function, item: pool.schedule(function, args=(item,)).result())


@contextlib.contextmanager
def loky() -> Iterator[Subject]:
    """loky's."""
    from loky import ProcessPoolExecutor as Loky

    with Loky(WORKERS) as pool:
        yield of_executor(pool)


@contextlib.contextmanager
def bare_fork(in_memory: bool = False) -> Iterator[Subject]:
    """A loop that forks a child for each call and reads its pickled result from a socket pair, or from a memfd."""

    def many(function: Callable[..., Any], items: list[Any]) -> None:
        poll, todo = select.poll(), iter(items)
        running: dict[int, tuple[socket.socket, int]] = {}
        left = len(items)
        while left:
            while len(running) < WORKERS and (item := next(todo, None)) is not None:
                ours, theirs = socket.socketpair()
                call = pickle.dumps((function, (item,), {}))
                pid = os.fork()
                if pid == 0:
                    func, args, kwargs = pickle.loads(call)
                    _give(theirs, pickle.dumps(func(*args, **kwargs), 5), in_memory)
                    os._exit(0)
                theirs.close()
                running[ours.fileno()] = ours, pid
                poll.register(ours, select.POLLIN)
            for fd, _ in poll.poll():
                ours, pid = running.pop(fd)
                poll.unregister(fd)
                _have(ours, in_memory)
                ours.close()
                os.waitpid(pid, 0)
                left -= 1

    yield Subject(many, lambda function, item: many(function, [item]))


@contextlib.contextmanager
def bare_kept() -> Iterator[Subject]:
    """Two children on socket pairs, several calls in flight each."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(WORKERS)]
    pids = []
    for ours, theirs in pairs:
        if (pid := os.fork()) == 0:
            ours.close()
            while data := theirs.recv(1 << 17):
                func, args, kwargs = pickle.loads(data)
                result = pickle.dumps(func(*args, **kwargs), 5)
                if len(result) < 100_000:
                    theirs.send(result)
                else:
                    fd = os.memfd_create("bench")
                    os.write(fd, result)
                    socket.send_fds(theirs, [b"m"], [fd])
                    os.close(fd)
            os._exit(0)
        pids.append(pid)

    def read(ours: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(ours, 1 << 17, 1)
        if fds:
            _load(fds[0])
        else:
            pickle.loads(data)

    def many(function: Callable[..., Any], items: list[Any]) -> None:
        poll, todo = select.poll(), iter(items)
        by_fd = {ours.fileno(): ours for ours, _ in pairs}
        left = len(items)
        for fd in by_fd:
            poll.register(fd, select.POLLIN)

        def ask(ours: socket.socket) -> None:
            if (item := next(todo, None)) is not None:
                ours.send(pickle.dumps((function, (item,), {})))

        for _ in range(IN_FLIGHT):
            for ours in by_fd.values():
                ask(ours)
        while left:
            for fd, _ in poll.poll():
                read(by_fd[fd])
                left -= 1
                ask(by_fd[fd])

    def one(function: Callable[..., Any], item: Any) -> None:
        pairs[0][0].send(pickle.dumps((function, (item,), {})))
        read(pairs[0][0])

    yield Subject(many, one)
    for ours, theirs in pairs:
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
    for pid in pids:
        os.waitpid(pid, 0)


def _give(sock: socket.socket, data: bytes, in_memory: bool) -> None:
    if in_memory:
        fd = os.memfd_create("bench")
        os.write(fd, data)
        socket.send_fds(sock, [b"m"], [fd])
    else:
        sock.sendall(_LENGTH.pack(len(data)) + data)


def _have(sock: socket.socket, in_memory: bool) -> None:
    if in_memory:
        _load(socket.recv_fds(sock, 1, 1)[1][0])
        return
    data = bytearray()
    while part := sock.recv(1 << 20):
        data += part
    pickle.loads(memoryview(data)[_LENGTH.size :])


def _load(fd: int) -> object:
    import mmap

    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        os.close(fd)
        return pickle.loads(memory)


KEPT: dict[str, Callable[[], contextlib.AbstractContextManager[Subject]]] = {
    "bare socket pair, 8 in flight (limit)": bare_kept,
    "daemonkit.Pool(reuse=None)": lambda: kit(None),
    "multiprocessing.Pool, imap": imap,
    "pebble": pebble,
    "ProcessPoolExecutor": executor,
    "loky": loky,
}
FRESH: dict[str, Callable[[], contextlib.AbstractContextManager[Subject]]] = {
    "bare fork + socket pair (limit)": bare_fork,
    "bare fork + memfd (limit)": lambda: bare_fork(in_memory=True),
    "daemonkit.Pool": lambda: kit(1),
    "multiprocessing.Pool(maxtasksperchild=1)": lambda: imap(1),
}


def main() -> None:
    """Both kinds, by turns; then fresh children of a parent of a gigabyte."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="calls of kept children; a tenth of fresh ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    kept = _compare("Children that are kept", KEPT, options.calls, options.rounds)
    raw, ours = kept["bare socket pair, 8 in flight (limit)"], kept["daemonkit.Pool(reuse=None)"]
    goal("calls with kept children, of the bare loop's", ours.rate / raw.rate, 0.6, at_least=True)
    goal("... of multiprocessing's imap", ours.rate / kept["multiprocessing.Pool, imap"].rate, 1, at_least=True)
    goal("round trip, ms", ours.p50, 0.1)
    goal("... of the bare loop's (0.1 ms where that takes 0.03)", ours.p50 / raw.p50, 3.3)
    fresh = _compare("A fresh child for each call", FRESH, options.calls // 10, options.rounds)
    raw, ours = fresh["bare fork + socket pair (limit)"], fresh["daemonkit.Pool"]
    goal("calls with fresh children, of the bare loop's", ours.rate / raw.rate, 0.85, at_least=True)
    memory = fresh["bare fork + memfd (limit)"].large
    goal("10 MB results, of the bare memfd loop's", ours.large / memory, 0.8, at_least=True)
    with _heavy(options.gigabytes):
        heavy = _compare(f"The same from {options.gigabytes:g} GB with threads and connections", _heavy_ones(), 400, 1)
    share = heavy["daemonkit.Pool"].rate / ours.rate
    goal("calls from the heavy parent, of those from the light one", share, 0.85, at_least=True)


def _heavy_ones() -> dict[str, Callable[[], contextlib.AbstractContextManager[Subject]]]:
    return {name: FRESH[name] for name in ("daemonkit.Pool", "multiprocessing.Pool(maxtasksperchild=1)")}


def _compare(
    title: str,
    subjects: dict[str, Callable[[], contextlib.AbstractContextManager[Subject]]],
    calls: int,
    rounds: int,
) -> dict[str, Figures]:
    found: dict[str, list[Figures]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            try:
                with subject() as made:
                    found[name].append(figures(made, calls))
            except ModuleNotFoundError as error:
                if error.name not in ("pebble", "loky"):
                    raise
    middle = {
        name: Figures(*(median(column) for column in zip(*rows, strict=True))) for name, rows in found.items() if rows
    }
    head = ["", "calls/s", "round trip p50 ms", "p99 ms", "64 KB results/s", "10 MB results MB/s"]
    table(title, head, [[name, *row] for name, row in middle.items()])
    return middle


@contextlib.contextmanager
def _heavy(gigabytes: float) -> Iterator[None]:
    """This process with memory that it has touched, threads and sockets."""
    memory = bytearray(os.urandom(1 << 20)) * int(gigabytes * 1024)
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    sockets = [socket.socketpair() for _ in range(20)]
    contexts = [ssl.create_default_context()]
    yield
    stop.set()
    for pair in sockets:
        for sock in pair:
            sock.close()
    del memory, contexts


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
