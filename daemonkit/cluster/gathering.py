"""A barrier, where so many wait for each other; and a queue, by which the cluster hands things over in order."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Final

from daemonkit.cluster.recipe import Recipe
from daemonkit.cluster.tree import Tree, check_data, in_order
from daemonkit.errors import CoordinatorTimeout

_ITEM: Final = "item-"

Until = Callable[[Recipe, Callable[[], bool], float | None], bool]


class _Look(Recipe):
    """Is touched by changes that a condition has asked to be told of."""

    def look(self) -> None:
        pass


class Barrier:
    """So many enter together, and leave together."""

    def __init__(self, tree: Tree, directory: str, count: int, until: Until) -> None:
        """Use ``Coordinator.barrier``."""
        self._tree = tree
        self._count = count
        self._until = until
        self._entrants = f"{directory}/entrants"
        self._ready = f"{directory}/ready"
        self._mine = f"{self._entrants}/{uuid.uuid4().hex}"

    def enter(self, timeout: float | None = None) -> None:
        """Wait until ``count`` have entered; ``timeout`` in seconds, None: as long as need be.

        Raises:
            CoordinatorTimeout: they had not; we have left again.
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        look = _Look(self._tree)

        def is_open() -> bool:
            mine = self._tree.get(self._mine)
            if mine is None or mine.session != self._tree.session:
                self._tree.create(self._mine, ephemeral=True)
            # The last to come opens it; all wait for that alone, or each would be woken by each.
            if len(self._tree.children(self._entrants) or ()) >= self._count:
                self._tree.create(self._ready)
            return self._tree.get(self._ready, look.touch) is not None

        if not self._until(look, is_open, timeout):
            self._tree.delete(self._mine)
            raise CoordinatorTimeout(f"enter the barrier {self._entrants}: not {self._count} have come in time")

    def leave(self, timeout: float | None = None) -> None:
        """Wait until all have left.

        Raises:
            CoordinatorTimeout: they had not; we have.
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        look = _Look(self._tree)

        def is_empty() -> bool:
            self._tree.delete(self._mine)
            if self._tree.children(self._entrants, look.touch):
                return False
            self._tree.delete(self._ready)
            return True

        if not self._until(look, is_empty, timeout):
            raise CoordinatorTimeout(f"leave the barrier {self._entrants}: not all have left in time")


class Queue:
    """Things in order, each given to one taker.

    It is for a few things now and then, such as the parts of a plan.  It is not for tasks: a thing is gone when it is
    taken, also if the taker dies the moment after; each is a node in every server's memory; and with thousands that
    wait, each look reads all their names.  For tasks there are queues with ``@task``.
    """

    def __init__(self, tree: Tree, directory: str, until: Until) -> None:
        """Use ``Coordinator.queue``."""
        self._tree = tree
        self._directory = directory
        self._until = until

    def put(self, data: bytes) -> None:
        """Put ``data`` behind all that is there.

        Raises:
            CoordinatorLost: the connection was lost: it may have been put.
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        self._tree.create(f"{self._directory}/{_ITEM}", check_data(data, "put"), sequential=True)

    def get(self, timeout: float | None = None) -> bytes:
        """Take the oldest, waiting for one; ``timeout`` in seconds, None: as long as need be.

        Raises:
            CoordinatorTimeout: there was none in that time.
            CoordinatorLost: the connection was lost: one may have been taken, and is lost.
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        look = _Look(self._tree)
        taken: list[bytes] = []

        def has_taken() -> bool:
            names = self._tree.children(self._directory, look.touch) or []
            for name in in_order(names, lambda name: int(name.removeprefix(_ITEM))):
                node = self._tree.get(f"{self._directory}/{name}")
                if node is not None and self._tree.delete(node.path):  # else somebody else was faster
                    taken.append(node.data)
                    return True
            return False

        if not self._until(look, has_taken, timeout):
            raise CoordinatorTimeout(f"get from the queue {self._directory}: there was nothing in that time")
        return taken[0]

    def __len__(self) -> int:
        """How many are there.

        Raises:
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        return len(self._tree.children(self._directory) or ())
