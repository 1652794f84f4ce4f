"""A System V message queue (msgop(2)): whole messages with types, between processes of any language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from daemonkit.errors import IpcTimeout, MessageTooLong, NoSuchObject, NotAllowed, UsageError
from daemonkit.ipc import kernel
from daemonkit.ipc.bound import Bound, interrupted_after
from daemonkit.ipc.library import Busy, Error, PlainQueue, explain, refuse
from daemonkit.ipc.object import KernelObject

LOWEST_FIRST: Final = -(2**31)  # a type for ``receive``: of all messages, those of the lowest type first
_GREATEST_TYPE: Final = 2**31 - 1
_MOST_BYTES: Final = 2**32 - 1  # more would reach the kernel as another number
_WHY: Final = {"send to": "it was full", "receive from": "no such message came"}

T = TypeVar("T")
Body = bytes | bytearray | memoryview


class Statistics(NamedTuple):
    """A queue at one moment; times in seconds since 1970, 0 if never."""

    messages: int
    bytes: int
    max_bytes: int  # of all messages together
    max_message: int  # bytes of one
    last_sender: int  # PID, 0 if nobody
    last_receiver: int
    last_sent: int
    last_received: int


class MessageQueue(KernelObject):
    """A queue in the kernel.  Messages outlive their senders; each is received once, by one process."""

    __slots__ = ("_limit", "_queue")

    def __init__(
        self,
        key: int | str | None = None,
        *,
        max_bytes: int | None = None,
        mode: int = 0o600,
        keep: bool = False,
    ) -> None:
        """Open the queue with that key; make it if there is none.

        Args:
            key: a number (``ftok``), a name, or None for a new queue with a key of its own.
            max_bytes: of all messages together, if it is made; above /proc/sys/kernel/msgmnb only root may ask.
            mode: permissions, if it is made.
            keep: do not write it into the registry: it stays when its creator is dead, until ``remove``.

        Raises:
            UsageError, NotAllowed, IpcError: it cannot be made or opened.
        """
        if max_bytes is not None and (not isinstance(max_bytes, int) or not 1 <= max_bytes <= _MOST_BYTES):
            raise UsageError(f"make a queue of {max_bytes!r} bytes: use 1 to {_MOST_BYTES}")
        super().__init__(kernel.QUEUE, key, mode, 0, keep)
        self._open()
        if max_bytes is not None and self.is_new:
            self._resize(max_bytes)

    @classmethod
    def attach(cls, key: int | str) -> MessageQueue:
        """Open a queue that is there.

        Raises:
            NoSuchObject: there is none with that key.
        """
        self = cls._found(kernel.find(kernel.QUEUE, key))
        self._open()
        return self

    def send(self, body: Body, type: int = 1, timeout: float | None = None) -> None:
        """Append a message, waiting for room as long as need be.

        Args:
            body: its bytes; none at all are a message, too.
            type: 1 or more.
            timeout: seconds to wait at most; 0 does not wait.

        Raises:
            MessageTooLong: there would never be room.
            IpcTimeout: there was none in that time.
            NoSuchObject: the queue was removed, perhaps while waiting.
        """
        if body.__class__ is not bytes:
            body = bytes(memoryview(body))  # the library crashes over what has no bytes
        if timeout is None:
            try:
                self._queue.send(body, True, type)
                return
            except Error as error:
                explain(error, "send to", self._made)
            except (ValueError, OSError, OverflowError) as error:
                self._reconsider(error, type, 1, len(body))
        self._within(timeout, "send to", lambda wait: self._send(body, wait, type))

    def receive(self, type: int = 0, timeout: float | None = None) -> tuple[bytes, int]:
        """Take a message out, waiting for one as long as need be; its body and its type.

        Args:
            type: 0 takes the oldest; n the oldest of type n; -n the oldest of the lowest type, among types up to n:
                so types serve as priorities.  ``LOWEST_FIRST`` is that for all types.
            timeout: seconds to wait at most; 0 does not wait.

        Raises:
            IpcTimeout: none came in that time.
            NoSuchObject: the queue was removed, perhaps while waiting.
        """
        if timeout is None:
            try:
                return self._queue.receive(True, type)  # type: ignore[no-any-return]  # sysv_ipc ships no types
            except Error as error:
                explain(error, "receive from", self._made)
            except (OSError, OverflowError) as error:
                self._reconsider(error, type, LOWEST_FIRST)
        return self._within(timeout, "receive from", lambda wait: self._receive(wait, type))

    def statistics(self) -> Statistics:
        """How full it is, and who used it last.

        Raises:
            NoSuchObject: it was removed.
        """
        row = kernel.listed(kernel.QUEUE).get(self.id)
        if row is None:
            raise NoSuchObject(f"look at {self._made}: it is not there any more; somebody has removed it")
        self._open()
        numbers = (row[name] for name in ("lspid", "lrpid", "stime", "rtime"))
        return Statistics(row["qnum"], row["cbytes"], self._max_bytes(), self._limit, *numbers)

    def _open(self) -> None:
        """Take hold of it, with its limits as they are now."""
        try:
            self._queue: Any = PlainQueue(self.key, 0, 0)
            if self._queue.id != self.id:
                raise NoSuchObject(f"open {self._made}: it was removed, and another one has its key")
            # The kernel lets a message wait for ever for room that the whole queue has not.
            self._limit = min(_greatest_message(), self._max_bytes())
            self._queue = PlainQueue(self.key, 0, 0, self._limit)
        except Error as error:
            refuse(error, "open", self._made)

    def _max_bytes(self) -> int:
        most: int = self._queue.max_size
        return most

    def _resize(self, max_bytes: int) -> None:
        try:
            self._queue.max_size = max_bytes
        except Error:
            self.remove()
            raise NotAllowed(
                f"make {self._made} of {max_bytes} bytes: only root may ask for more than /proc/sys/kernel/msgmnb"
            ) from None
        self._open()

    def _within(self, timeout: float | None, doing: str, attempt: Callable[[bool], T]) -> T:
        """What ``attempt`` returns, which is told whether it may wait."""
        bound = Bound(timeout)
        if timeout is not None:
            try:
                return attempt(False)
            except Busy:
                pass  # now it is worth a timer
            except Error as error:
                refuse(error, doing, self._made)
        with interrupted_after(bound.left()):
            while bound.left() != 0:
                try:
                    return attempt(True)
                except Error as error:
                    explain(error, doing, self._made)
        raise IpcTimeout(f"{doing} {self._made}: {_WHY[doing]} for {timeout:g} s")

    def _send(self, body: Body, wait: bool, type: int) -> None:
        try:
            self._queue.send(body, wait, type)
        except (ValueError, OSError, OverflowError) as error:
            self._reconsider(error, type, 1, len(body))
            self._queue.send(body, wait, type)

    def _receive(self, wait: bool, type: int) -> tuple[bytes, int]:
        try:
            return self._queue.receive(wait, type)  # type: ignore[no-any-return]  # sysv_ipc ships no types
        except (OSError, OverflowError) as error:
            self._reconsider(error, type, LOWEST_FIRST)
            return self._queue.receive(wait, type)  # type: ignore[no-any-return]  # sysv_ipc ships no types

    def _reconsider(self, error: Exception, type: int, least_type: int, size: int = 0) -> None:
        """Return if the limits have changed since the queue was opened: then it is worth another try."""
        if not least_type <= type <= _GREATEST_TYPE:
            raise UsageError(f"use type {type} with {self._made}: use {least_type} to {_GREATEST_TYPE}") from None
        before = self._limit
        self._open()
        if size > self._limit:
            raise MessageTooLong(
                f"send {size} bytes to {self._made}: it takes {self._limit} at most;"
                " see max_bytes and /proc/sys/kernel/msgmax"
            ) from None
        if self._limit == before:
            raise error


def _greatest_message() -> int:
    """Bytes that the kernel takes as one message (proc(5), /proc/sys/kernel/msgmax)."""
    with open("/proc/sys/kernel/msgmax") as file:
        return int(file.read())
