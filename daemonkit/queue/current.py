"""The task that this process does."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from daemonkit.errors import UsageError
from daemonkit.queue.payload import MOST


class Running(NamedTuple):
    """A task that is being done."""

    queue: str
    id: str
    token: int
    attempt: int


class CurrentTask:
    """``current_task``: what a task may know of itself.  Outside a task each of its attributes raises UsageError."""

    @property
    def queue(self) -> str:
        """The name of its queue."""
        return _running().queue

    @property
    def id(self) -> str:
        """The id by which it was put, the same for each attempt."""
        return _running().id

    @property
    def token(self) -> int:
        """A fencing number: it grows with each reservation of the queue.

        Whatever the task writes to can refuse what comes with a smaller one, from an attempt that was thought dead.
        """
        return _running().token

    @property
    def attempt(self) -> int:
        """1 for the first attempt, and one more after each failure."""
        return _running().attempt

    def progress(self, value: object) -> None:
        """Say how far the task has come; ``daemonkit queue peek`` and ``handle.progress()`` show it.

        Args:
            value: what JSON has; of several within a second the last one counts.

        Raises:
            UsageError: it is nothing that JSON has, or larger than 16 MB.
        """
        _running()
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            size = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"progress: {error}; it is told as JSON") from None
        if size > MOST:
            raise UsageError(f"progress: {size} bytes of JSON; {MOST} are the most")
        if _tell is not None:
            _tell(text)


def begin(task: Running, tell: Callable[[str], object]) -> None:
    """Let ``current_task`` be ``task``, whose progress ``tell`` tells."""
    global _task, _tell
    _task, _tell = task, tell


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The task's time-out waits for the end of the block.

    In the middle of an exchange it would look as if the broker did not answer, or leave something half done.  To block
    the signal would not do: beside other threads the kernel gives it to one of those, and Python runs its handler here.
    """
    global _depth, _owed
    if threading.current_thread() is not threading.main_thread():  # handlers run in that one alone
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _owed is not None:
            owed, _owed = _owed, None
            raise owed


def interrupt(error: BaseException) -> None:
    """Raise ``error`` in the task, now or at the end of what is not to be disturbed; for a signal's handler."""
    global _owed
    if not _depth:
        raise error
    _owed = error


def _running() -> Running:
    if _task is None:
        raise UsageError("current_task: this process does no task; put() has the daemon call the function in one")
    return _task


_task: Running | None = None
_tell: Callable[[str], object] | None = None
_depth = 0  # blocks that are not to be disturbed, in one another
_owed: BaseException | None = None  # what is to be raised at the end of the outermost
current_task = CurrentTask()
