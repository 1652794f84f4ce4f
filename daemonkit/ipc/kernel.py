"""The kernel's side of System V objects: make, find, remove and list them (svipc(7)).

Objects are made here and not by the library: its shared memory is filled with blanks after others can already write
into it, and its semaphores are initialised after others can already take them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from daemonkit.errors import IpcError, NoSuchObject, NotAllowed, UsageError
from daemonkit.ipc.keys import in_hex, key_of, random_key

SEMAPHORE: Final = "semaphore"
QUEUE: Final = "queue"
MEMORY: Final = "memory"
KINDS: Final = (SEMAPHORE, QUEUE, MEMORY)

SEM_UNDO: Final = 0x1000
_CREATE: Final = 0o1000
_EXCLUSIVE: Final = 0o2000
_REMOVE: Final = 0
_GETVAL: Final = 12
_GONE: Final = (errno.EINVAL, errno.EIDRM)

_TABLES: Final = {SEMAPHORE: ("sem", "semid"), QUEUE: ("msg", "msqid"), MEMORY: ("shm", "shmid")}
_LIMITS: Final = {SEMAPHORE: "sem", QUEUE: "msgmni", MEMORY: "shmmni and shmall"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]


class Object(NamedTuple):
    """One object: its key, its number in the kernel, and whether this call has made it."""

    kind: str
    key: int
    id: int
    is_new: bool

    def __str__(self) -> str:
        return f"{self.kind} {in_hex(self.key)}"


class _Sembuf(ctypes.Structure):
    _fields_ = [("number", ctypes.c_ushort), ("change", ctypes.c_short), ("flags", ctypes.c_short)]


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def make(kind: str, key: int | str | None, mode: int, size: int = 0) -> Object:
    """The object with that key, made if there is none.

    Args:
        kind: SEMAPHORE, QUEUE or MEMORY.
        key: None for a new object with a key that nobody has.
        mode: permissions of a new object.
        size: how many semaphores a new set has, or the least bytes of memory.

    Raises:
        IpcError, NotAllowed: it cannot be made.
    """
    if key is None:
        while True:
            try:
                return _get(kind, random_key(), size, mode | _CREATE | _EXCLUSIVE)
            except FileExistsError:
                continue
    number = key_of(key)
    while True:
        try:
            return _get(kind, number, size, mode | _CREATE | _EXCLUSIVE)
        except FileExistsError:
            try:
                return _get(kind, number, 0 if kind == SEMAPHORE else size, 0)
            except NoSuchObject:
                continue  # removed in between


def find(kind: str, key: int | str) -> Object:
    """The object with that key.

    Raises:
        NoSuchObject: there is none.
    """
    return _get(kind, key_of(key), 0, 0)


def remove(kind: str, number: int) -> bool:
    """Remove an object; tell whether it was there.

    Raises:
        NotAllowed: it belongs to another user.
    """
    control = {SEMAPHORE: _libc.semctl, QUEUE: _libc.msgctl, MEMORY: _libc.shmctl}[kind]
    arguments = (number, 0, _REMOVE) if kind == SEMAPHORE else (number, _REMOVE, None)
    if control(*arguments) != -1:
        return True
    error = _error()
    if isinstance(error, PermissionError):
        raise NotAllowed(f"remove {kind} {number}: it belongs to another user; try as root")
    return False  # EINVAL, EIDRM: gone already


def listed(kind: str) -> dict[int, dict[str, int]]:
    """Every object of that kind, by its number, with the columns of /proc/sysvipc (proc(5))."""
    name, number = _TABLES[kind]
    try:
        with open(f"/proc/sysvipc/{name}") as file:
            heads, *rows = (line.split() for line in file)
    except FileNotFoundError:
        raise IpcError(
            f"list {kind} objects: /proc/sysvipc/{name} is not there; mount /proc, or a kernel with it"
        ) from None
    octal = heads.index("perms")
    tables = [[int(word, 8 if place == octal else 10) for place, word in enumerate(row)] for row in rows]
    return {row[number]: row for row in (dict(zip(heads, values, strict=True)) for values in tables)}


def operate(number: int, operations: Sequence[tuple[int, int, int]], timeout: float | None) -> int:
    """Do several changes to the semaphores of a set, all at once or none (semtimedop(2)).

    Args:
        number: the set.
        operations: semaphore, change, flags of each.
        timeout: seconds to wait until all of them can be done; None waits for ever.

    Returns:
        0, or an errno: EAGAIN at the time-out, EINTR after a signal, EINVAL or EIDRM if the set was removed.
    """
    array = (_Sembuf * len(operations))(*(_Sembuf(*operation) for operation in operations))
    bound = None if timeout is None else ctypes.byref(_Timespec(int(timeout), int(timeout % 1 * 1e9)))
    return 0 if _libc.semtimedop(number, array, len(operations), bound) == 0 else ctypes.get_errno()


def value(made: Object, semaphore: int) -> int | None:
    """The value of one semaphore of a set; None if the set has not so many, or is not there any more.

    Raises:
        NotAllowed: it may not be read.
    """
    found: int = _libc.semctl(made.id, semaphore, _GETVAL)
    if found != -1:
        return found
    code = ctypes.get_errno()
    if code in _GONE:
        return None
    raise failure(code, "open", made)


def failure(code: int, doing: str, what: Object) -> NoSuchObject | NotAllowed | IpcError:
    """The error that an errno stands for, to be raised."""
    if code in _GONE:
        return NoSuchObject(f"{doing} {what}: it is not there any more; somebody has removed it")
    if code in (errno.EACCES, errno.EPERM):
        return NotAllowed(f"{doing} {what}: permission denied; its owner must grant it by mode=")
    return IpcError(f"{doing} {what}: {os.strerror(code).lower()}")


def _get(kind: str, key: int, size: int, flags: int) -> Object:
    if kind == QUEUE:
        number = _libc.msgget(key, flags)
    elif kind == MEMORY:
        number = _libc.shmget(key, size, flags)
    else:
        number = _libc.semget(key, size, flags)
    if number == -1:
        _refuse(kind, key, size, _error())
    return Object(kind, key, number, bool(flags & _CREATE))


def _refuse(kind: str, key: int, size: int, error: OSError) -> NoReturn:
    what, why = f"{kind} {in_hex(key)}", (error.strerror or "").lower()
    if isinstance(error, FileExistsError):
        raise error
    if isinstance(error, FileNotFoundError):
        raise NoSuchObject(f"find {what}: there is none with this key; somebody must make it first")
    if isinstance(error, PermissionError):
        raise NotAllowed(f"open {what}: {why}; it belongs to another user, who must grant it by mode=")
    if error.errno == errno.EINVAL and kind == MEMORY:
        raise UsageError(f"open {what} with {size} bytes: the one that is there has less, or 0 bytes are asked for")
    if error.errno == errno.ENOSPC:
        raise IpcError(f"make {what}: the kernel's limit is reached ({_LIMITS[kind]} in /proc/sys/kernel); see ipcs -l")
    raise IpcError(f"make {what}: {why}")


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
