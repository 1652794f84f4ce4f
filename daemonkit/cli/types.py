"""What is written on the command line, and cannot be said by click's own types."""

from __future__ import annotations

import os
from typing import Any

import click

from daemonkit.core.duration import seconds
from daemonkit.queue.broker import State

STATES = click.Choice([state.value for state in State])
MOVABLE = (State.READY, State.DELAYED, State.BURIED)
ALL = 2**31
COUNT = click.IntRange(1, ALL)  # SQLite has no integers above 2**63


class Words(click.ParamType):  # type: ignore[type-arg]  # as below
    """Text that can be kept, whatever bytes it was given as."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> str:
        """Replace what is no UTF-8."""
        return os.fsencode(value).decode(errors="replace")


class Duration(click.ParamType):  # type: ignore[type-arg]  # it has some in newer versions only
    """Seconds, or text such as "90s", "5m"."""

    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse it."""
        if isinstance(value, int | float):
            return float(value)
        try:
            return seconds(value, what=parameter.opts[0] if parameter and parameter.opts else "duration")
        except ValueError as error:
            self.fail(str(error), parameter, ctx)
