"""What stands on a tree: it looks again whenever something may have changed, and puts right what it is to see to."""

from __future__ import annotations

import abc
import json
import os
import socket
import time
from typing import Any, Final, NamedTuple

from daemonkit.cluster.tree import State, Tree

_LATEST: Final = 1e10  # seconds since the epoch: 2286


class Recipe(abc.ABC):
    """Looks at the tree, and asks to be touched when it is to look again."""

    def __init__(self, tree: Tree) -> None:
        """Stand on ``tree``; the first look is due."""
        self.tree = tree
        self.is_due = True

    def touch(self) -> None:
        """Something may have changed."""
        self.is_due = True

    @abc.abstractmethod
    def look(self) -> None:
        """See how things stand, and do what is to be done; as often as one likes.

        Raises:
            CoordinatorError: the tree cannot be reached, or refuses.
        """

    def settle(self) -> None:  # noqa: B027 - most have nothing of that
        """Do what can wait until others have been told of what the last look has found.

        Raises:
            CoordinatorError: as ``look``.
        """

    @property
    def is_connected(self) -> bool:
        """Whether the session is known to live."""
        return self.tree.state is State.CONNECTED and boot_time() < self.tree.valid_until


class Member(NamedTuple):
    """Who has created a node, in its own words."""

    id: str  # the node's name
    host: str
    pid: int
    daemon: str  # its name; empty: no daemon
    since: float  # seconds since the epoch
    session: str
    data: Any  # what it tells about itself


def introduce(daemon: str, data: Any = None, **more: Any) -> bytes:
    """The data of a node of ours: who we are.

    Raises:
        TypeError: ``data`` is nothing that JSON has.
    """
    words = {"host": socket.gethostname(), "pid": os.getpid(), "daemon": daemon, "data": data, **more}
    return json.dumps(words, ensure_ascii=False).encode()


def words_of(data: bytes) -> dict[str, Any]:
    """What ``introduce`` has written; nothing if somebody else has written it."""
    try:
        words = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}


def number_of(words: dict[str, Any], name: str) -> int:
    """A whole number among the words; 0 if somebody else has written something else."""
    number = words.get(name)
    return number if type(number) is int else 0


def moment_of(words: dict[str, Any], name: str) -> float | None:
    """Seconds since the epoch among the words; None if somebody else has written something else."""
    moment = words.get(name, -1)
    return float(moment) if type(moment) in (int, float) and 0 <= moment < _LATEST else None


def boot_time() -> float:
    """Seconds of the clock that goes on while the machine sleeps: a session does, too (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
