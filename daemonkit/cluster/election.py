"""Candidates for the leadership of something, of whom one leads."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from daemonkit.cluster.contender import EXCLUSIVE, Contender, line_of, one_alone
from daemonkit.cluster.recipe import introduce, moment_of, number_of, words_of
from daemonkit.cluster.tree import Tree


class Leader(NamedTuple):
    """Who leads, as the others see it."""

    name: str  # what is led
    token: int
    host: str
    pid: int
    daemon: str
    since: float  # seconds since the epoch
    session: str
    data: Any


class Candidacy(Contender):
    """One candidate.  ``is_held`` tells whether it leads: for sure, and now."""

    def __init__(self, tree: Tree, directory: str, daemon: str, data: Any, unique: str | None) -> None:
        """Stand for election from the first look on; ``data``, which JSON must have, is told to the others."""
        super().__init__(tree, directory, one_alone, EXCLUSIVE, introduce(daemon, data), unique)
        self._daemon = daemon
        self._told = 0  # the token with which our leadership was told
        self._words = data

    def settle(self) -> None:
        """Tell the others since when we lead, once whoever waits for it has been told."""
        if self.is_held and self._told != self.token:
            # Not in our own node: that would wake the one behind us.
            self.tree.set(self._directory, introduce(self._daemon, self._words, token=self.token, since=time.time()))
            self._told = self.token

    def is_still_there(self) -> bool:
        """Whether our node is; it is watched, for it may be deleted by hand."""
        return self.node is not None and self.tree.get(self.node.path, self.touch) is not None


def leader_of(tree: Tree, directory: str, name: str) -> Leader | None:
    """Who leads ``name``; None: nobody."""
    for entry in line_of(tree.children(directory) or ()):
        node = tree.get(f"{directory}/{entry.name}")
        if node is not None:
            words = words_of(node.data)
            top = tree.get(directory)
            told = words_of(top.data) if top else {}
            since = moment_of(told, "since") if told.get("token") == node.number else None
            return Leader(
                name,
                node.number,
                str(words.get("host", "")),
                number_of(words, "pid"),
                str(words.get("daemon", "")),
                node.created if since is None else since,
                node.session,
                words.get("data"),
            )
    return None
