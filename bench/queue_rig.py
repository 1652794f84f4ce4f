"""Runs a queue: its servers, a producer that does what it is told, its workers, and the marks that tasks leave."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from queue_subjects import WORK, Place, Subject
from rig import PYTHON, Cost, cost, end, is_alive, running

PATIENCE = 60.0  # seconds
LEAD = 0.3  # of the tasks are done while workers still start
_DRIVER = """
import importlib, json, random, sys, time
module = importlib.import_module(sys.argv[1])
many = getattr(module, "put_many", None)

def timed(act, count):
    began = time.perf_counter()
    act()
    return count / (time.perf_counter() - began)

def singly(count):
    def act():
        for _ in range(count):
            module.put("noop", 0)
    return timed(act, count)

def by_hundreds(count):
    if many is None:
        singly(count)
        return None
    def act():
        for _ in range(count // 100):
            many([("noop", 0)] * 100)
    return timed(act, count)

def stamps(count):
    moments = []
    for number in range(count):
        time.sleep(random.uniform(0.03, 0.08))
        moments.append(time.monotonic_ns())
        module.put("stamp", number)
    return moments

def mark(number):
    module.put("mark", number)

def wait(number):
    module.put("wait", number)

acts = {each.__name__: each for each in (singly, by_hundreds, stamps, mark, wait)}
print("null", flush=True)
for line in sys.stdin:
    word, number = line.split()
    print(json.dumps(acts[word](int(number))), flush=True)
"""


class Mark(NamedTuple):
    """What a task has left."""

    what: str
    value: int
    moment: int  # monotonic nanoseconds
    pid: int


class Queue:
    """A subject in its place."""

    def __init__(self, subject: Subject, place: Place) -> None:
        """Write its modules."""
        self.subject = subject
        self._place = place
        self._marks = place.path / f"{subject.slug}.marks"
        (place.path / "work.py").write_text(WORK)
        (place.path / f"{subject.slug}.py").write_text(self._fill(subject.text))
        run_dir = place.path / "run"
        run_dir.mkdir(mode=0o755, exist_ok=True)
        given = {name: self._fill(value) for name, value in subject.environ}
        log = str(place.path / f"{subject.slug}.log")
        ours = {"DAEMONKIT_RUN_DIR": str(run_dir), "DAEMONKIT_LOG": log, "PYTHONPATH": str(place.path)}
        self.environ = {**os.environ, **ours, "MARKS": str(self._marks), **given}
        self._producer: subprocess.Popen[str] | None = None
        self._programs: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start as many programs as make two workers."""
        for _ in range(self.subject.programs):
            self.start_another()

    def start_another(self) -> None:
        """Start one program more."""
        words = self.subject.command(self.subject.slug, len(self._programs))
        log = self._place.path / f"{self.subject.slug}.out"
        with log.open("ab") as file:
            command = [self._fill(word) for word in words]
            self._programs.append(
                subprocess.Popen(command, cwd=self._place.path, env=self.environ, stdout=file, stderr=file)
            )

    def tell(self, what: str, number: int) -> object:
        """Have the producer do something; return its answer."""
        if self._producer is None:
            self._producer = subprocess.Popen(
                [PYTHON, "-c", _DRIVER, self.subject.slug],
                cwd=self._place.path,
                env=self.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._answer()
        assert self._producer.stdin is not None
        self._producer.stdin.write(f"{what} {number}\n")
        self._producer.stdin.flush()
        return self._answer()

    def _answer(self) -> object:
        assert self._producer is not None
        assert self._producer.stdout is not None
        return json.loads(self._producer.stdout.readline())

    def marks(self, what: str, value: int | None = None) -> list[Mark]:
        """Those of a kind, or of one task, in their order."""
        text = self._marks.read_text() if self._marks.exists() else ""
        words = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
        found = [Mark(kind, int(number), int(now), int(pid)) for kind, number, now, pid in words if kind == what]
        return [mark for mark in found if value is None or mark.value == value]

    def await_marks(self, what: str, count: int, value: int | None = None) -> list[Mark]:
        """Wait until there are so many.

        Raises:
            TimeoutError: there are not.
        """
        until = time.monotonic() + PATIENCE
        while len(found := self.marks(what, value)) < count:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.subject.name}: {len(found)} of {count} marks {what!r} in {self._place.path}")
            time.sleep(0.01)
        return found

    def cost(self) -> Cost:
        """Of all workers' processes."""
        each = [cost(program.pid) for program in self._programs]
        return Cost._make(sum(column) for column in zip(*each, strict=True))

    def kill_program_of(self, pid: int) -> None:
        """kill -9 of all processes of the program to which ``pid`` belongs."""
        for program in self._programs:
            found = tree(program.pid)
            if pid in found:
                for each in found:
                    end(each)
                program.wait()

    def stop(self) -> None:
        """End workers and producer."""
        for program in self._programs:
            if program.poll() is None:
                program.terminate()
        for program in self._programs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(3)
            for each in tree(program.pid):
                end(each)
            program.wait()
        self._programs.clear()
        if self._producer is not None:
            self._producer.kill()
            self._producer.communicate()
            self._producer = None

    def _fill(self, text: str) -> str:
        for name, value in {**self._place._asdict(), "queue": self.subject.slug}.items():
            text = text.replace("{" + name + "}", str(value))
        return text


def tree(pid: int) -> list[int]:
    """A process and those below it, as far as they live."""
    if not is_alive(pid):
        return []
    found = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            found += tree(int(child))
    return found


@contextlib.contextmanager
def queue(subject: Subject, place: Place) -> Iterator[Queue]:
    """A subject for the time of a block."""
    made = Queue(subject, place)
    try:
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def servers(path: Path) -> Iterator[Place]:
    """Fresh ones, that keep all in memory, for the time of a block."""
    path.mkdir()
    redis, beanstalkd = _free_port(), _free_port()
    address = ("--port", str(redis), "--bind", "127.0.0.1", "--dir", str(path))
    commands = {
        redis: ("redis-server", *address, "--save", "", "--appendonly", "no"),
        beanstalkd: ("beanstalkd", "-l", "127.0.0.1", "-p", str(beanstalkd)),
    }
    with contextlib.ExitStack() as stack:
        for port, command in commands.items():
            stack.enter_context(running(*command))
            _await(partial(_is_open, port))
        yield Place(path, redis, beanstalkd)


def _await(look: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < until
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
