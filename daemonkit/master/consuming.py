"""A script's tasks become workers that consume them."""

from __future__ import annotations

import logging
import os

from daemonkit.config.options import Options
from daemonkit.core.logs import Sink
from daemonkit.script import Script

log = logging.getLogger("daemonkit.queue")


def add_consumer(script: Script, name: str, options: Options, sink: Sink) -> None:
    """Add the workers, if ``script`` declares tasks, to the daemon ``name``."""
    script.broker = options.broker
    if not script.tasks:
        return
    from daemonkit.queue.consumer import Settings, workers

    settings = Settings(
        name,
        options.broker,
        options.concurrency or len(os.sched_getaffinity(0)),
        options.graceful_timeout,
        options.min_free_memory,
        sink,
        tuple(script.handlers.get("fork", ())),
    )
    script.workers |= {made.name: made for made in workers(script.tasks, settings)}


def warn_of_broker(script: Script, options: Options) -> None:
    """Log what whoever starts a consumer ought to know of its broker."""
    if not script.tasks:
        return
    from daemonkit.queue.disk import caution

    if words := caution(options.broker):
        log.warning("the tasks at %s: %s", options.broker, words)
