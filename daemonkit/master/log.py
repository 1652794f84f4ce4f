"""The log of the daemon's processes, as the configuration wants it: under logging, stdout and stderr."""

from __future__ import annotations

import logging
import os
import sys

from daemonkit.config import Configuration
from daemonkit.core.logs import Handler, Sink, Stream, is_journal
from daemonkit.handover import Handover


def open_log(handover: Handover, configuration: Configuration) -> Sink:
    """Open the log and put it under logging, stdout and stderr.

    Raises:
        OSError: the file cannot be opened.
    """
    journal = not handover.detached and is_journal(2)
    explicit = configuration.sources.get("log", "default") != "default"
    path = configuration.options.log if handover.detached or explicit else None
    if path:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    sink = Sink(handover.name, path, journal)
    logging.basicConfig(level=configuration.options.log_level, handlers=[Handler(sink)])
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = Stream(sink, logging.INFO, 1), Stream(sink, logging.WARNING, 2)
    return sink
