"""A request to stop, and how long the user's code in hand may make it wait.

The loop stops between two pieces of the user's code.  One thing cannot wait for the loop: a stop whose time is up,
or that must be at once, while the user's code holds the thread.  Then, and only inside ``interruptible``, the
signal handler that asks raises ``StopNow``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Final

HOOK_GRACE: Final = 5.0  # seconds that `stop` hooks have after the code in hand had to be interrupted
LAST_RESORT: Final = 3  # StopNow raised so often and still not out: the user's code swallows it


class StopNow(BaseException):
    """Raised into the user's code when a stop may wait no longer; not an Exception, so it is rarely swallowed."""


class Stop:
    """Who asked for a stop, and the deadline of the code in hand."""

    def __init__(self, graceful_timeout: float, last_resort: Callable[[], None]) -> None:
        """Nobody has asked.

        Args:
            graceful_timeout: seconds that the user's code in hand has after the first TERM or INT.
            last_resort: ends the process; called when the user's code swallows ``StopNow``.
        """
        self.graceful_timeout = graceful_timeout
        self.signal: int | None = None  # the one that asked first
        self.at_once = False  # QUIT or a second TERM: nothing more is to be waited for
        self.urgent = False  # the code in hand (an import) is interrupted by the first TERM
        self.interrupted = False  # StopNow has been raised
        self.deadline: float | None = None  # monotonic seconds; None: the code in hand has all its time
        self._last_resort = last_resort
        self._raised = 0
        self._in_user_code = False

    def enter(self) -> bool:
        """The user's code begins: in there a stop whose time is up raises ``StopNow``; tell whether it had begun."""
        outer, self._in_user_code = self._in_user_code, True
        try:
            self.raise_if_due()
        except BaseException:
            self._in_user_code = outer
            raise
        return outer

    def leave(self, outer: bool) -> None:
        """The user's code has ended; ``outer`` is what ``enter`` told."""
        self._in_user_code = outer

    def ask(self, number: int) -> None:
        """Signal ``number`` asks for a stop; called from its handler."""
        self.at_once = self.at_once or number == signal.SIGQUIT or self.signal is not None
        if self.signal is None:
            self.signal = number
        self.deadline = time.monotonic() + (0 if self.at_once or self.urgent else self.graceful_timeout)
        self._arm()
        self.raise_if_due()

    def set_deadline(self, grace: float) -> None:
        """Give the code that comes next ``grace`` seconds."""
        self._raised = 0
        self.deadline = time.monotonic() + grace
        self._arm()

    def grant(self, least: float) -> None:
        """Give the hooks that come next what is left of the time, the whole if nobody asked, ``least`` at any rate."""
        left = self.graceful_timeout if self.deadline is None else self.deadline - time.monotonic()
        self.set_deadline(least if self.interrupted else max(left, least))

    def clear_deadline(self) -> None:
        """The code that had a deadline has ended in time; one of a stop that was asked for meanwhile stays."""
        if self.signal is None:
            self.deadline = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def raise_if_due(self) -> None:
        """Raise ``StopNow`` if the user's code is in hand and its time is up."""
        if not self._in_user_code or self.deadline is None or time.monotonic() < self.deadline:
            return
        self._raised += 1
        self.interrupted = True
        if self._raised > LAST_RESORT:
            self._last_resort()
        raise StopNow

    def ring_by(self, moment: float) -> None:
        """Let SIGALRM ring at ``moment`` (monotonic seconds) if that is before the deadline; that stays."""
        if self.deadline is not None:
            left = min(self.deadline, moment) - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.0001), 1.0)

    def _arm(self) -> None:
        """Let SIGALRM ring at the deadline, and each second after it while the user's code will not end."""
        if self.deadline is not None:
            self.ring_by(self.deadline)
