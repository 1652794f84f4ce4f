"""A kept child of a pool, and the calls that it has."""

from __future__ import annotations

import contextlib
import socket

from daemonkit.processes import call as child_call
from daemonkit.processes.assignment import Assignment
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Closed, Wire, pair


class Kept:
    """A kept child: calls go to it through a pair of sockets, of which we keep both ends.

    So calls that it has not begun can be taken back; what is then not taken has been read by it.
    """

    __slots__ = ("calls", "has_answered", "is_ending", "left", "receipt", "row", "since", "theirs", "wire")

    def __init__(self, left: int | None) -> None:
        """Make the pair of sockets; the child is yet to be spawned.  ``left``: calls that it may be given."""
        ours, self.theirs = pair()
        ours.setblocking(False)
        self.wire = Wire(ours)
        self.row: Child
        self.left = left  # None: any number
        self.calls: dict[int, Assignment] = {}  # given, unanswered, in order: the first one runs
        self.since = 0.0  # when that one began
        self.is_ending = False
        self.has_answered = False
        self.receipt: Receipt | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it may be given a call."""
        return not self.is_ending and self.left != 0

    def send(self, number: int, call: Assignment) -> None:
        """Give it a call."""
        self.wire.send(child_call.CALL, number, call.request)  # may raise: then nothing has changed
        self.calls[number] = call
        call.is_given = True
        if self.left is not None:
            self.left -= 1

    def take_back(self, most: int | None = None) -> dict[int, Assignment]:
        """Calls that it has not begun, the oldest ones, in order; None: all."""
        taken: dict[int, Assignment] = {}
        reader = Wire(self.theirs)
        with contextlib.suppress(Closed):
            while (most is None or len(taken) < most) and (message := reader.receive(socket.MSG_DONTWAIT)) is not None:
                taken[message.id] = call = self.calls.pop(message.id)
                call.is_given = False
        if self.left is not None:
            self.left += len(taken)
        return taken

    def close(self) -> None:
        """Let it go: it ends when it has read the end of file."""
        self.is_ending = True
        self.wire.close()
        self.theirs.close()
