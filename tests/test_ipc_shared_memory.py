"""shared_memory: bytes that several processes see, attached as long as somebody looks."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from ipc_peers import Objects

from daemonkit import ipc
from daemonkit.errors import NoSuchObject, UsageError


def attached() -> int:
    """How many System V segments this process has in its memory."""
    return Path("/proc/self/maps").read_text().count("/SYSV")


def test_memory_begins_with_zeros_and_is_seen_by_others(objects: Objects) -> None:
    memory = ipc.SharedMemory(objects.name, 1000)
    assert (memory.size, len(memory), memory.is_new) == (1000, 1000, True)
    assert memory[0:1000] == bytes(1000)
    memory[10:15] = b"hello"
    struct.pack_into("=q", memory.buf, 100, -7)
    said = objects.run("""
        import struct
        memory = ipc.SharedMemory.attach(name)
        say(memory[10:15])
        say(struct.unpack_from("=q", memory.buf, 100))
        memory[10:15] = b"world"
    """)
    assert said.splitlines() == ["b'hello'", "(-7,)"]
    assert bytes(memory.buf[10:15]) == b"world"
    memory.close()
    memory.remove()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="__buffer__ is Python 3.12's")
def test_it_is_bytes_like_itself(objects: Objects) -> None:
    with ipc.SharedMemory(None, 8) as memory:
        memory[0:3] = b"abc"
        assert bytes(memory) == b"abc" + bytes(5)
        memory.remove()


def test_a_child_inherits_it(objects: Objects) -> None:
    said = objects.run("""
        with ipc.SharedMemory(None, 10) as memory:
            pid = os.fork()
            if pid == 0:
                memory[0:5] = b"child"
                os._exit(0)
            os.waitpid(pid, 0)
            say(memory[0:5])
            memory.remove()
    """)
    assert said == "b'child'\n"


def test_it_is_detached_with_the_last_view(objects: Objects) -> None:
    before = attached()
    memory = ipc.SharedMemory(None, 100)
    view = memory.buf[0:3]
    assert attached() == before + 1
    memory.close()
    assert attached() == before + 1
    view[:] = b"abc"  # still there: no crash
    del view
    assert attached() == before
    with pytest.raises(ValueError, match="released"):
        _ = memory.size
    memory.close()
    memory.remove()


def test_it_is_detached_after_a_buffer_of_it_was_used(objects: Objects) -> None:
    before = attached()
    memory = ipc.SharedMemory(None, 100)
    user = memoryview(memory.buf)
    memory.close()
    assert user[0] == 0
    del user
    assert attached() == before
    memory.remove()


def test_what_was_removed_can_be_used_until_it_is_closed(objects: Objects) -> None:
    with ipc.SharedMemory(objects.name, 10) as memory:
        memory.remove()
        with pytest.raises(NoSuchObject, match="there is none with this key"):
            ipc.SharedMemory.attach(objects.name)
        memory[0:1] = b"x"
        with ipc.SharedMemory(objects.name, 10) as other:
            assert (other.is_new, other[0:1]) == (True, b"\0")
            other.remove()


def test_readonly_memory_refuses_writes_with_an_error_and_not_with_a_crash(objects: Objects) -> None:
    memory = ipc.SharedMemory(objects.name, 10)
    memory[0:1] = b"x"
    with ipc.SharedMemory.attach(objects.name, readonly=True) as reader:
        assert reader[0:1] == b"x"
        with pytest.raises(TypeError, match="read-only"):
            reader[0:1] = b"y"
    memory.close()
    memory.remove()


def test_what_is_there_may_be_larger_but_not_smaller(objects: Objects) -> None:
    memory = ipc.SharedMemory(objects.name, 100)
    with ipc.SharedMemory(objects.name, 50) as same:
        assert same.size == 100
    with pytest.raises(UsageError, match="with 101 bytes: the one that is there has less"):
        ipc.SharedMemory(objects.name, 101)
    memory.close()
    memory.remove()


@pytest.mark.parametrize("size", [0, -1, 1.5, "1", 2**63, 2**64 + 5])
def test_a_size_that_cannot_be_meant_is_refused(objects: Objects, size: int) -> None:
    with pytest.raises(UsageError, match="use 1 to "):
        ipc.SharedMemory(objects.name, size)


def test_more_than_there_is_is_an_error(objects: Objects) -> None:
    with pytest.raises(OSError, match="make memory"):
        ipc.SharedMemory(None, 2**62)


def test_slices_have_their_size(objects: Objects) -> None:
    with ipc.SharedMemory(None, 10) as memory:
        with pytest.raises(ValueError, match="different structures"):
            memory[0:3] = b"four"
        memory.remove()


def test_memory_that_was_closed_cannot_be_read_as_empty() -> None:
    memory = ipc.SharedMemory(None, 16)
    memory.remove()
    memory.close()
    memory.close()
    for use in (lambda: memory[0:1], lambda: len(memory), lambda: memory.__setitem__(slice(0, 1), b"x")):
        with pytest.raises(ValueError, match="released"):
            use()
