"""The contract of a coordinator, the same on every engine."""

from __future__ import annotations

import gc
import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE
from zookeeper import LOCAL, Ensemble, ensemble

from daemonkit.cluster.connect import connect as connect_to
from daemonkit.cluster.contender import line_of
from daemonkit.cluster.coordinator import Coordinator
from daemonkit.cluster.hold import Hold
from daemonkit.cluster.tree import MOST_DATA
from daemonkit.cluster.watching import Value
from daemonkit.errors import CoordinatorError, CoordinatorLost, CoordinatorTimeout, UsageError, VersionMismatch

Connect = Callable[..., Coordinator]
BRIEF = "session_timeout=2s"  # of those processes that are killed
CALM = "session_timeout=60s"  # ours are not to end, nor to be in doubt, however busy the machine
SHORT = 0.05  # seconds in which nothing is to happen


@pytest.fixture(scope="session")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ensemble]:
    with ensemble(tmp_path_factory.mktemp("zookeeper"), LOCAL) as servers:
        yield servers


@pytest.fixture(params=["local", "zookeeper"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a coordinator that knows nothing."""
    if request.param == "local":
        return f"local:{tmp_path}/cluster"
    servers: Ensemble = request.getfixturevalue("zookeeper")
    name = f"/{tmp_path.name}"
    with connect_to(servers.url()) as coordinator:
        coordinator.set(name, b"")
    return f"{servers.url(name)}?{BRIEF}"


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """A function that opens one connection more to one coordinator."""
    opened: list[Coordinator] = []

    def connect(daemon: str = "") -> Coordinator:
        opened.append(connect_to(url.replace(BRIEF, CALM), daemon))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


@pytest.fixture
def coordinator(connect: Connect) -> Coordinator:
    return connect()


def await_true(condition: Callable[[], object], *coordinators: Coordinator) -> None:
    """Take ``coordinators`` forward until ``condition`` is true."""
    until = time.monotonic() + PATIENCE
    for each in coordinators:
        each.dispatch()
    while not condition():
        assert time.monotonic() < until
        select.select([each.fileno() for each in coordinators], [], [], PATIENCE)
        for each in coordinators:
            each.dispatch()


def hold(url: str, what: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that holds ``what``, and says so, with its token."""
    program = (
        "import sys\nfrom daemonkit.cluster.connect import connect\n"
        f"c = connect({url!r}, 'other')\nh = {what}\nprint(getattr(h, 'token', 0), flush=True)\n"
        "while not c.wait(PATIENCE):\n    pass\nsys.stdin.read()".replace("PATIENCE", str(PATIENCE))
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )


def test_what_is_set_is_read_and_versions_grow(connect: Connect) -> None:
    one, other = connect(), connect()
    assert one.get("/config/x") == Value("/config/x", None, 0)
    assert one.set("/config/x", b"1") == 0
    assert other.get("/config/x") == Value("/config/x", b"1", 0)
    assert other.set("/config/x", bytes(range(256))) == 1
    assert one.get("/config/x") == Value("/config/x", bytes(range(256)), 1)
    assert one.children("/config") == ["x"]
    assert one.children("/nothing") == []


def test_a_set_with_a_version_changes_only_that(coordinator: Coordinator) -> None:
    with pytest.raises(VersionMismatch, match="/x is gone"):
        coordinator.set("/x", b"", 0)
    coordinator.set("/x", b"0")
    assert coordinator.set("/x", b"1", 0) == 1
    with pytest.raises(VersionMismatch, match="/x"):
        coordinator.set("/x", b"2", 0)
    with pytest.raises(VersionMismatch, match="/x"):
        coordinator.delete("/x", 0)
    assert coordinator.get("/x").data == b"1"
    assert coordinator.delete("/x", 1)
    assert not coordinator.delete("/x")


def test_what_has_something_below_it_is_not_deleted(coordinator: Coordinator) -> None:
    coordinator.set("/a/b", b"")
    with pytest.raises(CoordinatorError, match="there are nodes below it"):
        coordinator.delete("/a")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "begins with /"),
        ("x", "begins with /"),
        ("/x/", "must not end with /"),
        ("//x", "no part of it may be empty"),
        ("/x/../y", "mean nothing there"),
        ("/x\0", "can be printed"),
        ("/" + "x" * 201, "up to 200 characters"),
        ("/zookeeper/quota", "the server's own"),
        (b"/x", "must be a text"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(coordinator: Coordinator, path: str, words: str) -> None:
    for act in (coordinator.get, coordinator.children, coordinator.delete, lambda each: coordinator.set(each, b"")):
        with pytest.raises(UsageError, match=words):
            act(path)


def test_a_megabyte_is_kept_and_more_is_refused_with_a_sentence(coordinator: Coordinator) -> None:
    coordinator.set("/large", b"x" * MOST_DATA)
    assert len(coordinator.get("/large").data or b"") == MOST_DATA
    with pytest.raises(UsageError, match=r"set /large: 1,000,001 bytes are too many; a node holds 1,000,000"):
        coordinator.set("/large", b"x" * (MOST_DATA + 1))
    with pytest.raises(UsageError, match="data is bytes, not str"):
        coordinator.set("/large", "text")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="version=-1"):
        coordinator.set("/large", b"", -1)


def test_names_of_all_kinds_are_kept_apart(coordinator: Coordinator) -> None:
    names = ["=", "+", "%3D", "a b", "ü", "a:b", "-", "..."]
    for name in names:
        coordinator.set(f"/names/{name}", name.encode())
    assert coordinator.children("/names") == sorted(names)
    assert [coordinator.get(f"/names/{name}").data for name in names] == [name.encode() for name in names]


def test_a_lock_is_had_by_one_and_its_token_grows(connect: Connect) -> None:
    one, other = connect(), connect()
    tokens = []
    for _ in range(3):
        for each in (one, other):
            with each.lock("x") as held:
                assert held.is_held()
                tokens.append(held.token)
                third = other if each is one else one
                with pytest.raises(CoordinatorTimeout, match="wait for lock 'x': others had it for"):
                    third.lock("x", timeout=SHORT)
            assert not held.is_held()
            held.release()
    assert tokens == sorted(set(tokens))
    with one.lock("x") as a, one.lock("y") as b:
        assert a.is_held()
        assert b.is_held()


@pytest.mark.parametrize(
    "take", [lambda c: c.lock("x"), lambda c: c.lock("x", shared=True), lambda c: c.semaphore("x", 1)]
)
def test_a_lock_whose_node_was_deleted_by_hand_is_held_no_more(
    connect: Connect, take: Callable[[Coordinator], Hold]
) -> None:
    one, two = connect(), connect()
    held = take(one)
    assert held.is_held()
    (info,) = two.locks()
    top = "semaphores" if info.kind == "semaphore" else "locks"
    (name,) = two.children(f"/daemonkit/{top}/x")
    two.delete(f"/daemonkit/{top}/x/{name}")
    with take(two) as other:
        assert not held.is_held()
        held.release()
        assert other.is_held()


def test_locks_are_given_in_the_order_in_which_they_were_asked_for(url: str, connect: Connect) -> None:
    first = connect()
    held = first.lock("x")
    waiting = [hold(url, "c.lock('x')") for _ in range(1)]
    await_line(first, 2)
    waiting.append(hold(url, "c.lock('x')"))
    await_line(first, 3)
    held.release()
    tokens = [held.token]
    for process in waiting:
        tokens.append(int(said(process)))
        infos = [each for each in first.locks() if each.is_held]
        assert [each.pid for each in infos] == [process.pid]
        assert infos[0].token == tokens[-1]
        end(process)
    assert tokens == sorted(tokens)
    assert first.lock("x", timeout=PATIENCE).is_held()


def test_a_lock_of_a_process_that_was_killed_is_the_next_ones(url: str, connect: Connect) -> None:
    killed = hold(url, "c.lock('x')")
    token = int(said(killed))
    coordinator = connect()
    os.kill(killed.pid, signal.SIGKILL)
    held = coordinator.lock("x", timeout=PATIENCE)
    assert held.token > token
    end(killed)


def test_shared_locks_are_had_together_and_wait_for_one_who_wants_it_alone(connect: Connect) -> None:
    one, two, writer = connect(), connect(), connect()
    a, b = one.lock("x", shared=True), two.lock("x", shared=True)
    with pytest.raises(CoordinatorTimeout):
        writer.lock("x", timeout=SHORT)
    a.release()
    b.release()
    with writer.lock("x"), pytest.raises(CoordinatorTimeout):
        one.lock("x", shared=True, timeout=SHORT)
    assert one.lock("x", shared=True, timeout=PATIENCE).is_held()


def test_readers_who_come_after_a_writer_wait_for_it(url: str, connect: Connect) -> None:
    one, two = connect(), connect()
    a = one.lock("x", shared=True)
    writer = hold(url, "c.lock('x')")
    await_line(one, 2)
    with pytest.raises(CoordinatorTimeout):
        two.lock("x", shared=True, timeout=SHORT)
    a.release()
    assert int(said(writer)) > a.token
    end(writer)
    two.lock("x", shared=True, timeout=PATIENCE)


def test_a_semaphore_has_so_many_units_and_each_that_is_given_back_is_the_next_ones(url: str, connect: Connect) -> None:
    one, two, three = connect(), connect(), connect()
    a, b = one.semaphore("s", 2), two.semaphore("s", 2)
    with pytest.raises(CoordinatorTimeout, match="wait for semaphore 's'"):
        three.semaphore("s", 2, timeout=SHORT)
    waiting = []
    for n in range(3):
        waiting.append(hold(url, "c.semaphore('s', 2)"))
        await_line(one, 3 + n)
    b.release()
    said(waiting[0])
    a.release()
    said(waiting[1])
    end(waiting[1])
    said(waiting[2])
    assert sorted(each.pid for each in one.locks() if each.is_held) == sorted((waiting[0].pid, waiting[2].pid))
    for process in waiting:
        end(process)
    with pytest.raises(UsageError, match="count=0"):
        one.semaphore("s", 0)


@pytest.mark.parametrize("timeout", ["10s", float("nan"), -1, True])
def test_a_time_out_that_is_no_seconds_is_refused(coordinator: Coordinator, timeout: float) -> None:
    barrier = coordinator.barrier("b", 1)
    for wait in (
        lambda: coordinator.lock("x", timeout=timeout),
        lambda: coordinator.semaphore("x", 1, timeout=timeout),
        lambda: coordinator.queue("q").get(timeout=timeout),
        lambda: barrier.enter(timeout),
        lambda: barrier.leave(timeout),
        lambda: coordinator.wait(timeout),
    ):
        with pytest.raises(UsageError, match=r"timeout=.*: seconds are wanted"):
            wait()
    assert coordinator.locks() == []
    assert coordinator.children("/daemonkit/barriers/b/entrants") == []


def test_one_candidate_leads_and_the_next_when_it_resigns_or_ends_or_dies(url: str, connect: Connect) -> None:
    one, two = connect("first"), connect("second")
    a, b = one.elect("job", {"port": 1}), two.elect("job")
    await_true(lambda: a.is_held, one)
    two.dispatch()
    assert not b.is_held
    leader = two.leader("job")
    assert leader is not None
    assert leader[:5] == ("job", a.token, leader.host, os.getpid(), "first")
    assert leader.data == {"port": 1}
    assert abs(leader.since - time.time()) < PATIENCE
    tokens = [a.token]
    one.resign(a)
    assert not a.is_held
    await_true(lambda: b.is_held, two)
    tokens.append(b.token)
    other = hold(url, "c.elect('job')")
    other_wait = hold(url, "c.elect('job')")
    said(other)
    await_line_of_leaders(one, "job", 2)
    two.close()
    assert not b.is_held
    await_leader(one, other.pid, other_wait.pid)
    os.kill(other.pid, signal.SIGKILL)
    os.kill(other_wait.pid, signal.SIGKILL)
    c = one.elect("job")
    await_true(lambda: c.is_held, one)
    tokens.append(c.token)
    assert tokens == sorted(set(tokens))
    assert [each.token for each in one.leaders()] == [c.token]
    end(other)
    end(other_wait)


def test_who_is_deposed_by_hand_leads_no_more_and_stands_again(connect: Connect) -> None:
    one, two = connect(), connect()
    a, b = one.elect("job"), two.elect("job")
    await_true(lambda: a.is_held, one)
    two.dispatch()
    assert a.node is not None
    two.tree.delete(a.node.path)
    await_true(lambda: b.is_held, two)
    await_true(lambda: not a.is_held, one)
    assert b.token < a.token or not a.is_held
    two.resign(b)
    await_true(lambda: a.is_held, one)
    assert a.token > b.token


def test_members_are_there_until_they_leave_or_die(url: str, connect: Connect) -> None:
    one, two = connect("web"), connect()
    assert one.members() == []
    mine = one.join({"port": 80})
    theirs = two.join(group="others")
    (member,) = two.members()
    assert (member.pid, member.daemon, member.data) == (os.getpid(), "web", {"port": 80})
    assert [each.daemon for each in one.members("others")] == [""]
    assert one.groups() == ["default", "others"]
    seen: list[int] = []
    two.watch("/daemonkit/members/default", lambda value: seen.append(len(value.children)))
    killed = hold(url, "c.join()")
    said(killed)
    await_true(lambda: seen and seen[-1] == 2, two)
    os.kill(killed.pid, signal.SIGKILL)
    await_true(lambda: seen[-1] == 1, two)
    one.leave(mine)
    two.leave(theirs)
    await_true(lambda: seen[-1] == 0, two)
    end(killed)


FOREIGN = [b"", b"\xff", b"[1]", b"[" * 100_000, b'{"pid":"x","host":7,"since":"y","token":null,"daemon":[]}']


@pytest.mark.parametrize("data", FOREIGN, ids=range(len(FOREIGN)))
def test_what_others_have_written_is_shown_as_far_as_it_is_known(coordinator: Coordinator, data: bytes) -> None:
    for top in ("leaders", "locks", "semaphores", "members"):
        coordinator.set(f"/daemonkit/{top}/x/theirs-exclusive-0000000001", data)
        coordinator.set(f"/daemonkit/{top}/x/zzz", data)
        coordinator.set(f"/daemonkit/{top}/x", data)
    assert [each.pid for each in coordinator.leaders()] == [0]
    assert [each.pid for each in coordinator.locks()] == [0, 0]
    assert [each.pid for each in coordinator.members("x")] == [0, 0]


@pytest.mark.parametrize("since", ["Infinity", "NaN", "1" + "0" * 400, "-1", "true", "[]", '"x"'], ids=range(7))
def test_a_moment_that_is_none_is_not_taken_for_that_of_an_election(coordinator: Coordinator, since: str) -> None:
    candidacy = coordinator.elect("job")
    await_true(lambda: candidacy.is_held, coordinator)
    coordinator.set("/daemonkit/leaders/job", f'{{"token": {candidacy.token}, "since": {since}}}'.encode())
    (leader,) = coordinator.leaders()
    assert abs(leader.since - time.time()) < PATIENCE


def test_a_watch_tells_of_values_and_children_through_deletion_and_creation(connect: Connect) -> None:
    watcher, other = connect(), connect()
    seen: list[Value] = []
    watching = watcher.watch("/config/x", seen.append)
    await_true(lambda: seen, watcher)
    assert seen == [Value("/config/x", None, 0)]

    def await_value(data: bytes | None, *children: str) -> None:
        await_true(lambda: seen[-1][1::2] == (data, children), watcher)

    other.set("/config/x", b"1")
    await_value(b"1")
    other.set("/config/x", b"2")
    await_value(b"2")
    other.set("/config/x/below", b"")
    await_value(b"2", "below")
    other.set("/config/x/below/more", b"")
    other.delete("/config/x/below/more")
    other.delete("/config/x/below")
    other.delete("/config/x")
    other.delete("/config")
    await_value(None)
    other.set("/config/x/again", b"")
    await_value(b"", "again")
    other.set("/config/x", b"3")
    await_value(b"3", "again")
    watcher.unwatch(watching)
    count = len(seen)
    other.set("/config/x", b"4")
    watcher.wait(SHORT)
    assert len(seen) == count


def test_what_is_watched_and_waited_for_in_vain_leaves_nothing_behind(connect: Connect) -> None:
    watcher, other = connect(), connect()
    held, _ = other.lock("x"), other.join(group="web")
    last: dict[str, Value] = {}
    for path in ("/x", "/daemonkit/members/web"):
        watcher.watch(path, lambda value: last.update({value.path: value}))
    await_true(lambda: len(last) == 2, watcher)

    def turn(number: int) -> None:
        member = other.join(group="web")
        other.set("/x", b"%d" % number)
        await_true(lambda: len(last["/daemonkit/members/web"].children) == 2, watcher)
        other.leave(member)
        await_true(lambda: len(last["/daemonkit/members/web"].children) == 1, watcher)
        await_true(lambda: last["/x"].data == b"%d" % number, watcher)
        with pytest.raises(CoordinatorTimeout):
            watcher.lock("x", timeout=0)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    for number in range(20):
        turn(number)
    before = objects()
    for number in range(60):
        turn(number)
    until = time.monotonic() + PATIENCE
    while objects() >= before + 30:  # what the library's threads have in hand goes; what was left behind would stay
        assert time.monotonic() < until
        watcher.wait(SHORT)
    assert held.is_held()


def test_what_a_watching_function_raises_reaches_who_dispatches(connect: Connect) -> None:
    watcher, other = connect(), connect()
    other.set("/x", b"1")
    watcher.watch("/x", lambda value: [][0])
    with pytest.raises(IndexError):
        await_true(lambda: False, watcher)


def test_a_barrier_opens_when_all_have_come_and_is_left_together(url: str, connect: Connect) -> None:
    one = connect()
    barrier = one.barrier("b", 3)
    with pytest.raises(CoordinatorTimeout, match="not 3 have come in time"):
        barrier.enter(timeout=SHORT)
    others = [hold(url, "c.barrier('b', 3)\nh.enter()\nprint('in', flush=True)\nh.leave()") for _ in range(2)]
    barrier.enter(timeout=PATIENCE)
    barrier.leave(timeout=PATIENCE)
    for process in others:
        assert said(process) == "in"
        assert said(process) == "0"
        end(process)
    again = one.barrier("b", 1)
    again.enter(timeout=PATIENCE)
    again.leave(timeout=PATIENCE)


MEETS_AGAIN = """c.barrier('b', 2)
for n in range(20):
    h.enter(30)
    c.set(f'/met/{n}/{sys.argv[1]}', b'')
    assert len(c.children(f'/met/{n}')) <= 2
    h.leave(30)
    assert len(c.children(f'/met/{n}')) == 2
print('done', flush=True)"""


def test_a_barrier_is_used_again_at_once_round_after_round(url: str) -> None:
    both = [hold(url, MEETS_AGAIN, str(n)) for n in range(2)]
    for process in both:
        assert said(process) == "done"
        end(process)


def test_who_was_killed_within_a_barrier_does_not_keep_it_open(url: str, connect: Connect) -> None:
    one, two = connect(), connect()
    killed = [hold(url, "c.barrier('b', 2)\nh.enter()") for _ in range(2)]
    for process in killed:
        said(process)
        end(process)
    there: list[Value] = []
    two.watch("/daemonkit/barriers/b/entrants", there.append)
    await_true(lambda: there and not there[-1].children, two)
    with pytest.raises(CoordinatorTimeout, match="not 2 have come in time"):
        one.barrier("b", 2).enter(timeout=SHORT)
    await_true(lambda: not two.children("/daemonkit/barriers/b/entrants"), two)


def test_who_comes_to_a_round_that_is_on_waits_for_the_next(url: str, connect: Connect) -> None:
    one = connect()
    enters = "c.barrier('b', 2)\nh.enter()\nprint('in', flush=True)"
    others = [hold(url, f"{enters}\nsys.stdin.readline()") for _ in range(2)]
    assert [said(process) for process in others] == ["in", "in"]
    waiting = hold(url, enters)
    with pytest.raises(CoordinatorTimeout):
        one.barrier("b", 2).enter(timeout=SHORT)
    for process in others:
        end(process)
    one.barrier("b", 2).enter(timeout=PATIENCE)
    assert said(waiting) == "in"
    end(waiting)


def test_what_is_taken_from_a_queue_by_a_lost_request_is_told_to_be_lost(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = connect(), connect()
    other.queue("q").put(b"1")
    other.queue("q").put(b"2")
    delete = one.tree.delete

    def lose(path: str, version: int | None = None) -> bool:
        delete(path, version)
        raise CoordinatorLost("delete it: the connection was lost; it may have been done")

    with monkeypatch.context() as lost:
        lost.setattr(one.tree, "delete", lose)
        with pytest.raises(CoordinatorLost, match="may have been done"):
            one.queue("q").get(timeout=PATIENCE)
    assert one.queue("q").get(timeout=PATIENCE) == b"2"


def test_what_is_no_thing_in_a_queue_is_let_alone(coordinator: Coordinator) -> None:
    queue = coordinator.queue("q")
    for name in ("zzz", "item-", "item-x", "7"):
        coordinator.set(f"/daemonkit/queues/q/{name}", b"foreign")
    queue.put(b"ours")
    assert len(queue) == 1
    assert queue.get(timeout=PATIENCE) == b"ours"
    with pytest.raises(CoordinatorTimeout):
        queue.get(timeout=SHORT)


def test_a_queue_gives_each_thing_to_one_in_order(connect: Connect) -> None:
    one, two = connect(), connect()
    queue, other = one.queue("q"), two.queue("q")
    for n in range(5):
        queue.put(b"%d" % n)
    assert len(other) == 5
    assert [each.get() for each in (queue, other, queue, other, queue)] == [b"0", b"1", b"2", b"3", b"4"]
    with pytest.raises(CoordinatorTimeout):
        other.get(timeout=SHORT)


def test_who_waits_at_a_queue_is_woken(url: str, connect: Connect) -> None:
    waiting = hold(url, "c.queue('q').get()\nprint(h.decode(), flush=True)")
    connect().queue("q").put(b"hello")
    assert said(waiting) == "hello"
    end(waiting)


def test_a_session_that_is_closed_leaves_nothing_and_is_not_used_again(connect: Connect) -> None:
    one, other = connect(), connect()
    held, member, candidacy = one.lock("x"), one.join(), one.elect("job")
    await_true(lambda: candidacy.is_held, one)
    one.close()
    one.close()
    assert not held.is_held()
    assert not candidacy.is_held
    assert not member.is_due
    assert other.members() == []
    assert other.locks() == []
    assert other.leaders() == []
    with pytest.raises(CoordinatorError, match="this connection is closed"):
        one.get("/x")
    with pytest.raises(CoordinatorError, match="this connection is closed"):
        one.lock("x")


def test_a_connection_is_not_used_after_a_fork(connect: Connect) -> None:
    coordinator = connect()
    coordinator.set("/x", b"")
    program = os.fork() if sys.version_info < (3, 12) else None
    if program is None:
        pytest.skip("a fork of a process with threads warns from 3.12 on")
    if program == 0:
        try:
            coordinator.get("/x")
        except CoordinatorError as error:
            os._exit(7 if "open one after the fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == 7
    assert coordinator.get("/x").data == b""


def test_a_line_goes_on_when_its_numbers_begin_anew() -> None:
    """As ZooKeeper's do after 2,147,483,647 (ZooKeeper, sequence nodes)."""
    numbers = [2147483646, 2147483647, -2147483648, -2147483647]
    names = [f"u{place}-exclusive-{number:010d}" for place, number in enumerate(numbers)]
    for shuffled in itertools.permutations(names):
        assert [entry.name for entry in line_of([*shuffled, "another", "x-y-z"])] == names


def test_a_line_of_large_numbers_is_in_their_order_however_far_apart_they_are() -> None:
    """As on one host, where they are microseconds."""
    names = [f"u{number}-exclusive-{number}" for number in (2**50, 2**50 + 1, 2**50 + 2**31, 2**51)]
    for shuffled in itertools.permutations(names):
        assert [entry.name for entry in line_of(shuffled)] == names


def await_line(coordinator: Coordinator, count: int) -> None:
    """Sleep until so many stand in a line for a lock or semaphore."""
    await_names(coordinator, ("/daemonkit/locks", "/daemonkit/semaphores"), count)


def await_line_of_leaders(coordinator: Coordinator, name: str, count: int) -> None:
    await_names(coordinator, (f"/daemonkit/leaders/{name}",), count, 0)


def await_names(coordinator: Coordinator, tops: tuple[str, ...], count: int, depth: int = 1) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        found = 0
        for top in tops:
            for path in [f"{top}/{name}" for name in coordinator.children(top)] if depth else [top]:
                found += len(coordinator.tree.children(path, lambda: None) or ())
        if found >= count:
            return
        assert time.monotonic() < until
        coordinator.wait(0.02)


def await_leader(coordinator: Coordinator, *pids: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        leader = coordinator.leader("job")
        if leader is not None and leader.pid in pids:
            return
        assert time.monotonic() < until
        coordinator.wait(0.02)


def said(process: subprocess.Popen[bytes]) -> str:
    """The next line of its output."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
    assert ready
    return process.stdout.readline().decode().strip()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
