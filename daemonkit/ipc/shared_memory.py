"""System V shared memory (shmop(2)): bytes that several processes, of any language, see at once."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Final

from daemonkit.errors import UsageError
from daemonkit.ipc import kernel
from daemonkit.ipc.library import Error, Segment, refuse
from daemonkit.ipc.object import KernelObject

MOST_BYTES: Final = 2**63 - 1  # more would reach the kernel as another number


class SharedMemory(KernelObject):
    """Memory that is attached to this process; all zeros when it is made.

    ``buf`` is a memoryview of it: slices are read and assigned, ``struct`` and numpy work on it.  Changes by several
    processes want a semaphore around them.  A child inherits it.
    """

    __slots__ = ("buf",)

    def __init__(self, key: int | str | None, size: int, *, mode: int = 0o600, keep: bool = False) -> None:
        """Attach the memory with that key; make it if there is none.

        Args:
            key: a number (``ftok``), a name, or None for new memory with a key of its own.
            size: bytes, 1 or more; what is there already may have more.
            mode: permissions, if it is made.
            keep: do not write it into the registry: it stays when its creator is dead, until ``remove``.

        Raises:
            UsageError: what is there already has less.
            NotAllowed, IpcError: it cannot be made or attached.
        """
        if not isinstance(size, int) or not 1 <= size <= MOST_BYTES:
            raise UsageError(f"make shared memory of {size!r} bytes: use 1 to {MOST_BYTES}")
        super().__init__(kernel.MEMORY, key, mode, size, keep)
        self.buf = self._attach(0o600)

    @classmethod
    def attach(cls, key: int | str, *, readonly: bool = False) -> SharedMemory:
        """Attach memory that is there, with the size that it has.

        Raises:
            NoSuchObject: there is none with that key.
        """
        self = cls._found(kernel.find(kernel.MEMORY, key))
        view = self._attach(0o400 if readonly else 0o600)
        self.buf = view.toreadonly() if readonly else view
        return self

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.buf)

    def close(self) -> None:
        """Detach it from this process; the memory stays.

        What else looks at it (slices of ``buf``, an array) goes on doing so: it is detached with the last of them.
        """
        with contextlib.suppress(BufferError):  # somebody looks
            self.buf.release()
        self.buf = memoryview(b"")
        self.buf.release()  # whoever uses it from now on is told, by a ValueError

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.buf)

    def __getitem__(self, place: slice) -> bytes:
        """A copy of some bytes."""
        return bytes(self.buf[place])

    def __setitem__(self, place: slice, value: bytes | bytearray | memoryview) -> None:
        self.buf[place] = value

    def __buffer__(self, flags: int) -> memoryview:
        """It serves as bytes itself where Python asks for this (3.12 and later); ``buf`` does everywhere."""
        return self.buf

    def _attach(self, mode: int) -> memoryview:
        try:
            return memoryview(Segment(self.key, 0, mode))
        except Error as error:
            refuse(error, "attach", self._made)
