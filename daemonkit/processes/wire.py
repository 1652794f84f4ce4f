"""Messages between a process and its fork server: whole or not at all, of any size, with descriptors.

A pair of SOCK_SEQPACKET sockets (unix(7)) keeps the bounds of messages, so many children may write into one end and
none can leave half a message.  What is too large for that travels as a memfd (memfd_create(2)), uncopied.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

INLINE: Final = 64 * 1024  # bytes of payload in the message itself; more goes into a memfd
_HEAD: Final = struct.Struct("=BBQ")  # kind, whether the payload is in a memfd, id
HEAD_SIZE: Final = _HEAD.size
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_BUFFER: Final = _HEAD.size + INLINE
_MOST_FDS: Final = 253  # the kernel's SCM_MAX_FD
_ANCILLARY: Final = socket.CMSG_SPACE(_MOST_FDS * 4)
# As plain numbers: an operation on the socket module's flags costs as much as the system call.
_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC)
_CUT: Final = int(socket.MSG_CTRUNC)
_NO_SIGNAL: Final = int(socket.MSG_NOSIGNAL)


class Message(NamedTuple):
    """One message, as received."""

    kind: int
    id: int
    payload: bytes | mmap.mmap
    fds: list[int]


class Closed(EOFError):
    """The other end is closed."""


class DescriptorsLost(OSError):
    """A message came without its descriptors, or without its large payload: there was no room for them here."""

    def __init__(self, kind: int, number: int) -> None:
        super().__init__(errno.EMFILE, f"receive message {number}: too many open files here, its descriptors are lost")
        self.kind, self.id = kind, number


class Wire:
    """One end of a pair."""

    def __init__(self, sock: socket.socket) -> None:
        """Speak over ``sock``; if it does not block, what it will not take is kept until ``flush``."""
        self._sock = sock
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self.fileno = sock.fileno

    @property
    def maker(self) -> int:
        """The PID of the process that made the pair (unix(7), SO_PEERCRED); 0: it is in another PID namespace."""
        pid: int = _CREDENTIALS.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[
            0
        ]
        return pid

    @property
    def is_waiting(self) -> bool:
        """Whether messages wait for room: call ``flush`` when the socket can be written."""
        return bool(self._waiting)

    def send(self, kind: int, number: int, payload: bytes | memoryview = b"", fds: Sequence[int] = ()) -> None:
        """Send a message, or keep it for ``flush``, without bound; the descriptors are copied (unix(7), SCM_RIGHTS).

        Raises:
            BrokenPipeError, ConnectionResetError: nobody is there.
            ValueError: more descriptors than a message can carry, 253, a large payload being one.
            OSError: EMFILE or ENOMEM; nothing was sent.
        """
        if not fds and not self._waiting and len(payload) <= INLINE:  # the usual case
            data = _HEAD.pack(kind, False, number) + payload
            try:
                self._sock.send(data, _NO_SIGNAL)
            except BlockingIOError:
                self._waiting.append((data, []))
            return
        is_large = len(payload) > INLINE
        if len(fds) + is_large > _MOST_FDS:
            raise ValueError(f"send a message with {len(fds)} descriptors: the kernel takes {_MOST_FDS - is_large}")
        if is_large:
            self.send_memory(kind, number, in_memory(payload), fds)
        else:
            self._send(_HEAD.pack(kind, False, number) + payload, fds)

    def send_memory(self, kind: int, number: int, fd: int, fds: Sequence[int] = ()) -> None:
        """Send a message whose payload is in the memfd ``fd``, which is closed."""
        try:
            self._send(_HEAD.pack(kind, True, number), (fd, *fds))
        finally:
            os.close(fd)

    def offer(self, kind: int, number: int) -> bool:
        """Send a message without payload if there is room for it now, else forget it; tell which."""
        try:
            self._sock.send(_HEAD.pack(kind, False, number), _NO_SIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        while self._waiting and self._is_sent(*self._waiting[0]):
            _close_all(self._waiting.popleft()[1])

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if self._waiting:
            self.flush()
        if self._waiting or not self._is_sent(data, fds):
            self._waiting.append((data, _copied(fds)))

    def _is_sent(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))
                self._sock.sendmsg([data], [rights], _NO_SIGNAL)
            else:
                self._sock.send(data, _NO_SIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:  # as many of the user's descriptors are on their way as may be
                raise
            return False
        return True

    def receive(self, flags: int = 0) -> Message | None:
        """The next message; None if there is none yet and the socket, or MSG_DONTWAIT in ``flags``, does not block.

        Raises:
            Closed: the other end is, and nothing is left.
            DescriptorsLost: a message came without; the next one can be received.
        """
        try:
            data, ancillary, state, _ = self._sock.recvmsg(_BUFFER, _ANCILLARY, _FLAGS | flags)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # Said once, and before what the other end had sent, if that went away with messages of ours unread.
            return self.receive(flags)
        if not data:
            raise Closed
        kind, is_large, number = _HEAD.unpack_from(data)
        fds = _descriptors(ancillary) if ancillary else []
        if state & _CUT or (is_large and not fds):
            _close_all(fds)
            raise DescriptorsLost(kind, number)
        if not is_large:
            return Message(kind, number, data[_HEAD.size :], fds)
        try:
            return Message(kind, number, _mapped(fds.pop(0)), fds)
        except OSError:
            _close_all(fds)
            raise DescriptorsLost(kind, number) from None

    def forget_waiting(self) -> None:
        """Close the descriptors of messages that wait, in a process that was just forked: they are not its to send."""
        if self._waiting:
            for _, fds in self._waiting:
                _close_all(fds)

    def close(self) -> None:
        """Close our end; what still waits is dropped."""
        for _, fds in self._waiting:
            _close_all(fds)
        self._waiting.clear()
        if (fd := self._sock.detach()) >= 0:
            os.close(fd)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def number_of(head: bytes) -> int:
    """The number of the message that begins with ``head``, ``HEAD_SIZE`` bytes."""
    number: int = _HEAD.unpack(head)[2]
    return number


def in_memory(payload: bytes | memoryview) -> int:
    """A memfd that holds ``payload``."""
    fd = os.memfd_create("daemonkit-message", os.MFD_CLOEXEC)
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
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


def _copied(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        _close_all(copies)
        raise
    return copies


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
