"""The children of a pool and the calls that they have: a fresh one for each call, or kept ones with several."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from daemonkit.processes import call as child_call
from daemonkit.processes.children import Child, Children
from daemonkit.processes.future import Call
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Closed, Wire, pair

_DEEPEST: Final = 96  # calls that a kept child has at most, one of them running: so many fit into a socket's buffer
_AHEAD: Final = 24  # short calls, enough for a while
_SHORT: Final = 0.001  # seconds: calls up to here are worth being sent ahead
_SMALL: Final = 512  # bytes: calls up to here may be sent ahead
_KEPT: Final = 1 << 62  # ids of calls of kept children begin here; below are those of children

Begun = Callable[[Call], None]


class Lost(NamedTuple):
    """A call whose child has ended without an outcome of it."""

    call: Call
    receipt: Receipt


class Crew(Protocol):
    """The children under one fork server."""

    has_started: bool  # it has forked once

    def take(self, call: Call, width: int) -> bool:
        """Give the call to a child; False if ``width`` run already.

        Raises:
            ForkServerLost: nothing can be given to anybody.
        """
        ...

    def find(self, number: int) -> Call | None:
        """The call of an outcome."""
        ...

    def finish(self, number: int) -> Call | None:
        """Its outcome is here."""
        ...

    def settle(self) -> tuple[list[Lost], list[Call]]:
        """Calls lost with children that have ended, and those that can be given to others.

        To be asked when every outcome that was sent has been read.
        """
        ...

    def kill(self, call: Call) -> list[Call]:
        """Kill the child that runs it, if one has begun it; give back what that had not begun, perhaps it as well."""
        ...

    def recall(self, call: Call | None = None) -> list[Call]:
        """Give back all that was not begun by the child that has ``call``; None: by any child."""
        ...

    def spare(self, width: int) -> list[Call]:
        """Let children go that are too many; give back calls that have not begun and that others could begin."""
        ...

    def is_ahead(self) -> bool:
        """Whether every child has short calls enough for a while."""
        ...

    def calls(self) -> list[Call]:
        """All that children have."""
        ...

    def close(self) -> None:
        """Close what leads to children."""
        ...


class FreshCrew:
    """One child for each call."""

    def __init__(self, children: Children, begun: Begun) -> None:
        """Spawn among ``children``; ``begun`` is told of each call when its child runs."""
        self.has_started = False
        self._children = children
        self._begun = begun
        self._running: dict[int, tuple[Call, Child]] = {}
        self._ended: list[tuple[int, Receipt]] = []

    def take(self, call: Call, width: int) -> bool:
        # A child that has given its result has only its end before it: the next need not wait for that.
        if len(self._running) >= width or len(self._children) >= 2 * width:
            return False
        row = self._children.spawn(call.request, self._on_end, self._on_start)
        self._running[row.id] = call, row
        call.is_given = True
        call.begin()
        return True

    def _on_start(self, row: Child) -> None:
        self.has_started = True
        if entry := self._running.get(row.id):
            entry[0].pid = row.pid
            self._begun(entry[0])

    def _on_end(self, row: Child, receipt: Receipt) -> None:
        if row.id in self._running:
            self._ended.append((row.id, receipt))

    def find(self, number: int) -> Call | None:
        entry = self._running.get(number)
        return entry and entry[0]

    def finish(self, number: int) -> Call | None:
        entry = self._running.pop(number, None)
        return entry and entry[0]

    def settle(self) -> tuple[list[Lost], list[Call]]:
        ended, self._ended = self._ended, []
        return [Lost(self._running.pop(number)[0], receipt) for number, receipt in ended if number in self._running], []

    def kill(self, call: Call) -> list[Call]:
        for mine, row in self._running.values():
            if mine is call:
                row.kill_tree()
        return []

    def recall(self, call: Call | None = None) -> list[Call]:
        return []

    def spare(self, width: int) -> list[Call]:
        return []

    def is_ahead(self) -> bool:
        return False

    def calls(self) -> list[Call]:
        return [call for call, _ in self._running.values()]

    def close(self) -> None:
        pass


class _Kept:
    """A kept child: calls go to it through a pair of sockets, of which we keep both ends.

    So calls that it has not begun can be taken back; what is then not taken has been read by it.
    """

    __slots__ = ("calls", "has_answered", "is_ending", "left", "receipt", "row", "since", "theirs", "wire")

    def __init__(self, left: int | None) -> None:
        ours, self.theirs = pair()
        ours.setblocking(False)
        self.wire = Wire(ours)
        self.row: Child
        self.left = left  # calls that it may still be given; None: any number
        self.calls: dict[int, Call] = {}  # given, unanswered, in order: the first one runs
        self.since = 0.0  # when that one began
        self.is_ending = False
        self.has_answered = False
        self.receipt: Receipt | None = None

    def send(self, number: int, call: Call) -> None:
        self.wire.send(child_call.CALL, number, call.request)  # may raise: then nothing has changed
        self.calls[number] = call
        call.is_given = True
        if self.left is not None:
            self.left -= 1

    def take_back(self, most: int | None = None) -> dict[int, Call]:
        """Calls that it has not begun, the oldest ones, in order; None: all."""
        taken: dict[int, Call] = {}
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


class KeptCrew:
    """Children that are kept for a number of calls."""

    def __init__(self, children: Children, begun: Begun, reuse: int | None, first: bytes) -> None:
        """Spawn among ``children``.

        Args:
            children: of the fork server.
            begun: told of each call when a child runs it.
            reuse: calls that a child is kept for; None: any number.
            first: the initializer's pickle.
        """
        self.has_started = False
        self._children = children
        self._begun = begun
        self._reuse = reuse
        self._first = first
        self._ids = itertools.count(_KEPT)
        self._kept: dict[int, _Kept] = {}  # by the child's id
        self._owner: dict[int, _Kept] = {}  # by the call's id
        self._idle: list[_Kept] = []
        self._hungry: dict[_Kept, None] = {}  # busy ones that may be given more
        self._ended: list[_Kept] = []
        self._depth = 1

    def _may_hire(self, width: int) -> bool:
        return len(self._kept) < width and len(self._children) < 2 * width

    def _choose(self, call: Call, width: int) -> _Kept | None:
        while self._idle and len(self._kept) <= width:
            if self._is_ready(self._idle[-1]):
                return self._idle[-1]
            self._idle.pop()
        if self._may_hire(width) or len(call.request) > _SMALL:
            return None
        while self._hungry:
            kept = next(iter(self._hungry))
            if self._is_ready(kept) and 0 < len(kept.calls) < self._depth:
                return kept
            del self._hungry[kept]
        return None

    def _is_ready(self, kept: _Kept) -> bool:
        return not kept.is_ending and kept.left != 0

    def take(self, call: Call, width: int) -> bool:
        kept = self._choose(call, width)
        if kept is None and not self._may_hire(width):
            return False
        if kept is None:
            kept = self._hire()
            self._idle.append(kept)
        number = next(self._ids)
        kept.send(number, call)
        self._owner[number] = kept
        if len(kept.calls) == 1:
            self._idle.pop()
            self._hungry[kept] = None
            self._began_first(kept, time.monotonic())
        return True

    def _hire(self) -> _Kept:
        kept = _Kept(self._reuse)
        kept.row = self._children.spawn(self._first, self._on_end, self._on_start, [kept.theirs.fileno()])
        self._kept[kept.row.id] = kept
        return kept

    def _on_start(self, row: Child) -> None:
        self.has_started = True
        if kept := self._kept.get(row.id):
            self._began_first(kept, time.monotonic())

    def _began_first(self, kept: _Kept, now: float) -> None:
        kept.since = now
        for call in kept.calls.values():
            call.begin()
            if kept.row.pid is not None:
                call.pid = kept.row.pid
                self._begun(call)
            break

    def _on_end(self, row: Child, receipt: Receipt) -> None:
        if kept := self._kept.get(row.id):
            kept.receipt, kept.is_ending = receipt, True
            self._ended.append(kept)

    def find(self, number: int) -> Call | None:
        kept = self._owner.get(number)
        return kept.calls.get(number) if kept else None

    def finish(self, number: int) -> Call | None:
        kept = self._owner.pop(number, None)
        call = kept.calls.pop(number, None) if kept else None
        if kept is None or call is None:
            return None
        kept.has_answered = True
        now = time.monotonic()
        if now - kept.since >= _SHORT:
            self._depth = max(1, self._depth // 2)
        elif self._depth < _DEEPEST:
            self._depth = min(self._depth + 1 + self._depth // 8, _DEEPEST)
        if kept.calls:
            self._began_first(kept, now)
            # Not for every outcome: several calls at once wake it once.
            if len(kept.calls) <= self._depth // 2:
                self._hungry[kept] = None
        elif kept.left == 0:
            self._let_go(kept)
        else:
            self._idle.append(kept)  # the one that is warm is used first
        return call

    def _let_go(self, kept: _Kept) -> None:
        self._kept.pop(kept.row.id, None)
        self._hungry.pop(kept, None)
        kept.close()

    def settle(self) -> tuple[list[Lost], list[Call]]:
        ended, self._ended = self._ended, []
        lost: list[Lost] = []
        given_back: list[Call] = []
        for kept in ended:
            if kept.row.id not in self._kept:
                continue  # its last outcome came together with its end: it was let go
            assert kept.receipt is not None
            taken = self._take_back(kept)
            if not (kept.calls or kept.has_answered):  # it ended before it began anything: the next may, too
                for call in taken[:1]:
                    call.attempts += 1
            given_back += taken
            for number, call in kept.calls.items():
                del self._owner[number]
                lost.append(Lost(call, kept.receipt))
            self._let_go(kept)
        return lost, given_back

    def kill(self, call: Call) -> list[Call]:
        for kept in self._kept.values():
            if call in kept.calls.values():
                taken = self._take_back(kept)
                # What cannot be taken back it has read: one call, or two if the first one's outcome is on its way.
                if kept.calls and list(kept.calls.values())[-1] is call:
                    kept.is_ending = True
                    kept.row.kill_tree()
                return taken
        return []

    def recall(self, call: Call | None = None) -> list[Call]:
        return [
            taken
            for kept in self._kept.values()
            if call is None or call in kept.calls.values()
            for taken in self._take_back(kept)
        ]

    def _take_back(self, kept: _Kept, most: int | None = None) -> list[Call]:
        taken = kept.take_back(most)
        for number in taken:
            del self._owner[number]
        if taken and not kept.calls and self._is_ready(kept):
            self._hungry.pop(kept, None)
            self._idle.append(kept)
        return list(taken.values())

    def spare(self, width: int) -> list[Call]:
        self._idle = [kept for kept in self._idle if self._is_ready(kept)]
        while len(self._kept) > width and self._idle:
            self._let_go(self._idle.pop())
        taken: list[Call] = []
        free = len(self._idle) + max(0, width - len(self._kept))
        if free and len(self._owner) > len(self._kept) - len(self._idle):
            for kept in self._kept.values():
                if len(kept.calls) > 1 and len(taken) < free:
                    taken += self._take_back(kept, 1)
        return taken

    def is_ahead(self) -> bool:
        return self._depth > _AHEAD and all(len(kept.calls) > _AHEAD for kept in self._kept.values())

    def calls(self) -> list[Call]:
        return [call for kept in self._kept.values() for call in kept.calls.values()]

    def close(self) -> None:
        for kept in self._kept.values():
            kept.close()
