"""daemonkit jobs"""

from __future__ import annotations

import click

from daemonkit.cli.common import Place, as_json, json_option, name_argument


@click.command()
@json_option
@name_argument
def command(place: Place, json_wanted: bool) -> None:
    """The timer jobs of a daemon: when they ran, when they will, how late, how often they failed.

    \b
      daemonkit jobs heartbeat
    """
    jobs = place.ask("jobs")["jobs"]
    if json_wanted:
        as_json(jobs)
        return
    from daemonkit.report import jobs_as_text

    click.echo("\n".join(jobs_as_text(jobs)))
