"""What PID 1 of a container owes the others: reap whoever is adopted, pass signals on, end with the daemon.

The daemon runs as its only child.  So every orphan is adopted here, where nobody waits for a child of his own,
and nothing that a job waits for can be reaped from under it.
"""

from __future__ import annotations

import os
import signal


def serve(child: int) -> int:
    """Be init for ``child`` until it ends; return its exit status as a shell would give it.

    Every signal must be blocked by the caller: they are taken one at a time by sigwait(3), none is lost.
    """
    everything = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    while True:
        status = _reap(child)
        if status is not None:
            return status
        number = signal.sigwait(everything)
        if number != signal.SIGCHLD:
            os.kill(child, number)


def _reap(child: int) -> int | None:
    """Reap all who have ended; the exit status of ``child`` if it was among them."""
    status = None
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return status
        if ended is None:
            return status
        if ended.si_pid == child:
            status = ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
