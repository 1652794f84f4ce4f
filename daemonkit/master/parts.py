"""The parts of a running daemon, made by the image, used by the master."""

from __future__ import annotations

from typing import NamedTuple

from daemonkit.config import Configuration
from daemonkit.core.board import Board
from daemonkit.core.logs import Sink
from daemonkit.core.loop import Loop
from daemonkit.core.pidfile import PidFile
from daemonkit.core.signals import Signals
from daemonkit.core.timer import Timer
from daemonkit.handover import Handover
from daemonkit.service.notify import Notifier


class Parts(NamedTuple):
    """One of each."""

    handover: Handover
    configuration: Configuration
    pidfile: PidFile
    sink: Sink
    signals: Signals
    loop: Loop
    board: Board
    timer: Timer
    notifier: Notifier
