"""A tree in the file system of one host: nothing else needs to run.

It survives the death of any process, and is as durable as its directory.  When that is removed, or moved away, all that
was held in it is lost at once, and begins anew at the same path.  A fencing number grows over that, too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from daemonkit.cluster.files import Files
from daemonkit.cluster.tree import (
    Credentials,
    Node,
    OnChange,
    State,
    Tree,
    check_data,
    check_path,
    check_version,
)
from daemonkit.cluster.watches import Watches
from daemonkit.core.filesystem import file_system_of, is_network
from daemonkit.errors import CoordinatorError, CoordinatorLost


class LocalTree(Tree):
    """One session with the tree in a directory."""

    def __init__(self, root: str, credentials: Credentials | None = None) -> None:
        """Begin a session, or go on with one of another process'.

        Raises:
            CoordinatorError: the directory cannot be used, or is shared with other hosts.
        """
        self.url = f"local:{root}"
        self._root = os.path.normpath(root)
        self._pid = os.getpid()
        self._state = State.LOST  # there is none yet
        self._due: list[OnChange] = []  # to be called by ``dispatch``, whatever it finds
        self._watches: Watches | None = None  # none before somebody waits
        self._begin(credentials)

    @property
    def state(self) -> State:
        if self._state is State.CONNECTED and os.getpid() == self._pid:
            self._lose_if_gone()
        return self._state

    @property
    def session(self) -> str:
        return self._session

    def keep_valid(self, stake: object) -> None:
        pass  # the kernel does

    def let_lapse(self, stake: object) -> None:
        pass

    def create(self, path: str, data: bytes = b"", *, ephemeral: bool = False, sequential: bool = False) -> Node | None:
        check_path(path)
        check_data(data, f"create {path}")
        with self._locked(f"create {path} in"):
            if not sequential and self._files.read(path) is not None:
                return None
            number = self._files.count()
            path = f"{path}{number:010d}" if sequential else path
            if ephemeral:  # said before it is done: a crash in between leaves nothing
                self._files.note(self._session, self._fd, path)
            node = Node(path, data, 0, number, self._session if ephemeral else "", time.time())
            self._files.create(node)
            return node

    def get(self, path: str, on_change: OnChange | None = None) -> Node | None:
        check_path(path)
        with self._locked(f"read {path} in"):
            node = self._files.read(path)
            if on_change:
                self._watching.wait_for(path, "node", on_change)
                if node is not None and self._is_of_another(node):
                    self._watching.wait_for_end(node.session, on_change)
            return node

    def children(self, path: str, on_change: OnChange | None = None) -> list[str] | None:
        check_path(path)
        with self._locked(f"read {path} in"):
            names = self._files.names(path)
            if on_change:
                self._watching.wait_for(path, "children", on_change)
            if names is None:
                return None
            found = []
            for name in names:
                node = self._files.read(f"{path.rstrip('/')}/{name}")
                if node is not None:
                    found.append(name)
                    if on_change and self._is_of_another(node):
                        self._watching.wait_for_end(node.session, on_change)
            return found

    def set(self, path: str, data: bytes, version: int | None = None) -> int | None:
        check_path(path)
        check_data(data, f"set {path}")
        check_version(version, f"set {path}")
        with self._locked(f"write {path} in"):
            return self._files.change(path, data, version)

    def delete(self, path: str, version: int | None = None) -> bool:
        check_path(path)
        check_version(version, f"delete {path}")
        with self._locked(f"delete {path} in"):
            return self._files.remove(path, version)

    def fileno(self) -> int:
        return self._watching.fileno()

    def dispatch(self) -> bool:
        if self._state is State.CLOSED:
            return False
        events = self._watching.events()  # before anything can fail: who polls would be called again and again
        if self.state is State.LOST:
            self._begin()
        calls, self._due = self._due + self._watching.called_for(events), []
        for call in calls:
            call()
        return bool(calls)

    def forget(self, on_change: OnChange) -> None:
        if self._watches:
            self._watches.forget(on_change)

    def credentials(self) -> Credentials | None:
        return Credentials(self._session, fds=[self._fd]) if self.state is State.CONNECTED else None

    def close(self) -> None:
        if self._state is State.CONNECTED and os.getpid() == self._pid:
            with contextlib.suppress(CoordinatorError), self._locked("end a session in"):
                self._files.bury(self._session)
        self.leave()

    def leave(self) -> None:
        if self._state is State.CONNECTED:
            self._end()
        self._state = State.CLOSED
        if self._watches:
            self._watches.close()

    def forsake(self) -> None:
        self.leave()

    def _begin(self, credentials: Credentials | None = None) -> None:
        """Have a session, where the directory is now."""
        self._files = Files(self._root)
        self._fd = -1
        try:
            if is_network(kind := file_system_of(self._root)):
                raise CoordinatorError(
                    f"use {self._root}: it is on {kind}, which other hosts may share, and they would not see our "
                    "locks; name a directory of this host, or a zookeeper: coordinator"
                )
            with self._files.locked("begin a session in"):
                if credentials is not None and self._files.is_in_place(credentials.session, credentials.fds[0]):
                    self._session, self._fd = credentials.session, os.dup(credentials.fds[0])
                else:
                    self._session, self._fd = self._files.open_session()
                self._files.bury_dead()
        except BaseException:
            self._end()
            raise
        self._state = State.CONNECTED
        if self._watches:
            self._due += self._watches.guard(self._files, self._session)
            os.fchmod(self._fd, 0o600)  # an event: whoever polls comes by, and calls what is due

    def _end(self) -> None:
        """Have none any more."""
        self._files.close()
        if self._fd >= 0:
            os.close(self._fd)

    def _lose_if_gone(self) -> None:
        """The session is lost when others cannot find it: whoever comes to the path begins anew there, as we do."""
        if self._files.is_in_place(self._session, self._fd):
            return
        self._end()
        self._state, self._session = State.LOST, ""
        self._due.append(self._tell_state)

    def _tell_state(self) -> None:
        if self.on_state:
            self.on_state()

    @contextlib.contextmanager
    def _locked(self, doing: str) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise CoordinatorError(
                f"use {self.url}: this connection is that of pid {self._pid}; open one after the fork"
            )
        if self._state is State.CLOSED:
            raise CoordinatorError(f"use {self.url}: this connection is closed")
        if self._state is State.LOST:
            self._begin()
        error: CoordinatorError | None = None
        try:
            with self._files.locked(doing):
                if is_in_place := self._files.is_in_place(self._session, self._fd):
                    yield
        except CoordinatorError as found:
            error, is_in_place = found, self._files.is_in_place(self._session, self._fd)
        if not is_in_place:
            self._lose_if_gone()
            raise CoordinatorLost(
                f"{doing} {self._root}: it was removed or moved away; a new session begins"
            ) from error
        if error:
            raise error

    @property
    def _watching(self) -> Watches:
        """Made when somebody waits first: a user has few inotify instances (fs.inotify.max_user_instances)."""
        if self._watches is None:
            self._watches = Watches(self._files, self._session)
        return self._watches

    def _is_of_another(self, node: Node) -> bool:
        """Whether its session is another's: our own is guarded, and ``on_state`` tells."""
        return node.session not in ("", self._session)
