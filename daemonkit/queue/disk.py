"""What a queue's file lies on, and what that is worth."""

from __future__ import annotations

import os
import sqlite3
from typing import Final

from daemonkit.core.filesystem import file_system_of

_VANISHING: Final = frozenset(["tmpfs", "ramfs"])
_FULL: Final = 2  # PRAGMA synchronous
_MENDED: Final = (3, 51, 3)


def doctor(path: str, connection: sqlite3.Connection) -> list[str]:
    """What would be lost when, in sentences."""
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
    if kind in _VANISHING:
        lines.append(f"A BOOT LOSES ALL: {kind} is kept in memory; name a file on a disk as broker")
    if sqlite3.sqlite_version_info < _MENDED:
        lines.append(
            f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug (mended in 3.51.3); we keep clear of it, "
            "as long as nobody else writes the file"
        )
    return lines
