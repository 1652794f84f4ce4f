"""A fresh process for each call: the fork server beside a bare loop of fork and waitpid; and the end of all."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

# What is measured is a small process: the rest is imported where it is used.

IN_FLIGHT = (2, 64)
_SERVER = """
import os, pickle, signal, socket
from daemonkit.core import prctl
from daemonkit.processes import child
from daemonkit.processes.forkserver import ForkServer
from daemonkit.processes.wire import Wire

wire, results = (Wire(socket.socket(fileno=fd)) for fd in {fds})

def call(message):
    prctl.become_subreaper()
    results.send(1, message.id, pickle.dumps(pickle.loads(message.payload)))
    child.end_descendants()
    child.leave(0)

def sleep(message):
    prctl.become_subreaper()
    signal.pause()

os.set_blocking(wire.fileno(), False)
ForkServer(wire, {enter}).serve()
"""


def bare(calls: int, in_flight: int) -> float:
    """Calls a second of a loop that does nothing else: fork, a pickled result through a socketpair, waitpid."""
    poll = select.poll()
    running: dict[int, tuple[int, socket.socket]] = {}
    asked = done = 0
    began = time.perf_counter()
    while done < calls:
        while asked < calls and len(running) < in_flight:
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                theirs.sendall(pickle.dumps(asked))
                os._exit(0)
            theirs.close()
            running[ours.fileno()] = pid, ours
            poll.register(ours, select.POLLIN)
            asked += 1
        for fd, _ in poll.poll():
            pid, ours = running.pop(fd)
            pickle.loads(ours.recv(65536))
            poll.unregister(fd)
            ours.close()
            os.waitpid(pid, 0)
            done += 1
    return calls / (time.perf_counter() - began)


def grown(calls: int, in_flight: int) -> float:
    """The same of a program that has imported what each daemon has: Python has work to do for them after a fork."""
    import gc
    import importlib

    for name in ("logging", "random"):
        importlib.import_module(name)
    gc.freeze()
    return bare(calls, in_flight)


def start(enter: str) -> tuple[int, socket.socket, socket.socket]:
    """A lean fork server whose children do ``enter``; its PID, our end of its wire, and where results come."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for ours, theirs in pairs:
        ours.setblocking(False)
        theirs.set_inheritable(True)
    program = _SERVER.format(fds=tuple(theirs.fileno() for _, theirs in pairs), enter=enter)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ)
    for _, theirs in pairs:
        theirs.close()
    return pid, pairs[0][0], pairs[1][0]


def served(calls: int, in_flight: int) -> float:
    """The same, asked of a fork server; a call is done when its end has been told, with its receipt."""
    from daemonkit.processes.children import Child, Children
    from daemonkit.processes.receipt import Receipt
    from daemonkit.processes.wire import Wire

    server, wire, ours = start("call")
    children, results = Children(Wire(wire)), Wire(ours)
    answers: list[int] = []

    def ended(made: Child, receipt: Receipt) -> None:
        assert receipt.is_clean, receipt

    poll = select.poll()
    poll.register(wire, select.POLLIN)
    poll.register(ours, select.POLLIN)
    asked = 0
    began = 0.0
    while len(answers) < calls or len(children):
        while asked < calls and len(children) < (in_flight if answers else 1):  # the first shows that it is there
            children.spawn(pickle.dumps(asked), ended)
            asked += 1
        for fd, _ in poll.poll():
            if fd == ours.fileno():
                while (message := results.receive()) is not None:
                    answers.append(pickle.loads(message.payload))
                    began = began or time.perf_counter()
            else:
                children.receive()
    rate = (calls - 1) / (time.perf_counter() - began)
    children.wire.close()
    results.close()
    os.waitpid(server, 0)
    return rate


def until_none_is_left(size: int) -> float:
    """Milliseconds from the kill -9 of a process whose fork server has ``size`` sleeping children to the end of all."""
    import contextlib
    import subprocess

    command = [sys.executable, __file__, "sleepers", str(size), "0"]
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert master.stdout is not None
        poll = select.poll()
        pids = master.stdout.readline().split()
        for pid in pids:
            poll.register(stack.enter_context(open(os.pidfd_open(int(pid)))), select.POLLIN)
        left = len(pids)
        began = time.perf_counter()
        master.kill()
        while left:
            for fd, _ in poll.poll(10_000):
                poll.unregister(fd)
                left -= 1
        return (time.perf_counter() - began) * 1000


def sleepers(size: int, _: int) -> float:
    """Have ``size`` sleeping children, say their numbers, and sleep."""
    from daemonkit.processes.children import Children
    from daemonkit.processes.wire import Wire

    server, wire, _ours = start("sleep")
    children = Children(Wire(wire))
    pids = [server]
    for _ in range(size):
        children.spawn(b"", lambda made, receipt: None, lambda made: pids.append(made.pid or 0))
    poll = select.poll()
    poll.register(wire, select.POLLIN | select.POLLOUT)
    while len(pids) <= size:
        poll.poll()
        children.wire.flush()
        children.receive()
    print(*pids, flush=True)
    signal.pause()
    return 0.0


def bare_end(size: int) -> float:
    """The limit: so many sleeping forks of a small process, killed and waited for one by one."""
    pids = []
    for _ in range(size):
        if (pid := os.fork()) == 0:
            signal.pause()
        pids.append(pid)
    began = time.perf_counter()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return (time.perf_counter() - began) * 1000


WAYS: dict[str, Callable[[int, int], float]] = {
    "bare": bare,
    "grown": grown,
    "served": served,
    "sleepers": sleepers,
    "bare_end": lambda size, _: bare_end(size),
}


def _in_a_fresh_process(way: str, number: int, in_flight: int = 0) -> float:
    import subprocess

    command = [sys.executable, __file__, way, str(number), str(in_flight)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=120).stdout)


def main() -> None:
    """Print what the issue asks for."""
    import argparse

    from rig import goal, median, table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--children", type=int, default=500)
    chosen = parser.parse_args()
    rows = []
    for in_flight in IN_FLIGHT:
        # In turns, so that what else the machine does is the same for both.
        rounds = [
            [_in_a_fresh_process(way, chosen.calls, in_flight) for way in ("bare", "grown", "served")]
            for _ in range(chosen.rounds)
        ]
        rates = [median([each[n] for each in rounds]) for n in range(3)]
        rows.append((in_flight, *rates, median([with_us / alone for alone, _, with_us in rounds])))
    head = ["in flight", "bare loop/s", "... with logging and random", "fork server/s", "by the bare loop"]
    table("A fresh process for each call, with a result", head, rows)
    for number, *_, ratio in rows:
        goal(f"of the bare loop's rate, {number} in flight", ratio, 0.85, at_least=True)
    ends = [
        (until_none_is_left(chosen.children), _in_a_fresh_process("bare_end", chosen.children))
        for _ in range(chosen.rounds)
    ]
    table(
        f"Milliseconds from kill -9 of the master to none left of {chosen.children} children",
        ["", "median", "worst"],
        [
            (name, median(times), max(times))
            for name, times in zip(
                ("fork server", "bare loop, killed by its parent"), zip(*ends, strict=True), strict=True
            )
        ],
    )
    goal("milliseconds until none is left", median([with_us for with_us, _ in ends]), 100)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in WAYS:
        print(WAYS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
