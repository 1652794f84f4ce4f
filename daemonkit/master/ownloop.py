"""A script's own main loop: the daemon's work is done inside the signal handlers, between two of its bytecodes."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from daemonkit.core.stop import StopNow

if TYPE_CHECKING:
    from daemonkit.core.posixtimer import PosixTimer
    from daemonkit.master.master import Master

log = logging.getLogger("daemonkit")

BREATH: Final = 1_000_000  # nanoseconds that the main loop has to itself when jobs are always due
LATE: Final = 100_000_000  # nanoseconds after which an alarm that has not come was taken by somebody


class OwnLoop:
    """Lets any signal (SIGALRM, SIGIO of the control socket, SIGTERM ...) interrupt ``main_loop``, never nested."""

    def __init__(self, master: Master) -> None:
        """Serve ``master`` while the script's loop runs."""
        self._master = master
        self._in_turn = False
        self._may_leave = False
        self._second = _second_alarm()

    def run(self, main_loop: Callable[[], Any]) -> None:
        """Run ``main_loop`` to its end; the daemon stops with it, with exit code 1 if it raised."""
        signals, loop = self._master.parts.signals, self._master.parts.loop
        signals.serve_from_handlers(self._interrupt)
        loop.on_watch = _signal_when_ready
        self._master.parts.timer.on_fallback = None
        for fd in loop.watched():
            _signal_when_ready(fd)
        try:
            try:
                with signals.interruptible():
                    self._may_leave = True
                    self._interrupt()
                    main_loop()
            finally:
                self._may_leave = False
        except StopNow:
            log.info("the main loop was left")
        except SystemExit as error:
            self._master.exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # whatever ends the main loop ends the daemon, in order and with a traceback
            log.exception("the main loop failed")
            self._master.exit_code = 1
        finally:
            signals.after_note = None
            if self._second:
                self._second.close()

    def _interrupt(self) -> None:
        """Be the daemon for a moment; called from a handler, so anything may be half done around us."""
        if self._in_turn:
            return
        is_noted = True
        while is_noted:
            self._in_turn = True
            try:
                more = self._turn()
            finally:
                self._in_turn = False
            # Noted after the last look, while the handler saw a turn under way.
            is_noted = bool(set(self._master.parts.signals.pending) - {signal.SIGALRM})
        if self._master.is_stopping and self._may_leave:
            self._may_leave = False  # once: a signal that comes meanwhile must not raise into what is done about it
            raise StopNow
        timer = self._master.parts.timer
        if more:
            timer.wake_at(time.monotonic_ns() + BREATH)
        if self._second:
            self._second.arm(timer.rings_at + LATE if timer.rings_at else 0)

    def _turn(self) -> bool:
        parts = self._master.parts
        parts.timer.check_clock()
        more = parts.timer.run_due()
        # SIGIO tells of what comes, not of what was there when its descriptor was new: so look again soon.
        more = parts.loop.turn(wait=False) or more
        while set(parts.signals.pending) - {signal.SIGALRM}:
            self._master.act_on_signals()
        return more


def _second_alarm() -> PosixTimer | None:
    """A SIGIO in case that the main loop, or a library in it, takes the alarm or its handler for itself."""
    try:
        from daemonkit.core.posixtimer import PosixTimer  # ctypes takes its time, and most daemons have no such loop

        return PosixTimer(signal.SIGIO)
    except (OSError, ImportError) as error:
        log.warning("if the main loop takes the alarm, that is not noticed before the next signal: %s", error)
        return None


def _signal_when_ready(fd: int) -> None:
    """Let the kernel send SIGIO when ``fd`` becomes ready (fcntl(2), F_SETOWN and O_ASYNC)."""
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
