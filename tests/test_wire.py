"""Messages between a process and its fork server."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from forking import descriptors
from harness import PATIENCE

from daemonkit.processes.wire import INLINE, Closed, Wire, pair


@pytest.fixture
def wires() -> Iterator[tuple[Wire, Wire]]:
    """Two ends that do not block; the test fails if a descriptor is left."""
    gc.collect()  # what other tests have forgotten is not closed meanwhile
    before = descriptors()
    one, other = pair()
    one.setblocking(False)
    other.setblocking(False)
    ends = Wire(one), Wire(other)
    yield ends
    for end in ends:
        end.close()
    assert descriptors() == before


@pytest.mark.parametrize("size", [0, 1, INLINE - 1, INLINE, INLINE + 1, 3 * INLINE])
def test_a_payload_of_any_size_arrives_whole(wires: tuple[Wire, Wire], size: int) -> None:
    payload = os.urandom(size)
    wires[0].send(7, 2**64 - 1, payload)
    message = wires[1].receive()
    assert message is not None
    assert (message.kind, message.id, bytes(message.payload), message.fds) == (7, 2**64 - 1, payload, [])
    assert isinstance(message.payload, mmap.mmap) == (size > INLINE)
    assert wires[1].receive() is None


def test_a_hundred_megabytes_arrive_whole(wires: tuple[Wire, Wire]) -> None:
    payload = os.urandom(2**20) * 100
    wires[0].send(1, 1, payload)
    message = wires[1].receive()
    assert message is not None
    assert isinstance(message.payload, mmap.mmap)
    assert message.payload[:] == payload


@pytest.mark.parametrize(("size", "most"), [(0, 253), (INLINE + 1, 252)])
def test_as_many_descriptors_as_the_kernel_takes_and_no_more(wires: tuple[Wire, Wire], size: int, most: int) -> None:
    with open(os.devnull) as null:
        wires[0].send(1, 1, bytes(size), [null.fileno()] * most)
        with pytest.raises(ValueError, match=f"the kernel takes {most}"):
            wires[0].send(1, 2, bytes(size), [null.fileno()] * (most + 1))
        wires[0].send(1, 3)
    message, after = wires[1].receive(), wires[1].receive()
    assert message is not None
    assert after is not None
    assert len(message.fds) == most
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    assert after.id == 3
    for fd in message.fds:
        os.close(fd)


def test_what_the_socket_will_not_take_is_kept_in_order_and_its_descriptors_too(wires: tuple[Wire, Wire]) -> None:
    reader, writer = os.pipe()
    count = 0
    while not wires[0].is_waiting:
        count += 1
        wires[0].send(1, count, bytes(1000))
    wires[0].send(2, count + 1, b"with a descriptor", [writer])
    wires[0].send(2, count + 2, bytes(INLINE + 1), [writer])
    wires[0].send(2, count + 3, b"last")
    os.close(writer)  # the sender's own may be closed at once
    got = []
    while wires[0].is_waiting:
        while (message := wires[1].receive()) is not None:
            got.append(message)
        assert select.select([], [wires[0].fileno()], [], PATIENCE)[1]
        wires[0].flush()
    while (message := wires[1].receive()) is not None:
        got.append(message)
    assert [message.id for message in got] == list(range(1, count + 4))
    for message in got[-3:-1]:
        (fd,) = message.fds
        os.write(fd, b".")
        os.close(fd)
    assert os.read(reader, 10) == b".."
    assert os.read(reader, 10) == b""  # nobody has kept a copy
    os.close(reader)


def test_closing_drops_what_waits_and_its_descriptors(wires: tuple[Wire, Wire]) -> None:
    reader, writer = os.pipe()
    while not wires[0].is_waiting:
        wires[0].send(1, 1, bytes(INLINE))
    wires[0].send(1, 2, b"", [writer])
    os.close(writer)
    wires[0].close()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_what_was_sent_before_the_end_is_received_though_ours_was_not_read(wires: tuple[Wire, Wire]) -> None:
    """The kernel says ECONNRESET first in that case (unix(7)); it must not hide the last words."""
    wires[0].send(1, 1, b"never read")
    wires[1].send(2, 2, b"last words")
    wires[1].close()
    message = wires[0].receive()
    assert message is not None
    assert message.payload == b"last words"
    for _ in range(2):
        with pytest.raises(Closed):
            wires[0].receive()


def test_sending_to_nobody_is_an_error_and_leaks_nothing(wires: tuple[Wire, Wire]) -> None:
    wires[1].close()
    with open(os.devnull) as null:
        for payload in (b"", bytes(INLINE + 1)):
            for fds in ([], [null.fileno()]):
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    wires[0].send(1, 1, payload, fds)
    assert not wires[0].is_waiting


def test_a_descriptor_that_is_none_is_refused_and_what_follows_goes_on(wires: tuple[Wire, Wire]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        wires[0].send(1, 1, b"", [9999])
    wires[0].send(1, 2)
    message = wires[1].receive()
    assert message is not None
    assert message.id == 2


_NO_ROOM = """
import os, resource, socket, sys
from daemonkit.processes.wire import INLINE, DescriptorsLost, Wire, pair
ours, theirs = map(Wire, pair())
theirs.send(3, 41, b"two", [1, 1])
theirs.send(3, 42, bytes(INLINE + 1))
theirs.send(3, 43, b"fine")
room = os.open(os.devnull, os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (room + 1, room + 1))
for number in (41, 42):
    try:
        ours.receive()
    except DescriptorsLost as lost:
        assert (lost.kind, lost.id) == (3, number), (lost.kind, lost.id)
        assert f"message {number}: too many open files" in str(lost), lost
    else:
        raise SystemExit("not noticed")
assert ours.receive().payload == b"fine"
os.close(room)
assert os.open(os.devnull, os.O_RDONLY) == room, "a descriptor was leaked"
"""


def test_a_message_whose_descriptors_find_no_room_is_told_as_lost() -> None:
    subprocess.run([sys.executable, "-c", _NO_ROOM], check=True, timeout=PATIENCE)


_WRITER = """
import socket, sys
from daemonkit.processes.wire import Wire
wire = Wire(socket.socket(fileno=int(sys.argv[1])))
for number in range(300):
    wire.send(1, number, sys.argv[2].encode() * (number * 7))
"""


def test_many_writers_into_one_end_mix_no_messages() -> None:
    ours, theirs = pair()
    names = "abcdef"
    command = [sys.executable, "-c", _WRITER, str(theirs.fileno())]
    writers = [subprocess.Popen([*command, name], pass_fds=[theirs.fileno()]) for name in names]
    theirs.close()
    wire = Wire(ours)
    seen = dict.fromkeys(names.encode(), 0)
    zeros = 0
    with pytest.raises(Closed):
        while (message := wire.receive()) is not None:
            payload = bytes(message.payload)
            assert len(payload) == message.id * 7
            assert len(set(payload)) <= 1
            if payload:
                seen[payload[0]] += 1
            else:
                zeros += 1
    wire.close()
    for writer in writers:
        assert writer.wait(PATIENCE) == 0
    assert zeros == len(names)
    assert set(seen.values()) == {299}


def test_a_socket_that_blocks_can_be_asked_not_to() -> None:
    ours, theirs = pair()
    wire = Wire(ours)
    assert wire.receive(socket.MSG_DONTWAIT) is None
    wire.close()
    theirs.close()


def test_the_ends_are_not_inherited_by_programs() -> None:
    for end in pair():
        assert not os.get_inheritable(end.fileno())
        end.close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300  # or the test of 253 means nothing
