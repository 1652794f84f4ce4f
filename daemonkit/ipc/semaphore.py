"""A System V semaphore (semop(2)) that the kernel gives back when its holder dies, and that PHP can share.

A set is laid out as PHP's ``sem_get`` has it: the semaphore itself, the number of its users, and a lock.  PHP sets the
value when it sees itself as the first user.  So whoever prepares a set adds a large number of users for good: it marks
the set as prepared, and no PHP process ever takes itself for the first.  Value, mark and unlocking are one operation:
nobody can see a set half prepared, and if its maker dies before, the next one prepares it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from types import TracebackType
from typing import Final

from daemonkit.errors import IpcError, IpcTimeout, NoSuchObject, UsageError
from daemonkit.ipc import kernel
from daemonkit.ipc.bound import Bound
from daemonkit.ipc.kernel import SEM_UNDO
from daemonkit.ipc.library import Error, PlainSemaphore, explain, refuse
from daemonkit.ipc.object import KernelObject

MOST: Final = 32767  # SEMVMX
PATIENCE: Final = 10.0  # seconds for another process to prepare a set

_VALUE, _USERS, _LOCK = 0, 1, 2
_SET: Final = 3  # semaphores
_PREPARED: Final = 16384  # users; no PHP process is one of so many


class Semaphore(KernelObject):
    """A number that is taken from and given back to; whoever finds 0 waits.

    ``with Semaphore("room"): ...`` lets one process at a time into the block, on the whole machine.  When a process
    ends, by kill -9 too, what it held is given back (SEM_UNDO).  A child does not inherit what its parent holds.
    """

    __slots__ = ("_semaphore",)

    def __init__(
        self,
        key: int | str | None = None,
        value: int = 1,
        *,
        mode: int = 0o600,
        undo: bool = True,
        keep: bool = False,
    ) -> None:
        """Open the semaphore with that key; make it, with ``value``, if there is none.

        Args:
            key: a number (``ftok``), a name, or None for a new semaphore with a key of its own.
            value: how many may hold it at once, 0 to 32767.
            mode: permissions, if it is made.
            undo: give back what this process holds when it ends.  Not where one process gives and another one takes.
            keep: do not write it into the registry: it stays when its creator is dead, until ``remove``.

        Raises:
            UsageError, NotAllowed, IpcError: it cannot be made or opened.
        """
        if not isinstance(value, int) or not 0 <= value <= MOST:
            raise UsageError(f"make a semaphore with value {value!r}: use 0 to {MOST}")
        super().__init__(kernel.SEMAPHORE, key, mode, _SET, keep)
        _prepare(self._made, value)
        self._open(undo)

    @classmethod
    def attach(cls, key: int | str, *, undo: bool = True) -> Semaphore:
        """Open a semaphore that is there, a set of any size from any language; of a larger set the first one.

        Raises:
            NoSuchObject: there is none with that key.
        """
        self = cls._found(kernel.find(kernel.SEMAPHORE, key))
        _prepare(self._made, None)
        self._open(undo)
        return self

    def _open(self, undo: bool) -> None:
        try:
            self._semaphore = PlainSemaphore(self.key, 0, 0)
            if self._semaphore.id != self.id:
                raise NoSuchObject(f"open {self._made}: it was removed, and another one has its key")
        except Error as error:
            refuse(error, "open", self._made)
        self._semaphore.undo = undo

    def acquire(self, timeout: float | None = None) -> bool:
        """Take one, waiting for it as long as need be; tell whether it was had.

        Args:
            timeout: seconds to wait at most; 0 does not wait.

        Raises:
            NoSuchObject: the semaphore was removed, perhaps while waiting.
        """
        if timeout is None:
            try:
                self._semaphore.acquire()
                return True
            except Error as error:
                explain(error, "acquire", self._made)
        return self._acquire_within(timeout)

    def release(self) -> None:
        """Give one back.

        Raises:
            NoSuchObject: the semaphore was removed.
            ValueError: it has its greatest value already.
        """
        try:
            self._semaphore.release()
        except Error as error:
            explain(error, "release", self._made)
            self.release()

    @contextlib.contextmanager
    def held(self, timeout: float) -> Iterator[None]:
        """Hold it for a block, if it is had within ``timeout`` seconds.

        Raises:
            IpcTimeout: it was not.
        """
        if not self.acquire(timeout):
            raise IpcTimeout(f"acquire {self._made}: held by others for {timeout:g} s")
        try:
            yield
        finally:
            self.release()

    def __enter__(self) -> Semaphore:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def value(self) -> int:
        """How many can be had at this moment."""
        return self._ask("value")

    @property
    def waiting(self) -> int:
        """How many processes wait at this moment."""
        return self._ask("waiting_for_nonzero")

    @property
    def last_pid(self) -> int:
        """Who used it last; 0 if nobody has."""
        return self._ask("last_pid")

    def _ask(self, attribute: str) -> int:
        try:
            answer: int = getattr(self._semaphore, attribute)
        except Error as error:
            refuse(error, "look at", self._made)
        return answer

    def _acquire_within(self, timeout: float | None) -> bool:
        """Not by the library: as its wheels are built, it takes a time-out and waits for ever all the same."""
        bound, take = Bound(timeout), [(_VALUE, -1, SEM_UNDO if self._semaphore.undo else 0)]
        while (code := kernel.operate(self.id, take, bound.left())) == errno.EINTR:
            continue
        if code not in (0, errno.EAGAIN):
            raise kernel.failure(code, "acquire", self._made)
        return code == 0


def _prepare(made: kernel.Object, value: int | None) -> None:
    """See to it that the set has its value, whoever has made it; None waits for somebody who knows it.

    A set of another size is left alone: it is another program's, and Linux begins it with 0.  Who takes from it before
    its maker has set the value waits for just that.
    """
    users = kernel.value(made, _USERS)
    if users is None or users >= _PREPARED or not _is_a_set_of_three(made):
        return
    bound = Bound(PATIENCE)
    if value is None and users == 0 and not kernel.value(made, _VALUE):
        # Its maker is about to: wait until there are so many users, and leave them as they are.
        _do(made, [(_USERS, -_PREPARED, 0), (_USERS, _PREPARED, 0)], bound)
        return
    _do(made, [(_LOCK, 0, 0), (_LOCK, 1, SEM_UNDO)], bound)
    try:
        _do(made, [*_missing(made, value), (_LOCK, -1, SEM_UNDO)], bound)
    except BaseException:  # also what a signal's handler raises: we live on, so nobody else would unlock it
        kernel.operate(made.id, [(_LOCK, -1, SEM_UNDO)], 0)
        raise


def _missing(made: kernel.Object, value: int | None) -> list[tuple[int, int, int]]:
    """What the set lacks, now that nobody else can change that."""
    users = kernel.value(made, _USERS) or 0
    if users >= _PREPARED:
        return []
    # With users it is PHP's, which has set it.  Without, it is new, or what PHP has left.
    is_empty = users == 0 and not kernel.value(made, _VALUE)
    return [(_USERS, _PREPARED, 0), *([(_VALUE, value, 0)] if is_empty and value else [])]


def _is_a_set_of_three(made: kernel.Object) -> bool:
    return kernel.value(made, _LOCK) is not None and kernel.value(made, _SET) is None


def _do(made: kernel.Object, changes: list[tuple[int, int, int]], bound: Bound) -> None:
    while (code := kernel.operate(made.id, changes, bound.left())) == errno.EINTR:
        continue
    if code == errno.EAGAIN:
        raise IpcError(f"open {made}: nobody has prepared it, or unlocked it, for {PATIENCE:g} s; remove it (ipcrm)")
    if code:
        raise kernel.failure(code, "open", made)
