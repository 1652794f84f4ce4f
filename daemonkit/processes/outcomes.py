"""Finished calls of a pool, for whoever wants them as they finish."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Final

from daemonkit.processes.bells import Bells
from daemonkit.processes.future import Call

_UNREAD: Final = 10_000  # outcomes that are kept for ``results``


class Outcomes:
    """Finished calls that nobody has asked about yet."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changed = Bells()
        self._open: set[Call] = set()
        self._unread: OrderedDict[Call, None] = OrderedDict()

    def expect(self, call: Call) -> None:
        with self._lock:
            call.watcher = self
            self._open.add(call)

    def awaited(self, call: Call) -> None:
        with self._lock:
            self._unread.pop(call, None)

    def ended(self, call: Call) -> None:
        with self._lock:
            self._open.discard(call)
            if not call.is_awaited and not call.cancelled():
                self._unread[call] = None
                if len(self._unread) > _UNREAD:
                    self._unread.popitem(last=False)
            self._changed.ring()

    def forsake(self) -> None:
        """We are a fork: whoever held the lock is not here, nor who would end what is open."""
        self._lock = threading.RLock()
        self._changed = Bells()
        self._open.clear()

    def read(self, timeout: float | None) -> Iterator[Any]:
        return _Reader(self, timeout)

    def take(self, timeout: float | None) -> Call | None:
        """The next one; None if none is left."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                while self._unread:
                    call, _ = self._unread.popitem(last=False)
                    if not call.is_awaited:
                        return call
                if not self._open:
                    return None
                bell = self._changed.hang()
            left = -1 if end is None else min(max(end - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            if not bell.acquire(timeout=left):
                with self._lock:
                    self._changed.take_down(bell)
                raise TimeoutError(f"no call finished within {timeout:g} s")


class _Reader:
    def __init__(self, outcomes: Outcomes, timeout: float | None) -> None:
        self._outcomes = outcomes
        self._timeout = timeout

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        call = self._outcomes.take(self._timeout)
        if call is None:
            raise StopIteration
        return call.result()
