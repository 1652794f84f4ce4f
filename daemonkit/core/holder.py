"""The process that holds a PID file, addressed so that no other can be hit: by pidfd (pidfd_open(2))."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from types import TracebackType

from daemonkit.core import tree
from daemonkit.core.pidfile import State, holds, inspect
from daemonkit.errors import NotAllowed, NotRunning

MOST = 2**31 - 1  # milliseconds that poll(2) can wait
STALE_PATIENCE = 1.0  # seconds that a new holder may take from its lock to having wiped out a dead one's number
PID_PATIENCE = 10.0  # seconds that a launcher, on a busy machine, may take from its lock to the daemon's number


class Holder:
    """A living process and a descriptor that means it and no later one of its number."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Use ``find``."""
        self.pid = pid
        self._pidfd = pidfd

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if the process has ended.

        Raises:
            NotAllowed: it belongs to another user.
        """
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return
        except PermissionError:
            name = signal.Signals(number).name
            raise NotAllowed(f"send {name} to pid {self.pid}: it belongs to another user; try as root") from None

    def wait(self, timeout: float | None) -> bool:
        """Sleep until the process has ended or ``timeout`` seconds have passed; tell whether it has ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else min(int(timeout * 1000 + 0.999), MOST)))

    def kill_tree(self, patience: float) -> None:
        """SIGKILL the process and all its descendants; wait so many seconds for the end of these."""
        tree.kill(self.pid, self._pidfd, patience)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def find(path: str) -> Holder | None:
    """The holder of the PID file at ``path``; None if there is none.

    The number is read, a pidfd opened on it, and only if after that the lock is still held under that number,
    by a process that has this very file open, is it the one that is meant.
    """
    while True:
        state = settled(path)
        if not state.locked or state.pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(state.pid)
            if inspect(path) == state and holds(state.pid, path):
                return Holder(state.pid, pidfd)
            os.close(pidfd)
        if _changed(path, state, STALE_PATIENCE) is None:
            return None  # held, but not by the process whose number stands there: nobody may be signalled


def foreign_uid(pid: int) -> int | None:
    """A user besides root and ourselves as whom ``pid`` runs: one whose word is not to be taken; None for none.

    Raises:
        NotRunning: it has ended.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            uids = next(line.split()[1:] for line in file if line.startswith("Uid:"))
    except OSError:
        raise NotRunning(f"pid {pid} has just ended") from None
    # All four: the effective one alone could be had for a moment, by executing a set-user-ID program.
    return next(iter({*map(int, uids)} - {0, os.geteuid()}), None)


def settled(path: str) -> State:
    """What the PID file says, after a launcher that holds it has had the time to have its daemon's PID written."""
    state = inspect(path)
    if state.locked and state.pid is None:
        return _changed(path, state, PID_PATIENCE) or state
    return state


def _changed(path: str, seen: State, timeout: float) -> State | None:
    """What the PID file says when it is no longer what was ``seen``; None if that stays."""
    from daemonkit.core.inotify import wait_until

    def look() -> State | None:
        now = inspect(path)
        return None if now == seen else now

    return wait_until(os.path.dirname(path), look, timeout)
