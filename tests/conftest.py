"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Box


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """A directory with a daemon or two in it; fails the test if a process is left."""
    made = Box(tmp_path)
    yield made
    made.close()
