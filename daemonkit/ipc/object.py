"""What the three kinds of System V objects have in common: a key, a number, a creator, an end."""

from __future__ import annotations

from typing import Self

from daemonkit.ipc import kernel, registry
from daemonkit.ipc.keys import in_hex


class KernelObject:
    """An object in the kernel: it outlives the process, until somebody removes it or the machine is stopped."""

    __slots__ = ("_made", "_registry")

    def __init__(self, kind: str, key: int | str | None, mode: int, size: int, keep: bool) -> None:
        """Open the object with that key, or make one and write it into the registry."""
        self._made = made = kernel.make(kind, key, mode, size)
        self._registry = registry.note(made) if made.is_new and not keep else None

    @classmethod
    def _found(cls, made: kernel.Object) -> Self:
        """Around an object that is there."""
        self = cls.__new__(cls)
        self._made, self._registry = made, None
        return self

    @property
    def key(self) -> int:
        """By which other processes find it: a C int, so perhaps below 0."""
        return self._made.key

    @property
    def id(self) -> int:
        """Its number in the kernel, as ipcs(1) shows it."""
        return self._made.id

    @property
    def is_new(self) -> bool:
        """Whether this call has made it."""
        return self._made.is_new

    def remove(self) -> None:
        """Remove it from the kernel, whoever uses it; those who wait on it get an error.  Nothing if it is gone.

        Raises:
            NotAllowed: it belongs to another user.
        """
        kernel.remove(self._made.kind, self._made.id)
        if self._registry is not None:
            registry.forget(self._registry, self._made)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {in_hex(self.key)}, id {self.id}>"
