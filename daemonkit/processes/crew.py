"""The children of a pool and the calls that they have: a fresh one for each call, or kept ones with several."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from daemonkit.processes.assignment import Assignment
from daemonkit.processes.children import Child, Children
from daemonkit.processes.kept import Kept
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.rota import Rota

_KEPT: Final = 1 << 62  # ids of calls of kept children begin here; below are those of children

Begun = Callable[[Assignment], None]


class Lost(NamedTuple):
    """A call whose child has ended without an outcome of it."""

    call: Assignment
    receipt: Receipt


class Crew(Protocol):
    """The children under one fork server."""

    has_started: bool  # it has forked once

    def take(self, call: Assignment, width: int) -> bool:
        """Give the call to a child; False if ``width`` run already.

        Raises:
            ForkServerLost: nothing can be given to anybody.
        """
        ...

    def find(self, number: int) -> Assignment | None:
        """The call of an outcome."""
        ...

    def finish(self, number: int) -> Assignment | None:
        """Its outcome is here."""
        ...

    def settle(self) -> tuple[list[Lost], list[Assignment]]:
        """Calls lost with children that have ended, and those that can be given to others.

        To be asked when every outcome that was sent has been read.
        """
        ...

    def kill(self, call: Assignment) -> None:
        """Kill the child that runs it, if one has begun it; as ``withhold`` otherwise."""
        ...

    def withhold(self, call: Assignment) -> bool:
        """Keep from its child what that has not begun; tell whether the call is among that.

        In any thread, and interrupted anywhere: what is kept back waits until ``recalled`` is asked.
        """
        ...

    def recalled(self) -> list[Assignment]:
        """What was kept back since that was asked last: children do not have it any more."""
        ...

    def spare(self, width: int) -> list[Assignment]:
        """Let children go that are too many; give back calls that have not begun and that others could begin."""
        ...

    def is_ahead(self) -> bool:
        """Whether every child has short calls enough for a while."""
        ...

    def calls(self) -> list[Assignment]:
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
        self._running: dict[int, tuple[Assignment, Child]] = {}
        self._ended: list[tuple[int, Receipt]] = []

    def take(self, call: Assignment, width: int) -> bool:
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

    def find(self, number: int) -> Assignment | None:
        entry = self._running.get(number)
        return entry and entry[0]

    def finish(self, number: int) -> Assignment | None:
        entry = self._running.pop(number, None)
        return entry and entry[0]

    def settle(self) -> tuple[list[Lost], list[Assignment]]:
        ended, self._ended = self._ended, []
        return [Lost(self._running.pop(number)[0], receipt) for number, receipt in ended if number in self._running], []

    def kill(self, call: Assignment) -> None:
        for mine, row in self._running.values():
            if mine is call:
                row.kill_tree()

    def withhold(self, call: Assignment) -> bool:
        return False

    def recalled(self) -> list[Assignment]:
        return []

    def spare(self, width: int) -> list[Assignment]:
        return []

    def is_ahead(self) -> bool:
        return False

    def calls(self) -> list[Assignment]:
        return [call for call, _ in self._running.values()]

    def close(self) -> None:
        pass


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
        self._kept: dict[int, Kept] = {}  # by the child's id
        self._owner: dict[int, Kept] = {}  # by the call's id
        self._ended: list[Kept] = []
        self._rota = Rota()

    def _may_hire(self, width: int) -> bool:
        return len(self._kept) < width and len(self._children) < 2 * width

    def _choose(self, call: Assignment, width: int) -> Kept | None:
        if len(self._kept) <= width and (kept := self._rota.first_idle()):
            return kept
        return None if self._may_hire(width) else self._rota.first_hungry(call)

    def take(self, call: Assignment, width: int) -> bool:
        kept = self._choose(call, width)
        if kept is None and not self._may_hire(width):
            return False
        if kept is None:
            kept = self._hire()
            self._rota.rest(kept)
        number = next(self._ids)
        kept.send(number, call)
        self._owner[number] = kept
        if len(kept.calls) == 1:
            self._rota.work(kept)
            self._began_first(kept, time.monotonic())
        return True

    def _hire(self) -> Kept:
        kept = Kept(self._reuse)
        try:
            kept.row = self._children.spawn(self._first, self._on_end, self._on_start, [kept.theirs.fileno()])
        except BaseException:
            kept.close()
            raise
        self._kept[kept.row.id] = kept
        return kept

    def _on_start(self, row: Child) -> None:
        self.has_started = True
        if kept := self._kept.get(row.id):
            self._began_first(kept, time.monotonic())

    def _began_first(self, kept: Kept, now: float) -> None:
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

    def find(self, number: int) -> Assignment | None:
        kept = self._owner.get(number)
        return kept.calls.get(number) if kept else None

    def finish(self, number: int) -> Assignment | None:
        kept = self._owner.pop(number, None)
        call = kept.calls.pop(number, None) if kept else None
        if kept is None or call is None:
            return None
        kept.has_answered = True
        now = time.monotonic()
        self._rota.learn(now - kept.since)
        if kept.calls:
            self._began_first(kept, now)
            self._rota.feed(kept)
        elif kept.left == 0:
            self._let_go(kept)
        else:
            self._rota.rest(kept)
        return call

    def _let_go(self, kept: Kept) -> None:
        self._kept.pop(kept.row.id, None)
        self._rota.leave(kept)
        kept.close()

    def settle(self) -> tuple[list[Lost], list[Assignment]]:
        ended, self._ended = self._ended, []
        lost: list[Lost] = []
        given_back: list[Assignment] = []
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

    def kill(self, call: Assignment) -> None:
        for kept in self._kept.values():
            if call in kept.calls.values():
                kept.keep_back()
                # What cannot be kept back it has read: one call, or two if the first one's outcome is on its way.
                if kept.has_as_last(call):
                    kept.is_ending = True
                    kept.row.kill_tree()

    def withhold(self, call: Assignment) -> bool:
        for kept in self._kept.values():
            if call in kept.calls.values():
                kept.keep_back()
                return kept.keeps_back(call)
        return False

    def recalled(self) -> list[Assignment]:
        return [call for kept in self._kept.values() if kept.kept_back for call in self._give_back(kept)]

    def _take_back(self, kept: Kept, most: int | None = None) -> list[Assignment]:
        kept.keep_back(most)
        return self._give_back(kept)

    def _give_back(self, kept: Kept) -> list[Assignment]:
        given = kept.give_back()
        for number in given:
            del self._owner[number]
        if given and not kept.calls and kept.is_ready:
            self._rota.rest(kept)
        return list(given.values())

    def spare(self, width: int) -> list[Assignment]:
        idle = self._rota.idle()
        while len(self._kept) > width and idle:
            self._let_go(idle.pop())
        taken: list[Assignment] = []
        free = len(idle) + max(0, width - len(self._kept))
        if free and len(self._owner) > len(self._kept) - len(idle):
            for kept in self._kept.values():
                if len(kept.calls) > 1 and len(taken) < free:
                    taken += self._take_back(kept, 1)
        return taken

    def is_ahead(self) -> bool:
        return bool(self._kept) and all(self._rota.is_enough(kept) for kept in self._kept.values())

    def calls(self) -> list[Assignment]:
        return [call for kept in self._kept.values() for call in kept.calls.values()]

    def close(self) -> None:
        for kept in self._kept.values():
            kept.close()
