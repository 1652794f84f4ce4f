"""The command: one thin file a subcommand, loaded when it is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from daemonkit.cli.common import Preset
from daemonkit.errors import DaemonkitError, UsageError

if TYPE_CHECKING:
    from daemonkit.script import Script

COMMANDS = {
    "start": "Become a daemon; return when it is ready.",
    "run": "The same in the foreground: terminal, systemd, container.",
    "kill": "Stop a daemon; return when it is gone.",
    "status": "What runs, since when, and how its jobs fare.",
    "restart": "Stop it and start it again with the same arguments.",
    "reload": "Let it read its configuration again; return its result.",
    "reexec": "Execute the new code in place: same PID, lock never released.",
    "list": "Every daemon in the run directory.",
    "logs": "Show a daemon's log.",
    "jobs": "The timer jobs of a daemon.",
    "trigger": "Run a timer job now.",
    "pause": "Let timer jobs rest.",
    "resume": "Put paused timer jobs back on their grid.",
    "scale": "More or fewer processes of a named worker.",
    "check": "Import and validate a script; nothing is started.",
    "timetable": "Show when each job of a script would run.",
    "unit": "Print a systemd unit or an init script for a script.",
    "queue": "The tasks of a broker, by hand: look, put, kick, bury, delete, pause, move.",
    "cluster": "The cluster, by hand: who leads, who is there, who has which lock, what is configured.",
    "ipc": "System V objects that daemonkit has made: list them, remove those of the dead.",
}
ALIASES = {"stop": "kill"}


class Group(click.Group):
    """Finds a subcommand by its name, and knows what was meant when there is none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Load the subcommand's file."""
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        command = import_module(f"daemonkit.cli.{name.replace('list', 'listing')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without loading their files."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find it, or say what was probably meant."""
        if args and args[0] not in COMMANDS and args[0] not in ALIASES and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], [*COMMANDS, *ALIASES], 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if args[0].endswith(".py"):
                hint = f" Did you mean 'daemonkit start {args[0]}'?"
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.command(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="daemonkit", prog_name="daemonkit")
def group() -> None:
    """Turn a Python script into a Unix daemon.

    \b
      daemonkit start heartbeat.py     returns when it is ready, or says why not
      daemonkit status heartbeat       0 running, 1 dead, 3 not running
      daemonkit logs -f heartbeat
      daemonkit kill heartbeat         returns when it is gone

    Where a NAME is asked, the SCRIPT may be given.
    """


def run(args: list[str] | None = None, preset: Preset | None = None, prog: str = "daemonkit") -> None:
    """Run the command and exit with its code."""
    from daemonkit.cli.common import ensure_standard_streams

    ensure_standard_streams()
    code = call(args, preset, prog)
    if preset is None:
        _leave(code)
    sys.exit(code)  # a script's exit functions are its own


def _leave(code: int) -> None:
    """End the process here: the interpreter's own clean-up would be a tenth of the time of ``status``."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return  # the usual way out says so
    os._exit(code)


def call(args: list[str] | None, preset: Preset | None, prog: str) -> int:
    """Run the command; return its exit code, errors said on stderr."""
    stdout = sys.stdout
    try:
        result: Any = group.main(args, prog_name=prog, standalone_mode=False, obj=preset)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except SystemExit as end:
        # Click ends so, stdout replaced by a silent one, when its reader has left: nobody wants the rest.
        return 0 if sys.stdout is not stdout else int(end.code or 0)
    except DaemonkitError as error:
        text = str(error)
        click.echo(text if "\n" in text else f"{prog}: {text}", err=True)
        return error.exit_code
    except OSError as error:  # such as no room for our output
        click.echo(f"{prog}: {error}", err=True)
        return 1
    return result if isinstance(result, int) else 0


def run_script(script: Script) -> None:
    """The same command for the script that is running: its ``main()``."""
    main_module = sys.modules["__main__"]
    if not hasattr(main_module, "__file__"):
        raise UsageError("main() makes a script its own command; there is no script here, only python -c or a prompt")
    spec = getattr(main_module, "__spec__", None)
    if spec is not None:
        target = f"-m {spec.name.removesuffix('.__main__')}"
    else:
        target = os.path.abspath(str(main_module.__file__))
    run(preset=Preset(target, script.name, script.options), prog=os.path.basename(sys.argv[0]))
