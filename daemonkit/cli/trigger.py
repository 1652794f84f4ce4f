"""daemonkit trigger"""

from __future__ import annotations

import click

from daemonkit.cli.common import TIMEOUT, Place, job_argument


@click.command()
@click.option(
    "--timeout", type=TIMEOUT, default=60.0, show_default=True, metavar="SECONDS", help="Wait so long for its end."
)
@job_argument
def command(place: Place, job: str | None, timeout: float) -> None:
    """Run a timer job now, beside its schedule; return when it has ended, with exit code 1 if it failed.

    \b
      daemonkit trigger heartbeat beat
    """
    if job is None:
        raise click.UsageError("Missing argument 'JOB'.")
    place.ask("trigger", timeout, job=job)
    click.echo(f"{place.name}: {job} has run")
