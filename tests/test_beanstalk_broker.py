"""What is beanstalkd's own: its connections, its restarts, several servers, and what its protocol has no place for."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import Beanstalkd, Between, beanstalkd, redis_server
from harness import PATIENCE
from ports import free_ports

from daemonkit.errors import BrokerError, BrokerFull, PutUncertain, UsageError
from daemonkit.queue.beanstalkbroker import BeanstalkBroker
from daemonkit.queue.broker import Bury, Delete, NewTask, Outcome, Release, Reservation, State, Touch
from daemonkit.queue.connect import connect
from daemonkit.queue.history import History, plain, unwrap, wrap
from daemonkit.queue.waiter import Waiter


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Beanstalkd]:
    (tmp_path / "log").mkdir()
    with beanstalkd(tmp_path, "-b", str(tmp_path / "log"), "-f", "0") as made:
        yield made


@pytest.fixture
def broker(server: Beanstalkd) -> Iterator[BeanstalkBroker]:
    made = BeanstalkBroker(server.url, [str(server.socket)])
    yield made
    made.close()


@pytest.fixture
def other(server: Beanstalkd) -> Iterator[BeanstalkBroker]:
    made = BeanstalkBroker(server.url, [str(server.socket)])
    yield made
    made.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Beanstalkd, Beanstalkd]]:
    for name in ("one", "two"):
        (tmp_path / name / "log").mkdir(parents=True)
    with (
        beanstalkd(tmp_path / "one", "-b", str(tmp_path / "one" / "log"), "-f", "0") as one,
        beanstalkd(tmp_path / "two", "-b", str(tmp_path / "two" / "log"), "-f", "0") as two,
    ):
        yield one, two


@pytest.fixture
def both(pair: tuple[Beanstalkd, Beanstalkd], monkeypatch: pytest.MonkeyPatch) -> Iterator[BeanstalkBroker]:
    monkeypatch.setattr("daemonkit.queue.beanstalkbroker._BESIDE_OTHERS", PATIENCE)  # a disk may be slow
    made = BeanstalkBroker("beanstalk://one,two", [str(each.socket) for each in pair])
    yield made
    made.close()


def ready(server: Beanstalkd, queue: str = "mail") -> int:
    said = server.command(b"stats-tube " + queue.encode()).decode()
    return int(said.split("current-jobs-ready: ")[1].split("\n")[0]) if "current-jobs-ready" in said else 0


def test_over_tcp_it_is_the_same(tmp_path: Path) -> None:
    with beanstalkd(tmp_path, port=free_ports(1)[0]) as server:
        broker = connect(server.url + "/")
        broker.put("mail", NewTask(b"x"))
        assert broker.delete(broker.reserve("mail")[0])
        broker.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("beanstalk://", "'' is no HOST"),
        ("beanstalk://h:port", "'h:port' is no HOST"),
        ("beanstalk://h:99999", "'h:99999' is no HOST"),
        ("beanstalk://h1,,h2", "'' is no HOST"),
        ("beanstalk://user:password@h", "is no HOST, HOST:PORT or"),
        ("beanstalk://h/0", "'h/0' is no HOST"),
        ("beanstalk://h,h:11300", "stands there twice"),
        ("beanstalk:here", "a socket's path must begin with /"),
    ],
)
def test_a_url_that_cannot_be_meant_is_told(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        connect(url)


def test_where_nobody_answers_or_somebody_else_that_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"reach beanstalkd at 127.0.0.1:1: Connection refused; is it running\?"):
        connect("beanstalk://127.0.0.1:1")
    with redis_server(tmp_path) as other, pytest.raises(BrokerError, match="it has answered '-ERR' to b'stats'"):
        connect(f"beanstalk:{other.socket}")


def test_what_was_accepted_is_there_after_a_kill_9_of_the_server_and_no_old_id_is_anothers(
    server: Beanstalkd, broker: BeanstalkBroker
) -> None:
    ids = broker.put_many("mail", [NewTask(b"%d" % n) for n in range(10)])
    held = broker.reserve("mail", count=3)
    server.kill()
    with pytest.raises(BrokerError):
        broker.delete(held[0])
    with pytest.raises(BrokerError, match="is it running"):
        broker.peek(ids[5])
    server.start()
    assert broker.exchange([Delete(held[0]), Touch(held[1]), Release(held[2])], {}, 0).lost == held
    assert broker.peek(ids[5]) is None
    assert not broker.delete_task(ids[5])
    assert not broker.kick_task(ids[5])
    assert [each.body for each in broker.reserve("mail", count=20)] == [b"%d" % n for n in range(10)]


def test_a_server_without_a_binlog_begins_its_numbers_anew_and_nothing_of_others_is_deleted(tmp_path: Path) -> None:
    with beanstalkd(tmp_path) as server:
        broker = connect(server.url)
        broker.put("mail", NewTask(b"mine"))
        (held,) = broker.reserve("mail")
        server.kill()
        server.start()
        other = connect(server.url)
        assert other.put("mail", NewTask(b"another's")).partition("-")[0] == held.id.partition("-")[0]
        with pytest.raises(BrokerError):
            broker.delete(held)
        assert not broker.delete(held)
        assert [each.body for each in other.reserve("mail")] == [b"another's"]
        assert any("LOSES ALL" in line for line in other.doctor())
        broker.close()
        other.close()


def test_a_lost_line_gives_no_task_away_and_an_answer_that_was_lost_is_no_failure(
    server: Beanstalkd, broker: BeanstalkBroker, tmp_path: Path
) -> None:
    between = Between(server.socket, tmp_path / "between.sock")
    far = BeanstalkBroker("far", [str(between.path)])
    try:
        far.put_many("mail", [NewTask(b"%d" % n) for n in range(4)])
        held = far.reserve("mail", count=3)
        outcomes: list[Outcome] = [Delete(held[0]), Touch(held[1]), Release(held[2], 100)]
        between.cut_before = b"delete "
        with pytest.raises(BrokerError, match="it has closed the connection"):
            far.exchange(outcomes, {}, 0)
        assert far.exchange(outcomes, {}, 0).lost == []
        assert [each[:5] for each in broker.stats()] == [("mail", 1, 1, 1, 0)]
        between.cut_before = b"reserve-with-timeout"
        with pytest.raises(BrokerError):
            far.reserve("mail")
        assert [each.body for each in far.reserve("mail")] == [b"3"]
        assert far.delete(held[1])
    finally:
        far.close()
        between.close()


def test_a_put_whose_answer_is_lost_is_told_to_be_uncertain_and_is_not_put_again(
    server: Beanstalkd, broker: BeanstalkBroker, tmp_path: Path
) -> None:
    between = Between(server.socket, tmp_path / "between.sock")
    far = BeanstalkBroker("far", [str(between.path)])
    try:
        between.cut_before = b"put "
        with pytest.raises(PutUncertain, match="some may be there: putting them again may do them twice"):
            far.put("mail", NewTask(b"x"))
        assert ready(server) == 1
        far.put("mail", NewTask(b"y"))
        assert ready(server) == 2
    finally:
        far.close()
        between.close()


def test_puts_go_to_the_servers_by_turns_and_reserves_and_outcomes_to_where_they_belong(
    pair: tuple[Beanstalkd, Beanstalkd], both: BeanstalkBroker
) -> None:
    for n in range(10):
        both.put("mail", NewTask(b"%d" % n))
    assert [ready(each) for each in pair] == [5, 5]
    found = both.reserve("mail", count=20)
    assert sorted(each.body for each in found) == [b"%d" % n for n in range(10)]
    assert len({each.id for each in found}) == 10
    outcomes: list[Outcome] = [
        Bury(found[0], "no"),
        Release(found[1], reason="why"),
        *(Delete(each) for each in found[2:]),
    ]
    assert both.exchange(outcomes, {}, 0).lost == []
    assert [each[:5] for each in both.stats()] == [("mail", 1, 0, 0, 1)]
    assert both.kick("mail", 9) == 1
    assert both.empty("mail") == 2
    assert both.stats() == []


def test_a_server_that_drains_takes_nothing_more_and_the_other_does(
    pair: tuple[Beanstalkd, Beanstalkd], both: BeanstalkBroker
) -> None:
    both.put_many("mail", [NewTask(b"before")] * 2)
    both.put_many("mail", [NewTask(b"before")] * 2)
    pair[0].signal(signal.SIGUSR1)
    for _ in range(4):
        both.put("mail", NewTask(b"after"))
    assert [ready(each) for each in pair] == [2, 6]
    assert len(both.reserve("mail", count=20)) == 8
    pair[1].signal(signal.SIGUSR1)
    with pytest.raises(BrokerError, match="it is draining"):
        both.put("mail", NewTask(b"no"))
    assert sum("it is draining" in line for line in both.doctor()) == 2


def test_when_a_server_is_killed_the_other_goes_on_and_what_it_is_to_know_is_told_when_it_is_back(
    pair: tuple[Beanstalkd, Beanstalkd], both: BeanstalkBroker
) -> None:
    for n in range(4):
        both.put("mail", NewTask(b"%d" % n))
    held = both.reserve("mail", count=2)
    pair[0].kill()
    for n in range(4, 8):
        both.put("mail", NewTask(b"%d" % n))
    found = both.exchange([Delete(each) for each in held], {"mail": 20}, 20)
    assert found.lost == []
    assert found.due is not None
    alive = len(found.reserved)
    assert both.exchange([Delete(each) for each in found.reserved], {}, 0).lost == []
    pair[0].start()
    seen: list[bytes] = []
    lost: list[Reservation] = []
    while ready(pair[0]):
        select.select([both.watch()], [], [], found.due)
        found = both.exchange([], {"mail": 20}, 20)
        seen += [each.body for each in found.reserved]
        lost += found.lost
    # Its restart has given back what was reserved there: done again, as it must be.
    assert alive + len(seen) + len(held) == 8 + len(lost)


def test_a_waiter_gives_back_what_it_was_given_and_waits_only_while_there_is_room(
    server: Beanstalkd, broker: BeanstalkBroker, other: BeanstalkBroker
) -> None:
    assert broker.reserve("mail") == []
    assert not select.select([broker.watch()], [], [], 0)[0]
    other.put("mail", NewTask(b"x", priority=7))
    assert select.select([broker.watch()], [], [], PATIENCE)[0]
    broker.drain()
    assert other.reserve("mail") == []
    (task,) = other.peek_state("mail", State.DELAYED)
    assert (task.priority, task.failures, task.reserves, task.releases) == (7, 0, 1, 1)
    (found,) = broker.reserve("mail")
    assert found.priority == 7
    broker.watch()
    other.put("mail", NewTask(b"y"))
    assert ready(server) == 1
    assert broker.touch(found)


def test_whoever_could_not_reserve_or_wait_knows_when_to_look_again(
    server: Beanstalkd, other: BeanstalkBroker, tmp_path: Path
) -> None:
    between = Between(server.socket, tmp_path / "between.sock")
    far = connect(f"beanstalk:{between.path}")
    try:
        other.put_many("mail", [NewTask(b"a"), NewTask(b"b")])
        (found,) = far.reserve("mail")
        between.cut_before = b"reserve-with-timeout"
        half = far.exchange([Delete(found)], {"mail": 1}, 1)  # it is told, and then the line is cut
        assert half.reserved == []
        assert half.due is not None
        assert [each.body for each in far.reserve("mail")] == [b"b"]
    finally:
        far.close()
        between.close()
    assert other.reserve("sms") == []
    server.kill()
    with pytest.raises(BrokerError):
        other.watch()
    server.start()


def test_of_many_who_wait_one_is_woken_by_a_put_and_has_it(server: Beanstalkd, other: BeanstalkBroker) -> None:
    many = [connect(server.url) for _ in range(8)]
    poll = select.poll()
    by_fd = {}
    for each in many:
        assert each.reserve("mail") == []
        by_fd[each.watch()] = each
        poll.register(each.watch(), select.POLLIN)
    for number in range(20):
        id = other.put("mail", NewTask(b"%d" % number))
        ((fd, _),) = poll.poll(PATIENCE * 1000)
        by_fd[fd].drain()
        (found,) = by_fd[fd].reserve("mail")
        assert (found.body, found.id) == (b"%d" % number, id)
        assert by_fd[fd].delete(found)
        assert by_fd[fd].reserve("mail") == []
        by_fd[fd].watch()
    assert poll.poll(0) == []
    for each in many:
        each.close()


def test_what_a_waiter_was_given_long_ago_is_no_longer_its_own(broker: BeanstalkBroker, other: BeanstalkBroker) -> None:
    assert broker.reserve("mail") == []
    fd = broker.watch()
    id = other.put("mail", NewTask(b"x"))
    assert select.select([fd], [], [], PATIENCE)[0]
    broker.drain()
    assert other.bury_task(id, "by hand")
    assert broker.reserve("mail") == []


def test_what_a_waiter_hears_of_when_others_have_done_it_is_nothing(tmp_path: Path) -> None:
    # A server sees the end of a ttr when it likes, so this one says at once what it would say of a waiter that was
    # stopped for longer than that.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "server.sock"))
        listener.listen()
        words = b"WATCHING 2\r\nWATCHING 1\r\nRESERVED 1 1\r\nx\r\nNOT_FOUND\r\n"
        peers: list[socket.socket] = []

        def answer() -> None:
            peers.append(listener.accept()[0])
            peers[0].sendall(words)

        answering = threading.Thread(target=answer)
        answering.start()
        waiter = Waiter(str(tmp_path / "server.sock"), PATIENCE)
        waiter.wait(frozenset({"mail"}))
        waiter.hear()
        assert waiter.take_given() is None
        waiter.close()
        answering.join()
        peers[0].close()


def test_the_end_of_a_ttr_is_seen_also_by_who_has_asked_right_before_it(broker: BeanstalkBroker) -> None:
    broker.put("mail", NewTask(b"x", ttr=1))
    (held,) = broker.reserve("mail")
    select.select([], [], [], 0.9)  # the server answers DEADLINE_SOON, and then forgets to look
    found = broker.exchange((), {"mail": 1}, 1)
    while not found.reserved:
        assert found.due is not None
        select.select([broker.watch()], [], [], found.due)
        broker.drain()
        found = broker.exchange((), {"mail": 1}, 1)
    assert found.reserved[0].id == held.id


def test_a_waiter_that_has_no_room_any_more_lets_go(broker: BeanstalkBroker, other: BeanstalkBroker) -> None:
    assert broker.reserve("mail") == []
    broker.watch()
    other.put_many("mail", [NewTask(b"%d" % n) for n in range(2)])
    assert len(broker.reserve("mail")) == 1  # before it has looked at what the waiter has
    assert len(other.reserve("mail", count=2)) == 1


def test_a_queue_whose_room_is_used_up_is_not_waited_for_so_that_its_order_stays(
    broker: BeanstalkBroker, other: BeanstalkBroker
) -> None:
    other.put_many("mail", [NewTask(b"%d" % n) for n in range(3)])
    found = broker.exchange((), {"mail": 1, "sms": 5}, 5).reserved
    assert [each.body for each in found] == [b"0"]
    fd = broker.watch()
    other.put("sms", NewTask(b"sms"))
    assert select.select([fd], [], [], PATIENCE)[0]
    broker.drain()
    assert other.peek_state("mail", State.DELAYED) == []
    found = broker.exchange((), {"mail": 0, "sms": 5}, 5).reserved
    assert [each.body for each in found] == [b"sms"]
    assert [each.body for each in broker.reserve("mail", count=2)] == [b"1", b"2"]


def test_what_the_server_gives_by_its_own_clock_wakes_who_waits(broker: BeanstalkBroker) -> None:
    broker.put("mail", NewTask(b"x", delay=2))
    assert broker.exchange((), {"mail": 1}, 1).due is None
    assert select.select([broker.watch()], [], [], PATIENCE)[0]
    broker.drain()
    assert len(broker.reserve("mail")) == 1


def test_what_was_to_be_ready_soon_at_a_server_that_is_killed_is_no_hurry(
    pair: tuple[Beanstalkd, Beanstalkd], both: BeanstalkBroker
) -> None:
    both.put("mail", NewTask(b"x"))
    (found,) = both.reserve("mail")
    assert both.release(found, 0.9)
    instance = found.id.partition("-")[2]
    server = next(each for each in pair if instance.encode() in each.command(b"stats"))
    server.kill()
    until, looks = time.monotonic() + 1, 0
    while time.monotonic() < until:
        due = both.exchange((), {"mail": 1}, 1).due  # when it is tried again whether the server can be reached
        assert due is not None
        looks += 1
        select.select([], [], [], due)
    assert looks < 9
    server.start()
    while not (again := both.reserve("mail")):
        select.select([], [], [], 0.1)
    assert again[0].body == b"x"


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(broker: BeanstalkBroker) -> None:
    with pytest.raises(BrokerError, match=r"65536 bytes; beanstalkd at .* takes up to 65535"):
        broker.put_many("mail", [NewTask(b"x"), NewTask(b"x" * 65536)])
    assert broker.stats() == []
    broker.put("mail", NewTask(b"x" * 65535))
    assert len(broker.reserve("mail")[0].body) == 65535


def test_a_failure_that_does_not_fit_before_its_body_is_cut_or_left_out(broker: BeanstalkBroker) -> None:
    for size in (65535, 65000, 10):
        broker.put("mail", NewTask(b"x" * size))
        (found,) = broker.reserve("mail")
        assert broker.bury(found, "ä" * 20_000)
        (task,) = broker.peek_state("mail", State.BURIED)
        assert task.body == b"x" * size
        assert (
            len(task.reason or "") == {65535: 0, 65000: len(task.reason or ""), 10: 10_000}.get(size, 0) or size == 10
        )
        assert broker.delete_task(task.id)


def test_a_history_is_a_line_before_the_body_and_gives_it_back_byte_for_byte() -> None:
    body = bytes(range(256))
    for reason in (None, "", "no\nroute", "ä" * 100, "\U0001f642" * 100):
        data = wrap(body, History(3, reason, "17-abcdef01"), 10_000)
        assert data is not None
        assert unwrap(data) == (body, History(3, reason, "17-abcdef01"))
        assert data.count(b"\n") == body.count(b"\n") + 1
    for most in range(360, 1000, 7):
        data = wrap(body, History(1, "\U0001f642" * 1000, "1-1"), most)
        assert data is not None
        assert most - 12 < len(data) <= most
        assert unwrap(data)[0] == body
    assert wrap(body, History(1, "x", None), 256) is None
    for strange in (
        data,
        b"daemonkit/1 [1]\nx",
        b'daemonkit/1 {"failures": "1"}\nx',
        b"daemonkit/1 \xff\nx",
        b"daemonkit/1 ",
    ):
        assert strange is not None
        assert unwrap(plain(strange)) == (strange, History())
    assert plain(body) == body


def test_a_body_that_looks_like_a_history_is_none(broker: BeanstalkBroker) -> None:
    body = wrap(b"evil", History(99, "not true", None), 1000)
    assert body is not None
    broker.put("mail", NewTask(body))
    (found,) = broker.reserve("mail")
    assert (found.body, found.failures) == (body, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 30_000,
        b'{"failures": %s, "reason": null, "was": null}' % (b"9" * 4300),
        b'{"failures": -1, "reason": null, "was": null}',
        b'{"failures": 1, "reason": null, "was": "\\u001b[2J"}',
    ],
)
def test_a_history_that_somebody_has_made_up_is_none(server: Beanstalkd, broker: BeanstalkBroker, line: bytes) -> None:
    body = b"daemonkit/1 " + line + b"\nx"
    server.command(b"use mail", b"put 0 0 60 %d\r\n%s" % (len(body), body))
    (task,) = broker.peek_state("mail", State.READY)
    (found,) = broker.reserve("mail")
    assert (task.body, found.body, found.failures, str(found)) == (body, body, 0, f"task {found.id} of mail")


def test_failures_are_counted_also_where_nothing_more_can_be_put(server: Beanstalkd, broker: BeanstalkBroker) -> None:
    broker.put("mail", NewTask(b"x"))
    server.signal(signal.SIGUSR1)
    for failures in range(3):
        (found,) = broker.reserve("mail")
        assert found.failures == failures
        assert broker.release(found, reason="no route")


def test_what_a_restart_has_given_back_is_told_at_once(server: Beanstalkd, broker: BeanstalkBroker) -> None:
    broker.put_many("mail", [NewTask(b"1"), NewTask(b"2")])
    held = broker.reserve("mail", count=1)
    server.kill()
    with pytest.raises(BrokerError):
        broker.exchange((), {"mail": 1}, 1)
    server.start()
    found = broker.exchange((), {"mail": 2}, 2)
    assert found.lost == held
    assert [each.body for each in found.reserved] == [b"1", b"2"]


def test_a_server_that_hangs_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with beanstalkd(tmp_path / "one") as one, beanstalkd(tmp_path / "two") as two:  # which wait for no disk
        both = BeanstalkBroker("beanstalk://one,two", [str(one.socket), str(two.socket)])
        for n in range(4):
            both.put("mail", NewTask(b"%d" % n))
        one.signal(signal.SIGSTOP)
        try:
            found = both.exchange((), {"mail": 4}, 4)
        finally:
            one.signal(signal.SIGCONT)
        assert len(found.reserved) == 2
        assert f"{one.socket}: no reply within 3 s" in (found.trouble or "")
        assert both.exchange([Delete(each) for each in found.reserved], {}, 0).lost == []
        both.close()


def test_a_put_that_a_signal_handler_ends_leaves_no_reply_for_the_next(
    server: Beanstalkd, broker: BeanstalkBroker
) -> None:
    class Up(Exception):
        pass

    def end(number: int, frame: object) -> None:
        raise Up

    broker.put("mail", NewTask(b"1"))
    before = signal.signal(signal.SIGALRM, end)
    server.signal(signal.SIGSTOP)
    go_on = threading.Timer(0.3, server.signal, (signal.SIGCONT,))
    try:
        with pytest.raises(Up):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            broker.put("mail", NewTask(b"2"))
        go_on.start()
        id = broker.put("mail", NewTask(b"3"))
    finally:
        signal.signal(signal.SIGALRM, before)
        server.signal(signal.SIGCONT)
        go_on.cancel()
    task = broker.peek(id)
    assert task is not None
    assert task.body == b"3"


def test_keys_and_results_are_refused_with_the_reason(broker: BeanstalkBroker) -> None:
    with pytest.raises(UsageError, match="beanstalkd keeps no keys"):
        broker.put("mail", NewTask(b"", key="order 7"))
    with pytest.raises(UsageError, match="beanstalkd keeps no results; sqlite: and redis: do"):
        broker.result("1-abcdef01")


def test_how_many_watch_a_queue_is_all_that_is_told_of_consumers(
    broker: BeanstalkBroker, other: BeanstalkBroker
) -> None:
    broker.announce(["mail", "sms"], 5)
    assert sorted((each.owner, each.queues, each.concurrency) for each in other.consumers()) == [
        ("on 1 connection(s)", ("mail",), None),
        ("on 1 connection(s)", ("sms",), None),
    ]


def test_where_the_disk_is_full_puts_are_refused_and_all_else_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("needs to be allowed to mount")
    try:
        with beanstalkd(tmp_path, "-b", str(disk), "-f", "0", "-s", "16384") as server:
            broker = connect(server.url)
            put = 0
            with pytest.raises(BrokerFull, match="it has no room"):
                while True:
                    broker.put("mail", NewTask(os.urandom(1000)))
                    put += 1
            assert put > 10
            assert ready(server) == put
            found = broker.reserve("mail", count=put)
            assert broker.exchange([Delete(each) for each in found], {}, 0).lost == []
            broker.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
