"""Signals become values: a handler only notes, the loop acts (law 2).

CPython calls a handler between two bytecodes of the main thread, at any place of the user's code.  So ours adds
one to a dict and is done; the wakeup descriptor (``signal.set_wakeup_fd``) ends the loop's sleep.  Its pipe may
overflow under a storm, the dict cannot: no kind of signal is ever lost, and equal ones merge as the kernel's do.

One thing cannot wait for the loop: a stop whose time is up, or that must be at once, while the user's code holds
the thread.  Then, and only inside ``interruptible``, the handler raises ``StopNow``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final, NoReturn

TERMINATION: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
RESERVED: Final = frozenset({signal.SIGALRM, signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP})
LAST_RESORT: Final = 3  # StopNow raised so often and still not out: the user's code swallows it


class StopNow(BaseException):
    """Raised into the user's code when a stop may wait no longer; not an Exception, so it is rarely swallowed."""


class Signals:
    """Which signals have come since the loop looked last, and the deadline of a stop."""

    def __init__(self, graceful_timeout: float, last_resort: Callable[[], None]) -> None:
        """Nothing is installed yet.

        Args:
            graceful_timeout: seconds that the user's code in hand has after the first TERM or INT.
            last_resort: ends the process; called when the user's code swallows ``StopNow``.
        """
        self.pending: dict[int, int] = {}
        self.graceful_timeout = graceful_timeout
        self.stop_signal: int | None = None
        self.interrupted = False  # StopNow has been raised
        self.at_once = False  # QUIT or a second TERM: nothing more is to be waited for
        self.urgent = False  # True: the code in hand may be interrupted by the first TERM (import, own main loop)
        self.after_note: Callable[[], None] | None = None  # a script's own main loop is served from the handlers
        self._last_resort = last_resort
        self._handlers: dict[int, Any] = {}
        self._deadline: float | None = None
        self._in_user_code = False
        self._is_child = False
        self._raised = 0

    def install(self, numbers: Iterable[int], held: Iterable[int] = ()) -> int:
        """Catch ``numbers`` (and SIGALRM), route them to the wakeup pipe; return its reading end.

        All signals are unblocked but ``held``: those that an earlier image caught wait until ``unblock_all``.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.catch(signal.SIGALRM, self._alarm)
        for number in numbers:
            self.catch(number, self._terminate if number in TERMINATION else self._note)
        signal.pthread_sigmask(signal.SIG_SETMASK, set(held) - self._handlers.keys())
        os.register_at_fork(after_in_child=self._become_child)
        return reader

    def catch(self, number: int, handler: Callable[[int, FrameType | None], Any] | None = None) -> None:
        """Route ``number`` to ``handler`` (default: note it for the loop)."""
        self._handlers[number] = handler = handler or self._note
        signal.signal(number, handler)
        # Restarted by the kernel (sigaction(2), SA_RESTART), waitpid(2) or read(2) never lets CPython call a handler:
        # good for what can wait for the loop, not for a stop and its deadline, which must reach the code in hand.
        signal.siginterrupt(number, number in TERMINATION or number == signal.SIGALRM)

    def serve_from_handlers(self, act: Callable[[], None]) -> None:
        """Call ``act`` after each signal is noted, whatever call of the script's own main loop it interrupts."""
        self.after_note = act
        for number in self._handlers:
            signal.siginterrupt(number, True)

    def taken_over(self) -> list[tuple[int, Any]]:
        """Signals whose handler somebody else has replaced, with what stands there now."""
        # Asked after every job: the getsignal of signal makes an enum of each answer, 3 microseconds apiece.
        return [(n, signal.getsignal(n)) for n, ours in self._handlers.items() if _signal.getsignal(n) is not ours]

    def restore(self, number: int) -> None:
        """Put our handler for ``number`` back."""
        signal.signal(number, self._handlers[number])

    def take(self) -> list[int]:
        """The kinds noted since the last call, in the order of their arrival."""
        pending, self.pending = self.pending, {}
        return list(pending)

    def interruptible(self) -> _Interruptible:
        """Mark the user's code, by ``with``: in there a stop whose time is up raises ``StopNow``."""
        return _Interruptible(self)

    def _become_child(self) -> None:
        """The user's code has forked: its child is no daemon, dies of a TERM, and wakes nobody's loop."""
        self._is_child = True
        signal.set_wakeup_fd(-1)
        for number, ours in self._handlers.items():
            if signal.getsignal(number) == ours:
                signal.signal(number, signal.SIG_DFL)

    def block_all(self) -> None:
        """Keep every signal pending, for the moments around an exec (a handler's address does not survive it)."""
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())

    def unblock_all(self) -> None:
        """Let them come again."""
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    @property
    def deadline(self) -> float | None:
        """When the code in hand is interrupted (monotonic seconds); None while nobody asked for a stop."""
        return self._deadline

    def set_deadline(self, grace: float | None) -> None:
        """Give the code that comes next ``grace`` seconds; None: what is left, or the whole time if nobody asked."""
        if grace is None and self._deadline is None:
            grace = self.graceful_timeout
        if grace is not None:
            self._raised = 0
            self._deadline = time.monotonic() + grace
        self.arm_deadline()

    def clear_deadline(self) -> None:
        """The code that had a deadline has ended in time; one of a stop that was asked for meanwhile stays."""
        if self.stop_signal is None:
            self._deadline = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending[number] = self.pending.get(number, 0) + 1
        if self.after_note:
            self.after_note()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.pending[number] = self.pending.get(number, 0) + 1
        self.at_once = self.at_once or number == signal.SIGQUIT or self.stop_signal is not None
        if self.stop_signal is None:
            self.stop_signal = number
        self._deadline = time.monotonic() + (0 if self.at_once or self.urgent else self.graceful_timeout)
        self.arm_deadline()
        self._raise_if_due()
        if self.after_note:
            self.after_note()

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        self.pending[number] = 1
        if self._deadline is not None:
            self._raise_if_due()
        if self.after_note:
            self.after_note()

    def arm_deadline(self) -> None:
        """Let SIGALRM ring at the deadline, and each second after it while the user's code will not end."""
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.0001), 1.0)

    def _raise_if_due(self) -> None:
        if not self._in_user_code or self._deadline is None or time.monotonic() < self._deadline:
            return
        self._raised += 1
        self.interrupted = True
        if self._raised > LAST_RESORT:
            self._last_resort()
        raise StopNow


class _Interruptible:
    """What ``Signals.interruptible`` gives; a class, as a generator would cost a job without work a tenth more."""

    __slots__ = ("_outer", "_signals")

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        signals = self._signals
        self._outer, signals._in_user_code = signals._in_user_code, True
        try:
            signals._raise_if_due()
        except BaseException:
            signals._in_user_code = self._outer
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self._signals._in_user_code = self._outer
        if self._signals._is_child:
            _end_child(error)


def _end_child(error: BaseException | None) -> NoReturn:
    """A child that the user's code has forked comes back from there: it must not become a second daemon."""
    code = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)
