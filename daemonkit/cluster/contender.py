"""A place in a line: each who wants something has an ephemeral sequential node, and waits for the one before it alone.

So a death wakes one, not all.  A unique id in the node's name finds it again when the reply to its creation was lost.
That it is first in line counts only while its session is ours and is known to live: after a reconnection, the node of a
session that has expired may still stand there.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from daemonkit.cluster.recipe import Recipe
from daemonkit.cluster.tree import Node, Tree, in_order
from daemonkit.errors import CoordinatorLost

EXCLUSIVE = "exclusive"
SHARED = "shared"


class Entry(NamedTuple):
    """One who waits, or has it."""

    name: str  # the node's: UNIQUE-KIND-NUMBER
    kind: str
    number: int


class Wait(NamedTuple):
    """What is waited for: the node of ``entry``, or with None any change in the line."""

    entry: Entry | None


# From the line and our place in it to what is waited for; None: it is our turn.
Rule = Callable[[Sequence[Entry], int], Wait | None]


def one_alone(line: Sequence[Entry], place: int) -> Wait | None:
    """The first has it."""
    return Wait(line[place - 1]) if place else None


def many_readers(line: Sequence[Entry], place: int) -> Wait | None:
    """All have it before whom nobody wants it alone."""
    alone = [entry for entry in line[:place] if entry.kind == EXCLUSIVE]
    return Wait(alone[-1]) if alone else None


def first(count: int) -> Rule:
    """The first ``count`` have it; the next watches the line, and each behind it the one before."""

    def rule(line: Sequence[Entry], place: int) -> Wait | None:
        if place < count:
            return None
        return Wait(None if place == count else line[place - 1])

    return rule


class Contender(Recipe):
    """Stands in line, in one session after the other, until it leaves."""

    def __init__(
        self, tree: Tree, directory: str, rule: Rule, kind: str, data: bytes, unique: str | None = None
    ) -> None:
        """Stand in the line ``directory`` from the first look on.

        ``unique``: of a session that another process has begun; a node with it and of that session is ours.
        """
        super().__init__(tree)
        self.node: Node | None = None
        self._directory = directory
        self._rule = rule
        self._prefix = f"{unique or uuid.uuid4().hex}-{kind}-"
        self._data = data
        self._is_first = False
        self._in_doubt = unique is not None  # the reply to a creation was lost, or has gone to another process

    @property
    def is_held(self) -> bool:
        """Whether it is ours: for sure, and now."""
        return self._is_first and self._is_ours and self.is_connected

    @property
    def token(self) -> int:
        """The number of our node: higher than that of whoever had it before."""
        return self.node.number if self.node else 0

    def look(self) -> None:
        if self.node is None or not self._is_ours:
            self._be_first(False)
            self.node = self._enter()
        while True:
            names = self.tree.children(self._directory) or []
            line = line_of(names)
            place = next((n for n, entry in enumerate(line) if self._is_mine(entry.name)), None)
            if place is None:  # somebody has deleted it
                self._be_first(False)
                self.node = self._enter()
                continue
            wait = self._rule(line, place)
            if wait is None:
                self._is_first = True
                if self.is_still_there():
                    self.tree.keep_valid(self)
                    return
            elif self._is_waiting(wait, names):
                self._be_first(False)
                return

    def is_still_there(self) -> bool:
        """Whether our node is, when it is first in line."""
        return True

    def is_there(self) -> bool:
        """Whether our node is, and ours.

        Raises:
            CoordinatorError: the tree cannot be reached, or refuses.
        """
        found = self.tree.get(self.node.path) if self.node is not None else None
        return found is not None and self.node is not None and found[3:5] == self.node[3:5]

    def leave(self) -> None:
        """Stand in line no more.

        Raises:
            CoordinatorError: it could not be told; it ends with the session.
        """
        node, self.node = self.node, None
        self._be_first(False)
        # One that stayed would be in everybody's way for as long as the session lives: so until it is known to be gone.
        while node is not None or self._in_doubt:
            try:
                found = node or self._find()
                if found is not None and found.session == self.tree.session:
                    self.tree.delete(found.path)
                return
            except CoordinatorLost:
                continue  # there is another connection soon, or an error

    def tell(self, data: bytes) -> None:
        """Let the others read ``data`` in our node."""
        self._data = data
        if self.node is not None:
            self.tree.set(self.node.path, data)

    @property
    def _is_ours(self) -> bool:
        return self.node is not None and self.node.session == self.tree.session

    def _be_first(self, is_first: bool) -> None:
        self._is_first = is_first
        if not is_first:
            self.tree.let_lapse(self)

    def _is_mine(self, name: str) -> bool:
        return self.node is not None and name == self.node.path.rpartition("/")[2]

    def _is_waiting(self, wait: Wait, names: list[str]) -> bool:
        """Ask to be touched; False if what was waited for has come meanwhile."""
        if wait.entry is not None:
            return self.tree.get(f"{self._directory}/{wait.entry.name}", self.touch) is not None
        now = self.tree.children(self._directory, self.touch)
        return now is not None and sorted(now) == sorted(names)

    def _enter(self) -> Node:
        if self._in_doubt and (found := self._find()) is not None:
            return found
        try:
            self._in_doubt = True
            made = self.tree.create(f"{self._directory}/{self._prefix}", self._data, ephemeral=True, sequential=True)
        except CoordinatorLost:
            raise
        except Exception:
            self._in_doubt = False
            raise
        self._in_doubt = False
        assert made is not None  # its name is new
        return made

    def _find(self) -> Node | None:
        """Our node, if the creation in doubt was done, and in this session."""
        for name in self.tree.children(self._directory) or ():
            if name.startswith(self._prefix):
                node = self.tree.get(f"{self._directory}/{name}")
                if node is not None and node.session == self.tree.session:
                    return node
        return None


def line_of(names: Sequence[str]) -> list[Entry]:
    """Those who stand in line, in order; whatever else is there stands in nobody's way."""
    found = []
    for name in names:
        unique, _, rest = name.partition("-")
        kind, _, number = rest.partition("-")
        if unique and kind in (EXCLUSIVE, SHARED) and number.removeprefix("-").isdecimal():
            found.append(Entry(name, kind, int(number)))
    return in_order(found, lambda entry: entry.number)
