"""System V semaphores, message queues and shared memory, and a channel of framed messages between two processes.

Nothing of it is loaded until it is asked for: ``Channel`` and ``ftok`` need no library, the rest sysv_ipc.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daemonkit.ipc.channel import Channel
    from daemonkit.ipc.keys import ftok
    from daemonkit.ipc.message_queue import LOWEST_FIRST, MessageQueue, Statistics
    from daemonkit.ipc.semaphore import Semaphore
    from daemonkit.ipc.shared_memory import SharedMemory

__all__ = ["LOWEST_FIRST", "Channel", "MessageQueue", "Semaphore", "SharedMemory", "Statistics", "ftok"]

_HOMES = {
    "Channel": "channel",
    "LOWEST_FIRST": "message_queue",
    "MessageQueue": "message_queue",
    "Semaphore": "semaphore",
    "SharedMemory": "shared_memory",
    "Statistics": "message_queue",
    "ftok": "keys",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'daemonkit.ipc' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"daemonkit.ipc.{_HOMES[name]}"), name)
    return value
