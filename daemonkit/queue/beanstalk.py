"""A connection to a beanstalkd, as its protocol.txt describes it: commands in lines, answered in their order.

Several commands go in one write, so a batch costs one round trip; and a descriptor can be waited for.  An answer that
the command cannot have ends the connection: what follows would be taken for the answer to something else.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterable
from typing import Final, NamedTuple

from daemonkit.errors import BrokerError

PORT: Final = 11300
TIMEOUT: Final = 10.0  # seconds for a connection, and for a reply
_CHUNK: Final = 65536  # bytes sent before replies are read: neither side ever waits for the other's buffers
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # seconds, probes

# protocol.txt: what may answer a command.  Anything else, BAD_FORMAT among it, is a mistake of one of us.
_ANSWERS: Final = {
    "put": {"INSERTED", "BURIED", "JOB_TOO_BIG", "DRAINING", "OUT_OF_MEMORY"},
    "use": {"USING"},
    "watch": {"WATCHING"},
    "ignore": {"WATCHING", "NOT_IGNORED"},
    "reserve": {"RESERVED", "DEADLINE_SOON", "TIMED_OUT"},
    "reserve-with-timeout": {"RESERVED", "DEADLINE_SOON", "TIMED_OUT"},
    "reserve-job": {"RESERVED", "NOT_FOUND"},
    "delete": {"DELETED", "NOT_FOUND"},
    "release": {"RELEASED", "BURIED", "NOT_FOUND", "OUT_OF_MEMORY"},
    "bury": {"BURIED", "NOT_FOUND", "OUT_OF_MEMORY"},
    "touch": {"TOUCHED", "NOT_FOUND"},
    "kick": {"KICKED", "OUT_OF_MEMORY"},
    "kick-job": {"KICKED", "NOT_FOUND", "OUT_OF_MEMORY"},
    "peek": {"FOUND", "NOT_FOUND"},
    "peek-ready": {"FOUND", "NOT_FOUND"},
    "peek-delayed": {"FOUND", "NOT_FOUND"},
    "peek-buried": {"FOUND", "NOT_FOUND"},
    "pause-tube": {"PAUSED", "NOT_FOUND"},
    "stats": {"OK"},
    "stats-job": {"OK", "NOT_FOUND"},
    "stats-tube": {"OK", "NOT_FOUND"},
    "list-tubes": {"OK"},
}
_WITH_DATA: Final = {"RESERVED", "FOUND", "OK"}


class Reply(NamedTuple):
    """What answers a command."""

    word: str
    number: int = 0  # a job's, or how many
    data: bytes = b""

    @property
    def fields(self) -> dict[str, str]:
        """The data of stats, as far as it is needed of YAML."""
        pairs = (line.partition(": ") for line in self.data.decode().splitlines())
        return {key: value.strip('"') for key, colon, value in pairs if colon}

    @property
    def names(self) -> list[str]:
        """The data of a list."""
        return [line.removeprefix("- ").strip('"') for line in self.data.decode().splitlines() if line.startswith("- ")]


class Connection:
    """What it uses and watches dies with it, on both sides."""

    def __init__(self, where: str, patience: float) -> None:
        """Connect to ``where``: HOST:PORT, or the path of a socket; wait ``patience`` seconds for it, and for a reply.

        Raises:
            BrokerError: nobody answers there.
        """
        self.where = where
        self._used = "default"
        self._watched = {"default"}
        self._pid = os.getpid()
        try:
            self._socket = _connected(where, patience)
        except OSError as error:
            raise BrokerError(f"reach beanstalkd at {where}: {error.strerror or error}; is it running?") from error
        self._reader = self._socket.makefile("rb")

    def fileno(self) -> int:
        """Readable when a reply has come."""
        return self._socket.fileno()

    def has_news(self) -> bool:
        """Whether something has come unasked: that is its end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def ask(self, commands: Iterable[bytes]) -> list[Reply]:
        """Send ``commands``, without their line ends; return the replies.

        Raises:
            BrokerError: the connection is lost, and was closed.
        """
        replies: list[Reply] = []
        waiting: list[bytes] = []
        size = 0
        for command in commands:
            if waiting and size + len(command) > _CHUNK:
                replies += self._ask(waiting)
                waiting, size = [], 0
            waiting.append(command)
            size += len(command)
        return replies + self._ask(waiting)

    def _ask(self, commands: list[bytes]) -> list[Reply]:
        if commands:
            self.send(commands)
        return [self.reply(command) for command in commands]

    def send(self, commands: list[bytes]) -> None:
        """Send ``commands``; ``reply`` is to be called for each.

        Raises:
            BrokerError: the connection is lost, and was closed.
        """
        self._check_process()
        try:
            self._socket.sendall(b"\r\n".join([*commands, b""]))
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error

    def reply(self, command: bytes) -> Reply:
        """Wait for the answer to ``command``.

        Raises:
            BrokerError: the connection is lost, or the answer is none to this command; it was closed.
        """
        self._check_process()
        try:
            line = self._reader.readline(_CHUNK)
            if not line.endswith(b"\r\n"):
                raise self._lost("it has closed the connection")
            word, *rest = line[:-2].decode("ascii", "replace").split(" ")
            if word not in _ANSWERS[command.partition(b" ")[0].decode()]:
                raise self._lost(f"it has answered {word!r} to {command[:80]!r}")
            if word not in _WITH_DATA:
                return Reply(word, int(rest[0]) if rest and rest[0].isdecimal() else 0)
            data = self._reader.read(int(rest[-1]) + 2)
            if not data.endswith(b"\r\n"):
                raise self._lost("it has closed the connection in the middle of a reply")
            return Reply(word, int(rest[0]), data[:-2])
        except TimeoutError as error:
            raise self._lost(f"no reply within {self._socket.gettimeout():g} s") from error
        except (OSError, ValueError, IndexError) as error:
            if isinstance(error, BrokerError):
                raise
            raise self._lost(str(error)) from error

    def using(self, queue: str) -> list[bytes]:
        """The commands after which ``queue`` is used, to be sent with the next ``ask``."""
        if queue == self._used:
            return []
        self._used = queue
        return [b"use " + queue.encode()]

    def watching(self, queues: Iterable[str]) -> list[bytes]:
        """The commands after which ``queues`` are watched and no others, to be sent with the next ``ask``."""
        wanted = set(queues)
        if wanted == self._watched:
            return []
        commands = [b"watch " + queue.encode() for queue in wanted - self._watched]
        commands += [b"ignore " + queue.encode() for queue in self._watched - wanted]
        self._watched = wanted
        return commands

    def close(self) -> None:
        """What was reserved goes back at once; in a child of a fork nothing happens to the parent's."""
        for each in (self._reader, self._socket):
            with contextlib.suppress(OSError):
                each.close()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise BrokerError(
                f"use beanstalkd at {self.where}: this connection is that of pid {self._pid}; open one after the fork"
            )

    def _lost(self, why: str) -> BrokerError:
        self.close()
        return BrokerError(f"talk to beanstalkd at {self.where}: {why}; the connection was closed")


def put(priority: int, delay: int, ttr: int, body: bytes) -> bytes:
    """The command that puts ``body``, whose bytes are counted here and nowhere else."""
    return b"put %d %d %d %d\r\n%s" % (priority, delay, ttr, len(body), body)


def _connected(where: str, patience: float) -> socket.socket:
    if where.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(patience)
        try:
            sock.connect(where)
        except BaseException:
            sock.close()
            raise
        return sock
    host, _, port = where.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), patience)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that has vanished says nothing: who waits for tasks would wait for ever (tcp(7)).
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock
