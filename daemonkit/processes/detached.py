"""The program behind ``background``: detached from the process that asks, and there until all it has accepted is done.

Or it is a child of a daemon's, and ends with that.  It is small and has one thread.  When whoever asks has ended, what
was accepted is finished, and then this process ends, too.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from daemonkit.core.signalfd import open_signalfd
from daemonkit.core.title import take_title
from daemonkit.processes import child, interpreter, pickled
from daemonkit.processes.backlog import Backlog, Kind, Settings
from daemonkit.processes.forkserver import MASTERS
from daemonkit.processes.wire import Wire


def main() -> NoReturn:
    """Be the program; whoever started it waits for the exit status of a first process, 0: the program is there."""
    (sock,) = interpreter.own_sockets(1)
    wire = Wire(sock)
    first = wire.receive()
    if first is None or first.kind != Kind.SETTINGS:
        raise SystemExit("daemonkit.processes.detached is started by background()")
    settings = Settings(*pickled.loads(first.payload))
    interpreter.Settings(*settings.interpreter).take_over()
    told = None if settings.daemon else _detach()
    stop = open_signalfd((signal.SIGTERM,)) if settings.daemon else None
    take_title(settings.title)
    child.or_end(child.null_stdin)
    for number in MASTERS:
        signal.signal(number, signal.SIG_IGN)
    sock.setblocking(False)
    child.or_end(lambda: Backlog(sock, wire, settings, stop).serve(told))
    child.leave(0)


def _detach() -> int:
    """Go on as nobody's child, and no session's leader; return where a byte tells the first process to exit with 0."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else child.FAILED)
    os.close(reader)
    return writer
