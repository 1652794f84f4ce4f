"""daemonkit unit"""

from __future__ import annotations

from typing import Any

import click

from daemonkit import loader
from daemonkit.cli import starting
from daemonkit.cli.common import Preset, configuration_options, target_argument

SEPARATED = "daemonkit.cli.unit.separated"  # -- stands before SCRIPT: all that follows is the script's own


class Unit(click.Command):
    """Remembers the -- that click drops."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line."""
        given = list(args)
        rest = super().parse_args(ctx, args)
        words = len(ctx.params["args"])
        ctx.meta[SEPARATED] = len(given) > words and given[-words - 1] == "--"
        return rest


@click.command(cls=Unit, context_settings={"allow_interspersed_args": False})
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

    if module is None and not isinstance(ctx.obj, Preset) and not ctx.meta.get(SEPARATED):
        args, kind = _trailing(args, kind)
    request = starting.request_of(ctx, module, args, options, config_path)
    path, is_module = loader.find(request.target)
    spec = unit.specify(request.name, path, is_module, request.args, request.configuration())
    click.echo(unit.systemd_unit(spec) if kind == "systemd" else unit.initd_script(spec), nl=False)


def _trailing(args: tuple[str, ...], kind: str) -> tuple[tuple[str, ...], str]:
    """Take the kind from right behind the SCRIPT too; what comes later is the script's own."""
    if args[1:2] in (("--systemd",), ("--initd",)):
        return (args[0], *args[2:]), args[1].removeprefix("--")
    return args, kind
