"""Keeps PID file and control socket at their places: if somebody removes or replaces them, they are put back at once.

The kernel tells (inotify(7)): IN_ATTRIB when a name of the file is unlinked, IN_MOVE_SELF when it is renamed.  So
nobody is woken as long as nobody touches them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from daemonkit.config.trust import prepare_run_dir
from daemonkit.control import Server
from daemonkit.core.loop import Loop
from daemonkit.core.pidfile import PidFile, inspect
from daemonkit.errors import AlreadyRunning, DaemonkitError

if TYPE_CHECKING:
    from daemonkit.core.inotify import Watch

log = logging.getLogger("daemonkit")

TRIES: Final = 3  # how often in one turn of the loop a file is put back that somebody removes again


class _Kept(NamedTuple):
    """One of the files."""

    path: str
    is_intact: Callable[[], bool]
    put_back: Callable[[], None]


class Keeper:
    """Watches the two files of one daemon."""

    def __init__(self, pidfile: PidFile, server: Server, socket_path: str, loop: Loop) -> None:
        """Nothing is watched before ``begin``."""
        self._pidfile = pidfile
        self._run_dir = os.path.dirname(socket_path)
        self._loop = loop
        self._watch: Watch | None = None
        self._told: set[str] = set()  # each failure is told once, until all is well again
        self._files = (  # in this order: whose the PID file is, his is the socket
            _Kept(pidfile.path, pidfile.is_intact, self._restore_pid_file),
            _Kept(socket_path, lambda: server.is_reached_at(socket_path), lambda: server.listen_anew(socket_path)),
        )

    def begin(self) -> None:
        """Watch the files from now on; what was removed before is put back, too."""
        try:
            from daemonkit.core.inotify import Watch  # ctypes takes its time: not before we are ready

            self._watch = Watch()
        except (OSError, ImportError) as error:  # a Python without ctypes, or one that our user may not read
            log.warning("PID file and control socket are not watched: %s", error)
            return
        self._loop.watch(self._watch.fd, self._changed)
        self._keep()

    def _changed(self, _: int) -> None:
        if self._watch:
            self._watch.wait(0)
        self._keep()

    def _keep(self) -> None:
        """Put back what is not ours any more; watched before looked at, so no change falls between the two."""
        for _ in range(TRIES):
            self._watch_all()
            lost = [kept for kept in self._files if not kept.is_intact()]
            if not lost:
                self._told.clear()
                return
            for kept in lost:
                if not self._put_back(kept):
                    return
        self._tell(f"PID file or control socket in {self._run_dir} is removed as fast as it is put back")

    def _watch_all(self) -> None:
        from daemonkit.core.inotify import IN_ATTRIB, IN_MOVE_SELF

        wanted = {self._run_dir: IN_MOVE_SELF} | {kept.path: IN_ATTRIB | IN_MOVE_SELF for kept in self._files}
        for path, mask in wanted.items():
            try:
                if self._watch:
                    self._watch.add(path, mask)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it will be put back
            except OSError as error:
                self._tell(f"{path} is not watched: {error.strerror}")

    def _put_back(self, kept: _Kept) -> bool:
        try:
            if not os.path.lexists(self._run_dir):
                prepare_run_dir(self._run_dir)
            kept.put_back()
        except (DaemonkitError, OSError) as error:
            self._tell(f"{kept.path} had been deleted or replaced, and cannot be put back: {error}")
            return False
        log.warning("%s had been deleted or replaced; it was put back", kept.path)
        return True

    def _restore_pid_file(self) -> None:
        if not self._pidfile.restore():
            raise AlreadyRunning(self._pidfile.path, inspect(self._pidfile.path).pid)

    def _tell(self, failure: str) -> None:
        if failure not in self._told:
            log.error(failure)
        self._told.add(failure)
