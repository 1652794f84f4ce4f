"""A barrier, where so many wait for each other; and a queue, by which the cluster hands things over in order."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable
from typing import Final

from daemonkit.cluster.recipe import Recipe, words_of
from daemonkit.cluster.tree import Node, Tree, check_data, check_timeout, in_order
from daemonkit.errors import CoordinatorError, CoordinatorLost, CoordinatorTimeout, VersionMismatch

_ITEM: Final = "item-"

Until = Callable[[Recipe, Callable[[], bool], float | None], bool]


class _Look(Recipe):
    """Is touched by changes that a condition has asked to be told of."""

    def look(self) -> None:
        pass


class Barrier:
    """So many enter together, and leave together; again and again, in rounds.

    Each who enters has an ephemeral node of a name that is never used again.  The node of the rounds names those of the
    last round that was opened.  That is over when none of these is there any more, whether they left or died; then,
    and when so many have come, whoever sees it opens the next, on condition that nobody else has meanwhile.
    """

    def __init__(self, tree: Tree, directory: str, count: int, until: Until) -> None:
        """Use ``Coordinator.barrier``."""
        self._tree = tree
        self._count = count
        self._until = until
        self._entrants = f"{directory}/entrants"
        self._rounds = f"{directory}/rounds"
        self._name = ""  # of our node; empty: we have not entered

    def enter(self, timeout: float | None = None) -> None:
        """Wait until ``count`` have entered; ``timeout`` in seconds, None: as long as need be.

        Raises:
            CoordinatorTimeout: they had not; we have left again.
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        check_timeout(timeout)
        look = _Look(self._tree)
        self._name = self._name or uuid.uuid4().hex

        def is_open() -> bool:
            mine = self._tree.get(self._mine)
            if mine is None or mine.session != self._tree.session:
                self._tree.create(self._mine, ephemeral=True)
            while True:
                last = self._tree.get(self._rounds, look.touch)
                members = _members(last)
                if self._name in members:
                    return True
                come = self._tree.children(self._entrants) or []
                if not members.isdisjoint(come):  # all wait for its end, else for the opening alone
                    come = self._tree.children(self._entrants, look.touch) or []
                if not members.isdisjoint(come) or len(come) < self._count:
                    return False
                self._open(last, sorted(come)[: self._count])

        try:
            is_in = self._until(look, is_open, timeout)
        except BaseException:
            with contextlib.suppress(CoordinatorError):  # then it ends with the session
                self._go()
            raise
        if not is_in:
            self._go()
            raise CoordinatorTimeout(f"enter the barrier {self._entrants}: not {self._count} have come in time")

    def leave(self, timeout: float | None = None) -> None:
        """Wait until all have left who have entered with us.

        Raises:
            CoordinatorTimeout: they had not; we have.
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        look = _Look(self._tree)
        name = self._name

        def is_over() -> bool:
            self._go()
            members = _members(self._tree.get(self._rounds))
            return name not in members or members.isdisjoint(self._tree.children(self._entrants, look.touch) or ())

        if not self._until(look, is_over, timeout):
            raise CoordinatorTimeout(f"leave the barrier {self._entrants}: not all have left in time")

    @property
    def _mine(self) -> str:
        return f"{self._entrants}/{self._name}"

    def _go(self) -> None:
        if self._name:
            self._tree.delete(self._mine)
        self._name = ""

    def _open(self, last: Node | None, names: list[str]) -> None:
        """Open the round of ``names``, if ``last`` is still the last one; else we look again."""
        data = json.dumps({"members": names}).encode()
        if last is None:
            self._tree.create(self._rounds, data)
        else:
            with contextlib.suppress(VersionMismatch):
                self._tree.set(self._rounds, data, last.version)


def _members(last: Node | None) -> set[str]:
    """Those of a round; nobody, if there was none, or somebody else has written it."""
    names = words_of(last.data).get("members") if last else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


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
        taken: list[bytes | CoordinatorLost] = []

        def has_taken() -> bool:
            for name in _in_order(self._tree.children(self._directory, look.touch) or ()):
                node = self._tree.get(f"{self._directory}/{name}")
                if node is None:
                    continue
                try:
                    is_ours = self._tree.delete(node.path)  # else somebody else was faster
                except CoordinatorLost as error:  # nobody can know whether it was deleted, and by whom
                    taken.append(error)
                    return True
                if is_ours:
                    taken.append(node.data)
                    return True
            return False

        if not self._until(look, has_taken, timeout):
            raise CoordinatorTimeout(f"get from the queue {self._directory}: there was nothing in that time")
        if isinstance(taken[0], CoordinatorLost):
            raise taken[0]
        return taken[0]

    def __len__(self) -> int:
        """How many are there.

        Raises:
            CoordinatorError: the coordinator cannot be reached, or refuses.
        """
        return len(_in_order(self._tree.children(self._directory) or ()))


def _in_order(names: Iterable[str]) -> list[str]:
    """The things' names; whatever else is there is nobody's."""
    numbers = {name: name.removeprefix(_ITEM) for name in names if name.startswith(_ITEM)}
    ours = [name for name, number in numbers.items() if number.removeprefix("-").isdecimal()]
    return in_order(ours, lambda name: int(numbers[name]))
