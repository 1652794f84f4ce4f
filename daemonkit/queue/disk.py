"""What a queue's file lies on, and what that is worth."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from daemonkit.core.filesystem import file_system_of

if TYPE_CHECKING:
    import sqlite3

_VANISHING: Final = frozenset(["tmpfs", "ramfs"])
_FULL: Final = 2  # PRAGMA synchronous
_MENDED: Final = (3, 51, 3)


def caution(url: str) -> str | None:
    """What whoever starts a consumer of the broker ``url`` ought to know, if it is a file; None: nothing."""
    scheme, _, path = url.partition("?")[0].partition(":")
    return _vanishing(path) if scheme == "sqlite" else None


def _vanishing(path: str) -> str | None:
    kind = file_system_of(os.path.dirname(path))
    if kind not in _VANISHING:
        return None
    return f"A BOOT LOSES ALL: {kind} is kept in memory; name a file on a disk as broker"


def doctor(path: str, connection: sqlite3.Connection) -> list[str]:
    """What would be lost when, in sentences."""
    import sqlite3  # a daemon that only asks for a caution has no use for it

    level = connection.execute("PRAGMA synchronous").fetchone()[0]
    sound = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    space = os.statvfs(os.path.dirname(path))
    kind = file_system_of(os.path.dirname(path)) or "an unknown file system"
    lines = [
        f"{path}, on {kind}, {space.f_bavail * space.f_frsize / 2**20:,.0f} MB free",
        "a killed process loses nothing",
        "a power cut loses nothing that was accepted (synchronous=FULL)"
        if level >= _FULL
        else "a power cut loses the last puts, and repeats the last tasks (synchronous=NORMAL)",
        "the file is sound" if sound == "ok" else f"THE FILE IS DAMAGED: {sound}; stop all, try sqlite3's .recover",
    ]
    if words := _vanishing(path):
        lines.append(words)
    if sqlite3.sqlite_version_info < _MENDED:
        lines.append(
            f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug (mended in 3.51.3); we keep clear of it, "
            "as long as nobody else writes the file"
        )
    return lines
