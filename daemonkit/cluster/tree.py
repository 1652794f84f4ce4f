"""What a coordinator stands on: a tree of small nodes that several processes see alike, as ZooKeeper has it.

A node has data, a version that grows with each change of it, and a number that grows with each node that is created
anywhere in the tree: so the number is a fencing number.  An *ephemeral* node is gone when the session that has created
it is; a *sequential* one has a number of ten digits or more behind its name, higher than those of its siblings before.

Elections, locks and all the rest are made of these (``contender`` and its neighbours), once for all engines.
"""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

from daemonkit.errors import UsageError

MOST_DATA: Final = 1_000_000  # bytes in a node: a server takes packets of 1,048,575 bytes (ZooKeeper, jute.maxbuffer)
PATIENCE: Final = 30.0  # seconds that a call waits for a connection which is only just being made, or was lost

OnChange = Callable[[], None]
T = TypeVar("T")


class State(enum.Enum):
    """Of the session."""

    CONNECTING = "connecting"  # there is none yet
    CONNECTED = "connected"
    SUSPENDED = "suspended"  # the connection is lost, and the session may be: nobody knows until there is another
    LOST = "lost"  # the session is gone with all that was ephemeral; there will be another
    REFUSED = "refused"  # the server takes no session of ours, or there is no such tree: see ``error``
    CLOSED = "closed"


class Node(NamedTuple):
    """A node as it was read."""

    path: str
    data: bytes
    version: int  # of the data; 0: never changed
    number: int  # when it was created: grows over the whole tree
    session: str  # whose ephemeral node it is; empty: nobody's
    created: float  # seconds since the epoch


class Credentials(NamedTuple):
    """What it takes to go on with a session in another process."""

    session: str
    password: str = ""
    fds: Sequence[int] = ()


class Tree(abc.ABC):
    """One session, for one process and one of its threads; not to be used after a fork.

    Every method may raise CoordinatorError: the tree cannot be reached, or refuses; and UsageError for an argument that
    cannot be meant, before anything is sent.  What was asked when the connection was lost may have been done.
    """

    url: str  # to be shown: without passwords
    error: str | None = None  # why there is no connection, in a sentence
    on_state: OnChange | None = None  # called by ``dispatch`` when the state, or the session, has changed

    @property
    @abc.abstractmethod
    def state(self) -> State:
        """What is known of the session now."""

    @property
    @abc.abstractmethod
    def session(self) -> str:
        """The name of the session; empty while there is none."""

    @property
    def valid_until(self) -> float:
        """Until then (seconds of CLOCK_BOOTTIME) the session lives for sure, whatever happens to the connection."""
        return math.inf

    @abc.abstractmethod
    def keep_valid(self, stake: object) -> None:
        """``stake`` stands or falls with the session: let ``valid_until`` grow from now on."""

    @abc.abstractmethod
    def let_lapse(self, stake: object) -> None:
        """It does no more; a second call does nothing."""

    @abc.abstractmethod
    def create(self, path: str, data: bytes = b"", *, ephemeral: bool = False, sequential: bool = False) -> Node | None:
        """Create a node, and those above it; None: there is one of that path."""

    @abc.abstractmethod
    def get(self, path: str, on_change: OnChange | None = None) -> Node | None:
        """Read a node; None: there is none.

        ``on_change`` is called once, by ``dispatch``, when it is created, changed or deleted next, or might have been.
        """

    @abc.abstractmethod
    def children(self, path: str, on_change: OnChange | None = None) -> list[str] | None:
        """The names of the nodes right below ``path``, in no order; None: there is no such node.

        ``on_change`` is called once, by ``dispatch``, when there is one more or less next, or might be, or when the
        node itself comes or goes.
        """

    @abc.abstractmethod
    def set(self, path: str, data: bytes, version: int | None = None) -> int | None:
        """Change a node's data; return its new version.  None: there is no such node.

        Raises:
            VersionMismatch: it has another than ``version``.
        """

    @abc.abstractmethod
    def delete(self, path: str, version: int | None = None) -> bool:
        """Delete a node that has none below it; False: there is none.

        Raises:
            VersionMismatch: it has another than ``version``.
            CoordinatorError: there are nodes below it.
        """

    @abc.abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable when ``dispatch`` has something to call."""

    @abc.abstractmethod
    def dispatch(self) -> bool:
        """Call, here and now, what is to be called for the changes that the tree has told; tell if there were any."""

    @abc.abstractmethod
    def forget(self, on_change: OnChange) -> None:
        """Whoever is to be called so waits no more."""

    @abc.abstractmethod
    def credentials(self) -> Credentials | None:
        """What another process needs to go on with this session; None while there is none."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Close the connection, and let the session live: another process goes on with it."""

    @abc.abstractmethod
    def forsake(self) -> None:
        """In a child that was forked: close what must not live on in it, and nothing of the parent's."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the session at once; what it has created as ephemeral is gone when this returns, if it can be reached."""


def check_path(path: str, what: str = "path") -> str:
    """Return ``path`` if it can be that of a node; UsageError if not."""
    if not isinstance(path, str) or not path.startswith("/"):
        raise UsageError(f"{what} {path!r}: it must be a text that begins with /")
    if path != "/":
        for name in path[1:].split("/"):
            _check_component(name, f"{what} {path!r}")
    if path == "/zookeeper" or path.startswith("/zookeeper/"):
        raise UsageError(f"{what} {path!r}: /zookeeper is the server's own")
    return path


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be one component of a path; UsageError if not."""
    if not isinstance(name, str) or "/" in name:
        raise UsageError(f"{what} {name!r}: it must be a text without /")
    _check_component(name, f"{what} {name!r}")
    return name


def _check_component(name: str, what: str) -> None:
    if not name:
        raise UsageError(f"{what}: no part of it may be empty, and it must not end with /")
    if name in (".", ".."):
        raise UsageError(f"{what}: . and .. mean nothing there")
    if not name.isprintable() or len(name) > 200:
        raise UsageError(f"{what}: each part has up to 200 characters that can be printed")


def check_data(data: bytes, what: str) -> bytes:
    """Return ``data`` if a node can hold it; UsageError if not."""
    if not isinstance(data, bytes):
        raise UsageError(f"{what}: data is bytes, not {type(data).__name__}; encode it")
    if len(data) > MOST_DATA:
        raise UsageError(
            f"{what}: {len(data):,} bytes are too many; a node holds {MOST_DATA:,}: put the rest elsewhere, and its "
            "address here"
        )
    return data


def check_version(version: int | None, what: str) -> int | None:
    """Return ``version`` if a node can have it; UsageError if not."""
    if version is not None and (type(version) is not int or version < 0):
        raise UsageError(f"{what}: version={version!r} must be a whole number, 0 or more, as get() returned it")
    return version


def in_order(those: Iterable[T], number_of: Callable[[T], int]) -> list[T]:
    """``those`` by the numbers of their sequential nodes.

    ZooKeeper's are signed, of 32 bits, and go on with the least after the greatest, which a busy lock reaches in weeks.
    Those of ``local:`` are larger, and only grow.
    """
    listed = list(those)
    if any(number_of(each) >= 2**31 for each in listed):
        return sorted(listed, key=number_of)
    first = number_of(listed[0]) if listed else 0
    return sorted(listed, key=lambda each: (number_of(each) - first + 2**31) % 2**32)


def check_timeout(timeout: float | None) -> float | None:
    """Return ``timeout`` if it is seconds, or None; UsageError if not."""
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and timeout >= 0):  # not a number (nan) is not, either
        raise UsageError(f"timeout={timeout!r}: seconds are wanted, 0 or more; or None, to wait as long as need be")
    return timeout


def parent_of(path: str) -> str:
    """The path of the node above."""
    return path.rpartition("/")[0] or "/"
