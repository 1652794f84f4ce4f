"""The program of a pool's fork server: a fresh interpreter, small and clean whatever the pool's process holds.

Its imports are few on purpose: logging and threading alone double what a fork costs, for what they do in each child.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, NoReturn

from daemonkit.processes import call, interpreter, pickled
from daemonkit.processes.forkserver import ForkServer
from daemonkit.processes.wire import Closed, Wire, pair

SETTINGS: Final = 64  # kinds of messages beside forkserver's


def start(born: list[int]) -> tuple[int, Wire, Wire]:
    """Start the program; return its PID, the wire to it, and the wire from which its children's outcomes come.

    It is our child, to be reaped by its number, which is added to ``born`` in any case.  It ends when the first wire is
    closed.

    Raises:
        OSError: there is no room for another process, or no interpreter at ``sys.executable``.
    """
    with contextlib.ExitStack() as at_failure:
        ours, theirs = pair()
        at_failure.enter_context(ours)
        with theirs:
            results, answers = pair()
            at_failure.enter_context(results)
            with answers:
                fds = theirs.fileno(), answers.fileno()
                pid = interpreter.start("daemonkit.processes.poolserver", fds, born=born)
        at_failure.pop_all()
    ours.setblocking(False)
    results.setblocking(False)
    wire = Wire(ours)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended at once: the wire will tell
        wire.send(SETTINGS, 0, pickled.dumps(tuple(interpreter.settings())))
    return pid, wire, Wire(results)


def main() -> NoReturn:
    """Be the server."""
    wire, results = (Wire(sock) for sock in interpreter.own_sockets(2))
    try:
        first = wire.receive()
    except Closed:  # who started us was interrupted
        raise SystemExit(0) from None
    if first is None or first.kind != SETTINGS:
        raise SystemExit("daemonkit.processes.poolserver is started by a Pool")
    interpreter.Settings(*pickled.loads(first.payload)).take_over()
    os.set_blocking(wire.fileno(), False)
    caller = call.Caller(results)
    caller.rehearse()
    ForkServer(wire, caller.enter).serve()
