"""A thread that has a session proven again and again, while something stands or falls with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from daemonkit.cluster.session import Session
from daemonkit.cluster.tree import State

_PROOFS: Final = 4  # within a time-out: see ``session``
_SHORTEST: Final = 0.05  # seconds between them


class KeepAlive:
    """There is no thread before the first thing that stands or falls with the session."""

    def __init__(self, status: Session, prove: Callable[[], None]) -> None:
        """``prove`` is called by the thread, while there is a connection; it does not wait for the reply."""
        self._status = status
        self._prove = prove
        self._has_begun = False
        self._stakes: set[int] = set()
        self._at_stake = threading.Event()
        self._closed = threading.Event()

    def add(self, stake: object) -> None:
        """``stake`` stands or falls with the session."""
        is_first, self._has_begun = not self._has_begun, True
        self._stakes.add(id(stake))
        self._at_stake.set()
        if is_first:
            threading.Thread(target=self._run, name="session", daemon=True).start()

    def remove(self, stake: object) -> None:
        """It does no more; a second call does nothing."""
        self._stakes.discard(id(stake))
        if not self._stakes and not self._closed.is_set():
            self._at_stake.clear()

    def close(self) -> None:
        """The session is over, for us: let the thread end."""
        self._closed.set()
        self._at_stake.set()

    def _run(self) -> None:
        while True:
            self._closed.wait(max(self._status.timeout / _PROOFS, _SHORTEST))
            self._at_stake.wait()
            if self._closed.is_set():
                return
            if self._status.state is State.CONNECTED:
                self._prove()
