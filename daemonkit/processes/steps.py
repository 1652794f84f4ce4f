"""What a pool does outside its lock, one after the other: it may call what is not ours."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger("daemonkit.pool")

Step = tuple[Callable[[Any], None], Any]


def take(steps: deque[Step]) -> None:
    """Do all of ``steps``; each is forgotten when it is done: nothing of ours keeps a result alive."""
    while steps:
        act, on = steps.popleft()
        try:
            act(on)
        except BaseException:  # such as a sys.exit() in somebody's callback: it is not what ends the pool
            log.exception("pool: a callback or on_progress failed")
        del act, on
