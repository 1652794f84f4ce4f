"""Wait for something to happen in a directory, without looking again and again (inotify(7))."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4  # a link count that changes among them: so a file tells of its own unlinking
IN_CLOSE_WRITE: Final = 0x8
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_MOVED: Final = 0x40 | 0x80
IN_DELETE_SELF: Final = 0x400
IN_MOVE_SELF: Final = 0x800
IN_IGNORED: Final = 0x8000
IN_Q_OVERFLOW: Final = 0x4000

SLEEP: Final = 0.02  # seconds between two looks where nothing can be watched

_HEAD: Final = struct.Struct("=iIII")  # struct inotify_event: watch, mask, cookie, length of the name

T = TypeVar("T")


class Event(NamedTuple):
    """What has happened."""

    watch: int  # what ``add`` returned
    name: str  # in the directory that is watched; empty: to itself
    is_gone: bool  # what was watched, and with it the watch
    are_lost: bool  # events of any watch: nobody read them, and there was room for no more


class Watch:
    """An inotify descriptor; ``wait`` returns when something has happened to what it watches."""

    def __init__(self, path: str | None = None, mask: int = IN_MODIFY | IN_CREATE | IN_DELETE | IN_MOVED) -> None:
        """Watch ``path``, usually a directory, for the events in ``mask``; without one, nothing yet.

        Raises:
            OSError: no such path, or the user's limit of inotify instances is reached.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check(self.fd, path)
            if path is not None:
                self.add(path, mask)
        except OSError:
            self.close()
            raise

    def add(self, path: str, mask: int) -> int:
        """Watch what stands at ``path`` now, too; once more is no more than once.  Return the watch's number.

        Raises:
            OSError: nothing stands there, or the user's limit of watches is reached.
        """
        watch: int = self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask)
        _check(watch, path)
        return watch

    def remove(self, watch: int) -> None:
        """Watch no more what ``add`` has given that number; one that is gone by itself is no error."""
        self._libc.inotify_rm_watch(self.fd, watch)

    def events(self) -> list[Event]:
        """What has happened since the last call, without waiting."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, 65536):
                at = 0
                while at < len(data):
                    watch, mask, _, length = _HEAD.unpack_from(data, at)
                    at += _HEAD.size + length
                    name = os.fsdecode(data[at - length : at].rstrip(b"\0"))
                    found.append(Event(watch, name, bool(mask & IN_IGNORED), bool(mask & IN_Q_OVERFLOW)))
        return found

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until an event or ``timeout`` seconds have passed; tell whether there was an event."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(None if timeout is None else max(0, int(timeout * 1000 + 0.999))):
            return False
        os.read(self.fd, 65536)
        return True

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until(directory: str, look: Callable[[], T | None], timeout: float) -> T | None:
    """Return what ``look`` finds, looking again after each change in ``directory``, or None at the time-out.

    The watch is set before the first look, so no change falls between the two.
    """
    end = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        try:
            pause = stack.enter_context(Watch(directory)).wait
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENOSPC):
                raise
            pause = _short_sleep  # a user has 128 inotify instances (fs.inotify.max_user_instances), and they are out
        while (found := look()) is None:
            if not pause(end - time.monotonic()):
                return look()
    return found


def _check(result: int, path: str | None) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)


def _short_sleep(timeout: float | None = None) -> bool:
    left = SLEEP if timeout is None else timeout
    time.sleep(min(max(left, 0), SLEEP))
    return left > 0
