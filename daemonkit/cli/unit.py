"""daemonkit unit"""

from __future__ import annotations

from typing import Any

import click

from daemonkit import loader
from daemonkit.cli import starting
from daemonkit.cli.common import configuration_options, target_argument


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--systemd", "kind", flag_value="systemd", default=True, help="A Type=notify unit, hardened.  [default]")
@click.option("--initd", "kind", flag_value="initd", help="An LSB init script.")
@configuration_options()
@target_argument
@click.pass_context
def command(
    ctx: click.Context,
    /,
    kind: str,
    module: str | None,
    args: tuple[str, ...],
    config_path: str | None,
    **options: Any,
) -> None:
    """Print a hardened systemd unit or an LSB init script that runs a script.

    \b
      daemonkit unit --systemd heartbeat.py > /etc/systemd/system/heartbeat.service
      daemonkit unit heartbeat.py --initd > /etc/init.d/heartbeat
    """
    from daemonkit.service import unit

    rest = [arg for arg in args if arg not in ("--systemd", "--initd")]
    if len(rest) < len(args):
        kind = "initd" if "--initd" in args else "systemd"
    request = starting.request_of(ctx, module, tuple(rest), options, config_path)
    path, is_module = loader.find(request.target)
    spec = unit.specify(request.name, path, is_module, request.args, request.configuration())
    click.echo(unit.systemd_unit(spec) if kind == "systemd" else unit.initd_script(spec), nl=False)
