"""What is Redis's own: lists that others push, a full memory, a server that goes and comes, lost replies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import Between, RedisServer, redis_server
from harness import PATIENCE
from ports import free_ports

from daemonkit.errors import BrokerError, BrokerFull, UsageError
from daemonkit.queue.broker import Bury, Delete, NewTask, Release, State
from daemonkit.queue.connect import connect
from daemonkit.queue.redisbroker import RedisBroker


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path, "--save", "", "--appendonly", "yes", "--appendfsync", "always") as made:
        yield made


@pytest.fixture
def broker(server: RedisServer) -> Iterator[RedisBroker]:
    made = RedisBroker(server.url)
    yield made
    made.close()


def test_a_list_that_others_push_is_taken_in_order_and_byte_for_byte(server: RedisServer, broker: RedisBroker) -> None:
    for body in ('{"n": 9007199254740993}', "first", "second"):
        server.command("LPUSH", "mail", body)
    found = broker.exchange((), {"mail": 10}, 10).reserved
    assert [each.body for each in found] == [b'{"n": 9007199254740993}', b"first", b"second"]
    assert server.command("EXISTS", "mail") == b":0\r\n"
    assert [(each.queue, each.reserved) for each in broker.stats()] == [("mail", 3)]
    assert broker.exchange([Delete(found[0]), Bury(found[1], "no"), Release(found[2])], {}, 0).lost == []


def test_what_a_put_leaves_behind_for_its_repetition_is_gone_after_a_minute(
    server: RedisServer, broker: RedisBroker
) -> None:
    broker.put("mail", NewTask(b"x"))
    (found,) = broker.reserve("mail")
    assert broker.delete(found)
    keys = server.command("KEYS", "*:put:*").split(b"\r\n")
    assert len(keys) == 4  # the count, the length, the key, the end
    assert 0 < int(server.command("TTL", keys[2].decode()).strip(b":\r\n")) <= 60


def test_who_waits_is_woken_by_a_push_of_others_onto_one_of_its_lists(server: RedisServer, broker: RedisBroker) -> None:
    broker.announce(["mail", "mailing", "sms"], 1)
    fd = broker.watch()
    assert broker.reserve("mail", "sms") == []
    server.command("LPUSH", "other", "not ours")
    server.command("LPUSH", "sms", "ours")
    assert select.select([fd], [], [], PATIENCE)[0]
    broker.drain()
    assert [each.body for each in broker.reserve("mail", "sms")] == [b"ours"]


def test_who_waits_is_woken_when_the_server_closes_one_of_its_connections_and_connects_again(
    server: RedisServer, broker: RedisBroker
) -> None:
    """A server's ``timeout`` does so, and spares the one that hears of changes."""
    broker.announce(["mail"], 1)
    assert broker.reserve("mail") == []
    fd = broker.watch()
    broker.drain()
    server.command("CLIENT", "KILL", "TYPE", "normal")
    assert select.select([fd], [], [], PATIENCE)[0]
    broker.drain()
    fd = broker.watch()
    assert broker.reserve("mail") == []
    with contextlib.closing(RedisBroker(server.url)) as other:
        other.put("mail", NewTask(b"x"))
    assert select.select([fd], [], [], PATIENCE)[0]
    broker.drain()
    assert [each.body for each in broker.reserve("mail")] == [b"x"]


def test_what_is_put_between_a_look_and_the_wait_after_it_ends_that(server: RedisServer, broker: RedisBroker) -> None:
    broker.announce(["mail"], 1)
    assert broker.reserve("mail") == []
    with contextlib.closing(RedisBroker(server.url)) as other:
        other.put("mail", NewTask(b"x"))
    assert select.select([broker.watch()], [], [], PATIENCE)[0]


def test_a_key_of_another_kind_under_a_queues_name_is_left_alone(server: RedisServer, broker: RedisBroker) -> None:
    server.command("SET", "mail", "somebody's")
    broker.put("mail", NewTask(b"ours"))
    assert [each.body for each in broker.reserve("mail")] == [b"ours"]
    assert server.command("GET", "mail").endswith(b"somebody's\r\n")


def test_a_put_that_cannot_be_done_for_a_key_of_another_kind_is_refused_each_time(
    server: RedisServer, broker: RedisBroker
) -> None:
    server.command("SET", "{daemonkit}:ready:mail", "somebody's")
    for _ in range(2):
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            broker.put("mail", NewTask(b"x", key="once"))
    server.command("DEL", "{daemonkit}:ready:mail")
    broker.put("mail", NewTask(b"x", key="once"))
    broker.put("mail", NewTask(b"x", key="once"))
    assert [each.body for each in broker.reserve("mail", count=2)] == [b"x"]


@pytest.mark.skipif(shutil.which("php") is None, reason="needs php (Debian: php-cli, php-redis)")
def test_what_php_pushes_is_taken(server: RedisServer, broker: RedisBroker) -> None:
    program = f"""
    $redis = new Redis(); $redis->connect("{server.socket}");
    $redis->lPush("mail", json_encode(["worker" => "mail", "class" => "send", "params" => ["to" => "ä@b.c"]]));
    """
    done = subprocess.run(["php", "-r", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    (found,) = broker.reserve("mail")
    assert json.loads(found.body) == {"worker": "mail", "class": "send", "params": {"to": "ä@b.c"}}


def test_with_a_full_memory_puts_are_refused_and_all_else_goes_on(server: RedisServer, broker: RedisBroker) -> None:
    broker.put_many("mail", [NewTask(b"x" * 1000) for _ in range(50)])
    server.command("LPUSH", "mail", "of others")
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(BrokerFull, match="its memory is full"):
        broker.put("mail", NewTask(b"one more"))
    assert broker.stores() == broker.stores()
    broker.pause("mail", 60, "full")
    assert broker.reserve("mail", count=51) == []
    broker.pause("mail", 0)
    broker.announce(["mail"], 3)  # a consumer may begin now: who else would make room?
    assert [(each.queues, each.concurrency) for each in broker.consumers()] == [(("mail",), 3)]
    found = broker.reserve("mail", count=51)
    assert len(found) == 51
    assert broker.touch(found[0])
    assert (
        broker.exchange([Release(found[0], reason="again"), Bury(found[1], "no"), Delete(found[2])], {}, 0).lost == []
    )
    assert broker.kick("mail", 1) == 1
    assert len(broker.reserve("mail", count=2)) == 2
    assert broker.exchange([Delete(each) for each in found[3:]], {}, 0).lost == []


def test_what_was_accepted_is_there_after_a_kill_9_of_the_server_and_we_connect_again(
    server: RedisServer, broker: RedisBroker
) -> None:
    ids = broker.put_many("mail", [NewTask(b"%d" % n) for n in range(10)])
    held = broker.reserve("mail", count=3)
    broker.watch()
    server.kill()
    with pytest.raises(BrokerError, match="is the server running"):
        broker.delete(held[0])
    server.start()
    assert broker.exchange([Delete(held[0])], {"mail": 7}, 7).lost == []
    assert [task.id for task in broker.peek_state("mail", State.RESERVED, 99)] == ids[1:]
    server.command("LPUSH", "x", "y")
    assert broker.watch() >= 0


def test_what_comes_of_a_task_that_the_server_has_forgotten_is_not_taken_for_anothers(
    server: RedisServer, broker: RedisBroker
) -> None:
    future = "4000000000000000"  # microseconds: ids go on from there
    server.command("SET", "{daemonkit}:ids", future)
    broker.put("mail", NewTask(b"forgotten"))
    (old,) = broker.reserve("mail")
    server.command("FLUSHALL")
    server.command("SET", "{daemonkit}:ids", future)
    broker.put("mail", NewTask(b"new"))
    (new,) = broker.reserve("mail")
    assert (new.id, new.token > old.token) == (old.id, True)
    assert not broker.delete(old)
    assert broker.delete(new)


def test_who_asks_for_a_task_that_the_server_has_forgotten_is_not_told_of_another(
    server: RedisServer, broker: RedisBroker
) -> None:
    forgotten = broker.put_many("mail", [NewTask(b"forgotten")] * 3)
    server.command("FLUSHALL")
    broker.put_many("mail", [NewTask(b"new")] * 3)
    for each in broker.reserve("mail", count=3):
        assert broker.exchange([Delete(each, b'"of the new one"', 60)], {}, 0).lost == []
    assert [broker.result(id) for id in forgotten] == [None, None, None]
    assert [broker.peek(id) for id in forgotten] == [None, None, None]


def test_ids_grow_also_when_the_clock_goes_back(server: RedisServer, broker: RedisBroker) -> None:
    server.command("SET", "{daemonkit}:ids", "4000000000000000")  # microseconds, in the year 2096
    assert broker.put_many("mail", [NewTask(b"x")] * 2) == ["4000000000000001", "4000000000000002"]


def test_a_consumer_is_known_again_to_a_server_that_was_emptied(server: RedisServer, broker: RedisBroker) -> None:
    broker.announce(["mail"], 3)
    fd = broker.watch()
    known = broker.consumers()
    server.command("FLUSHALL")
    assert broker.consumers() == []
    assert select.select([fd], [], [], PATIENCE)[0]
    broker.drain()
    assert broker.reserve("mail") == []
    assert broker.consumers() == known
    broker.stats()  # who only looks is no consumer
    assert broker.consumers() == known


def test_tokens_grow_also_when_the_clock_goes_back(server: RedisServer, broker: RedisBroker) -> None:
    future = 4_000_000_000_000_000  # microseconds, in the year 2096
    server.command("SET", "{daemonkit}:tokens", str(future))
    broker.put_many("mail", [NewTask(b"x")] * 3)
    tokens = [each.token for each in (*broker.reserve("mail", count=2), *broker.reserve("mail"))]
    assert tokens == [future + 1, future + 2, future + 3]


def test_a_put_whose_reply_is_lost_is_one_task_and_a_lost_reservation_comes_back(
    server: RedisServer, broker: RedisBroker, tmp_path: Path
) -> None:
    between = Between(server.socket, tmp_path / "between.sock")
    far = RedisBroker(f"unix://{between.path}")
    try:
        far.put("mail", NewTask(b"first"))
        between.cut_before = b"second"
        id = far.put("mail", NewTask(b"second"))
        assert [each.ready for each in broker.stats()] == [2]
        known = far.reserve("mail")
        between.cut_before = b"it was not done within"
        with pytest.raises(BrokerError):
            far.reserve("mail")
        assert [each.reserved for each in broker.stats()] == [2]
        (again,) = far.reserve("mail")
        assert (again.id, again.failures) == (id, 0)
        assert far.delete(known[0])
        assert far.delete(again)
    finally:
        far.close()
        between.close()


def test_a_server_that_throws_tasks_away_is_refused(server: RedisServer) -> None:
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(BrokerError, match="its maxmemory-policy is allkeys-lru, which throws tasks away"):
        RedisBroker(server.url)


def test_the_doctor_tells_what_the_servers_settings_would_lose(server: RedisServer, broker: RedisBroker) -> None:
    assert "a power cut loses nothing that was accepted (appendfsync always)" in broker.doctor()
    server.command("CONFIG", "SET", "appendfsync", "everysec")
    assert any("loses the puts of the last second" in line for line in broker.doctor())
    server.command("CONFIG", "SET", "appendonly", "no")
    assert "A POWER CUT, CRASH OR RESTART OF THE SERVER LOSES ALL: set appendonly yes" in broker.doctor()


def test_a_url_that_leads_nowhere_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"reach unix://.*none\.sock: .*; is the server running\?"):
        connect(f"unix://{tmp_path}/none.sock")
    with pytest.raises(BrokerError, match=r"reach redis://127\.0\.0\.1:1/0"):
        connect("redis://127.0.0.1:1/0")
    with pytest.raises(UsageError, match="did you mean redis:"):
        connect("reddis://x")


def test_a_password_is_asked_for_and_taken(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        server.command("CONFIG", "SET", "requirepass", "secret")
        with pytest.raises(BrokerError, match="user and password"):
            connect(server.url)
        with pytest.raises(BrokerError, match="user and password") as wrong:
            connect(f"unix://:wrong@{server.socket}")
        assert "wrong" not in str(wrong.value)
        broker = connect(f"unix://:secret@{server.socket}")
        assert broker.put("mail", NewTask(b"")).isdecimal()
        assert "secret" not in broker.url
        broker.close()


def test_over_tls_the_certificate_and_its_host_name_are_looked_at(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    (port,) = free_ports(1)
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with redis_server(tmp_path, *tls, "--tls-auth-clients", "no", "--tls-ca-cert-file", str(certificate)):
        broker = connect(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}")
        broker.put("mail", NewTask(b"x"))
        assert select.select([broker.watch()], [], [], 0)[0] == []
        assert len(broker.reserve("mail")) == 1
        broker.close()
        with pytest.raises(BrokerError, match="certificate verify failed"):
            connect(f"rediss://localhost:{port}/0")
        with pytest.raises(BrokerError, match=r"certificate is not valid for '127.0.0.1'"):
            connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}")


def test_after_a_fail_over_the_sentinels_lead_to_the_new_master(tmp_path: Path) -> None:
    first, second, watch = free_ports(3)
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"""
        sentinel monitor mails 127.0.0.1 {first} 1
        sentinel down-after-milliseconds mails 300
        sentinel failover-timeout mails 2000
        """
    )
    with contextlib.ExitStack() as stack:
        for name in ("one", "two", "sentinel"):
            (tmp_path / name).mkdir()
        # An option that is given again counts instead of the first one.
        one = stack.enter_context(redis_server(tmp_path / "one", "--port", str(first), "--bind", "127.0.0.1"))
        replica = ["--port", str(second), "--bind", "127.0.0.1", "--replicaof", "127.0.0.1", str(first)]
        two = stack.enter_context(redis_server(tmp_path / "two", *replica, "--repl-diskless-sync-delay", "0"))
        options = (str(configuration), "--sentinel", "--port", str(watch), "--bind", "127.0.0.1")
        sentinel = stack.enter_context(redis_server(tmp_path / "sentinel", *options))
        before = os.listdir("/proc/self/fd")
        broker = stack.enter_context(contextlib.closing(connect(f"sentinel://127.0.0.1:{watch}/mails/0")))
        ids = broker.put_many("mail", [NewTask(b"%d" % n) for n in range(5)])
        assert len(broker.reserve("mail", count=2)) == 2
        until = time.monotonic() + PATIENCE
        while (
            b"master_link_status:up" not in two.command("INFO", "replication")
            or two.command("ZCARD", "{daemonkit}:ready:mail") != b":3\r\n"
            or b",slaves=1," not in sentinel.command("INFO", "sentinel")  # it asks the master every ten seconds
        ):
            assert time.monotonic() < until
            select.select([], [], [], 0.05)
        one.kill()
        until = time.monotonic() + PATIENCE
        while True:
            try:
                found = broker.reserve("mail", count=9)
                break
            except BrokerError:
                assert time.monotonic() < until
                select.select([], [], [], 0.05)
        assert [each.id for each in found] == ids[2:]
        assert b"role:master" in two.command("INFO", "replication")
        broker.close()
        assert os.listdir("/proc/self/fd") == before
        one.start()  # the fixture ends it
