"""The program of a pool's fork server: a fresh interpreter, small and clean whatever the pool's process holds.

Its imports are few on purpose: logging and threading alone double what a fork costs, for what they do in each child.
"""

from __future__ import annotations

import os
import sys
from typing import Final, NoReturn

from daemonkit.processes import call, child, interpreter, mainmodule, pickled
from daemonkit.processes.forkserver import ForkServer
from daemonkit.processes.wire import Message, Wire, pair

SETTINGS: Final = 64  # kinds of messages beside forkserver's
IMPORT: Final = 65  # payload: names of modules that children will need


def start() -> tuple[int, Wire, Wire]:
    """Start the program; return its PID, the wire to it, and the wire from which its children's outcomes come.

    It is our child, to be reaped by its number.  It ends when the first wire is closed.

    Raises:
        OSError: there is no room for another process, or no interpreter at ``sys.executable``.
    """
    ours, theirs = pair()
    results, answers = pair()
    try:
        pid = interpreter.start("daemonkit.processes.poolserver", (theirs.fileno(), answers.fileno()))
    except BaseException:
        ours.close()
        results.close()
        raise
    finally:
        theirs.close()
        answers.close()
    ours.setblocking(False)
    results.setblocking(False)
    wire = Wire(ours)
    wire.send(SETTINGS, 0, pickled.dumps(tuple(interpreter.settings())))
    return pid, wire, Wire(results)


def main() -> NoReturn:
    """Be the server."""
    wire, results = (Wire(sock) for sock in interpreter.own_sockets(2))
    first = wire.receive()
    if first is None or first.kind != SETTINGS:
        raise SystemExit("daemonkit.processes.poolserver is started by a Pool")
    interpreter.Settings(*pickled.loads(first.payload)).take_over()
    os.set_blocking(wire.fileno(), False)
    modules = Modules()
    caller = call.Caller(results, modules.names)
    caller.rehearse()
    ForkServer(wire, caller.enter, on_other=modules.take).serve()


class Modules:
    """What children need again and again is imported once, here."""

    def __init__(self) -> None:
        """Know those that are loaded now."""
        self._names = frozenset(sys.modules)

    def names(self) -> frozenset[str]:
        """All that are loaded here."""
        return self._names

    def take(self, message: Message) -> None:
        """Import the modules that a child has needed, found to be clean."""
        if message.kind != IMPORT:
            return
        for name in pickled.loads(message.payload):
            try:
                if name == mainmodule.ALIAS:
                    mainmodule.load()
                else:
                    __import__(name)
            except BaseException:  # noqa: BLE001 - a child that needs it tells its caller why
                continue
        self._names = frozenset(sys.modules)
        child.freeze()
