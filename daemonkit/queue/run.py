"""A task that is being done, as its consumer sees it."""

from __future__ import annotations

import logging
import math
from typing import Final

from daemonkit.core.chance import chance
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.queue.broker import Bury, Release, Reservation, Touch
from daemonkit.queue.declare import Policy
from daemonkit.queue.stderr import Stderr

TOUCHES: Final = 3  # within a ttr
log = logging.getLogger("daemonkit.queue")

LOST: Final = 3  # reservations that nobody ended, beyond max_retries, before a task is taken for the cause
REASON: Final = 20_000  # characters of a failure that are kept
PAUSE: Final = 1.0  # seconds between two tellings of how far a task has come


class Pulse:
    """When the broker is told again that a task is being done, and how far it has come."""

    def __init__(self, reservation: Reservation, asked: float) -> None:
        """The ttr runs since ``asked`` (monotonic seconds)."""
        self.at = asked + reservation.ttr / TOUCHES
        self._reservation = reservation
        self._progress: str | None = None
        self._told_at = 0.0

    def tell(self, progress: str, now: float) -> None:
        """It has come so far: that is told with the next touch, which comes soon."""
        self._progress = progress
        self.at = min(self.at, max(self._told_at + PAUSE, now))

    def touch(self, now: float) -> Touch:
        """What the broker is told to let its ttr begin anew."""
        progress, self._progress, self._told_at = self._progress, None, now
        self.at = now + self._reservation.ttr / TOUCHES
        return Touch(self._reservation, progress)


class Run:
    """From its reservation to its outcome."""

    def __init__(self, reservation: Reservation, policy: Policy, now: float, asked: float) -> None:
        """Begin ``now`` what was ``asked`` for then (monotonic seconds): its ttr runs since."""
        self.reservation = reservation
        self.policy = policy
        self.child: Child
        self.stderr: Stderr
        self.began = now
        self.due = math.inf if policy.timeout is None else now + policy.timeout
        self.pulse = Pulse(reservation, asked)
        self.kind = 0  # what its process has said: errand.DONE, FAILED; 0: nothing
        self.words = b""  # its result, or why it has failed
        self.is_given_back = False  # it is ended because the daemon stops
        self.is_ours = True

    @property
    def moment(self) -> float:
        """When something is to be done about it."""
        return min(self.pulse.at, self.due)

    def reason(self, receipt: Receipt, printed: str) -> str:
        """Why it has failed: in a line, with how its process ended; its traceback; the last that it has ``printed``."""
        words, _, trace = self.words.decode(errors="replace").partition("\n")
        why = f"{words} ({receipt})" if words else str(receipt)
        last = f"\nlast on stderr:\n{printed}" if printed else ""
        return f"{why}\n{trace}".rstrip()[: REASON - len(last)] + last


def bury(reservation: Reservation, reason: str) -> Bury:
    """It will never do: what the broker is told, and the log; a reason may be as long as a body that it cites."""
    reason = reason[:REASON]
    why, _, trace = reason.partition("\n")
    log.error("%s: %s; buried%s", reservation, why, trace and f"\n{trace}")
    return Bury(reservation, reason)


def fail(reservation: Reservation, policy: Policy, reason: str) -> Release | Bury:
    """An attempt has failed: what the broker is told, and the log."""
    attempt = reservation.failures + 1
    if attempt > policy.max_retries:
        return bury(reservation, reason)
    why, _, trace = reason.partition("\n")
    delay = policy.wait(reservation.failures, chance())
    what = f"attempt {attempt} of {policy.max_retries + 1}, again in {delay:.1f} s"
    log.warning("%s: %s; %s%s", reservation, why, what, trace and f"\n{trace}")
    return Release(reservation, delay, reason)
