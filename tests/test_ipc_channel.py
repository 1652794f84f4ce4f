"""channel: whole messages of any size, the end as an event, several writers and readers."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ipc_peers import Objects

from daemonkit import ipc
from daemonkit.errors import ChannelClosed, IpcTimeout, UsageError

Pair = tuple[ipc.Channel, ipc.Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = ipc.Channel.pair()
    with one, other:
        yield one, other


@pytest.mark.parametrize("size", [0, 1, 64, 65535, 65536, 65537, 1_000_000, 50_000_000])
@pytest.mark.parametrize("timeout", [None, 20])
def test_a_message_of_any_size_arrives_whole(pair: Pair, size: int, timeout: float | None) -> None:
    message = os.urandom(min(size, 4096)) * (size // 4096 + 1)
    message = message[:size]
    pair[0].send(message, timeout)
    assert pair[1].receive(timeout) == message
    pair[1].send(message, timeout)
    assert pair[0].receive(timeout) == message


def test_messages_are_not_joined(pair: Pair) -> None:
    for message in (b"a", b"", b"bc"):
        pair[0].send(message)
    assert [pair[1].receive() for _ in range(3)] == [b"a", b"", b"bc"]


def test_bytes_of_any_kind_are_a_message_and_nothing_else_is(pair: Pair) -> None:
    for message in (bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("H")):
        pair[0].send(message)
        assert pair[1].receive() == b"abcd"
    for wrong in ("abc", 5, None):
        with pytest.raises(TypeError):
            pair[0].send(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0.0, 0.2])
def test_a_wait_ends_at_its_time_out(pair: Pair, timeout: float) -> None:
    began = time.monotonic()
    with pytest.raises(IpcTimeout, match="no message came in time"):
        pair[0].receive(timeout)
    assert timeout <= time.monotonic() - began < timeout + 5
    with pytest.raises(IpcTimeout, match="there was no room in time"):
        while True:
            pair[0].send(b"x" * 10_000, timeout)
    assert pair[1].receive() == b"x" * 10_000


def test_the_end_is_an_event_after_the_last_message(pair: Pair) -> None:
    one, other = pair
    one.send(b"last")
    one.close()
    assert select.select([other], [], [], 20)[0]
    assert list(other) == [b"last"]
    assert select.select([other], [], [], 20)[0]
    for timeout in (None, 0, 5):
        with pytest.raises(ChannelClosed, match="its other end is closed"):
            other.receive(timeout)
        with pytest.raises(ChannelClosed):
            other.send(b"", timeout)
        with pytest.raises(ChannelClosed):
            other.send(b"x" * 100_000, timeout)


@pytest.mark.parametrize("timeout", [None, 20])
def test_nothing_is_lost_if_the_other_side_ends_with_messages_unread(pair: Pair, timeout: float | None) -> None:
    one, other = pair
    other.send(b"never read")
    one.send(b"first")
    one.send(b"x" * 100_000)
    one.close()
    assert other.receive(timeout) == b"first"
    assert other.receive(timeout) == b"x" * 100_000
    with pytest.raises(ChannelClosed):
        other.receive(timeout)


def test_the_end_comes_when_the_last_child_is_killed(objects: Objects) -> None:
    said = objects.run("""
        ours, theirs = ipc.Channel.pair()
        pids = []
        for number in range(3):
            pid = os.fork()
            if pid == 0:
                ours.close()
                theirs.send(b"%d" % number)
                signal.pause()
            pids.append(pid)
        theirs.close()
        say(sorted(ours.receive(20) for _ in pids))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        try:
            ours.receive(20)
        except ChannelClosed:
            say("end")
        for pid in pids:
            os.waitpid(pid, 0)
    """)
    assert said.splitlines() == ["[b'0', b'1', b'2']", "end"]


def test_five_writers_and_three_readers_share_a_channel_and_every_message_stays_whole(objects: Objects) -> None:
    said = objects.run("""
        ours, theirs = ipc.Channel.pair()
        results, sink = ipc.Channel.pair()
        def message(writer, number):
            return b"%d %d " % (writer, number) + bytes([writer]) * ((number * 997) % 90_000)
        writers, readers = [], []
        for writer in range(5):
            pid = os.fork()
            if pid == 0:
                ours.close()
                for number in range(200):
                    theirs.send(message(writer, number))
                os._exit(0)
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                theirs.close()
                results.close()
                for got in ours:
                    writer, number = map(int, got.split(b" ", 2)[:2])
                    sink.send(b"%d %d %d" % (writer, number, got == message(writer, number)))
                os._exit(0)
        ours.close()
        theirs.close()
        sink.close()
        seen = sorted(tuple(map(int, line.split())) for line in results)
        say(seen == sorted((w, n, 1) for w in range(5) for n in range(200)))
        for _ in range(8):
            assert os.wait()[1] == 0
    """)
    assert said == "True\n"


def test_a_program_that_is_executed_has_no_end_of_it(pair: Pair) -> None:
    text = f"import os; os.fstat({pair[1].fileno()})"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, close_fds=False)
    assert "Bad file descriptor" in done.stderr


def test_no_descriptor_is_left_by_large_messages(objects: Objects) -> None:
    # In a process of its own: in ours, threads that other tests have left may close theirs meanwhile.
    said = objects.run("""
        ours, theirs = ipc.Channel.pair()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            ours.send(b"x" * 100_000)
            theirs.receive()
        say(len(os.listdir("/proc/self/fd")) - before)
    """)
    assert said == "0\n"


def test_a_large_message_without_a_descriptor_for_it_is_an_error_and_the_next_one_arrives(
    objects: Objects,
) -> None:
    said = objects.run("""
        import resource
        ours, theirs = ipc.Channel.pair()
        theirs.send(b"x" * 100_000)
        theirs.send(b"next")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, limit[1]))
        try:
            ours.receive()
        except IpcError as error:
            say(error)
        say(ours.receive())
    """)
    assert said.splitlines() == [
        "receive over a channel: too many open files here, a large message is lost; see ulimit -n",
        "b'next'",
    ]


def test_a_channel_whose_socket_does_not_block_waits_all_the_same(pair: Pair) -> None:
    os.set_blocking(pair[0].fileno(), False)
    writer = threading.Thread(target=pair[1].send, args=(b"late",))
    writer.start()
    assert pair[0].receive() == b"late"
    writer.join(20)
    reader = threading.Thread(target=lambda: [pair[1].receive() for _ in range(500)])
    reader.start()
    for _ in range(500):
        pair[0].send(b"x" * 5000)
    reader.join(20)
    assert not reader.is_alive()


@pytest.mark.parametrize("timeout", ["1s", -1, float("nan")])
def test_a_timeout_that_is_no_number_of_seconds_is_wrong_use(pair: Pair, timeout: Any) -> None:
    with pytest.raises(UsageError, match="use 0 or more, or None"):
        pair[0].receive(timeout)
