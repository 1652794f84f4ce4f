"""Members of a group: each has an ephemeral node, made again in each session."""

from __future__ import annotations

import uuid
from typing import Any

from daemonkit.cluster.recipe import Member, Recipe, introduce, number_of, words_of
from daemonkit.cluster.tree import Node, Tree


class Membership(Recipe):
    """Ours, until it is left."""

    def __init__(self, tree: Tree, directory: str, daemon: str, data: Any, unique: str | None) -> None:
        """Be a member from the first look on; ``data``, which JSON must have, is told to the others."""
        super().__init__(tree)
        self._path = f"{directory}/{unique or uuid.uuid4().hex}"
        self._data = introduce(daemon, data)
        self._node: Node | None = None

    def look(self) -> None:
        node = self.tree.get(self._path, self.touch)
        if node is not None and node.session != self.tree.session:  # of a session that is about to end
            self.tree.delete(self._path)
            node = None
        if node is None:
            self.tree.create(self._path, self._data, ephemeral=True)
            self.tree.get(self._path, self.touch)

    def leave(self) -> None:
        """Be no member any more."""
        self.tree.delete(self._path)


def members_of(tree: Tree, directory: str) -> list[Member]:
    """All members, the oldest first."""
    found = []
    for name in tree.children(directory) or ():
        node = tree.get(f"{directory}/{name}")
        if node is not None:
            found.append(member(name, node))
    return sorted(found, key=lambda each: (each.since, each.id))


def member(name: str, node: Node) -> Member:
    """Who has created the node."""
    words = words_of(node.data)
    return Member(
        name,
        str(words.get("host", "")),
        number_of(words, "pid"),
        str(words.get("daemon", "")),
        node.created,
        node.session,
        words.get("data"),
    )
