"""The future of a call in a pool: the standard library's, and what a process of its own makes possible beyond it."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from concurrent.futures._base import CANCELLED
from typing import Any, Protocol

from daemonkit.processes.assignment import Assignment, Limits, Runner
from daemonkit.processes.condition import Condition


class Watcher(Protocol):
    """Whoever keeps an account of calls."""

    def awaited(self, call: Call) -> None:
        """Somebody has asked for its outcome; told once."""
        ...

    def ended(self, call: Call) -> None:
        """It has an outcome, or was cancelled; told once."""
        ...


class Call(Future[Any], Assignment):
    """One call.

    ``cancel()`` is the standard library's: it takes back a call that no child has begun, and returns False for one that
    has been begun.  ``kill()`` ends that one, too.
    """

    def __init__(self, runner: Runner, name: str, limits: Limits) -> None:
        """Use ``Pool.submit``."""
        Future.__init__(self)
        Assignment.__init__(self, runner, name, limits)
        self._condition = Condition()
        self.is_awaited = False  # somebody has asked for its outcome
        # Not by add_done_callback(): struck by control-C inside, that would leave the future locked for ever.
        self.watcher: Watcher | None = None

    def kill(self) -> bool:
        """End the call: kill its child with all that descends from it, if there is one.

        The future is cancelled then: ``result`` raises CancelledError.  False if the call is over already.
        """
        return self.cancel() or self._runner.kill(self)

    def cancel(self) -> bool:
        """As the standard library's: take it back if no child has begun it."""
        return Assignment.cancel(self)

    def tell_cancelled(self) -> None:
        """It was withdrawn."""
        Future.cancel(self)
        with self._condition:
            if self._state == CANCELLED:  # and not CANCELLED_AND_NOTIFIED
                self.set_running_or_notify_cancel()
        self._end()

    def is_cancelled(self) -> bool:
        """Whether it was cancelled, and not killed."""
        return Future.cancelled(self)

    def begin(self) -> None:
        """A child begins it; for the runner, and never after ``withdraw``."""
        if not self.is_begun:
            self.is_begun = self.set_running_or_notify_cancel()

    def cancelled(self) -> bool:
        """Whether it was cancelled or killed."""
        return super().cancelled() or (self.done() and isinstance(self._outcome(), CancelledError))

    def result(self, timeout: float | None = None) -> Any:
        """As the standard library's, for a result; WorkerLost if its child was lost, CallTimeout if its time was up."""
        self._await()
        try:
            return super().result(timeout)
        finally:
            del self  # the traceback of what is raised holds this frame, and we what is raised

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As the standard library's."""
        self._await()
        error = super().exception(timeout)
        if isinstance(error, CancelledError):
            raise error
        return error

    def _await(self) -> None:
        if not self.is_awaited:
            self.is_awaited = True
            if self.watcher:
                self.watcher.awaited(self)

    def set_result(self, result: Any) -> None:
        """Have it; for the runner."""
        super().set_result(result)
        self._end()

    def set_exception(self, exception: BaseException | None) -> None:
        """Have it; for the runner."""
        super().set_exception(exception)
        self._end()

    def _end(self) -> None:
        if self.watcher:
            self.watcher.ended(self)

    def _outcome(self) -> BaseException | None:
        return None if super().cancelled() else super().exception()
