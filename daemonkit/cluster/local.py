"""A tree in the file system of one host: nothing else needs to run.

It survives the death of any process, and is as durable as its directory.  When that is removed, or moved away, all that
was held in it is lost at once, and begins anew at the same path.  A fencing number grows over that, too.
"""

from __future__ import annotations

import contextlib
import os
import select
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
from daemonkit.core.filesystem import file_system_of, is_network
from daemonkit.core.inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_MOVE_SELF,
    IN_MOVED,
    Watch,
)
from daemonkit.errors import CoordinatorError, CoordinatorLost

_NODE: Final = IN_CREATE | IN_DELETE | IN_MOVED | IN_DELETE_SELF | IN_MOVE_SELF
_DIRECTORY: Final = IN_DELETE_SELF | IN_MOVE_SELF
_FILE: Final = IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF  # a file that is open tells of its unlinking by IN_ATTRIB
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
        self._root = os.path.normpath(root)
        self._pid = os.getpid()
        self._state = State.LOST  # there is none yet
        self._due: list[OnChange] = []  # to be called by ``dispatch``, whatever it finds
        self._inotify: Watch | None = None
        self._mounts = -1  # tells of each that comes or goes: it may cover the directory
        self._poll: select.epoll | None = None  # for both
        # By what it is: "node", "children" or a session's name; each is to be called once.
        self._watched: dict[int, dict[str, dict[OnChange, None]]] = {}
        self._guards: set[int] = set()  # watches of what the session depends on
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
        if self._poll is None:
            watch, self._poll = self._watch, select.epoll()
            self._poll.register(watch.fd, select.EPOLLIN)
            with contextlib.suppress(OSError):  # without it, what was mounted is seen before the next thing is done
                self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
                self._poll.register(self._mounts, select.EPOLLPRI)  # proc_pid_mountinfo(5)
        return self._poll.fileno()

    def dispatch(self) -> bool:
        if self._state is State.CLOSED:
            return False
        events = self._watch.events()  # before anything can fail: who polls would be called again and again
        if self.state is State.LOST:
            self._begin()
        calls, self._due = self._due, []
        for event in events:
            if event.are_lost:
                calls += self._take_all()
            waiting = self._watched.get(event.watch)
            if waiting is None:
                continue
            if event.is_gone:
                del self._watched[event.watch]
            for kind in list(waiting):
                if kind.isdecimal() and not event.is_gone:
                    self._see_off(kind)
                if event.is_gone or not event.name or (kind == "node") == (event.name == OWN):
                    calls += waiting.pop(kind)
        for call in calls:
            call()
        return bool(calls)

    def forget(self, on_change: OnChange) -> None:
        for kinds in self._watched.values():
            for waiting in kinds.values():
                waiting.pop(on_change, None)

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
        if self._inotify:
            self._inotify.close()
        if self._poll:
            self._poll.close()
            self._poll = None
        if self._mounts >= 0:
            os.close(self._mounts)
            self._mounts = -1

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
        if self._inotify:
            self._guard(self._inotify)
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
    def _watch(self) -> Watch:
        if self._inotify is None:
            try:
                self._inotify = Watch()
            except OSError as error:
                raise CoordinatorError(
                    f"watch {self._root}: {error.strerror}; raise fs.inotify.max_user_instances (sysctl)"
                ) from None
            self._guard(self._inotify)
        return self._inotify

    def _guard(self, inotify: Watch) -> None:
        """Watch what the session depends on, and nothing else."""
        for watch in {*self._guards, *self._watched}:
            inotify.remove(watch)
        self._due += self._take_all()
        self._guards.clear()
        directories, files = self._files.places(self._session)
        for path, mask in [*((path, _DIRECTORY) for path in directories), *((path, _FILE) for path in files)]:
            with contextlib.suppress(OSError):  # gone, or not ours to read: it is looked for before anything is done
                self._guards.add(inotify.add(path, mask))

    def _take_all(self) -> list[OnChange]:
        """What is to be called when anything may have changed."""
        found = [call for kinds in self._watched.values() for waiting in kinds.values() for call in waiting]
        self._watched.clear()
        return found

    def _arm(self, path: str, kind: str, on_change: OnChange) -> None:
        """Wait for a change of ``path``, or of the nearest node above it that there is."""
        while path != "/" and not os.path.isdir(self._files.directory(path)):
            path, kind = parent_of(path), "children"
        watch = self._watch.add(self._files.directory(path), _NODE)
        self._watched.setdefault(watch, {}).setdefault(kind, {})[on_change] = None

    def _arm_session(self, session: str, on_change: OnChange) -> None:
        """Wait for its end."""
        if session == self._session:  # guarded; ``on_state`` tells
            return
        with contextlib.suppress(FileNotFoundError):
            watch = self._watch.add(self._files.session_file(session), _SESSION)
            self._watched.setdefault(watch, {}).setdefault(session, {})[on_change] = None

    def _see_off(self, session: str) -> None:
        """Its last descriptor is being closed: that is told before the lock is released (fs/file_table.c, __fput).

        Usually a moment before; on a busy machine whoever dies may have to wait for the processor in between.
        """
        until, pause = time.monotonic() + _LAST_STEP, _FIRST_LOOK
        while self._files.is_alive(session) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(pause * 2, _LAST_LOOK)
