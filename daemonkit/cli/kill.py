"""daemonkit kill"""

from __future__ import annotations

import click

from daemonkit import ending
from daemonkit.cli.common import TIMEOUT, Place, name_argument
from daemonkit.config.options import Options, Schedule, parse_stop_schedule
from daemonkit.core import board
from daemonkit.core.holder import foreign_uid
from daemonkit.errors import ConfigError, DaemonkitError


@click.command()
@click.option(
    "--timeout", type=TIMEOUT, metavar="SECONDS", help="Send KILL after this long.  [default: see stop_schedule]"
)
@name_argument
def command(place: Place, timeout: float | None) -> None:
    """Stop a daemon; return when it is gone.

    It is sent TERM, and finishes what it has in hand; after the time-out its whole process tree is sent KILL.
    The stop_schedule that it was started with is kept to.  A daemon that does not run is a success.

    \b
      daemonkit kill heartbeat
      daemonkit kill --timeout 5 heartbeat.py
    """
    schedule = _own(place) or _configured(place) if timeout is None else ending.schedule(timeout)
    how = ending.end(place.pid_path, place.socket_path, schedule)
    click.echo(f"{place.name} {how}")


def _own(place: Place) -> Schedule | None:
    """The schedule in force for the daemon, by its own word, busy as it may be; None if that cannot be had or taken."""
    try:
        pid = place.pid()
        told = None if foreign_uid(pid) else board.facts(pid).get("stop_schedule")
        return parse_stop_schedule(told) if told else None
    except DaemonkitError:
        return None  # it does not run, or is not ours: `end` will say so


def _configured(place: Place) -> Schedule:
    """How the daemon is to be stopped.  A configuration that cannot be read is no reason to let it run on."""
    try:
        return place.configuration().options.stop_schedule
    except ConfigError as error:
        click.echo(f"{error}; stopping by the default stop_schedule", err=True)
        return parse_stop_schedule(Options.stop_schedule.default)
