"""A short soak; ``bench/soak.py`` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Box
from random_kills import ENGINES, Soak, server_of

SECONDS = 6.0
PAUSE = 0.35  # seconds between two kills, on average


@pytest.mark.parametrize("engine", ENGINES)
def test_row_29_whoever_is_killed_each_task_is_done_at_least_once(box: Box, tmp_path: Path, engine: str) -> None:
    with server_of(engine, tmp_path) as server:
        found = Soak(box, server).run(SECONDS, PAUSE, puts=51, kills=6)
    assert not found.complaints, (found.complaints, [found.marks[each] for each in found.unexplained], found.kills)
    assert len(found.kept) > 50
    assert len(found.kills) > 5
