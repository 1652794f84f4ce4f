"""A channel: whole messages of bytes, of any size, both ways between a process and its children.

Two SOCK_SEQPACKET sockets (unix(7)) keep the bounds of messages, so several processes may write into one end, and
several read from one, and none gets half of a message.  What is too large for one packet travels as a memfd.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Final

from daemonkit.errors import ChannelClosed, IpcError, IpcTimeout
from daemonkit.ipc.bound import Bound
from daemonkit.processes.wire import INLINE, in_memory, pair

# The first byte: without one, an empty message would be an end-of-file.
_HERE: Final = b"\0"
_IN_MEMFD: Final = b"\1"
_ANCILLARY: Final = socket.CMSG_SPACE(4)  # one descriptor
# As plain numbers: an operation on the socket module's flags costs as much as the system call.
_NO_SIGNAL: Final = int(socket.MSG_NOSIGNAL)
_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
_CLOSE_ON_EXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_MOST_POLLED: Final = 2**31 - 1  # milliseconds


class Channel:
    """One end.  ``ours, theirs = Channel.pair()`` before a fork; then each side closes the end that it does not use.

    The other side's end closes when the last process that has it closes it or ends: only then, end-of-file comes.
    """

    __slots__ = ("_socket",)

    def __init__(self, sock: socket.socket) -> None:
        """Use ``pair``."""
        self._socket = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends; a forked child has both, an executed program none."""
        one, other = pair()
        return cls(one), cls(other)

    def send(self, message: bytes | bytearray | memoryview, timeout: float | None = None) -> None:
        """Send a message, waiting for room as long as need be: whole, or not at all.

        Args:
            message: any number of bytes, none too.
            timeout: seconds to wait at most; 0 does not wait.

        Raises:
            ChannelClosed: nobody will read it.
            IpcTimeout: there was no room in that time.
        """
        if message.__class__ is not bytes:
            message = memoryview(message).cast("B")
        if timeout is None and len(message) <= INLINE:
            try:
                self._socket.send(_HERE + message, _NO_SIGNAL)
                return
            except BlockingIOError:
                pass  # somebody has made the socket non-blocking
            except (BrokenPipeError, ConnectionResetError):
                raise self._closed("send") from None
        self._send_within(message, Bound(timeout))

    def receive(self, timeout: float | None = None) -> bytes:
        """The next message, waiting for it as long as need be.

        Args:
            timeout: seconds to wait at most; 0 does not wait.

        Raises:
            ChannelClosed: the other side's end is closed, and all that it sent was received.
            IpcTimeout: nothing came in that time.
            IpcError: a large message came, and this process may open no more files.
        """
        if timeout is None:
            with contextlib.suppress(BlockingIOError):
                return self._receive(_CLOSE_ON_EXEC)
        bound = Bound(timeout)
        while True:
            with contextlib.suppress(BlockingIOError):
                return self._receive(_CLOSE_ON_EXEC | _AT_ONCE)
            self._await(select.POLLIN, bound, "receive", "no message came")

    def __iter__(self) -> Iterator[bytes]:
        """Every message until the end."""
        with contextlib.suppress(ChannelClosed):
            while True:
                yield self.receive()

    def fileno(self) -> int:
        """The descriptor, for select(2): it is readable when a message, or the end, is there."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this process' hold of this end."""
        self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _receive(self, flags: int) -> bytes:
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(INLINE + 1, _ANCILLARY, flags)
                break
            except ConnectionResetError:
                # It closed with messages of ours unread.  That is said once, before what it had sent can be read.
                continue
        if ancillary:
            return _content(struct.unpack("=i", ancillary[0][2])[0])
        if not data:
            raise self._closed("receive")
        if data[0]:
            raise IpcError("receive over a channel: too many open files here, a large message is lost; see ulimit -n")
        return data[1:]

    def _send_within(self, message: bytes | memoryview, bound: Bound) -> None:
        fds = [in_memory(message)] if len(message) > INLINE else []
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd)) for fd in fds]
        data = _IN_MEMFD if fds else _HERE + message
        try:
            while True:
                try:
                    self._socket.sendmsg([data], rights, _NO_SIGNAL | _AT_ONCE)
                    return
                except BlockingIOError:
                    self._await(select.POLLOUT, bound, "send", "there was no room")
                except (BrokenPipeError, ConnectionResetError):
                    raise self._closed("send") from None
        finally:
            for fd in fds:
                os.close(fd)

    def _await(self, event: int, bound: Bound, doing: str, why: str) -> None:
        left = bound.left()
        poll = select.poll()
        poll.register(self._socket, event)
        milliseconds = None if left is None else min(int(left * 1000 + 0.999), _MOST_POLLED)
        if not poll.poll(milliseconds) and bound.left() == 0:
            raise IpcTimeout(f"{doing} over a channel: {why} in time")

    def _closed(self, doing: str) -> ChannelClosed:
        return ChannelClosed(f"{doing} over a channel: its other end is closed")


def _content(fd: int) -> bytes:
    """All that is in a memfd, which is closed."""
    with open(fd, "rb"), mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        return memory[:]
