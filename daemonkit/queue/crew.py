"""The processes of tasks, as their consumer sees them: a fork server below it, and what its children say."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator

from daemonkit.core.title import take_title
from daemonkit.errors import ForkServerLost
from daemonkit.processes import child, modules
from daemonkit.processes.children import Child, Children, OnEnd, fork_server
from daemonkit.processes.wire import Closed, DescriptorsLost, Message, Wire, pair
from daemonkit.queue.errand import Errands
from daemonkit.queue.stderr import Stderr, Stderrs, Tell

_END_TIME = 1.0  # seconds that the server has to end
_LEAST = 512  # bytes of its socket's buffer that the kernel counts for a message, at least


class Crew:
    """Forked in a process that has one thread and no connection yet (law 3)."""

    def __init__(self, title: str, errands: Callable[[Wire], Errands], release: Callable[[], None]) -> None:
        """Fork the server.

        Args:
            title: of this process.
            errands: makes what children do, who speak on that wire.
            release: gives back, in the server, what is ours alone.

        Raises:
            OSError: there is no room for another process.
        """
        ours, theirs = pair()
        ours.setblocking(False)
        self._results = Wire(ours)
        self._most = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // _LEAST + 1  # messages on their way
        made = errands(Wire(theirs))

        def prepare() -> None:
            take_title(f"{title}: fork server")
            ours.close()
            release()
            made.rehearse()

        self.server, wire = fork_server(made.enter, prepare)
        theirs.close()
        self._children = Children(wire)
        self._stderrs = Stderrs()

    def register(self, poll: select.poll) -> None:
        """Have ``poll`` wait for them."""
        wire = self._children.wire
        poll.register(self._results.fileno(), select.POLLIN)
        poll.register(self._stderrs.fileno(), select.POLLIN)
        poll.register(wire.fileno(), select.POLLIN | (select.POLLOUT if wire.is_waiting else 0))

    def spawn(self, request: bytes, on_end: OnEnd, tell: Tell) -> tuple[Child, Stderr]:
        """Ask for a child; what it prints on stderr is told, and ``last_words`` are to be asked for at its end.

        Raises:
            ForkServerLost: the server has ended.
            OSError: there is no room for the request, or for its pipe.
        """
        stderr = Stderr(tell)
        try:
            child = self._children.spawn(request, on_end, fds=(stderr.writer,))
        except BaseException:
            stderr.close()
            raise
        stderr.started()
        self._stderrs.add(stderr)
        return child, stderr

    def learn(self, names: bytes) -> None:
        """Have modules that a child had to import imported where the next are forked."""
        self._children.learn(modules.unpack(names))

    def last_words(self, stderr: Stderr) -> str:
        """The last lines of a child's that has ended."""
        return self._stderrs.remove(stderr)

    def receive(self) -> None:
        """Take in how they fare, and call whom it concerns.

        Raises:
            ForkServerLost: the server has ended, and they with it.
        """
        self._stderrs.read()
        try:
            self._children.receive()
            self._children.wire.flush()
        except (BrokenPipeError, ConnectionResetError):
            raise ForkServerLost("the fork server has ended, and its children with it") from None

    def words(self) -> Iterator[Message]:
        """What children have said; the last words of one were sent before its end was told.

        No more than can have been sent by now: some may be talking without end.
        """
        for _ in range(self._most):
            try:
                message = self._results.receive()
            except (DescriptorsLost, struct.error):
                continue  # a task has written what is no message
            except Closed:
                return  # or an empty message
            if message is None:
                return
            yield message

    def close(self) -> None:
        """Let the server end; reap it."""
        self._children.wire.close()
        self._stderrs.close()
        child.wait_for(self.server, _END_TIME)
