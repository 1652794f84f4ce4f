"""A lock, or a share of one, or one of a semaphore's units, that is ours."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from daemonkit.cluster.contender import Contender
from daemonkit.errors import CoordinatorError


class Hold:
    """What was got, until it is released: best by a ``with`` block."""

    def __init__(self, name: str, contender: Contender, forget: Callable[[Contender], None]) -> None:
        """Use ``Coordinator.lock`` or ``semaphore``."""
        self.name = name
        self.token = contender.token  # a fencing number: higher than that of whoever had the lock before
        self.session = contender.tree.session
        self._contender: Contender | None = contender
        self._forget = forget

    def is_held(self) -> bool:
        """Whether it is still ours: for sure, and now: it is looked for at the coordinator.

        False after a lost connection until there is another, and for good when the session is gone: then somebody else
        may have it.  Asked before each step of a long piece of work, it keeps two from doing it; what the work writes
        to can refuse a ``token`` smaller than the last one.
        """
        if self._contender is None or not self._contender.is_held:
            return False
        try:
            return self._contender.is_there() and self._contender.is_held
        except CoordinatorError:  # nobody knows
            return False

    def release(self) -> None:
        """Let the next have it; a second call does nothing.

        Raises:
            CoordinatorError: it could not be told; it ends with the session.
        """
        contender, self._contender = self._contender, None
        if contender is not None:
            self._forget(contender)
            contender.leave()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class LockInfo(NamedTuple):
    """Who has a lock, or waits for it."""

    name: str
    kind: str  # "exclusive", "shared" or "semaphore"
    is_held: bool
    token: int
    host: str
    pid: int
    daemon: str
    since: float  # seconds since the epoch, when it began to wait
    session: str
