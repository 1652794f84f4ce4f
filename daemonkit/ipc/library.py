"""The one place that imports sysv_ipc: the optional library under semaphores, message queues and shared memory."""

from __future__ import annotations

import errno
from typing import NoReturn

from daemonkit.errors import IpcError, MissingLibrary
from daemonkit.ipc.kernel import Object, failure

try:
    import sysv_ipc
except ModuleNotFoundError:
    raise MissingLibrary(
        "use System V IPC: the library sysv_ipc is not installed; pip install 'daemonkit[ipc]'"
    ) from None

Busy = sysv_ipc.BusyError
Error = sysv_ipc.Error  # the root of the others; itself, it says that a signal came (EINTR)
PlainQueue = sysv_ipc.MessageQueue
PlainSemaphore = sysv_ipc.Semaphore


class Segment(sysv_ipc.SharedMemory):  # type: ignore[misc]  # sysv_ipc ships no types
    """Attached memory.  The library never detaches it; here that is done when the last view of it is gone."""

    def __del__(self) -> None:
        if self.attached:
            self.detach()


def explain(error: Exception, doing: str, what: Object) -> None:
    """Raise the library's error as ours; return if it only says that a signal came, for then one tries again.

    Raises:
        NoSuchObject, NotAllowed, IpcError: by its kind.
    """
    if type(error) is Error:
        return
    refuse(error, doing, what)


def refuse(error: Exception, doing: str, what: Object) -> NoReturn:
    """Raise the library's error as ours."""
    if isinstance(error, sysv_ipc.ExistentialError):
        raise failure(errno.EIDRM, doing, what) from None
    if isinstance(error, sysv_ipc.PermissionsError):
        raise failure(errno.EACCES, doing, what) from None
    raise IpcError(f"{doing} {what}: {str(error).lower()}") from None
