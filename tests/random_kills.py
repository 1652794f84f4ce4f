"""A daemon that does tasks while a hand kills its processes, its producers and its broker, again and again.

What is counted, see ``kill_counts``: each task that a producer was told is kept is done at least once, and one that is
done twice has been done the first time by a process, or told to a server, that was killed before the broker knew.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from brokers import beanstalkd, redis_server
from harness import PATIENCE, Box
from kill_counts import TTR, Kill, Mark, Outcome

from daemonkit.errors import BrokerError
from daemonkit.queue.broker import Broker, State
from daemonkit.queue.connect import connect

SCRIPT: Final = """
from daemonkit import current_task

def mark(n):
    fd = os.open("MARKS", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{n} {time.monotonic_ns()} {current_task.queue} {current_task.id} {current_task.attempt}\\n".encode())
    os.close(fd)

@task("forked", ttr=TTR, max_retries=1000, backoff=0.05, max_backoff=0.2)
def forked(n):
    time.sleep(n % 10 / 300)
    mark(n)

@task("kept", mode="prefork", concurrency=2, ttr=TTR, max_retries=1000, backoff=0.05, max_backoff=0.2)
def kept(n):
    time.sleep(n % 10 / 3000)
    mark(n)
"""
PRODUCER: Final = """
import mmap, os, random, sys, time
import beat
from daemonkit.errors import BrokerError

first, rate, told, flag = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
chance = random.Random(first)
with open(flag, "r+b") as file:
    putting = mmap.mmap(file.fileno(), 1)
log = os.open(told, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
began, n = time.monotonic(), 0
while True:
    count = chance.choice((1, 1, 1, 1, 1, 1, 1, 10, 40))
    numbers = range(first + n, first + n + count)
    n += count
    task = beat.forked if chance.random() < 0.5 else beat.kept
    options = dict(delay=chance.choice((0, 0, 0, 0.2, 1)), priority=chance.choice((10, 1024, 5000)))
    os.write(log, f"tried {numbers.start} {numbers.stop}\\n".encode())
    putting[0] = 1
    try:
        if count == 1:
            task.put(numbers[0], **options)
        else:
            task.put_many([(each,) for each in numbers], **options)
    except BrokerError as error:
        os.write(log, f"refused {numbers.start} {numbers.stop} {error}\\n".encode())
        time.sleep(0.05)
        continue
    finally:
        putting[0] = 0
    os.write(log, f"kept {numbers.start} {numbers.stop}\\n".encode())
    time.sleep(max(began + n / rate - time.monotonic(), 0))
"""
SPAN: Final = 1_000_000  # numbers of one producer
CALM: Final = 90.0  # seconds in which something must be done while there is something to do and nobody is killed


ENGINES: Final = ("sqlite", "redis", "beanstalk")


class Server(Protocol):
    """A broker's server that can be killed, and comes again with what it has kept."""

    url: str

    def kill(self) -> None:
        """kill -9."""

    def start(self) -> None:
        """Return when it answers."""


@contextlib.contextmanager
def server_of(engine: str, path: Path) -> Iterator[Server | None]:
    """The server of an engine, which keeps all that it has accepted; None for the one that has none."""
    if engine == "sqlite":
        yield None
        return
    path = path / "server"
    path.mkdir()
    if engine == "redis":
        with redis_server(path, "--save", "", "--appendonly", "yes", "--appendfsync", "always") as server:
            yield server
    else:
        with beanstalkd(path, "-b", str(path), "-f", "0") as server:
            yield server


class Soak:
    """One daemon, two producers, one broker, and the hand."""

    def __init__(self, box: Box, server: Server | None, *, rate: float = 80.0, seed: int = 1) -> None:
        """Prepare it.

        Args:
            box: where all happens.
            server: the broker's; None: the daemon's own file.
            rate: tasks that are put a second.
            seed: of what is left to chance.
        """
        self.box = box
        self.outcome = Outcome()
        self._server = server
        self._rate = rate
        self._chance = random.Random(seed)
        self._marks, self._told = box.path / "marks", box.path / "told"
        self._flags = [box.path / f"flag-{n}" for n in range(2)]
        self._producers: list[subprocess.Popen[bytes]] = []
        self._watchers: list[threading.Thread] = []
        self._born = 0
        self._url = f"sqlite:{box.run_dir}/queue.db"
        if server is not None:
            self._url = box.environ["DAEMONKIT_BROKER"] = server.url

    def run(self, seconds: float, pause: float, *, puts: int = 0, kills: int = 0) -> Outcome:
        """Put and kill for so long, a kill every ``pause`` seconds on average; then let all be done, and count.

        On a busy machine it goes on until there were so many accepted ``puts`` and ``kills``, if that takes no minute.
        """
        text = SCRIPT.replace("MARKS", str(self._marks)).replace("TTR", f"{TTR:g}")
        self.box.script(text)
        self._start()
        try:
            for flag in self._flags:
                flag.write_bytes(b"\0")
                self._producers.append(self._produce(flag))
            end = time.monotonic() + seconds
            self._kill_until(end, pause)
            while self._is_short_of(puts, kills) and time.monotonic() < end + 2 * PATIENCE:
                self._kill_until(time.monotonic() + pause, pause)
        finally:
            for producer in self._producers:
                producer.kill()
                producer.wait()
        self._settle()
        done = self.box.call("kill", "beat")
        if done.returncode != 0:
            self.outcome.faults.append(f"kill: {done.stdout}{done.stderr}")
        self._count()
        return self.outcome

    def _start(self) -> None:
        done = self.box.call("start", "--concurrency", "8", self.box.path / "beat.py")
        if done.returncode != 0:
            self.outcome.faults.append(f"start: {done.stdout}{done.stderr}")

    def _produce(self, flag: Path) -> subprocess.Popen[bytes]:
        self._born += 1
        rate = self._rate / len(self._flags)
        words = [str(self._born * SPAN), str(rate), str(self._told), str(flag)]
        environ = {**self.box.environ, "PYTHONPATH": str(self.box.path)}
        with open(self.box.path / "producer.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", PRODUCER, *words], cwd=self.box.path, env=environ, stdout=log, stderr=log
            )

    def _kill_until(self, end: float, pause: float) -> None:
        acts = {"producer": self._kill_producer, "master": self._kill_master}
        kinds = ["task", "task", "consumer", "kept process", "fork server", "master", "producer"]
        if self._server is not None:
            acts["server"] = self._kill_server
            kinds.append("server")
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(self._chance.expovariate(1 / pause), left))
            kind = self._chance.choice(kinds)
            acts.get(kind, lambda kind=kind: self._kill_one(kind))()

    def _is_short_of(self, puts: int, kills: int) -> bool:
        kept = sum(line.startswith("kept") for line in _lines(self._told))
        return kept < puts or len(self.outcome.kills) < kills

    def _kill_one(self, kind: str) -> None:
        """One of the daemon's processes; of tasks whichever there is within a moment."""
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            found = [pid for pid, title in descendants(self.box.pid()).items() if kind_of(title) == kind]
            if found and self._kill(self._chance.choice(found), kind):
                return
            time.sleep(0.002)

    def _kill(self, pid: int, kind: str) -> bool:
        """False: it is no longer who it was."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        with open(pidfd, "rb", buffering=0):
            if kind != "master" and kind_of(title_of(pid)) != kind:
                return False
            below = list(_pidfds(descendants(pid)))
            at = time.monotonic_ns()  # afterwards we may have to wait for a processor while others do its tasks again
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                kill = self._note(kind, at)
                assert select.select([pidfd], [], [], PATIENCE)[0]
                kill.gone = time.monotonic_ns()
                self._await_ends(kill, below)
                return True
        return False

    def _await_ends(self, kill: Kill, pidfds: list[int]) -> None:
        """Note when the last of them has ended; meanwhile the hand goes on."""

        def wait() -> None:
            for pidfd in pidfds:
                assert select.select([pidfd], [], [], PATIENCE)[0]
                os.close(pidfd)
            kill.gone = time.monotonic_ns()

        self._watchers.append(threading.Thread(target=wait))
        self._watchers[-1].start()

    def _kill_master(self) -> None:
        pid = self.box.pid()
        if pid is not None and self._kill(pid, "master"):
            self._start()

    def _kill_producer(self) -> None:
        """In the middle of a put, if it puts within a moment."""
        which = self._chance.randrange(len(self._flags))
        flag, end = self._flags[which], time.monotonic() + 0.5
        while flag.read_bytes() != b"\1" and time.monotonic() < end:
            pass
        kill = self._note("producer")
        self._producers[which].kill()
        self._producers[which].wait()
        kill.gone = time.monotonic_ns()
        flag.write_bytes(b"\0")
        self._producers[which] = self._produce(flag)

    def _kill_server(self) -> None:
        assert self._server is not None
        kill = self._note("server")
        self._server.kill()
        self._server.start()
        kill.gone = time.monotonic_ns()

    def _note(self, who: str, at: int = 0) -> Kill:
        at = at or time.monotonic_ns()
        self.outcome.kills.append(Kill(at, who, at))
        return self.outcome.kills[-1]

    def _settle(self) -> None:
        """Wait until nothing is left but what is buried; note what is left."""
        end, least = time.monotonic() + CALM, sys.maxsize
        broker: Broker = connect(self._url)
        try:
            while (left := sum(s.ready + s.delayed + s.reserved for s in broker.stats())) and time.monotonic() < end:
                if left < least:
                    end, least = time.monotonic() + CALM, left
                time.sleep(0.1)
            for stats in broker.stats():
                reasons = {task.reason for task in broker.peek_state(stats.queue, State.BURIED, 5)}
                self.outcome.left[stats.queue] = f"{stats} {reasons or ''}".rstrip()
        except BrokerError as error:
            self.outcome.faults.append(str(error))
        finally:
            broker.close()

    def _count(self) -> None:
        found = self.outcome
        for line in _lines(self._told):
            word, start, stop, *_ = line.split()
            numbers = range(int(start), int(stop))
            if word != "refused":
                (found.tried if word == "tried" else found.kept).update(numbers)
        marks = collections.defaultdict(list)
        for line in _lines(self._marks):
            number, moment, queue, id, attempt = line.split()
            marks[int(number)].append(Mark(int(moment), queue, id, int(attempt)))
        found.marks = dict(marks)
        for watcher in self._watchers:
            watcher.join()
        found.read_log(self.box.log.read_text(errors="replace"))


def kind_of(title: str) -> str:
    """What a process of the daemon is, by its title."""
    words = title.removeprefix("beat: ")
    if words.endswith(": fork server") and words.startswith("consumer"):
        return "fork server"
    if words.startswith("task "):
        return "task"
    if words.startswith("consumer kept"):
        return "kept process"
    return "consumer" if words == "consumer forked" else ""


def title_of(pid: int) -> str:
    """As ps shows it; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int | None) -> dict[int, str]:
    """The processes below ``pid``, with their titles; none for one that still has its parent's."""
    found: dict[int, str] = {}
    todo: list[int] = [] if pid is None else [pid]
    while todo:
        parent = todo.pop()
        theirs = title_of(parent)
        for child in _children(parent):
            if child not in found:
                title = title_of(child)
                found[child] = "" if title == theirs else title
                todo.append(child)
    return found


def _pidfds(pids: Iterable[int]) -> Iterator[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            yield os.pidfd_open(pid)


def _children(pid: int) -> Sequence[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(w) for t in tasks for w in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    """Those that were written to their end."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()
