"""message_queue: types as priorities, bounds of time and size, several processes, and what it tells of itself."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import sysv_ipc
from ipc_peers import Objects

from daemonkit import ipc
from daemonkit.errors import IpcTimeout, MessageTooLong, NoSuchObject, UsageError

MSGMAX = int(Path("/proc/sys/kernel/msgmax").read_text())


def test_messages_come_out_in_the_order_in_which_they_went_in(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name)
    bodies = [b"", b"one", bytes(range(256)), b"x" * 5000]
    for body in bodies:
        queue.send(body)
    assert [queue.receive() for _ in bodies] == [(body, 1) for body in bodies]
    queue.remove()


def test_a_type_is_asked_for_and_the_lowest_comes_first(objects: Objects) -> None:
    queue = ipc.MessageQueue(None)
    for number in (5, 3, 9, 3):
        queue.send(b"%d" % number, number)
    assert queue.receive(9) == (b"9", 9)
    assert queue.receive(-4) == (b"3", 3)
    queue.send(b"1", 1)
    queue.send(b"most", 2**31 - 1)
    assert [queue.receive(ipc.LOWEST_FIRST)[1] for _ in range(4)] == [1, 3, 5, 2**31 - 1]
    with pytest.raises(IpcTimeout):
        queue.receive(7, timeout=0)
    queue.remove()


def test_bytes_of_any_kind_are_a_body_and_nothing_else_is(objects: Objects) -> None:
    queue = ipc.MessageQueue(None)
    for body in (bytearray(b"abc"), memoryview(b"abc")):
        queue.send(body)
        assert queue.receive() == (b"abc", 1)
    for wrong in ("abc", 5, None, ["a"]):
        with pytest.raises(TypeError, match="bytes-like"):
            queue.send(wrong)  # type: ignore[arg-type]
    queue.remove()


@pytest.mark.parametrize("kind", [0, -1, 2**31, 2**80])
@pytest.mark.parametrize("timeout", [None, 1])
def test_a_type_that_cannot_be_meant_is_refused(objects: Objects, kind: int, timeout: float | None) -> None:
    queue = ipc.MessageQueue(None)
    with pytest.raises(UsageError, match="use 1 to 2147483647"):
        queue.send(b"", kind, timeout)
    if kind > 0:
        with pytest.raises(UsageError, match="use -2147483648 to"):
            queue.receive(kind, timeout)
    queue.remove()


@pytest.mark.parametrize("timeout", [0.0, 0.01, 0.3])
def test_a_wait_for_a_message_ends_at_its_time_out(objects: Objects, timeout: float) -> None:
    queue = ipc.MessageQueue(None)
    began = time.monotonic()
    with pytest.raises(IpcTimeout, match=f"no such message came for {timeout:g} s"):
        queue.receive(timeout=timeout)
    assert timeout <= time.monotonic() - began < timeout + 5
    queue.remove()


@pytest.mark.parametrize("timeout", [0.0, 0.01, 0.3])
def test_a_wait_for_room_ends_at_its_time_out(objects: Objects, timeout: float) -> None:
    queue = ipc.MessageQueue(None, max_bytes=100)
    queue.send(b"x" * 60)
    began = time.monotonic()
    with pytest.raises(IpcTimeout, match=f"it was full for {timeout:g} s"):
        queue.send(b"x" * 60, timeout=timeout)
    assert timeout <= time.monotonic() - began < timeout + 5
    queue.remove()


def test_a_message_and_room_are_had_within_the_time_out(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name, max_bytes=100)
    other = objects.start("""
        queue = ipc.MessageQueue.attach(name)
        say("waits")
        say(queue.receive(2, timeout=25)[0])
        hear()
        say("waits")
        queue.send(b"x" * 60, 2, timeout=25)
        say("sent")
    """)
    assert other.hear() == "waits"
    queue.send(b"for you", 2)
    assert other.hear() == "b'for you'"
    queue.send(b"x" * 60)
    other.tell()
    assert other.hear() == "waits"
    assert queue.receive(1) == (b"x" * 60, 1)
    assert other.hear() == "sent"
    assert queue.receive(2, timeout=25) == (b"x" * 60, 2)
    other.end()
    queue.remove()


def test_a_message_that_never_fits_is_an_error_and_does_not_wait_for_ever(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name, max_bytes=100)
    for timeout in (None, 0, 1):
        with pytest.raises(MessageTooLong, match=r"send 101 bytes to queue 0x[0-9a-f]{8}: it takes 100 at most"):
            queue.send(b"x" * 101, timeout=timeout)
    queue.send(b"x" * 100)
    queue.remove()
    queue = ipc.MessageQueue(None)
    with pytest.raises(ValueError, match="at most; see max_bytes and /proc/sys/kernel/msgmax"):
        queue.send(b"x" * (MSGMAX + 1))
    queue.remove()


@pytest.mark.parametrize("timeout", [None, 1])
def test_a_queue_that_was_made_larger_meanwhile_takes_and_gives_larger_messages(
    objects: Objects, timeout: float | None
) -> None:
    queue = ipc.MessageQueue(None, max_bytes=100)
    reader = ipc.MessageQueue.attach(queue.key)
    sysv_ipc.MessageQueue(queue.key).max_size = 1000
    queue.send(b"x" * 500, timeout=timeout)
    assert reader.receive(timeout=timeout) == (b"x" * 500, 1)
    queue.remove()


@pytest.mark.parametrize("size", [0, -1, 1.5, 2**32, 2**32 + 100])
def test_a_size_that_cannot_be_meant_is_refused(objects: Objects, size: int) -> None:
    with pytest.raises(UsageError, match="use 1 to "):
        ipc.MessageQueue(None, max_bytes=size)


def test_the_statistics_tell_how_full_it_is_and_who_used_it(objects: Objects) -> None:
    began = int(time.time())
    queue = ipc.MessageQueue(objects.name, max_bytes=1000)
    sender = objects.start("ipc.MessageQueue.attach(name).send(b'x' * 40)")
    sender.end()
    queue.send(b"y" * 2)
    receiver = objects.start("ipc.MessageQueue.attach(name).receive()")
    receiver.end()
    found = queue.statistics()
    assert (found.messages, found.bytes, found.max_bytes, found.max_message) == (1, 2, 1000, 1000)
    assert found.last_receiver == receiver.pid
    assert began - 1 <= found.last_sent <= found.last_received <= time.time() + 1
    queue.remove()
    with pytest.raises(NoSuchObject, match="somebody has removed it"):
        queue.statistics()


def test_who_waits_learns_that_the_queue_was_removed(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name)
    waiters = [
        objects.start(f"""
            queue = ipc.MessageQueue.attach(name)
            say("waits")
            try:
                queue.receive(timeout={timeout})
            except NoSuchObject as error:
                say(error)
        """)
        for timeout in (None, 25)
    ]
    assert [waiter.hear() for waiter in waiters] == ["waits"] * 2
    queue.remove()
    for waiter in waiters:
        assert "somebody has removed it" in waiter.hear()
        waiter.end()
    in_time = (lambda: queue.receive(timeout=1), lambda: queue.send(b"", timeout=1))
    for use in (lambda: queue.send(b""), queue.receive, *in_time):
        with pytest.raises(NoSuchObject, match="somebody has removed it"):
            use()


def test_five_children_write_into_one_queue_and_nothing_is_lost_or_mixed(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name)
    writers = [
        objects.start(f"""
            queue = ipc.MessageQueue.attach(name)
            for number in range(200):
                queue.send(b"%d" % number * (number % 50 + 1), {kind})
        """)
        for kind in range(1, 6)
    ]
    found: dict[int, list[bytes]] = {kind: [] for kind in range(1, 6)}
    for _ in range(1000):
        body, kind = queue.receive(timeout=25)
        found[kind].append(body)
    for writer in writers:
        writer.end()
    assert all(found[kind] == [b"%d" % n * (n % 50 + 1) for n in range(200)] for kind in found)
    queue.remove()


def test_a_signals_handler_runs_while_waiting_and_the_wait_goes_on(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name)
    waiter = objects.start("""
        queue = ipc.MessageQueue.attach(name)
        signal.signal(signal.SIGUSR1, lambda *_: say("signal"))
        for timeout in (None, 25):
            say("waits")
            say(queue.receive(timeout=timeout))
    """)
    for _ in range(2):
        assert waiter.hear() == "waits"
        waiter.await_sleep()
        waiter.process.send_signal(signal.SIGUSR1)
        assert waiter.hear() == "signal"
        queue.send(b"on")
        assert waiter.hear() == "(b'on', 1)"
    waiter.end()
    queue.remove()


@pytest.mark.parametrize("timeout", [None, 25])
def test_what_a_signals_handler_raises_comes_through(objects: Objects, timeout: float | None) -> None:
    said = objects.run(f"""
        def alarm(*_):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TimeoutError("of the user")
        signal.signal(signal.SIGALRM, alarm)
        queue = ipc.MessageQueue(name)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 1)  # once more, if the wait was only about to begin
            queue.receive(timeout={timeout})
        except OSError as error:
            say(repr(error))
        queue.remove()
    """)
    assert said == "TimeoutError('of the user')\n"


def test_a_time_out_counts_in_every_thread_and_with_all_signals_blocked(objects: Objects) -> None:
    queue = ipc.MessageQueue(None)
    late = []

    def wait(timeout: float) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            queue.receive(timeout=timeout)
        except IpcTimeout:
            late.append(timeout)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    threads = [threading.Thread(target=wait, args=(0.01 * number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(late) == 20
    queue.remove()


def test_a_time_out_leaves_the_users_signals_and_timers_alone(objects: Objects) -> None:
    said = objects.run("""
        seen = []
        for number in (signal.SIGALRM, signal.SIGRTMAX, signal.SIGRTMAX - 1):
            signal.signal(number, lambda number, frame: seen.append(number))
        signal.setitimer(signal.ITIMER_REAL, 30)
        queue = ipc.MessageQueue(name)
        for _ in range(50):
            try:
                queue.receive(timeout=0.001)
            except IpcTimeout:
                pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 1
        os.kill(os.getpid(), signal.SIGRTMAX)
        say(seen == [signal.SIGRTMAX])
        say(signal.sigpending())
        queue.remove()
    """)
    assert said.splitlines() == ["True", "set()"]


def test_attaching_to_nothing_is_told(objects: Objects) -> None:
    with pytest.raises(NoSuchObject, match="there is none with this key"):
        ipc.MessageQueue.attach(objects.name)
