"""Keys: the numbers by which processes that have nothing else in common find the same object (svipc(7))."""

from __future__ import annotations

import os
import random
import zlib
from typing import Final

from daemonkit.errors import UsageError

Key = int | str | None

_LEAST, _MOST = -(2**31), 2**31 - 1  # key_t is an int
_IPC_PRIVATE: Final = 0


def ftok(path: str | os.PathLike[str], project: int | str) -> int:
    """The key that ftok(3) of the C library, and so PHP's ``ftok``, makes of a file and a project.

    It follows the file's inode: a file that was replaced, as by an editor or an upgrade, gives another key.

    Args:
        path: a file that exists.
        project: a number, of which the low 8 bits count and are not 0, or one ASCII character, as in PHP.

    Raises:
        UsageError: ``project`` is neither.
        OSError: the file cannot be looked at (stat(2)).
    """
    number = ord(project) if isinstance(project, str) and len(project) == 1 and project.isascii() else project
    if not isinstance(number, int) or number & 0xFF == 0:
        raise UsageError(f"make a key of {os.fspath(path)}, project {project!r}: use one ASCII character or 1 to 255")
    file = os.stat(path)
    return _signed((number & 0xFF) << 24 | (file.st_dev & 0xFF) << 16 | file.st_ino & 0xFFFF)


def key_of(key: int | str) -> int:
    """The key itself, or the one that stands for a name: its CRC-32 without the sign (``crc32`` in PHP).

    Raises:
        UsageError: it is no key.
    """
    if isinstance(key, str) and key:
        try:
            key = zlib.crc32(key.encode(errors="surrogateescape")) & _MOST  # a file's name need not be text
        except UnicodeEncodeError:
            raise UsageError(f"use {key!r} as key: it cannot be written as UTF-8") from None
    elif not isinstance(key, int) or isinstance(key, bool):
        raise UsageError(f"use {key!r} as key: a number or a name is wanted")
    if key == _IPC_PRIVATE or not _LEAST <= key < 2**32:
        raise UsageError(f"use {key} as key: it must fit into 32 bits and not be 0 (IPC_PRIVATE); None makes a new one")
    return _signed(key)


def random_key() -> int:
    """A key that is probably free.  Positive, so that no language is in doubt how to write it."""
    return random.SystemRandom().randint(1, _MOST)


def in_hex(key: int) -> str:
    """As ipcs(1) shows it."""
    return f"0x{key & 0xFFFFFFFF:08x}"


def _signed(key: int) -> int:
    """The same 32 bits as a C int."""
    return key - 2**32 if key > _MOST else key
