"""daemonkit pause"""

from __future__ import annotations

import click

from daemonkit.cli.common import Place, job_argument


@click.command()
@job_argument
def command(place: Place, job: str | None) -> None:
    """Let a timer job, or all of them, rest: no run, no wake-up.

    \b
      daemonkit pause heartbeat beat
      daemonkit pause heartbeat
    """
    place.ask("pause", job=job)
    click.echo(f"{place.name}: {job or 'all jobs'} paused")
