"""Wait until a queue has nothing left to do."""

from __future__ import annotations

import select
import time
from typing import Final

from daemonkit.queue.broker import Broker, State

_SOON: Final = 1.0  # seconds
_LOOK: Final = 1.0  # seconds after which it is looked again: not every engine tells of a task that is done


def await_drained(broker: Broker, queue: str, timeout: float | None, *, delayed: bool) -> int:
    """Return when no task of ``queue`` is ready or reserved (nor ``delayed``), or how many are when the time is up.

    Args:
        broker: is asked every second, and when it tells of a change.
        queue: its name.
        timeout: seconds; None: without end.
        delayed: wait for these as well.

    Raises:
        BrokerError: the broker cannot be reached.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        fd = broker.watch()
        broker.drain()
        soon = broker.peek_state(queue, State.DELAYED)
        found = next((each for each in broker.stats() if each.queue == queue), None)
        left = found.ready + found.reserved + (found.delayed if delayed else 0) if found else 0
        if found and found.delayed and not left and not (soon and (soon[0].left or 0) > _SOON):
            left = 1  # it is delayed for a moment alone: beanstalkd shows so what a consumer is about to take
        pause = _LOOK if end is None else min(end - time.monotonic(), _LOOK)
        if not left or pause <= 0:
            return left
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(pause * 1000)
