"""A daemon whose script declares tasks: each one is run in a process of its own, and none is ever lost."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import Between, RedisServer, beanstalkd, broker_server, redis_server
from harness import PATIENCE, Box, await_end
from ports import free_ports

from daemonkit.errors import BrokerFull
from daemonkit.queue.broker import Broker, NewTask, Reservation, State, Task
from daemonkit.queue.connect import connect
from daemonkit.queue.sqlite import SqliteBroker

JSON = "arguments are sent as JSON: text, numbers, True, False, None, lists and dicts"
HEAD = """
import fcntl
def wait_for(path):
    with open(path) as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)

def note(*words):
    fd = os.open("OUT", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + chr(10)).encode())
    os.close(fd)
"""


class Mailer:
    """A daemon with tasks, and a connection to its queue."""

    def __init__(self, box: Box, tasks: str, *options: str) -> None:
        self.box = box
        self.out = box.path / "out"
        self.out.touch()
        self._text = HEAD.replace("OUT", str(self.out)) + textwrap.dedent(tasks)
        self._options = options
        self.broker = SqliteBroker(str(box.run_dir / "queue.db"))
        box.script(self._text)

    def start(self) -> int:
        return self.box.start(self._text, *self._options)

    def put(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a producer that has imported the script as ``beat``."""
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", f"import beat\n{textwrap.dedent(program)}"],
            cwd=self.box.path,
            env=self.box.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def push(self, body: bytes, queue: str = "default", **options: float) -> str:
        return self.broker.put(queue, NewTask(body, **options))  # type: ignore[arg-type]

    def await_broker(self, look: Callable[[], bool]) -> None:
        """Sleep until ``look`` is true, which may become so with any change of the queue."""
        until = time.monotonic() + PATIENCE
        self.broker.watch()
        self.broker.drain()
        while not look():
            assert time.monotonic() < until, self.broker.stats()
            select.select([self.broker.watch()], [], [], 1)  # a writer tells before it counts, and the disk may be slow
            self.broker.drain()

    def await_broker_of(self, broker: Broker, look: Callable[[], bool]) -> None:
        """The same, of another broker."""
        until = time.monotonic() + PATIENCE
        while not look():
            assert time.monotonic() < until, broker.stats()
            select.select([broker.watch()], [], [], 0.1)  # a deletion wakes nobody
            broker.drain()

    def await_empty(self) -> None:
        self.await_broker(lambda: not self.broker.stats())

    def await_buried(self, count: int = 1, queue: str = "default") -> list[Task]:
        self.await_broker(lambda: len(self.buried(queue)) >= count)
        return self.buried(queue)

    def await_out(self, text: str, count: int = 1) -> list[str]:
        return self.box.await_file(self.out, text, count).splitlines()

    def buried(self, queue: str = "default") -> list[Task]:
        return self.broker.peek_state(queue, State.BURIED, 100)

    def await_status(self, text: str) -> None:
        """Ask until ``text`` stands in the status: what a process tells the master comes after what it logs."""
        until = time.monotonic() + PATIENCE
        while text not in (status := self.box.call("status", "beat").stdout):
            assert time.monotonic() < until, status

    def consumer(self) -> int:
        """Its PID, once it is there: a start does not wait for it."""
        until = time.monotonic() + PATIENCE
        while True:
            children = self.box.status()["children"]
            pid = next(each["pid"] for each in children if each["name"].startswith("consumer"))
            if pid is not None:
                return int(pid)
            assert time.monotonic() < until, children


class Gate:
    """A file that is locked until it is opened: tasks that wait for it wait in the kernel."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        self._file.close()


@pytest.fixture
def gate(box: Box) -> Iterator[Gate]:
    made = Gate(box.path / "gate")
    yield made
    made.open()


Make = Callable[..., Mailer]


@pytest.fixture
def make(box: Box) -> Iterator[Make]:
    """Make a ``Mailer`` in the box."""
    made: list[Mailer] = []

    def make(tasks: str, *options: str) -> Mailer:
        made.append(Mailer(box, tasks, *options))
        return made[-1]

    yield make
    for each in made:
        each.broker.close()


def call(name: str, *args: object) -> bytes:
    return json.dumps({"task": name, "args": args}).encode()


def test_what_a_producer_puts_before_the_daemon_runs_is_done_when_it_does(box: Box, make: Make) -> None:
    mailer = make(
        """
        @task(queue="mail")
        def send_mail(to, text="hi"):
            from daemonkit import current_task
            note("sent", to, text, current_task.queue, current_task.id, current_task.attempt, current_task.token > 0)
        """,
    )
    done = mailer.put(
        """
        print(beat.send_mail.put("a@b.c"), *beat.send_mail.put_many([("b", "yo"), {"to": "c"}]))
        """
    )
    assert (done.stdout, done.stderr) == (
        "Handle(queue='mail', id='1') Handle(queue='mail', id='2') Handle(queue='mail', id='3')\n",
        "",
    )
    mailer.start()
    lines = mailer.await_out("sent", 3)
    assert sorted(lines) == ["sent a@b.c hi mail 1 1 True", "sent b yo mail 2 1 True", "sent c hi mail 3 1 True"]
    mailer.await_empty()


def test_a_plain_call_still_calls_and_wrong_arguments_are_told_to_the_producer(box: Box, make: Make) -> None:
    mailer = make("@task(queue='mail')\ndef send(to, n=1):\n    return to * n\n")
    done = mailer.put(
        """
        print(beat.send("ab", n=2), beat.send.__name__)
        for args, kwargs in (((), {}), ((1, 2, 3), {}), (("a",), {"m": 1}), ((b"x",), {}), ((float("nan"),), {}),
                             (("a",), {"delay": -1}), (("a",), {"priority": "x"})):
            try:
                beat.send.put(*args, **kwargs)
            except beat.UsageError as error:
                print(error)
        """
    )
    assert done.stderr == ""
    told = done.stdout.splitlines()
    assert re.fullmatch(f"put send: Out of range float values are not JSON compliant.*; {JSON}", told[5])
    assert told == [
        "abab send",
        "put send: missing a required argument: 'to'; it is called as send(to, n=1)",
        "put send: too many positional arguments; it is called as send(to, n=1)",
        "put send: got an unexpected keyword argument 'm'; it is called as send(to, n=1)",
        f"put send: Object of type bytes is not JSON serializable; {JSON}",
        told[5],
        "delay=-1 must be a number of seconds, from 0 to 4294967295",
        "priority='x' must be a whole number from 0, the most urgent, to 4294967295",
    ]
    assert mailer.broker.stats() == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("@task(queue='a b')\ndef f(): pass", "@task f: queue 'a b': a name is up to 200 letters"),
        ("@task(ttr=0)\ndef f(): pass", "@task f, ttr"),
        ("@task(max_retries=-1)\ndef f(): pass", "@task f, max_retries=-1 must be a whole number from 0"),
        ("@task(timeout=1, soft_timeout=2)\ndef f(): pass", "soft_timeout=2 must be less than timeout=1"),
        ("@task(concurrency=0)\ndef f(): pass", "@task f, concurrency=0 must be a whole number from 1"),
        ("@task\ndef f(delay): pass", "its parameter 'delay' is an option of put(); give it another name"),
        ("@task\nasync def f(): pass", "put it above a plain function; use asyncio.run()"),
        ("@task\ndef f(): pass\n@task\ndef f(): pass", "there is a task named 'f' already; give this one a name="),
        ("task(max)", "its arguments cannot be known; put @task above a function of your own"),
        ("@task(soft_timeout=1e300)\ndef f(): pass", "@task f, soft_timeout=1e+300 must be"),
        ("@task(max_backoff=1e300)\ndef f(): pass", "@task f, max_backoff=1e+300 must be"),
        ("@task(bogus=1)\ndef f(): pass", "bogus"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_told_at_the_start(box: Box, words: str, sentence: str) -> None:
    done = box.call("start", box.script(words))
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr


def test_each_task_has_a_process_of_its_own_below_the_consumer_and_is_shown(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        """
        @task
        def wait(path):
            note("begun", os.getpid(), os.getppid())
            wait_for(path)
            note("done")
        """,
    )
    id = mailer.push(call("wait", str(box.path / "gate")))
    master = mailer.start()
    _, pid, parent = mailer.await_out("begun")[0].split()
    titles = box.processes()
    assert titles[int(pid)] == f"beat: task default {id}"
    assert titles[int(parent)] == "beat: consumer default: fork server"
    assert titles[mailer.consumer()] == "beat: consumer default"
    assert titles[master] == "beat: master"
    gate.open()
    mailer.await_out("done")


FAILING = """
@task(max_retries=2, backoff=0.01)
def fail(how):
    note("try")
    print("asked to", how, file=sys.stderr)
    os.system("echo and a program: $0 >/dev/stderr")
    if how == "raise": raise ValueError("no route")
    if how == "exit": sys.exit("told why")
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "leave": os._exit(0)
"""


def test_a_task_that_writes_nonsense_into_all_that_is_open_takes_no_other_with_it(
    box: Box, make: Make, gate: Gate
) -> None:
    mailer = make(f"""
        @task(max_retries=0)
        def wait():
            note("begun")
            wait_for({str(box.path / "gate")!r})
            note("done")
        @task(max_retries=0)
        def nonsense():
            for fd in range(3, 64):
                for junk in (b"x", b"", bytes(9), bytes([9, 1]) + bytes(8)):
                    try:
                        os.write(fd, junk)
                    except OSError:
                        pass
            note("written")
    """)
    mailer.start()
    mailer.put("beat.wait.put()")
    mailer.await_out("begun")
    mailer.put("beat.nonsense.put()")
    mailer.await_out("written")
    gate.open()
    mailer.await_empty()
    assert mailer.await_out("done") == ["begun", "written", "done"]


def test_what_one_task_had_to_import_is_there_for_the_next_but_nothing_of_the_users(box: Box, make: Make) -> None:
    (box.path / "settings.py").write_text("")
    mailer = make("""
        import sys
        @task(concurrency=1)
        def send(number):
            before = [name for name in ("settings", "sqlite3", "inspect", "imaplib") if name in sys.modules]
            import settings, imaplib
            if number < 3:
                send.put(number + 1)
            note(number, *before, ".")
    """)
    mailer.start()
    mailer.put("beat.send.put(1)")
    mailer.await_out(".", 3)
    assert mailer.await_out(".", 3) == ["1 .", "2 sqlite3 inspect imaplib .", "3 sqlite3 inspect imaplib ."]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError: no route (pid"),
        ("exit", "SystemExit: told why (pid"),
        ("kill", "killed by SIGKILL after"),
        ("leave", "exited with status 0 after"),
    ],
)
def test_row_32_a_task_that_fails_is_tried_again_then_buried_with_the_reason(
    box: Box, make: Make, how: str, reason: str
) -> None:
    mailer = make(FAILING)
    id = mailer.push(call("fail", how))
    mailer.start()
    (task,) = mailer.await_buried()
    assert mailer.await_out("try", 3) == ["try"] * 3
    assert (task.id, task.reserves, task.failures) == (id, 3, 3)
    assert task.reason is not None
    assert reason in task.reason
    assert (how in ("raise", "exit")) == ("Traceback (most recent call last)" in task.reason)
    assert " of CPU, " in task.reason  # the receipt
    assert task.reason.endswith(f"\nlast on stderr:\nasked to {how}\nand a program: sh")
    box.await_log(f"beat: task default {id}[", 6)
    assert mailer.broker.kick_task(id)
    mailer.await_out("try", 6)


@pytest.mark.parametrize("engine", ["sqlite", "redis", "beanstalk"])
def test_each_broker_takes_the_longest_backoff(box: Box, make: Make, tmp_path: Path, engine: str) -> None:
    with contextlib.ExitStack() as stack:
        if engine != "sqlite":
            box.environ["DAEMONKIT_BROKER"] = stack.enter_context(broker_server(engine, tmp_path)).url
        mailer = make("@task(backoff=2**32 - 1, max_backoff=2**32 - 1)\ndef fail(): 1 / 0\n")
        url = box.environ.get("DAEMONKIT_BROKER", mailer.broker.url)
        with contextlib.closing(connect(url)) as broker:
            broker.put_many("default", [NewTask(call("fail"))] * 10)
            mailer.start()
            mailer.await_broker_of(broker, lambda: [each[1:5] for each in broker.stats()] == [(0, 10, 0, 0)])
        assert box.call("kill", "beat").returncode == 0


def test_row_32_a_task_that_takes_too_long_is_killed_with_what_it_has_started(box: Box, make: Make) -> None:
    mailer = make(
        """
        import subprocess
        @task(timeout=0.3, max_retries=0)
        def hang():
            note(subprocess.Popen(["sleep", "1000"]).pid)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.pause()
        """,
    )
    mailer.push(call("hang"))
    mailer.start()
    (task,) = mailer.await_buried()
    while not mailer.out.read_text():  # it was killed before it came to say that
        assert mailer.broker.kick_task(task.id)
        (task,) = mailer.await_buried()
    await_end(int(mailer.out.read_text()))
    assert task.reason is not None
    assert task.reason.startswith("took longer than its timeout, 0.3 s (pid ")


def test_row_32_a_task_that_is_stopped_is_killed_when_its_time_is_up(box: Box, make: Make) -> None:
    mailer = make("@task(timeout=0.3, max_retries=0)\ndef stop(): os.kill(os.getpid(), signal.SIGSTOP)\n")
    mailer.push(call("stop"))
    mailer.start()
    (task,) = mailer.await_buried()
    assert "took longer than its timeout, 0.3 s" in str(task.reason)


@pytest.mark.parametrize("mode", ["fork", "prefork"])
def test_a_soft_timeout_waits_for_the_end_of_a_put_also_beside_other_threads(make: Make, mode: str) -> None:
    mailer = make(f"""
        import signal, threading
        from daemonkit import task
        from daemonkit.errors import TaskTimeout
        from daemonkit.queue.current import undisturbed

        @task(mode={mode!r}, soft_timeout=60)
        def send():
            try:
                with undisturbed():  # as a put is
                    ring = threading.Thread(target=signal.raise_signal, args=[signal.SIGALRM])
                    ring.start()
                    ring.join()
                    note("put")
                note("late")
            except TaskTimeout:
                note("in time")
        """)
    mailer.start()
    mailer.push(b'{"task": "send"}')
    assert mailer.await_out("in time") == ["put", "in time"]


def test_a_soft_timeout_is_raised_in_the_task_which_may_tidy_up(box: Box, make: Make) -> None:
    mailer = make(
        """
        from daemonkit.errors import TaskTimeout
        @task(soft_timeout=0.1, timeout=60, max_retries=50, backoff=0.01)  # it may be raised before it is awaited
        def slow():
            try:
                while True:
                    time.sleep(0.01)
            except TaskTimeout:
                note("tidied up")
                raise
        """,
    )
    mailer.push(call("slow"))
    mailer.start()
    mailer.await_out("tidied up")
    box.await_log("TaskTimeout: not done after its time-out, 100ms")


def test_a_task_runs_longer_than_its_ttr_and_nobody_else_gets_it(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        """
        @task(max_retries=0)
        def wait(path):
            note("begun")
            wait_for(path)
            note("done")
        """,
        "--concurrency",
        "3",
    )
    id = mailer.push(call("wait", str(box.path / "gate")), ttr=3)
    mailer.start()
    mailer.await_out("begun")
    mailer.push(b"{}", delay=5)
    mailer.await_buried()  # five seconds have passed
    task = mailer.broker.peek(id)
    assert task is not None
    assert (task.state, task.reserves, task.timeouts) == (State.RESERVED, 1, 0)
    gate.open()
    assert mailer.await_out("done") == ["begun", "done"]


BAD = {
    b"\xff\xfe": "not UTF-8: invalid start byte at byte 0",
    b"": "not JSON: Expecting value",
    b"[1,": "not JSON: Expecting value",
    b"[" * 100_000: "not JSON: ",
    b"9" * 10_000: "not JSON: ",
    b'{"task": NaN}': "not JSON: NaN is no number of JSON's",
    b"[]": "a JSON object is wanted, not an array",
    b"null": "a JSON object is wanted, not null",
    b"{}": 'the object has neither "task" nor "class"',
    b'{"task": 1}': '"task" must be a text, not a number',
    b'{"task": "add", "args": {}}': '"args" must be an array, not an object',
    b'{"task": "add", "kwargs": []}': '"kwargs" must be an object, not an array',
    b'{"task": "os.system", "args": ["touch HACKED"]}': "no task named 'os.system' is declared",
    b'{"task": "note", "args": ["hacked"]}': "no task named 'note' is declared",
    b'{"task": "__import__", "args": ["hacked"]}': "no task named '__import__' is declared",
    b'{"task": "add"}': "missing a required argument: 'a'",
    b'{"task": "add", "args": [1, 2, 3]}': "too many positional arguments",
    b'{"task": "add", "args": [1], "kwargs": {"c": 1}}': "missing a required argument: 'b'",
    b'{"worker": 1, "class": "add"}': '"worker" and "class" must be texts',
    pickle.dumps(os.getpid): "not UTF-8",
}


def test_rows_31_and_37_bad_bodies_are_buried_byte_for_byte_and_never_executed(box: Box, make: Make) -> None:
    mailer = make("@task\ndef add(a, b):\n    note('sum', a + b)\n")
    ids = {mailer.push(body): body for body in BAD}
    mailer.push(call("add", 1, 2))
    mailer.start()
    assert mailer.await_out("sum") == ["sum 3"]
    buried = mailer.await_buried(len(BAD))
    assert {task.id: task.body for task in buried} == ids
    for task in buried:
        assert task.reason is not None
        assert BAD[task.body] in task.reason
    assert not (box.path / "HACKED").exists()
    assert mailer.out.read_text() == "sum 3\n"


def test_what_is_nested_too_deeply_for_a_process_is_buried_and_its_consumer_lives(box: Box, make: Make) -> None:
    mailer = make("sys.setrecursionlimit(20_000)\n@task\ndef add(a, b):\n    note('sum', a + b)\n")
    body = b'{"task": "add", "args": [1, %s]}' % (b"[" * 3000 + b"]" * 3000)
    id = mailer.push(body)
    mailer.push(call("add", 1, 2))
    mailer.start()
    assert mailer.await_out("sum") == ["sum 3"]
    (task,) = mailer.await_buried()
    assert (task.id, task.body, task.reserves) == (id, body, 1)
    assert re.match("add: object too deeply nested|not JSON: maximum recursion depth", task.reason or "")


@pytest.mark.parametrize("mode", ["fork", "prefork"])
def test_the_reason_of_a_bad_body_is_not_as_long_as_the_body(box: Box, make: Make, mode: str) -> None:
    mailer = make(f"@task(mode={mode!r})\ndef add(): pass\n")
    long = "x" * 1_000_000
    mailer.push(call(long))
    mailer.push(json.dumps({"task": "add", "kwargs": {long: 1}}).encode())
    mailer.start()
    for task in mailer.await_buried(2):
        assert task.reason is not None
        assert len(task.body) > len(long)
        assert 10_000 < len(task.reason) < 30_000
    assert box.log.stat().st_size < 100_000


def test_rows_31_and_37_the_same_from_beanstalkd(box: Box, make: Make, tmp_path: Path) -> None:
    with broker_server("beanstalk", tmp_path) as server, contextlib.closing(connect(server.url)) as broker:
        mailer = make("@task\ndef add(a, b):\n    note('sum', a + b)\n", "--broker", server.url)
        for body in BAD:
            if len(body) < 65536:  # the server takes no more
                broker.put("default", NewTask(body))
        broker.put("default", NewTask(call("add", 1, 2)))
        mailer.start()
        assert mailer.await_out("sum") == ["sum 3"]
        left = {body for body in BAD if len(body) < 65536}
        while left:
            mailer.await_broker_of(broker, lambda: bool(broker.peek_state("default", State.BURIED)))
            (task,) = broker.peek_state("default", State.BURIED)
            assert BAD[task.body] in (task.reason or "")
            left.remove(task.body)
            assert broker.delete_task(task.id)
        assert not (box.path / "HACKED").exists()
        assert mailer.out.read_text() == "sum 3\n"
        assert box.call("kill", "beat").returncode == 0


def test_what_other_languages_push_is_taken_as_they_write_it(box: Box, make: Make) -> None:
    mailer = make(
        """
        @task(name="mail.send")
        def send(to, n=0): note("mail.send", to, n)
        @task
        def sms(to): note("sms", to)
        """,
    )
    for body in (
        {"worker": "mail", "class": "send", "params": ["a", 1]},
        {"worker": "mail", "class": "send", "params": {"to": "b", "n": 2}},
        {"worker": "x", "class": "sms", "params": "c"},
        {"class": "sms", "params": [9007199254740993]},
        {"worker": "sms", "params": "ä"},
    ):
        mailer.push(json.dumps(body, ensure_ascii=False).encode())
    mailer.start()
    lines = mailer.await_out("\n", 5)
    assert sorted(lines) == ["mail.send a 1", "mail.send b 2", "sms 9007199254740993", "sms c", "sms ä"]


@pytest.fixture
def small_box() -> Iterator[Path]:
    """A memory cgroup with 150 MB, of either version."""
    is_new = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    path = Path("/sys/fs/cgroup" if is_new else "/sys/fs/cgroup/memory") / f"test-{uuid.uuid4().hex}"
    try:
        path.mkdir()
        (path / ("memory.max" if is_new else "memory.limit_in_bytes")).write_text("150000000")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    yield path
    path.rmdir()


def memory_kills(group: Path) -> int:
    events = group / "memory.events" if (group / "memory.events").exists() else group / "memory.oom_control"
    return int(events.read_text().split("oom_kill ")[1].split()[0])


def test_row_32_no_task_begins_for_which_there_is_no_memory(box: Box, make: Make, gate: Gate, small_box: Path) -> None:
    mailer = make(
        """
        @task(max_retries=0)
        def fat(path): x = bytearray(10_000_000); wait_for(path); time.sleep(0.3); note("done")
        """
    )
    mailer.broker.put_many("default", [NewTask(call("fat", str(box.path / "gate")))] * 30)
    options = ("--concurrency", "100", "--min-free-memory", "40M", str(box.path / "beat.py"))
    enter = f'echo $$ > {small_box}/cgroup.procs && exec "$@"'
    started = subprocess.run(["sh", "-c", enter, "-", *box.command("start", *options)], env=box.environ, check=False)
    assert started.returncode == 0
    box.await_log("no task is begun until there is memory")
    gate.open()
    mailer.await_out("done", 30)
    mailer.await_empty()
    assert memory_kills(small_box) == 0
    assert box.call("kill", "beat").returncode == 0


def test_row_32_many_small_tasks_at_once_after_a_few_meet_no_memory_limit(
    box: Box, make: Make, small_box: Path
) -> None:
    mailer = make("@task(max_retries=0)\ndef small(): note('begun'); time.sleep(1); note('done')\n")
    options = ("--concurrency", "800", "--min-free-memory", "30M", str(box.path / "beat.py"))
    enter = f'echo $$ > {small_box}/cgroup.procs && exec "$@"'
    started = subprocess.run(["sh", "-c", enter, "-", *box.command("start", *options)], env=box.environ, check=False)
    assert started.returncode == 0
    for count in (6, 150):
        mailer.broker.put_many("default", [NewTask(call("small"))] * count)
        mailer.await_empty()
    words = mailer.out.read_text().split()
    assert memory_kills(small_box) == 0
    assert (words.count("begun"), words.count("done")) == (156, 156)
    assert box.call("kill", "beat").returncode == 0


def test_no_more_run_at_once_than_may_of_each_queue_and_in_all(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        """
        @task("narrow", concurrency=2)
        def narrow(path): note("narrow"); wait_for(path)
        @task("wide")
        def wide(path): note("wide"); wait_for(path)
        """,
        "--concurrency",
        "5",
    )
    for _ in range(6):
        mailer.push(call("narrow", str(box.path / "gate")), "narrow")
        mailer.push(call("wide", str(box.path / "gate")), "wide")
    mailer.start()
    mailer.await_out("\n", 5)
    assert collections.Counter(mailer.out.read_text().split()) == {"narrow": 2, "wide": 3}
    states = {each.queue: (each.reserved, each.ready) for each in mailer.broker.stats()}
    assert states == {"narrow": (2, 4), "wide": (3, 3)}
    gate.open()
    mailer.await_empty()
    assert len(mailer.out.read_text().split()) == 12


def test_no_more_are_reserved_than_can_begin_soon(box: Box, make: Make, gate: Gate) -> None:
    mailer = make("@task\ndef wait(path): note('begun'); wait_for(path)\n", "--concurrency", "300")
    mailer.broker.put_many("default", [NewTask(call("wait", str(box.path / "gate")))] * 300)
    mailer.start()
    mailer.await_out("begun")
    server = next(pid for pid, title in box.processes().items() if title == "beat: consumer default: fork server")
    while (reserved := sum(each.reserved for each in mailer.broker.stats())) < 300:
        begun = len(mailer.out.read_text().split())
        forked = len(Path(f"/proc/{server}/task/{server}/children").read_text().split())  # none has ended
        assert reserved - forked <= 32
        mailer.await_out("begun", min(begun + 1, 300))
    gate.open()
    mailer.await_empty()


def test_a_stop_lets_tasks_finish_and_gives_back_what_does_not_in_time(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        """
        @task
        def short(path): note("begun"); wait_for(path); note("short done")
        @task
        def long(): note("begun"); signal.pause()
        """,
        "--graceful-timeout",
        "5",
        "--concurrency",
        "2",
    )
    mailer.push(call("short", str(box.path / "gate")))
    long = mailer.push(call("long"))
    waiting = mailer.push(call("short", str(box.path / "gate")))
    mailer.start()
    mailer.await_out("begun", 2)
    stopping = box.popen("kill", "beat")
    box.await_log("stopping on SIGTERM")
    gate.open()
    assert "was stopped" in stopping.communicate(timeout=PATIENCE)[0]
    assert "short done" in mailer.out.read_text()
    for id in (long, waiting):
        task = mailer.broker.peek(id)
        assert task is not None
        assert (task.state, task.failures) == (State.READY, 0)


def test_a_task_that_forks_and_is_killed_is_not_taken_for_done(make: Make) -> None:
    mailer = make(
        """
        @task(max_retries=0)
        def forks():
            if (pid := os.fork()) == 0: return
            os.waitpid(pid, 0)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    mailer.push(call("forks"))
    mailer.start()
    (task,) = mailer.await_buried()
    assert "killed by SIGKILL" in str(task.reason)


def test_a_delay_of_a_month_lets_the_consumer_sleep(box: Box, make: Make) -> None:
    mailer = make("@task(timeout='40d')\ndef say(): note('said')\n")
    mailer.push(call("say"), delay=40 * 86400.0)
    mailer.push(call("say"))
    mailer.start()
    mailer.await_out("said")
    mailer.await_broker(lambda: [each[1:5] for each in mailer.broker.stats()] == [(0, 1, 0, 0)])
    assert [each["restarts"] for each in box.status()["children"] if each["name"].startswith("consumer")] == [0]


def test_a_full_queue_with_something_due_makes_no_busy_consumer(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        f"@task(concurrency=1)\ndef wait(): note('begun'); wait_for({str(box.path / 'gate')!r})\n", "--concurrency", "4"
    )
    mailer.push(call("wait"))
    mailer.push(call("wait"), delay=0.1)
    mailer.start()
    mailer.await_out("begun")
    time.sleep(0.3)  # the second one is due
    consumer = Path(f"/proc/{mailer.consumer()}/status")

    def switches() -> int:
        return int(consumer.read_text().split("voluntary_ctxt_switches:")[1].split()[0])

    counts = [switches()]
    for _ in range(6):  # it may still be busy with the first
        time.sleep(0.5)
        counts.append(switches())
        if counts[-1] - counts[-2] < 5:
            break
    else:
        pytest.fail(f"it is busy: {counts}")
    gate.open()


def test_an_interrupt_from_the_terminal_lets_tasks_finish(box: Box, make: Make, gate: Gate) -> None:
    mailer = make("@task(max_retries=0)\ndef wait(path): note('begun'); wait_for(path); note('done')\n")
    mailer.push(call("wait", str(box.path / "gate")))
    running = box.popen("run", "beat.py", start_new_session=True)
    mailer.await_out("begun")
    os.killpg(running.pid, signal.SIGINT)
    mailer.broker.put("other", NewTask(b"something happens"))
    gate.open()
    running.communicate(timeout=PATIENCE)
    assert mailer.out.read_text() == "begun\ndone\n"


def test_row_29_after_kill_9_of_the_consumer_its_tasks_run_again_at_once(box: Box, make: Make, gate: Gate) -> None:
    mailer = make("@task\ndef wait(path):\n    note('begun', os.getpid())\n    wait_for(path)\n    note('done')\n")
    mailer.push(call("wait", str(box.path / "gate")), ttr=1000)
    mailer.start()
    first = int(mailer.await_out("begun")[0].split()[1])
    os.kill(mailer.consumer(), signal.SIGKILL)
    await_end(first)
    mailer.await_out("begun", 2)
    gate.open()
    mailer.await_out("done")
    box.await_log("1 task(s) of a consumer that has ended are tried again")


@pytest.mark.parametrize("engine", ["redis", "beanstalk"])
def test_row_29_the_same_with_a_server(box: Box, make: Make, gate: Gate, tmp_path: Path, engine: str) -> None:
    """Redis is told by the next consumer; beanstalkd sees that the connection is closed."""
    with broker_server(engine, tmp_path) as server:
        mailer = make(
            """
            from daemonkit import current_task

            @task(ttr=1000, max_retries=2)
            def wait(path):
                note("begun", current_task.attempt)
                wait_for(path)
                note("done")
            """,
            "--broker",
            server.url,
        )
        with contextlib.closing(connect(server.url)) as broker:
            broker.put("default", NewTask(call("wait", str(box.path / "gate")), ttr=1000))
            mailer.start()
            for attempt in (1, 2, 3):
                assert mailer.await_out("begun", attempt)[-1] == f"begun {attempt}"
                os.kill(mailer.consumer(), signal.SIGKILL)
            mailer.await_out("begun 4")
            gate.open()
            mailer.await_out("done")
            mailer.await_broker_of(broker, lambda: not broker.stats())
        assert box.call("kill", "beat").returncode == 0


def test_row_29_after_kill_9_of_the_master_the_next_daemon_does_its_tasks(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        "@task\ndef wait(path):\n    note('begun')\n    wait_for(path)\n    note('done')\n",
        "--concurrency",
        "4",
    )
    for _ in range(4):
        mailer.push(call("wait", str(box.path / "gate")), ttr=1000)
    master = mailer.start()
    mailer.await_out("begun", 4)
    all = box.processes()
    os.kill(master, signal.SIGKILL)
    for pid in all:
        await_end(pid)
    assert {task.failures for task in mailer.broker.peek_state("default", State.RESERVED, 9)} == {0}
    mailer.start()
    mailer.await_out("begun", 8)
    gate.open()
    mailer.await_out("done", 4)
    mailer.await_empty()


def test_a_reload_replaces_the_consumer_by_new_code_and_tasks_go_on(box: Box, make: Make) -> None:
    mailer = make("@task\ndef say(): note('old')\n")
    mailer.start()
    mailer.push(call("say"))
    mailer.await_out("old")
    before = mailer.consumer()
    (box.path / "beat.py").write_text((box.path / "beat.py").read_text().replace("'old'", "'new'"))
    done = box.call("reload", "beat")
    assert done.returncode == 0, done.stderr
    assert mailer.consumer() != before
    mailer.push(call("say"))
    mailer.await_out("new")


def test_check_names_the_tasks_and_their_queues(box: Box) -> None:
    done = box.call("check", box.script("@task\ndef a(): pass\n@task('mail')\ndef b(): pass\n"))
    assert done.stdout == "beat: tasks a (queue default), b (queue mail); ready to start\n"


RESULTS = """
from daemonkit import current_task
@task(keep_result="1h", max_retries=0, queue="sums")
def add(a, b):
    return {"sum": a + b, "large": "x" * 200_000 * (a == 7)}
@task(keep_result=60, max_retries=0)
def fail(): raise ValueError("no route")
@task(keep_result=60, max_retries=0)
def odd(): return {1, 2}
@task
def quiet(): return 5
@task(keep_result=60)
def slow(path):
    current_task.progress({"half": True})
    wait_for(path)
"""


@pytest.mark.parametrize("engine", ["sqlite", "redis"])
def test_results_are_kept_for_whom_asks_and_failures_are_told(
    box: Box, make: Make, gate: Gate, tmp_path: Path, engine: str
) -> None:
    with contextlib.ExitStack() as stack:
        if engine == "redis":
            (tmp_path / "redis").mkdir()
            server = stack.enter_context(redis_server(tmp_path / "redis"))
            box.environ["DAEMONKIT_BROKER"] = server.url
        mailer = make(RESULTS, "--concurrency", "4")
        mailer.start()
        done = mailer.put(
            f"""
            import time
            from daemonkit.errors import DaemonkitError
            def told(handle, timeout=30):
                try:
                    return handle.result(timeout)
                except (DaemonkitError, TimeoutError) as error:
                    return f"{{type(error).__name__}}: {{error}}".partition(" (pid")[0]
            first = beat.add.put(1, 2)
            print(told(first), told(first))
            print(len(told(beat.add.put(7, 1))["large"]))
            print(told(beat.fail.put()))
            print(told(beat.odd.put()))
            print(told(beat.quiet.put()))
            slow = beat.slow.put({str(box.path / "gate")!r})
            while slow.progress() is None:
                time.sleep(0.01)
            print(slow.state(), slow.progress(), told(slow, 0.01))
            print(told(beat.add.put(1, 2, delay=60), 0))
            print(beat.add.handle("no such").state(), told(beat.add.handle("no such")))
            """
        )
        assert done.stderr == ""
        assert re.sub(r"task \d+ of", "task N of", done.stdout).splitlines() == [
            "{'sum': 3, 'large': ''} {'sum': 3, 'large': ''}",
            "200000",
            "TaskFailed: task N of default: ValueError: no route",
            "TaskFailed: task N of default: PayloadError: the result cannot be kept: Object of type set is not JSON "
            "serializable; results are kept as JSON",
            "NoSuchTask: task N of default: it is done or deleted, and no result of it is kept",
            "reserved {'half': True} TimeoutError: task N of default is not done after 0.01 s",
            "TimeoutError: task N of sums is not done after 0 s",
            "None NoSuchTask: task no such of sums: it is done or deleted, and no result of it is kept",
        ]
        slow = re.findall(r"task (\d+) of", done.stdout)[-2]
        assert 'progress: {"half": true}' in box.call("queue", "peek", "--id", slow).stdout
        told = mailer.put(f"handle = beat.slow.handle({slow!r}); print(handle.state(), handle.progress())").stdout
        assert told.strip() == "reserved {'half': True}"
        gate.open()
        assert mailer.put(f"print(beat.slow.handle({slow!r}).result(30))").stdout.strip() == "None"
        assert box.call("kill", "beat").returncode == 0


def test_a_handle_is_made_again_of_its_id_and_not_pickled(make: Make) -> None:
    done = make("@task\ndef wait(): ...\n").put(
        """
        import pickle
        for wrong in (lambda: beat.wait.handle(5), lambda: pickle.dumps(beat.wait.handle("1"))):
            try:
                wrong()
            except ValueError as error:
                print(error)
        """
    )
    assert done.stdout.splitlines() == [
        "handle(5) of wait: the id of a handle is wanted, a text",
        "Handle(queue='default', id='1') is not pickled: send its id, and call the task's handle(id) there",
    ], done.stderr


def test_what_no_broker_could_be_told_is_the_tasks_own_failure(make: Make) -> None:
    mailer = make(
        """
        from daemonkit import current_task
        @task(keep_result=60, max_retries=0)
        def large(): return "x" * 2**24
        @task(max_retries=0)
        def much(): current_task.progress("x" * 2**24)
        """
    )
    mailer.push(call("large"))
    mailer.push(call("much"))
    mailer.start()
    reasons = {str(task.reason).partition(" (pid")[0] for task in mailer.await_buried(2)}
    assert reasons == {
        "PayloadError: the result cannot be kept: 16777218 bytes of JSON; 16777216 are the most",
        "UsageError: progress: 16777218 bytes of JSON; 16777216 are the most",
    }


def test_a_wrong_broker_is_told_in_a_sentence(box: Box, make: Make) -> None:
    mailer = make("@task\ndef say(): pass\n", "--broker", "sqlight:/tmp/x")
    mailer.start()
    box.await_log("broker 'sqlight:/tmp/x': did you mean sqlite:?")


@pytest.mark.parametrize("engine", ["redis", "beanstalk"])
def test_row_30_a_broker_that_is_killed_and_comes_again_loses_nothing_that_was_accepted(
    box: Box, make: Make, tmp_path: Path, engine: str
) -> None:
    with broker_server(engine, tmp_path) as server:
        mailer = make("@task\ndef say(n): note('said', n)\n", "--broker", server.url, "--concurrency", "2")
        broker = connect(server.url)
        broker.put_many("default", [NewTask(call("say", n)) for n in range(40)])
        mailer.start()
        mailer.await_out("said", 5)
        server.kill()
        box.await_log("tried again until it can be reached")
        broker.close()
        mailer.await_status("  consumer default: broker lost: ")
        server.start()
        if isinstance(server, RedisServer):
            server.command("LPUSH", "default", call("say", 40).decode())
        else:
            body = call("say", 40)
            server.command(b"use default", b"put 0 0 60 %d\r\n%s" % (len(body), body))
        for n in range(41):
            mailer.await_out(f"said {n}\n")
        broker = connect(server.url)
        mailer.await_broker_of(broker, lambda: not broker.stats())
        broker.close()
        mailer.await_status(f"  consumer default: broker {server.url}\n")
        assert box.call("kill", "beat").returncode == 0


def test_row_30_of_two_servers_one_is_killed_the_other_goes_on_and_nothing_is_lost(
    box: Box, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = free_ports(2)
    with (
        beanstalkd(tmp_path / "one", "-b", str(tmp_path / "one"), "-f", "0", port=first) as one,
        beanstalkd(tmp_path / "two", "-b", str(tmp_path / "two"), "-f", "0", port=second),
    ):
        url = f"beanstalk://127.0.0.1:{first},127.0.0.1:{second}"
        mailer = make(
            """
            @task
            def say(n): note("said", n)
            @task("kept", mode="prefork")
            def keep(n): note("said", n)
            """,
            *("--broker", url, "--concurrency", "2"),
        )
        with contextlib.closing(connect(url)) as broker:
            for n in range(40):
                broker.put("default" if n % 2 else "kept", NewTask(call("say" if n % 2 else "keep", n), delay=n % 4))
            mailer.start()
            mailer.await_out("said", 5)
            one.kill()
            for n in range(40, 80):  # some of the put may go to the dead one first, and are told to the other
                broker.put("default" if n % 2 else "kept", NewTask(call("say" if n % 2 else "keep", n)))
            for n in range(40, 80):
                mailer.await_out(f"said {n}\n")
            one.start()
            for n in range(40):
                mailer.await_out(f"said {n}\n")
            mailer.await_broker_of(broker, lambda: not broker.stats())
        assert box.call("kill", "beat").returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=False)
    if mounted.returncode:
        pytest.skip("needs to be allowed to mount")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_row_33_on_a_full_disk_nothing_is_lost_and_with_room_all_is_done(box: Box, make: Make, disk: Path) -> None:
    url = f"sqlite:{disk}/queue.db"
    mailer = make("@task\ndef say(n): note('said', n)\n", "--broker", url, "--concurrency", "2")
    with contextlib.closing(connect(url)) as broker:
        broker.put_many("default", [NewTask(call("say", n) + b" " * 1000) for n in range(100)])
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(b"x" * 4096):
                pass
        mailer.start()
        box.await_log("make room on the disk; tried again")
        with pytest.raises(BrokerFull, match="make room on the disk"):
            broker.put_many("default", [NewTask(b"y" * 1000)] * 100)
        mailer.await_status("make room on the disk")
        (disk / "filler").unlink()
        for n in range(100):
            mailer.await_out(f"said {n}\n")
        mailer.await_broker_of(broker, lambda: not broker.stats())
        assert box.call("kill", "beat").returncode == 0


@pytest.mark.parametrize("mode", ["fork", "prefork"])
def test_a_consumer_announces_itself_also_in_a_new_file(box: Box, make: Make, mode: str) -> None:
    path = box.path / "queue.db"
    mailer = make(f"@task(mode={mode!r})\ndef say(n): note('said', n)\n", "--broker", f"sqlite:{path}")
    box.environ["DAEMONKIT_CONCURRENCY"] = "1"
    mailer.start()
    with contextlib.closing(connect(f"sqlite:{path}")) as broker:
        broker.put("default", NewTask(call("say", 1)))
        mailer.await_out("said 1")
        mailer.await_broker_of(broker, lambda: not broker.stats())
    for suffix in ("-lock", "-shm", "", "-wal"):  # the last is what it watches
        (box.path / f"queue.db{suffix}").unlink(missing_ok=True)  # the consumer may have closed it, and so removed that
    with contextlib.closing(connect(f"sqlite:{path}")) as broker:
        broker.put("default", NewTask(call("say", 2)))
        mailer.await_out("said 2")
        assert [(each.queues, each.concurrency) for each in broker.consumers()] == [(("default",), 1)]


def test_row_33_a_damaged_file_is_told_and_a_new_one_is_used_when_it_is_moved_away(box: Box, make: Make) -> None:
    path = box.path / "queue.db"
    mailer = make("@task\ndef say(n): note('said', n)\n", "--broker", f"sqlite:{path}")
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8000)
    path.chmod(0o600)
    mailer.start()
    box.await_log("it is no SQLite file, or damaged: move it away")
    mailer.await_status("broker lost")
    path.rename(box.path / "damaged.db")
    with contextlib.closing(connect(f"sqlite:{path}")) as broker:
        broker.put("default", NewTask(call("say", 1)))
        mailer.await_out("said 1")


EXAMPLES = Path(__file__).parents[2] / "etc" / "examples"


@pytest.mark.skipif(shutil.which("php") is None, reason="needs php (Debian: php-cli, php-redis)")
def test_the_mailer_sends_what_python_and_php_have_put(box: Box, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis") as server:
        box.environ["DAEMONKIT_BROKER"] = server.url
        assert box.call("start", EXAMPLES / "mailer.py").returncode == 0
        program = "import mailer; mailer.send_mail.put('a@b.c', 'from Python')"
        environ = {**box.environ, "PYTHONPATH": str(EXAMPLES)}
        subprocess.run([sys.executable, "-c", program], cwd=box.path, env=environ, check=True)
        php = ["php", str(EXAMPLES / "produce.php"), str(server.socket), "0", "ä@b.c", "from PHP"]
        assert subprocess.run(php, capture_output=True, text=True, check=True).stdout == "pushed\n"
        box.await_log("from Python")
        log = box.await_log("from PHP")
        assert "mail to a@b.c, attempt 1:" in log
        assert "mail to ä@b.c, attempt 1:" in log
        assert box.call("kill", "mailer").returncode == 0


PREFORK = """
from daemonkit import current_task
@task("quick", mode="prefork", concurrency=2, max_retries=1, backoff=0.01, ttr=5, keep_result=60)
def square(n): note("square", n, os.getpid()); return n * n
@task("quick", mode="prefork", concurrency=2, max_retries=0, ttr=5, timeout=2)
def misbehave(how):
    note(how, os.getpid())
    if how == "raise": raise ValueError("no route")
    if how == "hang": time.sleep(60)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit": sys.exit(3)
@task("quick", mode="prefork", concurrency=2, ttr=60)
def wait(path):
    began = time.monotonic()
    current_task.progress({"half": True})
    if time.monotonic() < began + 1: current_task.progress("too soon to be told")
    wait_for(path)
@task("slow")
def forked(): note("forked", os.getpid())
"""


@pytest.mark.parametrize("engine", ["sqlite", "redis", "beanstalk"])
def test_kept_processes_do_many_tasks_and_each_at_least_once(box: Box, make: Make, tmp_path: Path, engine: str) -> None:
    with contextlib.ExitStack() as stack:
        url = f"sqlite:{box.run_dir}/queue.db"
        if engine != "sqlite":
            box.environ["DAEMONKIT_BROKER"] = url = stack.enter_context(broker_server(engine, tmp_path)).url
        mailer = make(PREFORK, "--concurrency", "3")
        broker = connect(url)
        stack.callback(broker.close)
        broker.put_many("quick", [NewTask(call("square", n)) for n in range(400)])
        broker.put("quick", NewTask(b"[]"))
        broker.put("slow", NewTask(call("forked")))
        mailer.start()
        children = {each["name"] for each in box.status()["children"]}
        assert children >= {"consumer slow", "consumer quick", "consumer quick-1"}
        assert "consumer quick-2" not in children
        lines = mailer.await_out("square", 400)
        assert sorted(int(line.split()[1]) for line in lines if "square" in line) == list(range(400))
        assert len({line.split()[2] for line in lines if "square" in line}) <= 2
        mailer.await_broker_of(broker, lambda: [each[:5] for each in broker.stats()] == [("quick", 0, 0, 0, 1)])
        done = mailer.put("print(beat.square.put(12).result(30))")
        if engine == "beanstalk":
            assert "beanstalkd keeps no results; sqlite: and redis: do" in done.stderr
        else:
            assert (done.stdout, done.stderr) == ("144\n", "")


def test_what_misbehaves_in_a_kept_process_is_told_and_the_next_task_is_done(box: Box, make: Make) -> None:
    mailer = make(PREFORK, "--concurrency", "2")
    mailer.start()
    for how, reason in (
        ("raise", "ValueError: no route"),
        ("exit", "SystemExit: 3"),
        ("hang", "TaskTimeout: not done after its time-out, 2s"),
    ):
        mailer.push(call("misbehave", how), "quick")
        task = mailer.await_buried(1, "quick")[0]
        assert reason in str(task.reason)
        assert mailer.broker.delete_task(task.id)
    mailer.push(call("misbehave", "kill"), "quick")
    (task,) = mailer.await_buried(1, "quick")
    assert "begun 4 times, and each time its process has died or hung" in str(task.reason)
    mailer.push(call("square", 5), "quick")
    mailer.await_out("square 5")


def test_a_task_that_hangs_in_a_kept_process_has_no_other_done_again(box: Box, make: Make) -> None:
    mailer = make(
        """
        @task("quick", mode="prefork", concurrency=2, max_retries=0, ttr=10)
        def quick(n): note("quick", n)
        @task("quick", mode="prefork", concurrency=2, max_retries=0, ttr=10)
        def hang(): time.sleep(60)
        """
    )
    mailer.broker.put_many("quick", [NewTask(call("quick", n), ttr=10) for n in range(100)])
    mailer.push(call("hang"), "quick", ttr=10)
    mailer.broker.put_many("quick", [NewTask(call("quick", n), ttr=10) for n in range(100, 200)])
    mailer.start()
    (task,) = mailer.await_buried(1, "quick")
    assert "TaskTimeout: not done after its time-out" in str(task.reason)
    assert sorted(int(line.split()[1]) for line in mailer.await_out("quick", 200)) == list(range(200))
    mailer.await_broker(lambda: [each[:5] for each in mailer.broker.stats()] == [("quick", 0, 0, 0, 1)])
    assert len(mailer.await_out("quick")) == 200


def test_the_progress_of_a_task_in_a_kept_process_is_shown(make: Make, gate: Gate) -> None:
    mailer = make(PREFORK, "--concurrency", "1")
    id = mailer.push(call("wait", str(mailer.box.path / "gate")), "quick", ttr=60)
    mailer.start()
    mailer.await_broker(lambda: (task := mailer.broker.peek(id)) is not None and task.progress is not None)
    task = mailer.broker.peek(id)
    assert task is not None
    assert task.progress == '{"half": true}'
    gate.open()
    mailer.await_empty()


def test_a_time_out_that_comes_while_progress_is_told_is_raised_right_after_it(make: Make) -> None:
    mailer = make(
        """
        import subprocess
        from daemonkit import current_task
        @task("quick", mode="prefork", max_retries=0, soft_timeout=2)
        def slow(lock):
            other = subprocess.Popen(["flock", lock, "sh", "-c", "echo; exec sleep 3"], stdout=subprocess.PIPE)
            with other:
                other.stdout.readline()
                current_task.progress("the lock is another's")
                note("the time-out was lost")
        """,
        *("--concurrency", "1"),
    )
    mailer.push(call("slow", f"{mailer.box.run_dir}/queue.db-lock"), "quick")
    mailer.start()
    mailer.await_broker(lambda: [each[1:4] for each in mailer.broker.stats()] in ([], [(0, 0, 0)]))
    assert mailer.out.read_text() == ""
    (task,) = mailer.buried("quick")
    assert "TaskTimeout: not done after its time-out, 2s" in str(task.reason)
    assert task.progress == '"the lock is another\'s"'


@pytest.mark.parametrize("mode", ["fork", "prefork"])
@pytest.mark.parametrize("engine", ["redis", "beanstalk"])
def test_a_soft_time_out_that_comes_while_the_task_puts_is_raised_as_such(
    box: Box, make: Make, tmp_path: Path, engine: str, mode: str
) -> None:
    with broker_server(engine, tmp_path) as server, contextlib.closing(connect(server.url)) as broker:
        mailer = make(
            f"""
            from daemonkit.errors import TaskTimeout
            @task("sink")
            def sink(): pass
            @task(mode={mode!r}, soft_timeout=0.2)
            def fill():
                try:
                    while True:
                        sink.put()
                except Exception as error:
                    note("ended by", type(error).__name__)
            """,
            *("--broker", server.url, "--concurrency", "1"),
        )
        broker.pause("sink", 3600)
        for _ in range(3):
            broker.put("default", NewTask(call("fill")))
        mailer.start()
        assert mailer.await_out("ended", 3) == ["ended by TaskTimeout"] * 3
        assert box.call("kill", "beat").returncode == 0


def test_a_kept_process_that_has_nothing_to_do_is_not_taken_for_one_that_hangs(box: Box, make: Make) -> None:
    mailer = make("@task('quick', mode='prefork', ttr=0.1)\ndef idle(): note('done')\n", "--concurrency", "1")
    mailer.start()
    pid = mailer.consumer()
    with open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
        assert not select.select([pidfd], [], [], 7)[0]  # its heartbeat is due after 5.1 s
    mailer.push(call("idle"), "quick")
    mailer.await_out("done")


@pytest.fixture
def between(box: Box, tmp_path: Path) -> Iterator[Between]:
    """In front of the box' broker."""
    with broker_server("redis", tmp_path) as server:
        made = Between(Path(server.url.removeprefix("unix://")), tmp_path / "between.sock")
        box.environ["DAEMONKIT_BROKER"] = f"unix://{made.path}"
        yield made
        made.close()


def await_late(broker: Broker, queue: str) -> Reservation:
    """Reserve what a consumer does not hold any more, once its ttr is up."""
    while not (found := broker.exchange((), {queue: 1}, 1)).reserved:
        select.select([broker.watch()], [], [], found.due)
        broker.drain()
    return found.reserved[0]


@pytest.mark.parametrize("mode", ["fork", "prefork"])
def test_a_task_that_is_told_after_its_ttr_is_not_begun(box: Box, make: Make, between: Between, mode: str) -> None:
    mailer = make(f"@task('news', mode='{mode}', ttr=1)\ndef tell(what): note(what)\n", "--concurrency", "1")
    mailer.start()
    with contextlib.closing(connect(f"unix://{between.server}")) as broker:
        between.hold = b"old news"
        broker.put("news", NewTask(call("tell", "old news"), ttr=1))
        assert between.is_holding.wait(PATIENCE)
        found = await_late(broker, "news")
        assert broker.delete(found)  # before its ttr is up again
        between.let_go.set()
        box.await_log("is no longer ours")
        assert mailer.out.read_text() == ""
        broker.put("news", NewTask(call("tell", "new")))
        assert mailer.await_out("new") == ["new"]
    assert box.call("kill", "beat").returncode == 0


def test_a_task_that_is_told_late_is_touched_in_time(box: Box, make: Make, gate: Gate, between: Between) -> None:
    mailer = make("@task('news', ttr=8)\ndef tell(path, what): wait_for(path); note(what)\n", "--concurrency", "1")
    mailer.start()
    with contextlib.closing(connect(f"unix://{between.server}")) as broker:
        between.hold = b"old news"
        broker.put("news", NewTask(call("tell", str(box.path / "gate"), "old news"), ttr=8))
        assert between.is_holding.wait(PATIENCE)
        until = time.monotonic() + 8.1
        select.select([], [], [], 5.5)  # a third of its ttr later, that would be up
        between.let_go.set()
        while (left := until - time.monotonic()) > 0:
            assert broker.reserve("news") == []
            select.select([broker.watch()], [], [], left)
            broker.drain()
        assert broker.reserve("news") == []
        gate.open()
        assert mailer.await_out("old news") == ["old news"]
    assert box.call("kill", "beat").returncode == 0


def test_a_task_that_prints_without_end_holds_up_nobody(box: Box, make: Make) -> None:
    mailer = make(
        """
        @task(timeout=2, max_retries=0)
        def flood():
            while True:
                os.write(2, b"x" * 65000)
        @task
        def calm(): note("calm")
        """,
        *("--concurrency", "2"),
    )
    mailer.push(call("flood"))
    mailer.start()
    for n in range(5):
        mailer.push(call("calm"))
        mailer.await_out("calm", n + 1)
    (task,) = mailer.await_buried()
    assert "took longer than its timeout, 2 s" in (task.reason or "")
    assert (task.reason or "").endswith("x" * 1000)


def test_tasks_that_tell_their_progress_without_end_hold_up_nobody(box: Box, make: Make) -> None:
    mailer = make(
        """
        from daemonkit import current_task
        @task
        def flood():
            note("flood")
            while True:
                current_task.progress("x" * 1000)
        @task
        def calm(): note("calm")
        """,
        *("--concurrency", "8", "--graceful-timeout", "2"),
    )
    mailer.start()
    os.setpriority(os.PRIO_PROCESS, mailer.consumer(), 19)  # they are faster than it can be
    mailer.broker.put_many("default", [NewTask(call("flood"))] * 6)
    mailer.await_out("flood", 6)
    for _ in range(3):
        mailer.push(call("calm"))
    mailer.await_out("calm", 3)
    with contextlib.suppress(PermissionError):  # it has a second to give them back
        os.setpriority(os.PRIO_PROCESS, mailer.consumer(), 0)
    assert box.call("kill", "beat").returncode == 0
    assert [each[:5] for each in mailer.broker.stats()] == [("default", 6, 0, 0, 0)]


def test_without_descriptors_fewer_tasks_run_at_once_and_none_is_thrown_about(box: Box, make: Make) -> None:
    mailer = make("@task\ndef say(n): note('said', n)\n", "--concurrency", "200")
    for n in range(120):
        mailer.push(call("say", n))
    text = (box.path / "beat.py").read_text()
    script = box.script(text)
    limited = ["prlimit", "--nofile=40:40", *box.command("start", "--concurrency", "200", script)]
    subprocess.run(limited, env=box.environ, cwd=box.path, check=True, timeout=PATIENCE)
    for n in range(120):
        mailer.await_out(f"said {n}\n")
    assert box.log.read_text().count("tasks run at once for 30 s") <= 3
    mailer.await_empty()


def test_unique_means_the_same_call_however_it_is_written(box: Box, make: Make) -> None:
    mailer = make("@task(unique=True)\ndef say(a, b=2): pass\n")
    program = """
    from beat import say
    calls = [say.put(1), say.put(1, 2), say.put(a=1, b=2), say.put(b=2, a=1)]
    print({each.id for each in calls}, say.put(1, 3).id != "1")
    print(say.put({1: 2, "a": 3}).id == say.put({"a": 3, "1": 2}).id)
    """
    done = mailer.put(program)
    assert (done.stdout, done.stderr) == ("{'1'} True\nTrue\n", "")


def test_unique_means_the_same_call_also_with_a_default_that_json_does_not_have(box: Box, make: Make) -> None:
    words = "@task(unique=True)\ndef say(a, unset=object(), names=frozenset({'a', 'b', 'c'}), by={(1, 2): 3}): pass\n"
    mailer = make(words)
    program = "from beat import say; print(say.put(1).id, say.put(a=1).id, say.put(1, None).id)"
    first, *others = [mailer.put(program).stdout.split() for _ in range(3)]
    assert first[0] == first[1] != first[2]
    assert others == [first, first]


def test_a_stop_gives_back_what_a_kept_process_has_not_begun(box: Box, make: Make, gate: Gate) -> None:
    mailer = make(
        """
        def tell(number, frame, then):
            then(number, frame)
            note("told")

        @task(mode="prefork", concurrency=1, ttr=1000)
        def step(path):
            if path != os.devnull:
                import functools
                signal.signal(signal.SIGTERM, functools.partial(tell, then=signal.getsignal(signal.SIGTERM)))
            note("step")
            wait_for(path)
        """
    )
    mailer.broker.put_many("default", [NewTask(call("step", os.devnull))] * 50)
    mailer.broker.put_many("default", [NewTask(call("step", str(box.path / "gate")))] * 40)
    mailer.start()
    mailer.await_out("step", 51)
    stopping = box.popen("kill", "beat")
    mailer.await_out("told")
    gate.open()
    stopping.communicate(timeout=PATIENCE)
    assert mailer.out.read_text().count("step") == 51
    assert [each[1:5] for each in mailer.broker.stats()] == [(39, 0, 0, 0)]
    assert all(task.failures == 0 for task in mailer.broker.peek_state("default", State.READY, 99))


def test_a_queue_has_one_mode_and_kept_tasks_end_within_their_ttr(box: Box) -> None:
    two = "@task('q')\ndef a(): pass\n@task('q', mode='prefork')\ndef b(): pass\n"
    assert "all tasks of the queue 'q' must have the same mode=" in box.call("check", box.script(two)).stderr
    long = "@task(mode='prefork', ttr=5, timeout=6)\ndef a(): pass\n"
    assert "a time-out may not be longer than the ttr, 5 s" in box.call("check", box.script(long)).stderr
    assert "is not one of fork, prefork" in box.call("check", box.script("@task(mode='x')\ndef a(): pass")).stderr
