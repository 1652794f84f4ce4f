"""Ports of the loopback for the servers that tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections import deque
from typing import Final

_FIRST: Final = 15_000
_END: Final = 32_000  # from 32768 on they are the kernel's to give to clients (ip(7), ip_local_port_range)
_chosen: deque[int] = deque(maxlen=500)  # by this process, the last ones


def free_ports(count: int) -> list[int]:
    """Ports that nobody has.

    Below those that the kernel gives to clients: who knocks at one of those before the server does may get it himself.
    A server takes seconds until it listens: those who test beside us, and we, choose from others meanwhile.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ours = range(_FIRST + worker, _END, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    found: list[int] = []
    for port in random.SystemRandom().sample(ours, len(ours)):
        with contextlib.suppress(OSError), socket.socket() as sock:
            if port not in _chosen:
                sock.bind(("127.0.0.1", port))
                found.append(port)
        if len(found) == count:
            _chosen.extend(found)
            return found
    raise AssertionError("no free ports")
