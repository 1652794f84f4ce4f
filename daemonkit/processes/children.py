"""The children of a fork server, as the process sees them that has asked for them: one row each, in one table."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from daemonkit.errors import ForkServerLost
from daemonkit.processes import child, modules
from daemonkit.processes.forkserver import MASTERS, Enter, ForkServer, Kind, number_in, numbered
from daemonkit.processes.limited import Limit
from daemonkit.processes.receipt import Receipt, unpack
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
        """Send a signal.  One that is not forked yet is taken back instead; one that has ended is left in peace.

        Raises:
            ValueError: there is no such signal.
        """
        if number not in child.SIGNALS:
            raise ValueError(f"send signal {number} to pid {self.pid}: there is no such signal")
        self._children.tell(Kind.SIGNAL, self.id, numbered(number))

    def kill_tree(self) -> None:
        """SIGKILL it and all that descends from it; one that is not forked yet is taken back."""
        self._children.tell(Kind.KILL_TREE, self.id)


class Children:
    """Asks a fork server for children, and hears of their fates.

    Call ``receive`` when the wire can be read, and ``wire.flush`` when it can be written and something waits for that.
    What a child has sent to us over a socket of its own is there to be read when its end is told: so read that first.
    """

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
        self._learned: set[str] = set()

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Child]:
        return iter(tuple(self._table.values()))

    def spawn(
        self,
        payload: bytes,
        on_end: OnEnd,
        on_start: OnStart | None = None,
        fds: Sequence[int] = (),
        *,
        adopts: bool = True,
        closes: bool = False,
        limited: bool = False,
    ) -> Child:
        """Ask for a child that runs what ``payload`` means to the server's ``enter``; ``fds`` are copied to it.

        Args:
            payload: any bytes.
            on_end: called when it has ended, or could not be begun (then the receipt's pid is 0).
            on_start: called when it was forked.
            fds: 252 at most.
            adopts: ``enter`` makes it a subreaper (prctl(2)), so what it leaves behind ends with it.
            closes: it has something to close when we are gone, and does so at once; it does not adopt.
            limited: the server kills it at its limit, see ``ForkServer``; it does not adopt.

        Raises:
            ForkServerLost: the server is gone.
            OSError: EMFILE or ENOMEM; nothing was asked.
        """
        made = Child(self, next(self._ids), on_end, on_start)
        try:
            lasting = Kind.SPAWN_LIMITED if limited else Kind.SPAWN_CLOSING if closes else Kind.SPAWN_LASTING
            kind = Kind.SPAWN if adopts and not (closes or limited) else lasting
            self.wire.send(kind, made.id, payload, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise ForkServerLost("fork a child: the fork server has ended") from None
        self._table[made.id] = made
        return made

    def tell(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Tell the server something of a child.  If it is gone, so is the child, as ``receive`` will say."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wire.send(kind, number, payload)

    def learn(self, names: list[str]) -> None:
        """Have modules that children had to import, and that leave a process clean, imported where they are forked."""
        if fresh := [name for name in names if name not in self._learned]:
            self._learned.update(fresh)
            self.tell(Kind.IMPORT, 0, modules.pack(fresh))

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


def fork_server(
    enter: Enter,
    prepare: Callable[[], None],
    ignored: tuple[int, ...] = (),
    limit: Limit | None = None,
) -> tuple[int, Wire]:
    """Fork a fork server from this process, which is clean; return its PID and our end of the wire.

    Args:
        enter: what a child does with the message that asked for it.
        prepare: called in the server first: gives back what is its parent's (descriptors, title).
        ignored: signals that its children ignore.
        limit: of limited children, see ``ForkServer``.

    The server is our child: when the wire is closed it ends, and then it is to be reaped.
    """
    ours, theirs = pair()
    try:
        pid = child.fork(MASTERS, dies_with_parent=False)  # it watches the wire
    except BaseException:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        ours.close()
        child.or_end(prepare)
        serve_wire(Wire(theirs), enter, ignored, limit)
    theirs.close()
    ours.setblocking(False)
    return pid, Wire(ours)


def serve_wire(
    wire: Wire,
    enter: Enter,
    ignored: tuple[int, ...] = (),
    limit: Limit | None = None,
) -> NoReturn:
    """Be the fork server at the other end of ``wire``, in a process that has just begun; end with our parent."""
    os.set_blocking(wire.fileno(), False)
    ForkServer(wire, enter, ignored, limit).serve()
