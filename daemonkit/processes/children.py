"""The children of a fork server, as the process sees them that has asked for them: one row each, in one table."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from typing import NoReturn

from daemonkit.core import prctl
from daemonkit.errors import ForkServerLost
from daemonkit.processes import child
from daemonkit.processes.forkserver import Enter, ForkServer, Kind, number_in, numbered, unpack
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Closed, Wire, pair

OnEnd = Callable[["Child", Receipt], None]
OnStart = Callable[["Child"], None]


class Child:
    """One child: asked for, then living, then ended."""

    __slots__ = ("_children", "id", "on_end", "on_start", "pid")

    def __init__(self, children: Children, id: int, on_end: OnEnd, on_start: OnStart | None) -> None:
        """Use ``Children.spawn``."""
        self._children = children
        self.id = id
        self.pid: int | None = None  # None: not forked yet
        self.on_end = on_end
        self.on_start = on_start

    def signal(self, number: int) -> None:
        """Send a signal.  One that is not forked yet is taken back instead; one that has ended is left in peace."""
        self._children.wire.send(Kind.SIGNAL, self.id, numbered(number))

    def kill_tree(self) -> None:
        """SIGKILL it and all that descends from it."""
        self._children.wire.send(Kind.KILL_TREE, self.id)


class Children:
    """Asks a fork server for children, and hears of their fates."""

    def __init__(self, wire: Wire, on_delay: Callable[[Child, OSError], None] | None = None) -> None:
        """Speak over ``wire``, whose other end a fork server has and whose socket does not block.

        Args:
            wire: to the server.
            on_delay: told once when the system has no room for a child; the server goes on trying.
        """
        self.wire = wire
        self._ids = itertools.count(1)
        self._table: dict[int, Child] = {}
        self._on_delay = on_delay

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> itertools.chain[Child]:
        return itertools.chain(tuple(self._table.values()))

    def spawn(
        self,
        payload: bytes,
        on_end: OnEnd,
        on_start: OnStart | None = None,
        fds: Sequence[int] = (),
    ) -> Child:
        """Ask for a child that runs what ``payload`` means to the server's ``enter``; ``fds`` are copied to it.

        Raises:
            ForkServerLost: the server is gone.
        """
        made = Child(self, next(self._ids), on_end, on_start)
        self._table[made.id] = made
        try:
            self.wire.send(Kind.SPAWN, made.id, payload, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise ForkServerLost("fork a child: the fork server has ended") from None
        return made

    def receive(self) -> None:
        """Take in all that the server has said, and call whom it concerns.

        Raises:
            ForkServerLost: it is gone, and so are its children (prctl(2), PR_SET_PDEATHSIG); ask ``abandon`` for them.
        """
        try:
            while (message := self.wire.receive()) is not None:
                payload = bytes(message.payload)
                if message.kind == Kind.ENDED:
                    made = self._table.pop(message.id)
                    made.on_end(made, unpack(payload))
                elif message.kind == Kind.STARTED:
                    made = self._table[message.id]
                    made.pid = number_in(payload)
                    if made.on_start:
                        made.on_start(made)
                elif message.kind == Kind.DELAYED and self._on_delay and (late := self._table.get(message.id)):
                    code = number_in(payload)
                    self._on_delay(late, OSError(code, os.strerror(code)))
        except Closed:
            raise ForkServerLost("the fork server has ended, and its children with it") from None

    def abandon(self) -> list[Child]:
        """The rows of a server that is gone; the table is empty afterwards."""
        rows = list(self._table.values())
        self._table.clear()
        return rows


def fork_server(enter: Enter, prepare: Callable[[], None], ignored: tuple[int, ...] = ()) -> tuple[int, Wire]:
    """Fork a fork server from this process, which is clean; return its PID and our end of the wire.

    Args:
        enter: what a child does with the message that asked for it.
        prepare: called in the server first: gives back what is its parent's (descriptors, title).
        ignored: signals that its children ignore.

    The server is our child: when the wire is closed it ends, and then it is to be reaped.
    """
    ours, theirs = pair()
    pid = child.fork()
    if pid == 0:
        ours.close()
        _serve(Wire(theirs), enter, prepare, ignored)
    theirs.close()
    ours.setblocking(False)
    return pid, Wire(ours)


def _serve(wire: Wire, enter: Enter, prepare: Callable[[], None], ignored: tuple[int, ...]) -> NoReturn:
    # Not SIGKILL, as for other children: it has to take those with it that descend from its own.
    prctl.die_with_parent(signal.SIGTERM)
    os.set_blocking(wire.fileno(), False)
    prepare()
    ForkServer(wire, enter, ignored).serve()
