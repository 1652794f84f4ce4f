"""What processes of one cluster agree upon: who leads, who has a lock, who is there, what is configured.

The same on every engine.  An engine is a ``tree``, which tells what has changed; all that is here is made of its nodes,
once.  Nothing happens behind the caller's back: what has changed is taken in, and functions are called, by ``dispatch``
and by whatever waits here, in the caller's thread.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from daemonkit.cluster.contender import EXCLUSIVE, SHARED, Contender, Rule, first, line_of, many_readers, one_alone
from daemonkit.cluster.election import Candidacy, Leader, leader_of
from daemonkit.cluster.gathering import Barrier, Queue
from daemonkit.cluster.hold import Hold, LockInfo
from daemonkit.cluster.membership import Membership, member, members_of
from daemonkit.cluster.recipe import Member, Recipe, introduce, words_of
from daemonkit.cluster.tree import PATIENCE, State, Tree, check_data, check_name, check_path, check_timeout
from daemonkit.cluster.watching import Value, Watching
from daemonkit.errors import CoordinatorError, CoordinatorLost, CoordinatorTimeout, UsageError

_MOST_POLLED: Final = 3600.0  # seconds: a longer wait is made of these
NAMESPACE: Final = "daemonkit"


class Coordinator:
    """One session, for one process and one of its threads; not to be used after a fork.

    Every method may raise CoordinatorError: the coordinator cannot be reached, or refuses; and UsageError for an
    argument that cannot be meant.  Times are seconds; a ``timeout`` of None waits as long as need be.
    """

    def __init__(self, tree: Tree, daemon: str = "", namespace: str = NAMESPACE) -> None:
        """Stand on ``tree``, in the name of ``daemon``; use ``connect``.

        ``namespace``: the node below which elections, locks and the like are; values have their paths as given.
        """
        self.tree = tree
        self.url = tree.url
        self._daemon = daemon
        self._root = f"/{check_name(namespace, 'namespace')}"
        self._recipes: list[Recipe] = []
        tree.on_state = self._touch_all

    def elect(self, name: str, data: Any = None, *, unique: str | None = None) -> Candidacy:
        """Stand for election as the leader of ``name``; ``is_held`` tells whether we lead.

        The candidacy goes on through lost connections and sessions until ``resign``.  It is taken forward by ``wait``
        and ``dispatch``.  Its ``token`` is the fencing number.

        Args:
            name: any.
            data: told to the others; JSON must have it.
            unique: an id, with which another process stood in this session, and goes on standing as we do.
        """
        made = Candidacy(self.tree, self._directory("leaders", name), self._daemon, data, unique)
        self._recipes.append(made)
        return made

    def resign(self, candidacy: Candidacy) -> None:
        """Stand for election no more; the next one leads at once."""
        self._forget(candidacy)
        candidacy.leave()

    def leader(self, name: str) -> Leader | None:
        """Who leads ``name``; None: nobody."""
        return leader_of(self.tree, self._directory("leaders", name), name)

    def leaders(self) -> list[Leader]:
        """Who leads what, by name."""
        names = sorted(self.tree.children(f"{self._root}/leaders") or ())
        return [found for name in names if (found := self.leader(name)) is not None]

    def lock(self, name: str, shared: bool = False, timeout: float | None = None) -> Hold:
        """Wait for the lock ``name``: alone, or ``shared`` with all others who want it so.  First come, first served.

        Who has it and asks for it again waits for himself.

        Raises:
            CoordinatorTimeout: others had it for the whole time.
        """
        rule, kind = (many_readers, SHARED) if shared else (one_alone, EXCLUSIVE)
        return self._hold("locks", name, rule, kind, timeout)

    def semaphore(self, name: str, count: int, timeout: float | None = None) -> Hold:
        """Wait for one of ``count`` units of the semaphore ``name``; all who use it must say the same count.

        Raises:
            CoordinatorTimeout: others had them for the whole time.
        """
        if type(count) is not int or count < 1:
            raise UsageError(f"semaphore {name!r}: count={count!r} must be a whole number, 1 or more")
        return self._hold("semaphores", name, first(count), EXCLUSIVE, timeout)

    def locks(self) -> list[LockInfo]:
        """Who has which lock, and who waits for it, in the order in which they will get it."""
        return [info for top in ("locks", "semaphores") for info in self._infos(top)]

    def watch(self, path: str, func: Callable[[Value], object]) -> Watching:
        """Have ``func`` called with the value at ``path`` and the names below it, now and after each change.

        It is called by ``dispatch``, ``wait``, and whatever else waits here; also when the path does not exist yet, is
        deleted, and is created again.  ``unwatch`` ends that.
        """
        made = Watching(self.tree, check_path(path), func)
        self._recipes.append(made)
        return made

    def unwatch(self, watching: Watching) -> None:
        """Call its function no more."""
        self._forget(watching)

    def join(
        self, data: Any = None, group: str = "default", *, wait: bool = True, unique: str | None = None
    ) -> Membership:
        """Be a member of ``group`` until ``leave``, through lost connections and sessions.

        Args:
            data: told to the others; JSON must have it.
            group: any name.
            wait: return when the others can see it; else that is for ``dispatch``.
            unique: as in ``elect``.
        """
        made = Membership(self.tree, self._directory("members", group), self._daemon, data, unique)
        self._recipes.append(made)
        if wait:
            self._until(made, lambda: not made.is_due, PATIENCE)
        return made

    def leave(self, membership: Membership) -> None:
        """Be no member any more."""
        self._forget(membership)
        membership.leave()

    def members(self, group: str = "default") -> list[Member]:
        """The members of ``group``, the oldest first."""
        return members_of(self.tree, self._directory("members", group))

    def groups(self) -> list[str]:
        """The names of all groups that have, or had, members."""
        return sorted(self.tree.children(f"{self._root}/members") or ())

    def barrier(self, name: str, count: int) -> Barrier:
        """The barrier ``name``, at which ``count`` wait for each other: ``enter`` together, ``leave`` together."""
        if type(count) is not int or count < 1:
            raise UsageError(f"barrier {name!r}: count={count!r} must be a whole number, 1 or more")
        return Barrier(self.tree, self._directory("barriers", name), count, self._until)

    def queue(self, name: str) -> Queue:
        """The queue ``name``, for the ordered hand-over of a few things; it is not for tasks: see ``Queue``."""
        return Queue(self.tree, self._directory("queues", name), self._until)

    def get(self, path: str) -> Value:
        """The value at ``path``; its ``data`` is None if there is none."""
        node = self.tree.get(check_path(path))
        return Value(path, node.data, node.version) if node else Value(path, None, 0)

    def set(self, path: str, data: bytes, version: int | None = None) -> int:
        """Let ``data`` be the value at ``path``, which is made if it is not there; return its version.

        Args:
            path: as in "/config/x".
            data: up to 1,000,000 bytes.
            version: change it only if it has this version, which ``get`` returned; None: whatever it has.

        Raises:
            VersionMismatch: it has another: somebody else has changed it, or deleted it.
            CoordinatorLost: the connection was lost: it may have been done.
        """
        check_path(path)
        check_data(data, f"set {path}")
        while True:
            changed = self.tree.set(path, data, version)
            if changed is not None:
                return changed
            if version is not None:
                from daemonkit.errors import VersionMismatch

                raise VersionMismatch(f"{path} is gone, it has no version {version}: read it again")
            if self.tree.create(path, data) is not None:
                return 0

    def delete(self, path: str, version: int | None = None) -> bool:
        """Delete the value at ``path``, which has nothing below it; False: there is none.

        Raises:
            VersionMismatch: it has another version than ``version``.
        """
        return self.tree.delete(check_path(path), version)

    def children(self, path: str) -> list[str]:
        """The names right below ``path``, sorted."""
        return sorted(self.tree.children(check_path(path)) or ())

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to ``dispatch``, for who also waits elsewhere."""
        return self.tree.fileno()

    def dispatch(self) -> bool:
        """Take in what has changed, and call the functions of what is watched; tell whether anything has.

        Waits for nobody but the coordinator.
        """
        has_changed = self.look()
        self.settle()
        return has_changed

    def look(self) -> bool:
        """The first half of ``dispatch``: what has changed is known afterwards."""
        has_changed = self.tree.dispatch()
        due = [recipe for recipe in self._recipes if recipe.is_due and self.tree.state is State.CONNECTED]
        refused: list[CoordinatorError] = []
        for recipe in due:
            try:
                self._look(recipe)
            except CoordinatorError as error:  # that may be one path's alone: the others are looked at all the same
                refused.append(error)
        if refused:
            raise refused[0]
        return has_changed or bool(due)

    def settle(self) -> None:
        """The second half: the others are told."""
        for recipe in list(self._recipes):
            if self.tree.state is State.CONNECTED:
                with contextlib.suppress(CoordinatorLost):  # it is done when there is a connection
                    recipe.settle()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until something has changed, or ``timeout`` has passed, then ``dispatch``; tell whether it has."""
        check_timeout(timeout)
        if self.dispatch():  # what was only just asked for, or has come meanwhile
            return True
        self._poll(timeout)
        return self.dispatch()

    def close(self) -> None:
        """End the session: leaderships, locks and memberships are others' at once.  A second call does nothing."""
        self._recipes.clear()
        self.tree.close()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _directory(self, top: str, name: str) -> str:
        return f"{self._root}/{top}/{check_name(name, 'name')}"

    def _hold(self, top: str, name: str, rule: Rule, kind: str, timeout: float | None) -> Hold:
        check_timeout(timeout)
        contender = Contender(self.tree, self._directory(top, name), rule, kind, introduce(self._daemon))
        self._recipes.append(contender)
        try:
            is_held = self._until(contender, lambda: contender.is_held, timeout)
        except BaseException:
            self._give_up(contender)
            raise
        if not is_held:
            self._give_up(contender)
            raise CoordinatorTimeout(f"wait for {top[:-1]} {name!r}: others had it for {timeout:g} s")
        # Who holds it sees to nothing any more: a lock that was lost is not taken again behind its holder's back.
        self._forget(contender)
        if top == "semaphores":
            contender.tell(
                introduce(self._daemon, held=True)
            )  # wakes the one behind, whose turn it is to watch the line
        return Hold(name, contender, self._forget)

    def _give_up(self, contender: Contender) -> None:
        self._forget(contender)
        with contextlib.suppress(CoordinatorError):  # then it ends with the session
            contender.leave()

    def _infos(self, top: str) -> list[LockInfo]:
        found = []
        for name in sorted(self.tree.children(f"{self._root}/{top}") or ()):
            line = line_of(self.tree.children(f"{self._root}/{top}/{name}") or ())
            for place, entry in enumerate(line):
                node = self.tree.get(f"{self._root}/{top}/{name}/{entry.name}")
                if node is None:
                    continue
                who = member(entry.name, node)
                rule = many_readers if entry.kind == SHARED else one_alone
                is_held = rule(line, place) is None
                kind = entry.kind
                if top == "semaphores":
                    is_held, kind = bool(words_of(node.data).get("held")), "semaphore"
                found.append(
                    LockInfo(name, kind, is_held, node.number, who.host, who.pid, who.daemon, who.since, who.session)
                )
        return found

    def _look(self, recipe: Recipe) -> None:
        if not recipe.is_due or self.tree.state is not State.CONNECTED:
            return
        recipe.is_due = False
        try:
            recipe.look()
        except CoordinatorLost:
            recipe.is_due = True  # looked at again when there is a connection, which ``on_state`` tells
        except BaseException:
            recipe.is_due = True
            raise

    def _until(self, recipe: Recipe, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until ``condition`` is true; asked anew only when ``recipe`` was touched, or the state has changed."""
        check_timeout(timeout)
        began = time.monotonic()
        asked = False
        if recipe not in self._recipes:
            self._recipes.append(recipe)
            asked = True
        try:
            while True:
                self.dispatch()
                if self._is_true(condition):
                    return True
                left = None if timeout is None else timeout - (time.monotonic() - began)
                if left is not None and left <= 0:
                    return False
                self._check_reachable(time.monotonic() - began)
                self._poll(PATIENCE if left is None else left)
        finally:
            if asked:
                self._forget(recipe)

    def _is_true(self, condition: Callable[[], bool]) -> bool:
        if self.tree.state is not State.CONNECTED:
            return False
        try:
            return condition()
        except CoordinatorLost:
            return False

    def _check_reachable(self, waited: float) -> None:
        state = self.tree.state
        if state is State.CLOSED:
            raise CoordinatorError(f"use {self.url}: this connection is closed")
        if state is State.REFUSED or (state is State.CONNECTING and waited >= PATIENCE):
            raise CoordinatorError(self.tree.error or f"reach {self.url}: no server has answered for {waited:.0f} s")

    def _poll(self, timeout: float | None) -> bool:
        poll = select.poll()
        poll.register(self.tree.fileno(), select.POLLIN)
        left = min(max(_MOST_POLLED if timeout is None else timeout, 0.0), _MOST_POLLED)
        return bool(poll.poll(left * 1000 + 0.999))

    def _touch_all(self) -> None:
        for recipe in self._recipes:
            recipe.touch()

    def _forget(self, recipe: Recipe) -> None:
        if recipe in self._recipes:
            self._recipes.remove(recipe)
        self.tree.forget(recipe.touch)
