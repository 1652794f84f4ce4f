"""A consumer's way to its broker: connected when it can be, and again when it was lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from daemonkit.core.chance import about
from daemonkit.errors import BrokerError
from daemonkit.queue.broker import Broker, Exchange, Outcome, Release, Reservation

log = logging.getLogger("daemonkit.queue")

_FIRST: Final = 0.1  # seconds until a broker that cannot be reached is tried again; doubled
_LONGEST: Final = 30.0  # up to this
_LATE: Final = 1.0  # seconds until what has come too late is handed out again: a ttr may be shorter than that takes
_LOOK: Final = 60.0  # seconds after which a moment to come is asked for again: clocks are set, and machines sleep
_SHARE: Final = 0.9  # of a ttr, in which a task is to be done: the rest is for telling it


class Link:
    """Holds what is to be told until it has been told.  Moments are monotonic seconds."""

    def __init__(
        self, connect: Callable[[], Broker], announce: Callable[[Broker], object], show: Callable[[str], object]
    ) -> None:
        """Nothing is connected yet.

        Args:
            connect: called with the first exchange.
            announce: called with the first, and after each time that the broker could not be reached.
            show: told whether it can be.
        """
        self.outcomes: list[Outcome] = []  # not told yet
        self.asked = 0.0  # when the last exchange has begun
        self._connect = connect
        self._announce = announce
        self._show = show
        self._broker: Broker | None = None
        self._trouble: str | None = None  # with a part of it
        self._words: str | None = None  # what else is to be known
        self._pause = 0.0  # seconds between two tries; 0: it can be reached
        self._next = 0.0  # when there is something to be had, or it is to be tried again

    @property
    def wants_at(self) -> float:
        """When ``exchange`` is to be called next."""
        return 0.0 if self.outcomes and not self._pause else self._next

    def look(self, moment: float) -> None:
        """Ask for more then, and no earlier, unless there is something to tell."""
        if not self._pause:
            self._next = moment

    def fileno(self, now: float) -> int | None:
        """What is readable when there is more; None while nobody would know.  Then call ``heard``."""
        if self._broker is None or self._pause:
            return None
        try:
            return self._broker.watch()
        except BrokerError as error:
            self._lost(error, now)
            return None

    def heard(self, now: float) -> None:
        """Something has changed at the broker."""
        if self._broker is None:
            return
        self.look(0.0)
        try:
            self._broker.drain()
        except BrokerError as error:
            self._lost(error, now)

    def exchange(self, room: Mapping[str, int], count: int, now: float) -> Exchange | None:
        """Tell what is to be told, and reserve; None if the broker cannot be reached now."""
        try:
            if self._broker is None:
                self._broker = self._connect()
                self._announce(self._broker)
                self._show_all()
            elif self._pause:
                self._announce(self._broker)  # it may be another file, or a server that has forgotten us
            self.asked = time.monotonic()
            found = self._broker.exchange(self.outcomes, room if count else {}, count)
        except BrokerError as error:
            self._lost(error, now)
            return None
        self.outcomes.clear()
        if self._pause or found.trouble != self._trouble:
            self._pause, self._trouble = 0.0, found.trouble
            if found.trouble:
                log.error("%s; tried again until it can be used; the others go on", found.trouble)
            self._show_all()
        return self._without_late(found)

    def must_be_told_at(self, reservation: Reservation) -> float:
        """When the ttr of one that was reserved last is nearly up; what comes of it is told in the rest."""
        return self.asked + reservation.ttr * _SHARE

    def _without_late(self, found: Exchange) -> Exchange:
        """Give back what has come so late that it may have run out, by our own clock: others may be at it by now."""
        late = [each for each in found.reserved if time.monotonic() >= self.must_be_told_at(each)]
        if not late:
            return found
        log.error("%d task(s) were handed out so late that their ttr may be up: they are given back", len(late))
        self.outcomes += [Release(each, _LATE) for each in late]
        return found._replace(reserved=[each for each in found.reserved if each not in late])

    def tell(self, outcome: Outcome, now: float) -> None:
        """Tell this at once, alone, or never."""
        if self._broker is None or self._pause:
            return
        try:
            self._broker.exchange([outcome], {}, 0)
        except BrokerError as error:
            self._lost(error, now)

    def show(self, words: str | None) -> None:
        """Have these shown beside the broker, until others are; None: the broker alone."""
        if words != self._words:
            self._words = words
            self._show_all()

    def _show_all(self) -> None:
        assert self._broker is not None
        troubles = [each for each in (self._trouble, self._words) if each]
        self._show(f"broker {self._broker.url}" + (f", but: {'; '.join(troubles)}" if troubles else ""))

    def give_up(self) -> None:
        """Nobody will try again: what was not told, is lost, and so is done again."""
        if self.outcomes:
            log.error("what came of %d task(s) could not be told; they will be done again", len(self.outcomes))
            self.outcomes.clear()

    @property
    def is_down(self) -> bool:
        """Whether the broker could not be reached."""
        return self._pause > 0

    def close(self) -> None:
        """Close the connection."""
        if self._broker:
            self._broker.close()

    def _lost(self, error: BrokerError, now: float) -> None:
        if not self._pause:
            log.error("%s; tried again until it can be reached", error)
            self._show(f"broker lost: {error}")
        self._pause = min(self._pause * 2, _LONGEST) if self._pause else _FIRST
        self._next = now + about(self._pause, 0.2)


def next_look(found: Exchange, room: int, now: float) -> float:
    """When to ask for more after an exchange that had ``room``, if nobody says before that there is more."""
    if len(found.reserved) >= room:
        return math.inf  # the next end of a task makes room
    return math.inf if found.due is None else now + min(found.due, _LOOK)
