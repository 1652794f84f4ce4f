"""Messages between a process and its fork server: whole or not at all, of any size, with descriptors.

A pair of SOCK_SEQPACKET sockets (unix(7)) keeps the bounds of messages, so many children may write into one end and
none can leave half a message.  What is too large for that travels as a memfd (memfd_create(2)), uncopied.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

INLINE: Final = 64 * 1024  # bytes of payload in the message itself; more goes into a memfd
_HEAD: Final = struct.Struct("=BBQ")  # kind, whether the payload is in a memfd, id
_BUFFER: Final = _HEAD.size + INLINE
_MOST_FDS: Final = 253  # the kernel's SCM_MAX_FD
_ANCILLARY: Final = socket.CMSG_SPACE(_MOST_FDS * 4)
_FLAGS: Final = socket.MSG_CMSG_CLOEXEC


class Message(NamedTuple):
    """One message, as received."""

    kind: int
    id: int
    payload: bytes | mmap.mmap
    fds: list[int]


class Closed(EOFError):
    """The other end is closed."""


class Wire:
    """One end of a pair."""

    def __init__(self, sock: socket.socket) -> None:
        """Speak over ``sock``; if it does not block, what it will not take is kept until ``flush``."""
        self._sock = sock
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self.fileno = sock.fileno

    @property
    def is_waiting(self) -> bool:
        """Whether messages wait for room: call ``flush`` when the socket can be written."""
        return bool(self._waiting)

    def send(self, kind: int, number: int, payload: bytes | memoryview = b"", fds: Sequence[int] = ()) -> None:
        """Send a message, or keep it for ``flush``; the descriptors are copied (unix(7), SCM_RIGHTS).

        Raises:
            BrokenPipeError, ConnectionResetError: nobody is there.
        """
        if not fds and not self._waiting and len(payload) <= INLINE:  # the usual case
            try:
                self._sock.send(_HEAD.pack(kind, 0, number) + payload, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._waiting.append((_HEAD.pack(kind, 0, number) + payload, []))
            return
        copies = [os.dup(fd) for fd in fds]
        is_large = len(payload) > INLINE
        if is_large:
            copies.insert(0, in_memory(payload))
        data = _HEAD.pack(kind, is_large, number) + (b"" if is_large else payload)
        self._waiting.append((data, copies))
        self.flush()

    def send_memory(self, kind: int, number: int, fd: int) -> None:
        """Send a message whose payload is in the memfd ``fd``, which is closed."""
        self._waiting.append((_HEAD.pack(kind, True, number), [fd]))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        while self._waiting:
            data, fds = self._waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
            try:
                self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)

    def receive(self) -> Message | None:
        """The next message; None if there is none yet and the socket does not block.

        Raises:
            Closed: the other end is, and nothing is left.
        """
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_BUFFER, _ANCILLARY, _FLAGS)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            raise Closed from None
        if not data:
            raise Closed
        kind, is_large, number = _HEAD.unpack_from(data)
        fds = _descriptors(ancillary) if ancillary else []
        payload: bytes | mmap.mmap = data[_HEAD.size :]
        if is_large:
            payload = _mapped(fds.pop(0))
        return Message(kind, number, payload, fds)

    def close(self) -> None:
        """Close our end; what still waits is dropped."""
        for _, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()
        self._sock.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def in_memory(payload: bytes | memoryview) -> int:
    """A memfd that holds ``payload``."""
    fd = os.memfd_create("daemonkit-message", os.MFD_CLOEXEC)
    view = memoryview(payload)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _mapped(fd: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % 4
            found.extend(struct.unpack(f"={whole // 4}i", data[:whole]))
    return found
