"""daemonkit reexec"""

from __future__ import annotations

import click

from daemonkit.cli.common import name_argument, place_of


@click.command()
@click.option(
    "--timeout", type=float, default=90.0, show_default=True, metavar="SECONDS", help="Wait so long for its result."
)
@name_argument
@click.pass_context
def command(
    ctx: click.Context,
    name: str | None,
    module: str | None,
    run_dir: str | None,
    config_path: str | None,
    timeout: float,
) -> None:
    """Execute the new code in place (SIGUSR2): same PID, lock never released, timer grid kept.

    The new code is imported in a child first; if that fails, its traceback is shown, the exit code is 1, and the
    old code goes on.

    \b
      daemonkit reexec heartbeat
    """
    place = place_of(ctx, name, module, run_dir, config_path)
    place.ask("reexec", timeout)
    click.echo(f"{place.name} runs the new code, pid {place.pid()}")
