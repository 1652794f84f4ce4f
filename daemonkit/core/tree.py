"""A process and all that descend from it, for when they must all end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final

_LONGEST: Final = 1.0  # seconds that a tree may grow while it is stopped


def children() -> set[int]:
    """Our own children, adopted ones too (proc(5), /proc/PID/task/TID/children)."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found.update(map(int, file.read().split()))
    return found


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, parents first (proc(5), /proc/PID/task/TID/children)."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    children = [int(word) for word in file.read().split()]
                found += children
                todo += children
    return found


def kill(pid: int, pidfd_send: int, patience: float = 0.0) -> None:
    """SIGKILL ``pid`` and its descendants; return when the descendants have ended, or ``patience`` seconds later.

    The root is stopped first, so that it starts no more; then its tree, until no new member is seen or, if that grows
    faster than it is stopped, a second has passed; then all are killed.  What was never seen comes to whoever adopts it
    (prctl(2), subreaper).  ``pidfd_send`` is a pidfd of the root, so that a number that was reused is not hit.
    """
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd_send, signal.SIGSTOP)
    until = time.monotonic() + _LONGEST
    seen: set[int] = set()
    while fresh := [child for child in descendants(pid) if child not in seen]:
        seen.update(fresh)
        for child in fresh:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGSTOP)
        if time.monotonic() > until:
            break
    with contextlib.ExitStack() as stack:
        pidfds = [stack.enter_context(file) for file in _opened(seen if patience else ())]
        for child in seen:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd_send, signal.SIGKILL)
        until = time.monotonic() + patience
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(until - time.monotonic(), 0) * 1000)


def _opened(pids: Iterable[int]) -> Iterator[BinaryIO]:
    """A pidfd of each that is there, as far as there are descriptors: nobody waits for the rest."""
    for pid in pids:
        try:
            yield open(os.pidfd_open(pid), "rb", buffering=0)
        except ProcessLookupError:
            continue
        except OSError:
            return
