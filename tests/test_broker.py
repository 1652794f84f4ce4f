"""The contract of a broker, the same on every engine."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from brokers import Beanstalkd, RedisServer, beanstalkd, redis_server
from harness import PATIENCE

from daemonkit.errors import BrokerError, UsageError
from daemonkit.queue.broker import Broker, Bury, Delete, NewTask, Release, Reservation, State, Touch
from daemonkit.queue.connect import connect as connect_to
from daemonkit.queue.transfer import Transfer

Connect = Callable[[], Broker]
LONG = 2.0**31  # seconds
MILLISECONDS = 0.01  # seconds: moments are rounded, and clocks set right meanwhile


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis", "beanstalk"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a broker without tasks."""
    if request.param == "sqlite":
        yield f"sqlite:{tmp_path}/queue.db"
    elif request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        server.command("FLUSHALL")
        yield server.url
    else:
        with beanstalkd(tmp_path) as one:
            yield one.url


# What beanstalkd's protocol has no place for: keys, who has a task, more than the first of a state, fractions.
not_beanstalk = pytest.mark.parametrize("url", ["sqlite", "redis"], indirect=True)


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """A function that opens one connection more to one broker."""
    opened: list[Broker] = []

    def connect() -> Broker:
        opened.append(connect_to(url))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


@pytest.fixture
def broker(connect: Connect) -> Broker:
    return connect()


def reserve(broker: Broker, *queues: str) -> Reservation:
    """Reserve one task that is there, or will be when its time has come."""
    until = time.monotonic() + PATIENCE
    while not (found := broker.exchange((), dict.fromkeys(queues or ("mail",), 1), 1)).reserved:
        assert time.monotonic() < until
        if found.due is None:
            assert broker.url.startswith("beanstalk")  # whose server wakes us by its own clock
        select.select([broker.watch()], [], [], PATIENCE if found.due is None else found.due)
        broker.drain()
    return found.reserved[0]


def due(broker: Broker) -> float | None:
    return broker.exchange((), {"mail": 1}, 1).due


def ids(reserved: list[Reservation]) -> list[str]:
    return [each.id for each in reserved]


def count(broker: Broker, state: State, queue: str = "mail") -> int:
    return next((int(getattr(each, state.value)) for each in broker.stats() if each.queue == queue), 0)


def test_what_is_put_is_reserved_as_it_was_put(broker: Broker) -> None:
    body = bytes(range(256))
    id = broker.put("mail", NewTask(body, priority=7, ttr=3))
    found = reserve(broker)
    assert found == Reservation("mail", id, found.token, body, 7, 3.0, 0)
    assert found.token > 0


@not_beanstalk
def test_a_ttr_may_be_a_fraction(broker: Broker) -> None:
    broker.put("mail", NewTask(b"", ttr=0.25))
    assert reserve(broker).ttr == 0.25


def test_nothing_is_reserved_where_nothing_is(broker: Broker) -> None:
    broker.put("mail", NewTask(b""))
    assert broker.reserve("other", "another") == []
    assert broker.exchange((), {"mail": 0}, 5).reserved == []
    assert broker.exchange((), {"mail": 5}, 0).reserved == []


def test_lower_priorities_come_first_and_equal_ones_in_the_order_of_their_puts(broker: Broker) -> None:
    put = [broker.put("mail", NewTask(b"", priority)) for priority in (5, 2**32 - 1, 0, 5, 5)]
    assert ids(broker.reserve("mail", count=9)) == [put[2], put[0], put[3], put[4], put[1]]


def test_priorities_count_across_queues_and_each_queue_gives_no_more_than_asked(broker: Broker) -> None:
    for n in range(4):
        broker.put("mail", NewTask(b"m%d" % n, priority=n))
        broker.put("sms", NewTask(b"s%d" % n, priority=n))
    found = broker.exchange((), {"mail": 4, "sms": 1}, 3).reserved
    assert sorted(each.body for each in found[:2]) == [b"m0", b"s0"]
    assert found[2].body == b"m1"
    assert [each.body for each in broker.exchange((), {"sms": 9}, 2).reserved] == [b"s1", b"s2"]


def test_what_is_reserved_is_nobody_elses(connect: Connect) -> None:
    one, other = connect(), connect()
    one.put("mail", NewTask(b""))
    assert len(one.reserve("mail")) == 1
    assert other.reserve("mail") == []


def test_tokens_grow_with_each_reservation_also_of_the_same_task(broker: Broker) -> None:
    broker.put_many("mail", [NewTask(b"")] * 3)
    tokens = [each.token for each in broker.reserve("mail", count=3)]
    assert tokens == sorted(set(tokens))
    id = broker.put("sms", NewTask(b""))
    for _ in range(3):
        found = reserve(broker, "sms")
        assert found.id == id
        tokens.append(found.token)
        assert broker.release(found)
    assert tokens[3:] == sorted(set(tokens[3:]))


def test_what_is_deleted_is_gone_and_a_second_time_it_is_no_longer_ours(broker: Broker) -> None:
    broker.put("mail", NewTask(b""))
    found = reserve(broker)
    assert broker.delete(found)
    assert broker.peek(found.id) is None
    assert not broker.delete(found)
    assert not broker.touch(found)
    assert not broker.release(found)
    assert not broker.bury(found, "why")
    assert broker.stats() == []


def test_who_is_too_late_changes_nothing(broker: Broker) -> None:
    broker.put("mail", NewTask(b"", ttr=0.02))
    late = reserve(broker)
    now = reserve(broker)  # its ttr is up
    assert now.id == late.id
    assert now.token > late.token
    assert now.failures == 1
    for act in (broker.delete, broker.touch, broker.release, lambda each: broker.bury(each, "why")):
        assert not act(late)
    task = broker.peek(now.id)
    assert task is not None
    assert (task.state, task.timeouts, task.reserves - task.releases) == (State.RESERVED, 1, 2)
    assert task.reason == "it was not done within its ttr"


def test_a_touch_lets_the_ttr_begin_anew(broker: Broker) -> None:
    broker.put("mail", NewTask(b"", ttr=10))
    found = reserve(broker)
    broker.put("mail", NewTask(b"", delay=1))
    reserve(broker)
    touched = time.monotonic()
    assert broker.touch(found)
    task = broker.peek(found.id)
    assert task is not None
    assert task.left is not None
    assert task.left > 10 - (time.monotonic() - touched) - MILLISECONDS


def test_what_is_released_comes_again_and_only_with_a_reason_as_a_failure(broker: Broker) -> None:
    first, second = (broker.put("mail", NewTask(body)) for body in (b"1", b"2"))
    found = reserve(broker)
    assert broker.release(found, priority=2000)
    assert reserve(broker).id == second
    again = reserve(broker)
    assert (again.id, again.priority, again.failures) == (first, 2000, 0)
    assert broker.release(again, reason="no route")
    (task,) = broker.peek_state("mail", State.READY)
    assert (task.body, task.priority, task.failures, task.reason) == (b"1", 2000, 1, "no route")
    last = reserve(broker)
    assert (last.body, last.failures, last.first_id) == (b"1", 1, first)


@not_beanstalk
def test_a_task_keeps_its_id_and_its_counts_whatever_becomes_of_it(broker: Broker) -> None:
    id = broker.put("mail", NewTask(b""))
    assert broker.release(reserve(broker))
    assert broker.release(reserve(broker), reason="no route")
    assert broker.bury(reserve(broker), "no host")
    task = broker.peek(id)
    assert task is not None
    assert (task.state, task.reserves, task.releases, task.buries, task.failures) == (State.BURIED, 3, 2, 1, 2)
    assert broker.kick_task(id)
    assert reserve(broker).id == id


def test_a_delay_keeps_a_task_until_then(broker: Broker) -> None:
    other = broker.put("mail", NewTask(b"", delay=LONG))
    assert broker.reserve("mail") == []
    assert count(broker, State.DELAYED) == 1
    assert broker.delete_task(other)
    began = time.monotonic()
    id = broker.put("mail", NewTask(b"", delay=1))
    found = reserve(broker)
    assert time.monotonic() - began >= 1 - MILLISECONDS
    assert broker.release(found, delay=LONG)
    assert broker.reserve("mail") == []
    task = broker.peek(id)
    assert task is not None
    assert task.left is not None
    assert LONG - 60 < task.left <= LONG
    assert task.state == State.DELAYED


@pytest.mark.parametrize("reason", [None, "no route"])
def test_what_goes_back_for_a_part_of_a_second_is_there_right_after_it(broker: Broker, reason: str | None) -> None:
    broker.put("mail", NewTask(b"x", priority=7))
    (found,) = broker.reserve("mail")
    for times in range(1, 10):
        began = time.monotonic()
        looked = broker.exchange([Release(found, 0.2, reason)], {"mail": 1}, 1)
        if not looked.reserved:  # or it took so long
            assert looked.due is not None
            assert looked.due <= 0.2
        found = looked.reserved[0] if looked.reserved else reserve(broker)
        took = time.monotonic() - began
        assert took >= 0.2 - MILLISECONDS
        assert (found.body, found.priority, found.failures) == (b"x", 7, 0 if reason is None else times)
        if took < 0.9:  # beanstalkd alone knows of whole seconds
            return
    pytest.fail("it always came after a whole second")


def test_what_is_buried_comes_only_when_it_is_kicked_its_failures_forgotten(broker: Broker) -> None:
    broker.put("mail", NewTask(b"body"))
    assert broker.bury(reserve(broker), "Bad: it is\nbroken")
    assert broker.reserve("mail") == []
    (task,) = broker.peek_state("mail", State.BURIED)
    same = broker.peek(task.id)
    assert same is not None
    assert task == same._replace(age=task.age)
    assert (task.state, task.buries, task.failures, task.reason) == (State.BURIED, 1, 1, "Bad: it is\nbroken")
    assert broker.kick_task(task.id)
    assert not broker.kick_task(task.id)
    found = reserve(broker)
    assert (found.id, found.body, found.failures) == (task.id, b"body", 0)
    again = broker.peek(task.id)
    assert again is not None
    assert again.kicks == 1


def test_a_kick_takes_buried_ones_in_the_order_of_their_burials_and_delayed_ones_only_if_there_are_none(
    broker: Broker,
) -> None:
    broker.put_many("mail", [NewTask(b"%d" % n) for n in range(3)])
    for each in broker.reserve("mail", count=3):
        assert broker.bury(each, "")
    broker.put("mail", NewTask(b"later", delay=LONG))
    assert broker.kick("mail", 2) == 2
    assert [each.body for each in broker.reserve("mail", count=9)] == [b"0", b"1"]
    assert broker.kick("mail", 9) == 1
    assert broker.kick("mail", 9) == 1
    assert [each.body for each in broker.reserve("mail", count=9)] == [b"2", b"later"]
    assert broker.kick("mail", 9) == 0
    assert broker.kick("unheard-of", 9) == 0


def test_tasks_can_be_deleted_and_buried_by_hand_but_not_while_they_are_reserved(broker: Broker) -> None:
    put = [broker.put("mail", NewTask(b"", delay=delay)) for delay in (0, 0, 9)]
    found = reserve(broker)
    assert not broker.delete_task(found.id)
    assert not broker.bury_task(found.id, "")
    assert broker.bury_task(put[1], "by hand")
    assert not broker.bury_task(put[1], "by hand")
    (buried,) = broker.peek_state("mail", State.BURIED)
    assert buried.reason == "by hand"
    assert broker.delete_task(buried.id)
    assert broker.delete_task(put[2])
    assert not broker.delete_task(put[2])
    for nothing in ("", "0", "-1", "x", "99999999999999999999", "1 OR 1=1"):
        assert not broker.delete_task(nothing)
        assert broker.peek(nothing) is None


@not_beanstalk
def test_peek_shows_the_first_ones_of_each_state(broker: Broker) -> None:
    for n in (3, 1, 2):
        broker.put("mail", NewTask(b"ready %d" % n, priority=n))
        broker.put("mail", NewTask(b"delayed %d" % n, delay=n * 100.0))
    assert [each.body for each in broker.peek_state("mail", State.READY, 2)] == [b"ready 1", b"ready 2"]
    assert [each.body for each in broker.peek_state("mail", State.DELAYED, 9)] == [
        b"delayed 1",
        b"delayed 2",
        b"delayed 3",
    ]
    assert broker.peek_state("mail", State.BURIED) == broker.peek_state("mail", State.RESERVED) == []
    found = reserve(broker)
    (task,) = broker.peek_state("mail", State.RESERVED)
    assert (task.id, task.state, task.left is not None) == (found.id, State.RESERVED, True)
    assert broker.peek_state("unheard-of", State.READY) == []


def test_peek_shows_the_first_of_each_state_and_changes_nothing(broker: Broker) -> None:
    broker.put_many("mail", [NewTask(b"%d" % n, priority=9 - n) for n in range(3)])
    broker.put_many("mail", [NewTask(b"%d" % n, delay=900 - n * 100) for n in range(3, 6)])
    broker.put("mail", NewTask(b"bad", priority=0))
    assert broker.bury(reserve(broker), "why")
    before = broker.stats()
    seen = {state: broker.peek_state("mail", state)[0].body for state in (State.READY, State.DELAYED, State.BURIED)}
    assert seen == {State.READY: b"2", State.DELAYED: b"5", State.BURIED: b"bad"}
    assert broker.stats() == before


def test_stats_count_each_state_of_each_queue(broker: Broker) -> None:
    broker.put_many("mail", [NewTask(b"")] * 5)
    broker.put_many("mail", [NewTask(b"", delay=9)] * 2)
    broker.put("a", NewTask(b""))
    one, other = broker.reserve("mail", count=2)
    assert broker.bury(one, "")
    assert [each[:5] for each in broker.stats()] == [("a", 1, 0, 0, 0), ("mail", 3, 2, 1, 1)]
    assert broker.delete(other)


@not_beanstalk
def test_a_second_put_with_the_key_of_a_task_that_is_there_is_no_second_task(broker: Broker) -> None:
    first = broker.put("mail", NewTask(b"1", key="order 7"))
    assert broker.put("mail", NewTask(b"2", key="order 7")) == first
    assert broker.put("sms", NewTask(b"3", key="order 7")) != first
    found = reserve(broker)
    assert (found.id, found.body) == (first, b"1")
    assert broker.put("mail", NewTask(b"4", key="order 7")) == first
    assert broker.delete(found)
    assert broker.put("mail", NewTask(b"5", key="order 7")) != first


def test_a_paused_queue_hands_out_nothing_and_others_do_and_all_see_it(connect: Connect) -> None:
    one, other = connect(), connect()
    one.put("mail", NewTask(b"m"))
    one.put("sms", NewTask(b"s"))
    one.pause("mail", LONG, "the relay is down")
    third = connect()
    assert [each.body for each in third.reserve("mail", "sms", count=9)] == [b"s"]
    stats = {each.queue: each for each in other.stats()}
    assert stats["mail"].pause_reason == (None if one.url.startswith("beanstalk") else "the relay is down")
    assert stats["mail"].paused is not None
    assert stats["mail"].paused > LONG - 60
    assert stats["sms"].paused is None
    other.pause("mail", 0)
    assert [each.body for each in third.reserve("mail")] == [b"m"]


def test_a_pause_ends_by_itself_and_that_is_a_due_time(broker: Broker) -> None:
    broker.put("mail", NewTask(b"m"))
    began = time.monotonic()
    broker.pause("mail", 1)
    assert reserve(broker).body == b"m"
    assert time.monotonic() - began >= 1 - MILLISECONDS
    assert [each.paused for each in broker.stats()] == [None]


def test_empty_deletes_all_but_what_is_reserved_or_only_some_states(broker: Broker) -> None:
    broker.put_many("mail", [NewTask(b"%d" % n) for n in range(6)])
    broker.put_many("mail", [NewTask(b"", delay=9)] * 3)
    broker.put("sms", NewTask(b""))
    reserved, buried = broker.reserve("mail", count=2)
    assert broker.bury(buried, "")
    assert broker.empty("mail", [State.DELAYED]) == 3
    assert broker.empty("mail") == 5
    assert broker.empty("mail") == 0
    assert broker.empty("unheard-of") == 0
    assert [each[:5] for each in broker.stats()] == [("mail", 0, 0, 1, 0), ("sms", 1, 0, 0, 0)]
    assert broker.delete(reserved)


def test_outcomes_and_reservations_go_in_one_exchange_and_what_is_late_is_told(broker: Broker) -> None:
    broker.put_many("mail", [NewTask(b"%d" % n) for n in range(6)])
    a, b, c, d = broker.reserve("mail", count=4)
    assert broker.delete(a)
    found = broker.exchange([Delete(a), Delete(b), Release(c), Bury(d, "no")], {"mail": 2}, 2)
    assert found.lost == [a]
    assert [each.body for each in found.reserved] == [b"2", b"4"]
    assert broker.exchange([Touch(a), Touch(found.reserved[0])], {}, 0).lost == [a]


def test_a_consumer_that_waits_is_woken_by_another_process_and_not_by_its_own_looks(
    broker: Broker, connect: Connect
) -> None:
    broker.watch()
    assert broker.reserve("mail") == []
    broker.drain()
    assert broker.reserve("mail") == []
    assert not select.select([broker.watch()], [], [], 0)[0]
    connect().put("mail", NewTask(b"wake up"))
    assert select.select([broker.watch()], [], [], PATIENCE)[0]
    broker.drain()
    assert reserve(broker).body == b"wake up"


@not_beanstalk
def test_when_the_next_task_is_due_is_told(broker: Broker) -> None:
    assert due(broker) is None
    broker.put("mail", NewTask(b"", delay=500))
    left = due(broker)
    assert left is not None
    assert 400 < left <= 500


@pytest.mark.parametrize(
    ("queue", "task", "words"),
    [
        ("", NewTask(b""), "queue ''"),
        ("-x", NewTask(b""), "queue '-x'"),
        ("a b", NewTask(b""), "queue 'a b'"),
        ("a\r\ndelete 1", NewTask(b""), "delete 1"),
        ("ä", NewTask(b""), "queue 'ä'"),
        ("x" * 201, NewTask(b""), "up to 200"),
        ("mail", NewTask(b"", priority=-1), "priority=-1"),
        ("mail", NewTask(b"", priority=2**32), "priority=4294967296"),
        ("mail", NewTask(b"", priority=1.5), "priority=1.5"),  # type: ignore[arg-type]
        ("mail", NewTask(b"", priority=True), "priority=True"),
        ("mail", NewTask(b"", delay=-1), "delay=-1"),
        ("mail", NewTask(b"", delay=float("nan")), "delay=nan"),
        ("mail", NewTask(b"", delay=float("inf")), "delay=inf"),
        ("mail", NewTask(b"", ttr=0), "ttr=0"),
        ("mail", NewTask(b"", ttr="60"), "ttr='60'"),  # type: ignore[arg-type]
        ("mail", NewTask("text"), "a body is bytes, not str"),  # type: ignore[arg-type]
        ("mail", NewTask(b"", key=""), "key=''"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_put(
    broker: Broker, queue: str, task: NewTask, words: str
) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        broker.put_many(queue, [NewTask(b"good"), task])
    assert broker.stats() == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (Debian: util-linux)")
def test_where_no_inotify_instance_is_left_a_consumer_looks_again(tmp_path: Path) -> None:
    program = f"""
import logging, select
from daemonkit.queue.sqlite import SqliteBroker
from daemonkit.queue.broker import NewTask
logging.basicConfig(format="%(message)s")
broker = SqliteBroker({str(tmp_path / "queue.db")!r})
assert not select.select([broker.watch()], [], [], 0)[0]
assert 0 < broker.exchange((), {{"mail": 1}}, 1).due <= 0.25
broker.put("mail", NewTask(b""))
assert broker.reserve("mail")
broker.close()
"""
    command = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$0" -W error -c "$1"'
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", command, sys.executable, program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("no inotify instance is left (fs.inotify.max_user_instances)")


@pytest.mark.parametrize("engine", ["redis", "beanstalk"])
def test_row_30_a_server_that_answers_no_more_is_given_up_in_time_and_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """As behind a firewall that drops what we send."""
    monkeypatch.setattr(f"daemonkit.queue.{engine}.TIMEOUT", 3)
    server: RedisServer | Beanstalkd
    with redis_server(tmp_path) if engine == "redis" else beanstalkd(tmp_path) as server:  # which wait for no disk
        broker = connect_to(server.url)
        broker.put_many("mail", [NewTask(b"1"), NewTask(b"2")])
        (held,) = broker.reserve("mail")
        server.signal(signal.SIGSTOP)
        try:
            for act in (lambda: broker.delete(held), lambda: broker.put("mail", NewTask(b"3")), broker.stats):
                with pytest.raises(BrokerError, match=r"no reply|Timeout|timed out|[Cc]onnect"):
                    act()
        finally:
            server.signal(signal.SIGCONT)
        monkeypatch.setattr(f"daemonkit.queue.{engine}.TIMEOUT", PATIENCE)
        assert {each.body for each in broker.reserve("mail", count=9)} >= {b"2"}
        broker.close()


def test_of_several_put_at_once_all_are_put_or_none(broker: Broker) -> None:
    assert len(set(broker.put_many("mail", [NewTask(b"")] * 100))) == 100
    assert broker.put_many("mail", []) == []
    assert count(broker, State.READY) == 100


def test_a_body_of_ten_megabytes_comes_back_whole(broker: Broker) -> None:
    body = os.urandom(10_000_000)
    broker.put("mail", NewTask(body))
    assert reserve(broker).body == body


def test_after_a_fork_the_child_is_told_and_the_parent_goes_on(broker: Broker) -> None:
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            broker.put("mail", NewTask(b"child"))
        except BrokerError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        assert b"open one after the fork" in told.read()
    os.waitpid(pid, 0)
    broker.put("mail", NewTask(b"parent"))
    assert reserve(broker).body == b"parent"


@not_beanstalk
def test_a_consumer_that_announces_itself_is_seen_until_it_closes(connect: Connect) -> None:
    one, other = connect(), connect()
    assert other.consumers() == []
    one.announce(["sms", "mail"], 5)
    one.put("mail", NewTask(b""))
    reserve(one)
    (found,) = other.consumers()
    assert (sorted(found.queues), found.concurrency, found.busy) == (["mail", "sms"], 5, 1)
    one.announce(["mail"], 2)
    assert [(each.queues, each.concurrency) for each in other.consumers()] == [(("mail",), 2)]


@not_beanstalk
def test_how_many_are_ahead_is_told(broker: Broker) -> None:
    ids = [broker.put("mail", NewTask(b"", priority)) for priority in (5, 1, 5)]
    broker.put("sms", NewTask(b"", 0))
    tasks = [broker.peek(id) for id in ids]
    assert [task and broker.ahead(task) for task in tasks] == [1, 0, 2]


def test_the_doctor_says_what_a_power_cut_would_lose(broker: Broker) -> None:
    assert any("power cut" in line.lower() for line in broker.doctor())


def test_what_a_consumer_had_reserved_that_was_killed_is_given_back_at_once(connect: Connect) -> None:
    broker = connect()
    broker.put_many("mail", [NewTask(b"%d" % n) for n in range(3)])
    program = f"""
import sys
from daemonkit.queue.connect import connect
broker = connect({broker.url!r})
print(*[each.id for each in broker.reserve("mail", count=2)], flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as consumer:
        assert consumer.stdout is not None
        taken = consumer.stdout.readline().split()
        assert broker.recover() == 0
        consumer.kill()
    assert broker.recover() == (0 if broker.url.startswith("beanstalk") else 2)  # the server has done so itself
    found = broker.reserve("mail", count=9)
    assert sorted(ids(found))[:2] == taken
    assert [each.failures for each in found] == [1, 1, 0]


@pytest.mark.parametrize("state", [State.READY, State.DELAYED, State.BURIED])
def test_an_interruption_waits_until_each_task_is_in_one_of_the_queues_of_a_move(
    broker: Broker, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.put("mail", NewTask(b"x", delay=1000.0 if state is State.DELAYED else 0.0))
    if state is State.BURIED:
        broker.bury(reserve(broker), "it was bad")
    put_many = broker.put_many

    def put_and_be_interrupted(queue: str, tasks: Sequence[NewTask]) -> list[str]:
        ids = put_many(queue, tasks)
        signal.raise_signal(signal.SIGINT)
        return ids

    monkeypatch.setattr(broker, "put_many", put_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        Transfer(broker, "mail", broker, "slow").move([state], 10, lambda count: None)
    (queue,) = broker.stats()
    assert (queue.queue, getattr(queue, state.value)) == ("slow", 1)
