"""FAULTS.md, rows 21 to 25, as far as they are the fork server's."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import ENTER, IMPORTS, Asked, Serving, await_end, descriptors, living, zombies
from harness import PATIENCE

from daemonkit.errors import ForkServerLost
from daemonkit.processes.receipt import MemoryKills

SLEEP = "os.write(READY, b'.')\nsignal.pause()"
CHILDREN = 500
BOUND = 0.1  # seconds, on a machine that has nothing else to do

# Keeps 500 children, says all PIDs, and sleeps.
_MASTER = """
import select
TITLE = sys.argv[1] + ": child"
pid, wire = fork_server(enter, lambda: setproctitle.setproctitle(sys.argv[1] + ": fork server"))
children = Children(wire)
pids = [pid]
text = b"signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
for _ in range(int(sys.argv[2])):
    children.spawn(text, lambda made, receipt: None, lambda made: pids.append(made.pid))
while len(pids) <= int(sys.argv[2]):
    select.select([wire.fileno()], [wire.fileno()] if wire.is_waiting else [], [], 30)
    wire.flush()
    children.receive()
print(*pids, flush=True)
signal.pause()
"""


@pytest.fixture
def memory_kills() -> MemoryKills:
    """Tells whether the kernel has killed somebody for want of memory since: another test may have it do so."""
    return MemoryKills()


@pytest.fixture
def serving() -> Iterator[Serving]:
    """A fork server; the test fails if it leaves anything."""
    with Serving() as made:
        yield made


def test_row_21_master_killed_with_500_children_leaves_none() -> None:
    mark = f"row21-{uuid.uuid4().hex}"
    command = [sys.executable, "-c", IMPORTS + ENTER + _MASTER, mark, str(CHILDREN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as master, contextlib.ExitStack() as stack:
        assert master.stdout is not None
        pids = [int(word) for word in master.stdout.readline().split()]
        assert len(pids) == CHILDREN + 1
        poll = select.poll()
        left = set()
        for pid in pids:
            left.add(pidfd := os.pidfd_open(pid))
            stack.callback(os.close, pidfd)
            poll.register(pidfd, select.POLLIN)
        server = min(left)
        began = time.monotonic()
        master.kill()
        while left:
            ready = {fd for fd, _ in poll.poll(PATIENCE * 1000)}
            assert ready, f"{len(left)} are left"
            left -= ready
            for fd in ready:
                poll.unregister(fd)
            assert server not in ready or not left, "the server has left children to init"
        spent = time.monotonic() - began
    print(f"{CHILDREN} children were gone after {spent * 1000:.0f} ms; the goal is {BOUND * 1000:.0f}")
    assert not living(mark)
    assert spent < 20 * BOUND  # a bound that holds with all cores taken, too; bench/fork.py has the figure


def test_row_21_server_killed_takes_its_children_with_it(serving: Serving) -> None:
    asked = [serving.started("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP) for _ in range(20)]
    serving.process.kill()
    for each in asked:
        await_end(each.pid)
    with pytest.raises(ForkServerLost):
        serving.until(lambda: False)


@pytest.mark.parametrize("wire_first", [True, False])
def test_row_21_the_wires_end_also_ends_what_has_not_been_forked_yet(wire_first: bool) -> None:
    with Serving() as serving:
        if wire_first:
            serving.process.send_signal(signal.SIGSTOP)
        for _ in range(100):
            serving.spawn("signal.pause()")
        if wire_first:
            serving.children.wire.close()
            serving.process.send_signal(signal.SIGCONT)
        assert not serving.close()
        assert serving.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_row_22_child_killed_is_told_with_its_signal(memory_kills: MemoryKills, serving: Serving, number: int) -> None:
    asked, other = serving.started(SLEEP), serving.started(SLEEP)
    os.kill(asked.pid, number)
    receipt = serving.end_of(asked)
    assert (receipt.pid, receipt.signal, receipt.exit_code) == (asked.pid, number, None)
    assert not receipt.out_of_memory or memory_kills.explain_one(time.monotonic())
    assert other.receipt is None


def test_row_22_segfault_is_told(serving: Serving) -> None:
    assert serving.run("ctypes.string_at(0)").reason == "killed by SIGSEGV"


def test_row_22_exit_with_0_unasked_is_told(serving: Serving) -> None:
    assert serving.run("os._exit(0)").is_clean


def test_row_22_stopped_child_is_no_end_and_can_be_killed(serving: Serving) -> None:
    asked = serving.started(SLEEP)
    os.kill(asked.pid, signal.SIGSTOP)
    assert serving.run("").is_clean
    assert asked.receipt is None
    asked.child.kill_tree()
    assert serving.end_of(asked).signal == signal.SIGKILL


def cgroup(controller: str) -> Path | None:
    """A new control group below our own that may be limited, or None."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {name: path for _, names, path in lines for name in names.split(",")}
    name = f"daemonkit-test-{uuid.uuid4().hex}"
    for path in (
        Path(f"/sys/fs/cgroup/{controller}{own.get(controller, '/')}"),
        Path(f"/sys/fs/cgroup/{controller}"),
        Path(f"/sys/fs/cgroup{own.get('', '/')}"),
    ):
        is_second = (path / "cgroup.controllers").exists()
        if is_second and controller not in (path / "cgroup.subtree_control").read_text().split():
            continue
        if path.is_dir() and os.access(path, os.W_OK):
            with contextlib.suppress(OSError):
                (path / name).mkdir()
                if (path / name / "cgroup.procs").exists():
                    return path / name
                (path / name).rmdir()
    return None


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of the controller that the test names."""
    made = cgroup(request.param)
    if made is None:
        pytest.skip(f"no control group of {request.param} can be made here")
    yield made
    made.rmdir()


def inside(group: Path) -> list[str]:
    """A command that executes another one in ``group``."""
    return ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"]


@pytest.mark.parametrize("group", ["memory"], indirect=True)
def test_row_22_child_out_of_memory_is_told_as_such(group: Path) -> None:
    limit = group / "memory.max"
    if not limit.exists():
        limit = group / "memory.limit_in_bytes"
    with Serving(wrap=inside(group)) as serving:
        innocent = serving.started(SLEEP)
        limit.write_text(str(60 * 2**20))
        receipt = serving.run("text = bytearray(b'x') * 200_000_000")
        assert receipt.signal == signal.SIGKILL
        assert receipt.out_of_memory
        assert receipt.reason == "killed by SIGKILL, probably out of memory"
        innocent.child.signal(signal.SIGKILL)
        assert not serving.end_of(innocent).out_of_memory


def _delayed(serving: Serving) -> None:
    """With room for few children: those that fit run, the rest comes when they have ended, nothing is lost."""
    asked = [serving.spawn("signal.pause()") for _ in range(30)]
    serving.until(lambda: bool(serving.delays))
    begun = [each for each in asked if each.child.pid is not None]
    assert 0 < len(begun) < 30
    assert serving.delays[0].errno == 11  # EAGAIN
    assert serving.process.poll() is None
    taken_back = asked[-1]
    taken_back.child.signal(signal.SIGTERM)
    assert serving.end_of(taken_back).pid == 0
    while begun:
        for each in begun:
            each.child.signal(signal.SIGTERM)
        for each in begun:
            assert serving.end_of(each).signal == signal.SIGTERM
        serving.until(lambda: all(each.receipt for each in asked) or any(_runs(each) for each in asked))
        begun = [each for each in asked if _runs(each)]
    assert all(each.receipt for each in asked)
    assert len(serving.delays) < 30


def _runs(each: Asked) -> bool:
    return each.child.pid is not None and each.receipt is None


@pytest.mark.skipif(os.getuid() != 0, reason="takes on another user, for whom the limit holds")
def test_row_23_fork_fails_for_the_users_limit_and_is_tried_again() -> None:
    uid = 60_000 + os.getpid() % 5000  # nobody else's in a test run at the same time
    before = f"os.setresuid({uid}, {uid}, {uid})\nresource.setrlimit(resource.RLIMIT_NPROC, (10, 10))"
    with Serving(before) as serving:
        _delayed(serving)
        assert not serving.close()


@pytest.mark.parametrize("group", ["pids"], indirect=True)
def test_row_23_fork_fails_for_the_groups_limit_and_is_tried_again(group: Path) -> None:
    (group / "pids.max").write_text("12")
    with Serving(wrap=inside(group)) as serving:
        _delayed(serving)
        assert not serving.close()


@pytest.mark.parametrize("group", ["pids"], indirect=True)
def test_row_23_room_that_comes_from_elsewhere_is_found(group: Path) -> None:
    with Serving(wrap=inside(group)) as serving:
        assert serving.run("").is_clean
        (group / "pids.max").write_text("1")
        asked = [serving.spawn("") for _ in range(3)]
        serving.until(lambda: bool(serving.delays))
        (group / "pids.max").write_text("max")
        for each in asked:
            assert serving.end_of(each).is_clean
        assert len(serving.delays) == 1  # told once, however often it was tried


def test_row_24_10_000_children_leave_no_zombie_no_descriptor_and_no_memory() -> None:
    # No title: it is what the most of a child's time goes into.
    enter = "def enter(message):\n    os._exit(message.id % 3)\n"
    with Serving(enter=enter) as serving:
        pid = serving.process.pid

        def memory() -> int:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        ended = 0

        def on_end(child: object, receipt: object) -> None:
            nonlocal ended
            ended += 1

        def run(count: int) -> None:
            before = ended
            for asked in range(count):
                serving.until(lambda least=before + asked - 50: ended >= least)  # type: ignore[misc]
                serving.children.spawn(b"x" * 100, on_end)
            serving.until(lambda: ended == before + count)

        run(1000)
        before, open_before = memory(), descriptors(pid)
        run(9000)
        assert len(serving.children) == 0
        assert zombies(pid) == 0
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
        assert descriptors(pid) == open_before
        assert memory() - before < 300_000


LEAVE = """
def leave():
    os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
    os.posix_spawnp("setsid", ["setsid", "sh", "-c", "sleep 1001 & sleep 1002"], {"PATH": os.environ["PATH"]})
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork() == 0:
            if os.fork() == 0:
                os.write(READY, b".")
                signal.pause()
            os._exit(0)
        os._exit(0)
leave()
"""


def descendants_of(pid: int, program: str = "") -> list[int]:
    """All in the tree below ``pid``, or those that run ``program``; pidfds of them."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            todo += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
            if parent != pid and program in Path(f"/proc/{parent}/comm").read_text():
                found.append(os.pidfd_open(parent))
    return found


def all_end(pidfds: list[int]) -> None:
    """Wait until all have ended."""
    for pidfd in pidfds:
        with open(pidfd, "rb", buffering=0):
            assert select.select([pidfd], [], [], PATIENCE)[0]


@pytest.mark.parametrize("end", ["kill -9", "kill_tree", "terminate", "well", "unasked"])
def test_row_25_what_a_child_left_ends_with_it(serving: Serving, end: str) -> None:
    reader, writer = os.pipe()
    last = {"well": "", "unasked": "os._exit(0)"}.get(end, "signal.pause()")
    # It goes on when told to, so that what it leaves can be seen first.
    text = f"READY, GO = message.fds\n{LEAVE}\nos.read(GO, 1)\n{last}"
    ready, told = os.pipe()
    asked = serving.spawn(text, [told, reader])
    os.close(told)
    os.close(reader)
    serving.until(lambda: asked.child.pid is not None)
    assert os.read(ready, 1) == b"."
    pidfds = descendants_of(asked.pid)
    assert len(pidfds) >= 3
    other = serving.started(LEAVE + "signal.pause()")
    others = descendants_of(other.pid, "sleep")
    assert others
    if end == "kill -9":
        os.kill(asked.pid, signal.SIGKILL)
    elif end == "kill_tree":
        asked.child.kill_tree()
    elif end == "terminate":
        asked.child.signal(signal.SIGTERM)
    os.close(writer)
    receipt = serving.end_of(asked)
    assert receipt.is_clean == (end in ("well", "unasked"))
    all_end(pidfds)
    assert os.read(ready, 1) == b""  # what was only forked had it open
    os.close(ready)
    assert not any(select.select([pidfd], [], [], 0)[0] for pidfd in others)  # another child's stays
    serving.children.wire.close()
    all_end(others)


@pytest.mark.parametrize("group", ["pids"], indirect=True)
def test_row_25_a_tree_that_forks_while_it_is_killed_is_killed(group: Path) -> None:
    """Eight processes that live on in ever new children; the group's limit is only for the case that this fails."""
    walkers = """
def walk():
    os.setsid()
    while True:
        try:
            if os.fork():
                os._exit(0)
        except BlockingIOError:
            continue

for _ in range(8):
    if os.fork() == 0:
        walk()
os.write(READY, b".")
while True:
    os.waitpid(-1, 0)
"""
    (group / "pids.max").write_text("1000")  # dead ones that nobody has reaped yet count, too
    with Serving(wrap=inside(group)) as serving:
        asked = serving.started(walkers)
        assert serving.run("").is_clean
        asked.child.kill_tree()
        assert serving.end_of(asked).signal == signal.SIGKILL
        server = serving.process.pid
        while left := descendants_of(server):  # some may have come to the server, which looks again
            all_end(left)
        assert serving.run("").is_clean
        assert not serving.close()
