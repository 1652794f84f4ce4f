"""The task that this process does."""

from __future__ import annotations

from typing import NamedTuple

from daemonkit.errors import UsageError


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
        """Its id, as the command shows it."""
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


def begin(task: Running) -> None:
    """Let ``current_task`` be ``task``."""
    global _task
    _task = task


def _running() -> Running:
    if _task is None:
        raise UsageError("current_task: this process does no task; put() has the daemon call the function in one")
    return _task


_task: Running | None = None
current_task = CurrentTask()
