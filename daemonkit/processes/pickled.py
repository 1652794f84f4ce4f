"""Values on their way between two processes: pickled; large ones straight into memory that both see.

This is the one place that knows cloudpickle, which carries what pickle cannot: lambdas, closures, functions of a REPL.
"""

from __future__ import annotations

import os
import pickle
from types import ModuleType
from typing import Any, Final

from daemonkit.processes import mainmodule
from daemonkit.processes.wire import INLINE, Wire

_HEAD: Final = 64 * 1024  # bytes of a pickle that are searched for names of the main script
_HINT: Final = "lambdas, closures and functions of an interactive session can be pickled with daemonkit[cloudpickle]"


class RemoteTraceback(Exception):
    """The traceback of another process, as text; the cause of the exception that came from there."""

    def __init__(self, text: str) -> None:
        """Quote ``text``."""
        super().__init__(text)
        self.tb = f'\n"""\n{text}"""'

    def __str__(self) -> str:
        return self.tb


def dumps(value: object, *, by_value: bool = False) -> bytes:
    """Pickle ``value``, with cloudpickle if pickle cannot.

    Args:
        value: what is to cross.
        by_value: functions and classes of ``__main__`` cannot be found by their names on the other side.

    Raises:
        Exception: whatever pickle says, if neither can.
    """
    if by_value:
        library = _cloudpickle()
        if library is None:
            raise pickle.PicklingError(f"__main__ is no file that another process could read; {_HINT}")
        return bytes(library.dumps(value, pickle.HIGHEST_PROTOCOL))
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        library = _cloudpickle()
        if library is None:
            error.add_note(_HINT)
            raise
        return bytes(library.dumps(value, pickle.HIGHEST_PROTOCOL))


def dumps_call(value: object) -> bytes:
    """Pickle a call for another interpreter: ``__main__``'s part of it by value, if that is no file it could read.

    Raises:
        Exception: whatever pickle says, if it cannot be.
    """
    data = dumps(value)
    if b"__main__" in data[:_HEAD] and mainmodule.find() is None:
        return dumps(value, by_value=True)
    return data


def pack(value: object) -> Packed:
    """Pickle ``value``, with cloudpickle if pickle cannot; for ``Packed.send``.

    Raises:
        BaseException: whatever its class says, if neither can.
    """
    try:
        return _packed(pickle, value)
    except Exception as error:
        library = _cloudpickle()
        if library is None:
            error.add_note(_HINT)
            raise
        return _packed(library, value)


class Packed:
    """What a pickler writes into: a message while it is small, a memfd (memfd_create(2)) from then on."""

    __slots__ = ("data", "fd")

    def __init__(self) -> None:
        """Begin empty."""
        self.data = b""
        self.fd: int | None = None

    def send(self, wire: Wire, kind: int, number: int) -> None:
        """Send it as the payload of a message; it is used up.

        Raises:
            OSError: it cannot be sent.
        """
        if self.fd is None:
            wire.send(kind, number, self.data)
        else:
            wire.send_memory(kind, number, self.fd)

    def write(self, data: bytes | memoryview) -> None:
        """Take in what the pickler writes."""
        if self.fd is None:
            if len(self.data) + len(data) <= INLINE:
                self.data += data
                return
            self.fd = os.memfd_create("daemonkit-result", os.MFD_CLOEXEC)
            self.write(self.data)
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]


def _packed(library: ModuleType, value: object) -> Packed:
    sink = Packed()
    try:
        library.Pickler(sink, pickle.HIGHEST_PROTOCOL).dump(value)
    except BaseException:
        if sink.fd is not None:
            os.close(sink.fd)
        raise
    return sink


def _cloudpickle() -> ModuleType | None:
    try:
        import cloudpickle
    except ImportError:
        return None
    module: ModuleType = cloudpickle
    return module


def loads(payload: Any) -> Any:
    """The value in ``payload``, anything that has the buffer interface.

    Raises:
        Exception: whatever its class says when it is made again.
    """
    return pickle.loads(payload)
