"""The calls of a pool that no child has."""

from __future__ import annotations

import threading
from collections import deque

from daemonkit.errors import PoolFull
from daemonkit.processes.assignment import Assignment
from daemonkit.processes.bells import Bells


class Waiting:
    """Calls in their order, as many as there is room for; under the pool's lock."""

    def __init__(self, most: int | None) -> None:
        """None yet; room for ``most`` (None: any number)."""
        self.calls: deque[Assignment] = deque()
        self._most = most
        self._room = Bells()

    @property
    def is_full(self) -> bool:
        """Whether there is no room."""
        return self._most is not None and len(self.calls) >= self._most

    def bell(self, call: Assignment) -> threading.Lock:
        """What ``call`` has to wait for before it is looked again whether there is room; without the pool's lock.

        Raises:
            PoolFull: the call's limits say not to wait.
        """
        if not call.limits.block:
            raise PoolFull(f"submit {call.name}: {self._most} calls wait already (max_pending)")
        return self._room.hang()

    def tell_room(self) -> None:
        """There may be room: have those look who wait for it."""
        self._room.ring()

    def put_back(self, calls: list[Assignment]) -> None:
        """They were with a child, and are the first again."""
        self.calls.extendleft(reversed(calls))

    def forget(self, call: Assignment) -> None:
        """It was withdrawn, and takes no room; if there is no bound, it is passed over when its turn comes."""
        if self._most is not None and self.remove(call):
            self._room.ring()

    def remove(self, call: Assignment) -> bool:
        """Take it out; False if it is not there."""
        if call not in self.calls:
            return False
        self.calls.remove(call)
        return True

    def take_all(self) -> list[Assignment]:
        """Take out all of them."""
        calls = list(self.calls)
        self.calls.clear()
        self.tell_room()
        return calls
