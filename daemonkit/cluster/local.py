"""A tree in the file system of one host: nothing else needs to run.

It survives the death of any process, and is as durable as its directory.  A fencing number grows over boots, too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Final

from daemonkit.cluster.files import OWN, Files
from daemonkit.cluster.tree import (
    Credentials,
    Node,
    OnChange,
    State,
    Tree,
    check_data,
    check_path,
    check_version,
    parent_of,
)
from daemonkit.core.filesystem import network_type
from daemonkit.core.inotify import IN_CLOSE_WRITE, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVED, Watch
from daemonkit.errors import CoordinatorError

_NODE: Final = IN_CREATE | IN_DELETE | IN_MOVED | IN_DELETE_SELF
_SESSION: Final = IN_CLOSE_WRITE | IN_DELETE_SELF
_LAST_STEP: Final = 10.0  # seconds from the event of a close until the lock is released, at most
_FIRST_LOOK: Final = 0.0005  # seconds between two looks at that, doubled
_LAST_LOOK: Final = 0.02  # up to this


class LocalTree(Tree):
    """One session with the tree in a directory."""

    def __init__(self, root: str, credentials: Credentials | None = None) -> None:
        """Begin a session, or go on with one of another process'.

        Raises:
            CoordinatorError: the directory cannot be used, or is shared with other hosts.
        """
        self.url = f"local:{root}"
        self._files = Files(root)
        if kind := network_type(root):
            self._files.close()
            raise CoordinatorError(
                f"use {root}: it is on {kind}, which other hosts may share, and they would not see our locks; "
                "name a directory of this host, or a zookeeper: coordinator"
            )
        self._pid = os.getpid()
        self._fd = 0  # of the session's file
        self._inotify: Watch | None = None
        self._watched: dict[
            int, dict[str, list[OnChange]]
        ] = {}  # by what it is: "node", "children" or a session's name
        with self._locked("begin a session in"):
            if credentials is None:
                self._session, self._fd = self._files.open_session()
            else:
                self._session, self._fd = credentials.session, os.dup(credentials.fds[0])
            self._files.bury_dead()

    @property
    def state(self) -> State:
        return State.CONNECTED if self._fd >= 0 else State.CLOSED

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
                os.write(self._fd, f"{path}\n".encode())
            node = Node(path, data, 0, number, self._session if ephemeral else "", time.time())
            self._files.create(node)
            return node

    def get(self, path: str, on_change: OnChange | None = None) -> Node | None:
        check_path(path)
        with self._locked(f"read {path} in"):
            node = self._files.read(path)
            if on_change:
                self._arm(path, "node", on_change)
                if node is not None and node.session:
                    self._arm_session(node.session, on_change)
            return node

    def children(self, path: str, on_change: OnChange | None = None) -> list[str] | None:
        check_path(path)
        with self._locked(f"read {path} in"):
            names = self._files.names(path)
            if on_change:
                self._arm(path, "children", on_change)
            if names is None:
                return None
            found = []
            for name in names:
                node = self._files.read(f"{path.rstrip('/')}/{name}")
                if node is not None:
                    found.append(name)
                    if on_change and node.session not in ("", self._session):
                        self._arm_session(node.session, on_change)
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
        return self._watch.fd

    def dispatch(self) -> bool:
        if self._fd < 0:
            return False
        calls: list[OnChange] = []
        for event in self._watch.events():
            waiting = self._watched.get(event.watch)
            if waiting is None:
                continue
            if event.is_gone:
                del self._watched[event.watch]
            for kind in list(waiting):
                if kind.isdecimal() and not event.is_gone:
                    self._see_off(kind)
                if event.is_gone or kind.isdecimal() or (kind == "node") == (event.name == OWN):
                    calls += waiting.pop(kind)
        for call in calls:
            call()
        return bool(calls)

    def credentials(self) -> Credentials | None:
        return Credentials(self._session, fds=[self._fd])

    def close(self) -> None:
        if self._fd < 0:
            return
        if os.getpid() == self._pid:
            with contextlib.suppress(CoordinatorError), self._locked("end a session in"):
                self._files.bury(self._session)
        self.leave()

    def leave(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._files.close()
            if self._inotify:
                self._inotify.close()

    def forsake(self) -> None:
        self.leave()

    @contextlib.contextmanager
    def _locked(self, doing: str) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise CoordinatorError(
                f"use {self.url}: this connection is that of pid {self._pid}; open one after the fork"
            )
        if self._fd < 0:
            raise CoordinatorError(f"use {self.url}: this connection is closed")
        with self._files.locked(doing):
            yield

    @property
    def _watch(self) -> Watch:
        if self._inotify is None:
            try:
                self._inotify = Watch()
            except OSError as error:
                raise CoordinatorError(
                    f"watch {self._files.root}: {error.strerror}; raise fs.inotify.max_user_instances (sysctl)"
                ) from None
        return self._inotify

    def _arm(self, path: str, kind: str, on_change: OnChange) -> None:
        """Wait for a change of ``path``, or of the nearest node above it that there is."""
        while not os.path.isdir(directory := self._files.directory(path)):
            path, kind = parent_of(path), "children"
        watch = self._watch.add(directory, _NODE)
        self._watched.setdefault(watch, {}).setdefault(kind, []).append(on_change)

    def _arm_session(self, session: str, on_change: OnChange) -> None:
        """Wait for its end."""
        with contextlib.suppress(FileNotFoundError):
            watch = self._watch.add(self._files.session_file(session), _SESSION)
            self._watched.setdefault(watch, {}).setdefault(session, []).append(on_change)

    def _see_off(self, session: str) -> None:
        """Its last descriptor is being closed: that is told before the lock is released (fs/file_table.c, __fput).

        Usually a moment before; on a busy machine whoever dies may have to wait for the processor in between.
        """
        until, pause = time.monotonic() + _LAST_STEP, _FIRST_LOOK
        while self._files.is_alive(session) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(pause * 2, _LAST_LOOK)
