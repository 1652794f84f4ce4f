"""The control socket, the daemon's end: one JSON object a line, a request up, its answer down.

Only root and the daemon's own user are heard (unix(7), SO_PEERCRED).  The server never waits for a client: what
it cannot read or write now it leaves to the loop, and each client may hold only so much memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable
from typing import Final

from daemonkit.core.asking import Message, peer, short
from daemonkit.core.loop import READ, WRITE, Loop

MAX_CLIENTS: Final = 64
MAX_REQUEST: Final = 65536  # bytes
_CHUNK: Final = 65536

Answer = Callable[[Message], None]
Request = Callable[[Message, "Client"], None]
FileId = tuple[int, int]  # device and inode


class Client:
    """One connection, as the server sees it."""

    __slots__ = ("_fd", "_read", "_server", "_unsent", "is_waiting", "sock")

    def __init__(self, server: Server, sock: socket.socket) -> None:
        """Serve ``sock``."""
        self._server = server
        self._read = bytearray()
        self._unsent = memoryview(b"")
        self._fd = -1  # a descriptor that came with a request
        self.sock = sock
        self.is_waiting = False  # a request is being worked on; the next is read after its answer

    def answer(self, message: Message) -> None:
        """Send ``message``, now or as the client reads."""
        self.is_waiting = False
        self._unsent = memoryview(json.dumps(message).encode() + b"\n")
        self._send()

    def take_fd(self) -> int:
        """The descriptor that came with the request, the caller's from now on; -1: none did."""
        fd, self._fd = self._fd, -1
        return fd

    def close_fd(self) -> None:
        """Close a descriptor that nobody has asked for."""
        if (fd := self.take_fd()) >= 0:
            os.close(fd)

    def ready(self, events: int) -> None:
        """The loop's callback."""
        if self._unsent:
            self._send()
            self._next_request()  # what came together with the one that is answered now
        else:
            self._receive()

    def _receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _CHUNK, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        for fd in fds:
            self.close_fd()
            self._fd = fd
        if not data or len(self._read) + len(data) > MAX_REQUEST:
            self._server.drop(self)
            return
        self._read += data
        self._next_request()

    def _next_request(self) -> None:
        while b"\n" in self._read and not self.is_waiting and not self._unsent and self.sock.fileno() >= 0:
            line, _, rest = bytes(self._read).partition(b"\n")
            self._read = bytearray(rest)
            self.is_waiting = True
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if isinstance(message, dict) and isinstance(message.get("do"), str):
                self._server.serve(message, self)
            else:
                self.answer({"ok": False, "error": 'a request is one JSON object a line, with "do"'})

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._server.drop(self)
            return
        self._server.wait_for(self, WRITE if self._unsent else READ)


class Server:
    """The daemon's end."""

    def __init__(self, sock: socket.socket, loop: Loop, serve: Request, file: FileId | None = None) -> None:
        """Serve the listening ``sock``, whose ``file`` this is, from ``loop``.

        ``serve(message, client)`` answers each request.
        """
        self.sock = sock
        self.file = file
        self.serve = serve
        self._loop = loop
        self._allowed = {0, os.geteuid()}
        self._clients: dict[int, Client] = {}  # in order of arrival: the first is the oldest
        self._most = max(1, min(MAX_CLIENTS, os.sysconf("SC_OPEN_MAX") // 4))  # jobs need some, too
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        sock.setblocking(False)
        loop.watch(sock.fileno(), self._accept)

    def adopt(self, fd: int) -> Client:
        """Serve a connection that an earlier image of this process had accepted."""
        client = Client(self, socket.socket(fileno=fd))
        self._add(client)
        client.is_waiting = True
        return client

    def is_reached_at(self, path: str) -> bool:
        """Whether ``path`` still names the socket that we listen at."""
        return self.file is not None and self.file == file_at(path)

    def listen_anew(self, path: str) -> None:
        """Make another socket at ``path`` and listen there; whoever waits at the old one is let in first.

        Raises:
            OSError: it cannot be made there.
        """
        sock = listen(path)
        for _ in range(MAX_CLIENTS):
            self._accept(READ)
        self._loop.unwatch(self.sock.fileno())
        self.sock.close()
        self.sock, self.file = sock, file_at(path)
        sock.setblocking(False)
        self._loop.watch(sock.fileno(), self._accept)

    def drop(self, client: Client) -> None:
        """Close a connection; the client is told nothing more."""
        fd = client.sock.fileno()
        if self._clients.pop(fd, None) is not None:
            self._loop.unwatch(fd)
            client.close_fd()
            client.sock.close()

    def wait_for(self, client: Client, events: int) -> None:
        """Wake ``client`` on ``events`` from now on."""
        self._loop.watch(client.sock.fileno(), client.ready, events)

    def close(self) -> None:
        """Stop listening and drop everybody."""
        for client in list(self._clients.values()):
            self.drop(client)
        self._loop.unwatch(self.sock.fileno())
        self.sock.close()
        os.close(self._spare)

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self.sock.accept()
        except OSError as error:
            if error.errno == errno.EMFILE:
                self._hang_up()
            return  # or it is gone again
        if peer(sock)[1] not in self._allowed:
            sock.close()
            return
        if len(self._clients) >= self._most:
            clients = self._clients.values()  # rather one that only sits there than one that waits for its answer
            self.drop(next((each for each in clients if not each.is_waiting), next(iter(clients))))
        sock.setblocking(False)
        self._add(Client(self, sock))

    def _hang_up(self) -> None:
        """Take the spare descriptor to be rid of a connection: left alone it would wake the loop again and again."""
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self.sock.accept()[0].close()
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _add(self, client: Client) -> None:
        self._clients[client.sock.fileno()] = client
        self.wait_for(client, READ)


def listen(path: str) -> socket.socket:
    """Make the control socket at ``path``, mode 0600; the caller holds the PID file, so a stale one may go.

    Raises:
        OSError: it cannot be made there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    umask = os.umask(0o177)
    try:
        with short(path) as name:
            sock.bind(name)
    finally:
        os.umask(umask)
    sock.listen(MAX_CLIENTS)
    return sock


def file_at(path: str) -> FileId | None:
    """Which file stands at ``path``; None for none."""
    try:
        there = os.lstat(path)
    except OSError:
        return None
    return there.st_dev, there.st_ino
