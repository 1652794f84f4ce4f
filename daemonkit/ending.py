"""End a daemon from outside, and see that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

from daemonkit import objects
from daemonkit.config.options import Schedule
from daemonkit.core import asking
from daemonkit.core.holder import Holder, find, settled
from daemonkit.core.pidfile import PidFile, inspect
from daemonkit.errors import ControlError, DaemonkitError, NotAllowed, StopTimeout, UsageError

ANSWER_TIME: Final = 5.0  # seconds that a daemon which has lost its PID file has to say so
KILL_TIME: Final = 5.0  # seconds that the kernel may take to end what was sent KILL


def schedule(timeout: float) -> Schedule:
    """TERM, then KILL after ``timeout`` seconds.

    Raises:
        UsageError: ``timeout`` is not a time.
    """
    if not 0 <= timeout < 1e9:
        raise UsageError(f"--timeout {timeout:g}: a number of seconds, 0 or more, is wanted")
    return ((signal.SIGTERM, timeout), (signal.SIGKILL, KILL_TIME))


def end(pid_path: str, socket_path: str, stop_schedule: Schedule) -> str:
    """End the holder of ``pid_path``; return how, in words that follow its name.

    Raises:
        NotAllowed: it belongs to another user.
        StopTimeout: not even KILL ended it in time.
        ControlError: its PID file was deleted, and it does not answer.
    """
    seek_lost(pid_path, socket_path)
    with contextlib.ExitStack() as stack:
        holder = find(pid_path)
        if holder is None:
            state = settled(pid_path)
            if state.locked:
                raise NotAllowed(
                    f"{pid_path} is locked, but not by the process whose number stands in it ({state.pid}); "
                    "nobody was signalled: find the holder with lslocks(8)"
                )
            swept = state.exists and sweep(pid_path, socket_path)
            return "is not running; what it had left was removed" if swept else "is not running"
        stack.enter_context(holder)
        how = _escalate(holder, stop_schedule)
    sweep(pid_path, socket_path)
    return how


def seek_lost(pid_path: str, socket_path: str) -> None:
    """Find a daemon whose PID file was deleted or replaced by its socket; asked for its status, it restores the file.

    Raises:
        ControlError: it is there, but too busy to answer.
    """
    if not os.path.exists(socket_path) or inspect(pid_path).locked or (pid := asking.listener(socket_path)) is None:
        return
    try:
        asking.ask(socket_path, {"do": "status"}, pid=pid, timeout=ANSWER_TIME)
    except ControlError:
        if asking.listener(socket_path) == pid and not inspect(pid_path).locked:
            raise ControlError(
                f"{pid_path} was deleted under pid {pid}, which is too busy to restore it; try again when it is idle"
            ) from None


def sweep(pid_path: str, socket_path: str) -> bool:
    """Remove the files of a daemon that is gone, unless the next one is there already; tell whether they are gone."""
    try:
        if not os.path.lexists(pid_path) and not os.path.lexists(socket_path):
            return True
        pidfile = PidFile(pid_path)
        pidfile.acquire(0, write_pid=False)  # the disk may be full, and we are no daemon
    except DaemonkitError:
        return False  # another daemon runs by now, or the files are not ours to remove
    with contextlib.suppress(OSError):
        os.unlink(socket_path)
    objects.sweep(pid_path)
    pidfile.release()
    return True


def _escalate(holder: Holder, stop_schedule: Schedule) -> str:
    waited = 0.0
    for number, patience in stop_schedule:
        if number == signal.SIGKILL:
            holder.kill_tree(patience)
        else:
            holder.signal(number)
            holder.signal(signal.SIGCONT)  # one that was stopped could not act on it
        if holder.wait(patience):
            if number == signal.SIGKILL:
                return f"was killed, pid {holder.pid}: it had not ended within {waited:g} s"
            return f"was stopped, pid {holder.pid}"
        waited += patience
    killed = any(number == signal.SIGKILL for number, _ in stop_schedule)
    why = "KILL, too, did not end it: it is stuck in the kernel" if killed else "add KILL to its stop_schedule"
    raise StopTimeout(f"pid {holder.pid} is still there after {waited:g} s; {why}")
