"""A kept child of a pool, and the calls that it has."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import deque

from daemonkit.processes import call as child_call
from daemonkit.processes.assignment import Assignment
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import HEAD_SIZE, Wire, number_of, pair


class Kept:
    """A kept child: calls go to it through a pair of sockets, of which we keep both ends.

    So calls that it has not begun can be taken back; what is then not taken has been read by it.
    """

    __slots__ = ("calls", "has_answered", "is_ending", "kept_back", "left", "receipt", "row", "since", "theirs", "wire")

    def __init__(self, left: int | None) -> None:
        """Make the pair of sockets; the child is yet to be spawned.  ``left``: calls that it may be given."""
        ours, self.theirs = pair()
        ours.setblocking(False)
        self.wire = Wire(ours)
        self.row: Child
        self.left = left  # None: any number
        self.calls: dict[int, Assignment] = {}  # given, unanswered, in order: the first one runs
        self.kept_back: deque[bytes] = deque()  # heads of their requests, which it cannot read any more
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

    def keep_back(self, most: int | None = None) -> None:
        """Keep calls from it that it has not begun, the oldest ones, until they are given back; None: all.

        Control-C may strike anywhere here: a request goes from the kernel to where we find it in C alone.
        """
        with contextlib.suppress(BlockingIOError):
            while most is None or len(self.kept_back) < most:
                self.kept_back.extend(map(self.theirs.recv, (HEAD_SIZE,), (socket.MSG_DONTWAIT,)))

    def keeps_back(self, call: Assignment) -> bool:
        """Whether it cannot begin the call any more."""
        return call in map(self.calls.get, map(number_of, self.kept_back))

    def has_as_last(self, call: Assignment) -> bool:
        """Whether it has read the call, and none after it."""
        left = len(self.calls) - len(self.kept_back)
        return left > 0 and next(itertools.islice(self.calls.values(), left - 1, None)) is call

    def give_back(self) -> dict[int, Assignment]:
        """What was kept back from it, in order: it does not have that any more.  In the pool's thread."""
        given: dict[int, Assignment] = {}
        while self.kept_back:
            number = number_of(self.kept_back.popleft())
            given[number] = call = self.calls.pop(number)
            call.is_given = False
        if self.left is not None:
            self.left += len(given)
        return given

    def close(self) -> None:
        """Let it go: it ends when it has read the end of file."""
        self.is_ending = True
        self.wire.close()
        self.theirs.close()
