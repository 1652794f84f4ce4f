"""daemonkit jobs"""

from __future__ import annotations

import click

from daemonkit.cli.common import as_json, name_argument, place_of


@click.command()
@click.option("--json", "json_wanted", is_flag=True, help="Print it for programs.")
@name_argument
@click.pass_context
def command(
    ctx: click.Context,
    name: str | None,
    module: str | None,
    run_dir: str | None,
    config_path: str | None,
    json_wanted: bool,
) -> None:
    """The timer jobs of a daemon: when they ran, when they will, how late, how often they failed.

    \b
      daemonkit jobs heartbeat
    """
    jobs = place_of(ctx, name, module, run_dir, config_path).ask("jobs")["jobs"]
    if json_wanted:
        as_json(jobs)
        return
    from daemonkit.report import jobs_as_text

    click.echo("\n".join(jobs_as_text(jobs)))
