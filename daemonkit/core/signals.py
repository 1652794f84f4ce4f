"""Signals become values: a handler only notes, the loop acts (law 2).

CPython calls a handler between two bytecodes of the main thread, at any place of the user's code.  So ours adds
one to a dict and is done; the wakeup descriptor (``signal.set_wakeup_fd``) ends the loop's sleep.  Its pipe may
overflow under a storm, the dict cannot: no kind of signal is ever lost, and equal ones merge as the kernel's do.

What a stop may not wait for is in ``core.stop``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final, NoReturn

from daemonkit.core.stop import Stop

TERMINATION: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
RESERVED: Final = frozenset({signal.SIGALRM, signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP})
WAKING: Final = frozenset({signal.SIGALRM, signal.SIGCHLD, signal.SIGIO})  # the master's: they only end its sleep


class Signals:
    """Which signals have come since the loop looked last."""

    def __init__(self, stop: Stop) -> None:
        """Nothing is installed yet; the signals of ``TERMINATION`` will ask ``stop`` for one."""
        self.stop = stop
        self.pending: dict[int, int] = {}
        self.after_note: Callable[[], None] | None = None  # a script's own main loop is served from the handlers
        self._handlers: dict[int, Any] = {}
        self._is_child = False
        self._writer = -1

    def install(self, numbers: Iterable[int], held: Iterable[int] = ()) -> int:
        """Catch ``numbers`` (and SIGALRM), route them to the wakeup pipe; return its reading end.

        All signals are unblocked but ``held``: those that an earlier image caught wait until ``unblock_all``.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._writer = writer
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.catch(signal.SIGALRM, self._alarm)
        for number in numbers:
            self.catch(number, self._terminate if number in TERMINATION else self._note)
        signal.pthread_sigmask(signal.SIG_SETMASK, set(held) - self._handlers.keys())
        os.register_at_fork(after_in_child=self._become_child)
        return reader

    def close(self) -> None:
        """Give the wakeup pipe's end back, in a process that was forked."""
        os.close(self._writer)

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

    def drop_unclaimed(self) -> list[int]:
        """Forget the blocked signals that wait for nobody: unblocked, they would take their default action; tell which.

        Ignoring a signal discards a pending one, blocked or not (POSIX, "Signal Actions").
        """
        unclaimed = [number for number in signal.sigpending() if signal.getsignal(number) == signal.SIG_DFL]
        for number in unclaimed:
            signal.signal(number, signal.SIG_IGN)
            signal.signal(number, signal.SIG_DFL)
        return unclaimed

    def unblock_all(self) -> None:
        """Let them come again."""
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending[number] = self.pending.get(number, 0) + 1
        if self.after_note:
            self.after_note()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.pending[number] = self.pending.get(number, 0) + 1
        self.stop.ask(number)
        if self.after_note:
            self.after_note()

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        self.pending[number] = 1
        self.stop.raise_if_due()
        if self.after_note:
            self.after_note()


class _Interruptible:
    """What ``Signals.interruptible`` gives; a class, as a generator would cost a job without work a tenth more."""

    __slots__ = ("_outer", "_signals")

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        self._outer = self._signals.stop.enter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self._signals.stop.leave(self._outer)
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
