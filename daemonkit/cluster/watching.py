"""One path that is watched: its value and the names below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from daemonkit.cluster.recipe import Recipe
from daemonkit.cluster.tree import Tree


class Value(NamedTuple):
    """A path as it was read."""

    path: str
    data: bytes | None  # None: there is nothing at that path
    version: int  # of the data: grows with each change
    children: tuple[str, ...] = ()  # the names right below it, sorted; of ``watch`` alone


class Watching(Recipe):
    """Calls ``func`` with each state of the path that is seen, the first at once.

    States that were passed by between two looks are not seen.  A node that is deleted and created again is watched on.
    """

    def __init__(self, tree: Tree, path: str, func: Callable[[Value], object]) -> None:
        """See ``Coordinator.watch``."""
        super().__init__(tree)
        self._path = path
        self._func = func
        self._last: tuple[object, ...] | None = None

    def look(self) -> None:
        node = self.tree.get(self._path, self.touch)
        names = tuple(sorted(self.tree.children(self._path, self.touch) or ()))
        value = Value(self._path, node.data if node else None, node.version if node else 0, names)
        seen = (value, node.number if node else 0)
        if seen != self._last:
            self._last = seen
            self._func(value)
