"""What the pools of the bench are asked to call, in a module that imports next to nothing."""

from __future__ import annotations

import time


def same(value: object = None) -> object:
    """Return it."""
    return value


def blob(size: int) -> bytes:
    """That many bytes."""
    return bytes(size)


def sleep(seconds: float) -> float:
    """Sleep."""
    time.sleep(seconds)
    return seconds
