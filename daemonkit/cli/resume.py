"""daemonkit resume"""

from __future__ import annotations

import click

from daemonkit.cli.common import Place, job_argument


@click.command()
@job_argument
def command(place: Place, job: str | None) -> None:
    """Put a paused timer job, or all of them, back on the grid; what was missed is not made up.

    \b
      daemonkit resume heartbeat beat
      daemonkit resume heartbeat
    """
    place.ask("resume", job=job)
    click.echo(f"{place.name}: {job or 'all jobs'} resumed")
