"""The log of the daemon's processes, as the configuration wants it: under logging, stdout and stderr."""

from __future__ import annotations

import logging
import os
import sys

from daemonkit.config import Configuration
from daemonkit.core.logs import Handler, Sink, Stream, is_journal
from daemonkit.errors import StartError
from daemonkit.handover import Handover


def open_log(handover: Handover, configuration: Configuration) -> Sink:
    """Open the log and put it under logging, stdout and stderr.

    Raises:
        StartError: the file cannot be opened.
    """
    journal = not handover.detached and is_journal(2)
    explicit = configuration.sources.get("log", "default") != "default"
    path = configuration.options.log if handover.detached or explicit else None
    try:
        if path:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        sink = Sink(handover.name, path, journal)
    except OSError as error:
        raise StartError(f"open the log {path or 'stderr'}: {error.strerror}; name another with --log") from error
    logging.basicConfig(level=configuration.options.log_level, handlers=[Handler(sink)])
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = Stream(sink, logging.INFO, 1), Stream(sink, logging.WARNING, 2)
    return sink
