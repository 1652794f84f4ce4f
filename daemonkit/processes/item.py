"""One call of a map: it has no future, for nobody would see it, and making one costs as much as all else together."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import CancelledError
from typing import Any

from daemonkit.processes.assignment import Assignment, Limits, Runner


class Item(Assignment):
    """A call whose outcome is taken once, by whoever goes through the map."""

    def __init__(self, runner: Runner, name: str, limits: Limits) -> None:
        """It waits to be given to a child."""
        super().__init__(runner, name, limits)
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._bell: threading.Lock | None = None  # released for who waits

    def done(self) -> bool:
        return self._is_done

    def tell_cancelled(self) -> None:
        self.set_exception(CancelledError())

    def is_cancelled(self) -> bool:
        return isinstance(self._error, CancelledError)

    def begin(self) -> None:
        self.is_begun = True

    def set_result(self, result: Any) -> None:
        self._result = result
        self._tell()

    def set_exception(self, exception: BaseException | None) -> None:
        self._error = exception
        self._tell()

    def _tell(self) -> None:
        self._is_done = True  # before it is looked who waits; who waits looks after he has said so
        if self._bell is not None:
            with contextlib.suppress(RuntimeError):  # it was, and that was interrupted
                self._bell.release()

    def take(self, timeout: float | None) -> Any:
        """Wait up to ``timeout`` seconds for the outcome; return the result, or raise the exception.

        Raises:
            TimeoutError: there is none yet.
        """
        if not self._is_done:
            self._wait(timeout)
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is None:
            return result
        try:
            raise error
        finally:
            del error, self  # the traceback holds this frame

    def _wait(self, timeout: float | None) -> None:
        bell = threading.Lock()
        bell.acquire()
        self._bell = bell
        limit = -1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX)
        if not self._is_done and not bell.acquire(timeout=limit):
            raise TimeoutError
