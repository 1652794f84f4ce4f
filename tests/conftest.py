"""Fixtures for all tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from harness import Box
from ipc_peers import Objects

# The same examples in each run, however slow the machine is.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """A directory with a daemon or two in it; fails the test if a process is left."""
    made = Box(tmp_path)
    yield made
    made.close()


@pytest.fixture
def open_box() -> Iterator[Box]:
    """A box that every user may enter, unlike pytest's own directories."""
    path = Path(tempfile.mkdtemp(prefix="box-"))
    path.chmod(0o755)
    made = Box(path)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(path)


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    """A run directory for System V objects, and other processes; fails the test if one of either is left."""
    monkeypatch.delenv("DAEMON_PID_FILE", raising=False)
    monkeypatch.setenv("DAEMONKIT_RUN_DIR", str(tmp_path))
    made = Objects(tmp_path)
    yield made
    made.close()
