"""Who waits for what in the files of a local tree, woken by inotify(7)."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable
from typing import Final

from daemonkit.cluster.files import OWN, Files
from daemonkit.cluster.tree import OnChange, parent_of
from daemonkit.core.inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_MOVE_SELF,
    IN_MOVED,
    Event,
    Watch,
)
from daemonkit.errors import CoordinatorError

_NODE: Final = IN_CREATE | IN_DELETE | IN_MOVED | IN_DELETE_SELF | IN_MOVE_SELF
_DIRECTORY: Final = IN_DELETE_SELF | IN_MOVE_SELF
_FILE: Final = IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF  # a file that is open tells of its unlinking by IN_ATTRIB
_SESSION: Final = IN_CLOSE_WRITE | IN_DELETE_SELF
_LAST_STEP: Final = 10.0  # seconds from the event of a close until the lock is released, at most
_FIRST_LOOK: Final = 0.0005  # seconds between two looks at that, doubled
_LAST_LOOK: Final = 0.02  # up to this


class Watches:
    """What one session waits for: each who asks is called once; what it depends on itself is watched all the time."""

    def __init__(self, files: Files, session: str) -> None:
        """Watch what ``session`` depends on.

        Raises:
            CoordinatorError: the user's limit of inotify instances is reached.
        """
        try:
            self._inotify = Watch()
        except OSError as error:
            raise CoordinatorError(
                f"watch {files.root}: {error.strerror}; raise fs.inotify.max_user_instances (sysctl)"
            ) from None
        self._mounts = -1  # tells of each that comes or goes: it may cover the directory
        self._poll: select.epoll | None = None  # for both
        # By what it is: "node", "children" or a session's name.
        self._waiting: dict[int, dict[str, dict[OnChange, None]]] = {}
        self._guards: set[int] = set()  # watches of what the session depends on
        self.guard(files, session)

    def guard(self, files: Files, session: str) -> list[OnChange]:
        """Watch what ``session`` depends on, and nothing else; return all who waited: anything may have changed."""
        for watch in {*self._guards, *self._waiting}:
            self._inotify.remove(watch)
        calls = self._take_all()
        self._guards.clear()
        self._files = files
        directories, own = files.places(session)
        for path, mask in [*((path, _DIRECTORY) for path in directories), *((path, _FILE) for path in own)]:
            with contextlib.suppress(OSError):  # gone, or not ours to read: it is looked for before anything is done
                self._guards.add(self._inotify.add(path, mask))
        return calls

    def wait_for(self, path: str, kind: str, on_change: OnChange) -> None:
        """Wait for a change of ``path``, or of the nearest node above it that there is.

        ``kind``: of the "node" itself, or of its "children".
        """
        while path != "/" and not os.path.isdir(self._files.directory(path)):
            path, kind = parent_of(path), "children"
        self._add(self._files.directory(path), _NODE, kind, on_change)

    def wait_for_end(self, session: str, on_change: OnChange) -> None:
        """Wait for the end of another's ``session``."""
        with contextlib.suppress(FileNotFoundError):
            self._add(self._files.session_file(session), _SESSION, session, on_change)

    def forget(self, on_change: OnChange) -> None:
        """Whoever is to be called so waits no more."""
        for kinds in self._waiting.values():
            for waiting in kinds.values():
                waiting.pop(on_change, None)

    def fileno(self) -> int:
        """A descriptor that is readable when there are ``events``, or something was mounted or unmounted."""
        if self._poll is None:
            self._poll = select.epoll()
            self._poll.register(self._inotify.fd, select.EPOLLIN)
            with contextlib.suppress(OSError):  # without it, what was mounted is seen before the next thing is done
                self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
                self._poll.register(self._mounts, select.EPOLLPRI)  # proc_pid_mountinfo(5)
        return self._poll.fileno()

    def events(self) -> list[Event]:
        """What has happened since the last call, without waiting."""
        return self._inotify.events()

    def called_for(self, events: Iterable[Event]) -> list[OnChange]:
        """Whom ``events`` concern; they wait no more."""
        calls: list[OnChange] = []
        for event in events:
            if event.are_lost:
                calls += self._take_all()
            waiting = self._waiting.get(event.watch)
            if waiting is None:
                continue
            if event.is_gone:
                del self._waiting[event.watch]
            for kind in list(waiting):
                if kind.isdecimal() and not event.is_gone:
                    self._see_off(kind)
                if event.is_gone or not event.name or (kind == "node") == (event.name == OWN):
                    calls += waiting.pop(kind)
        return calls

    def close(self) -> None:
        """Give the descriptors back; a second call does nothing."""
        self._inotify.close()
        if self._poll:
            self._poll.close()
            self._poll = None
        if self._mounts >= 0:
            os.close(self._mounts)
            self._mounts = -1

    def _add(self, file: str, mask: int, kind: str, on_change: OnChange) -> None:
        watch = self._inotify.add(file, mask)
        self._waiting.setdefault(watch, {}).setdefault(kind, {})[on_change] = None

    def _take_all(self) -> list[OnChange]:
        """What is to be called when anything may have changed."""
        found = [call for kinds in self._waiting.values() for waiting in kinds.values() for call in waiting]
        self._waiting.clear()
        return found

    def _see_off(self, session: str) -> None:
        """Its last descriptor is being closed: that is told before the lock is released (fs/file_table.c, __fput).

        Usually a moment before; on a busy machine whoever dies may have to wait for the processor in between.
        """
        until, pause = time.monotonic() + _LAST_STEP, _FIRST_LOOK
        while self._files.is_alive(session) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(pause * 2, _LAST_LOOK)
