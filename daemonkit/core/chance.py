"""Chance, for waits that are not to be the same everywhere.

Not from ``random``: Python seeds that anew in each child of a process that has it, and copies the memory for it.
"""

from __future__ import annotations

import os

_BYTES = 7  # a float has 53 bits


def chance() -> float:
    """A number in [0, 1) (getrandom(2))."""
    return (int.from_bytes(os.urandom(_BYTES), "big") >> 3) / 2**53


def about(value: float, share: float) -> float:
    """``value``, changed by up to that share of it."""
    return value * (1 - share + 2 * share * chance())
