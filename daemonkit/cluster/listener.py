"""Hears what a library logs: the only way to learn from kazoo why it cannot connect."""

from __future__ import annotations

import logging
from collections.abc import Callable


class Listener(logging.Handler):
    """Tells it without writing it anywhere."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        """``hear`` is called with each message."""
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        self._hear(record.getMessage())
