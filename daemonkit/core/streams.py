"""The interpreter's own output streams; apart from the log, for processes that must stay small."""

from __future__ import annotations

import sys


def flush_streams() -> None:
    """Flush sys.stdout and sys.stderr, whatever the script has put there."""
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - as ``suppress`` it would cost each child of a fork server twenty copied pages
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
