"""daemonkit check"""

from __future__ import annotations

import os
import signal
from typing import Any

import click

from daemonkit import loader
from daemonkit.cli import starting
from daemonkit.cli.common import configuration_options, target_argument, working_directory
from daemonkit.config import trust
from daemonkit.script import Script


@click.command(context_settings={"allow_interspersed_args": False})
@configuration_options()
@target_argument
@click.pass_context
def command(
    ctx: click.Context, /, module: str | None, args: tuple[str, ...], config_path: str | None, **options: Any
) -> None:
    """Import and validate a script and its configuration; nothing is started, nothing is written.

    \b
      daemonkit check heartbeat.py
    """
    request = starting.request_of(ctx, module, args, options, config_path)
    path, is_module = loader.find(request.target)
    request.configuration()
    script = load(path, is_module, request.args)
    request.configuration(script.options)
    click.echo(f"{script.name or request.name}: {_summary(script)}; ready to start")


def load(path: str, is_module: bool, args: list[str]) -> Script:
    """Load the script in this process."""
    from daemonkit.api import default

    cwd = working_directory()
    if os.geteuid() == 0:
        for file in loader.files_of(path, is_module, cwd):
            trust.check_trusted(file)
    if is_module:
        loader.add_working_directory(cwd)
    default.loading = loader.Loader(default)
    try:
        return default.loading.load(path, is_module, args)
    finally:
        default.loading = None


def _summary(script: Script) -> str:
    jobs = ", ".join(f"{job.name} ({job.when})" for job in list(script.jobs.values())[:10])
    more = f" and {len(script.jobs) - 10} more" if len(script.jobs) > 10 else ""
    events = ", ".join(signal.Signals(key).name if isinstance(key, int) else key for key in script.handlers)
    workers = ", ".join(f"{worker.name} ({worker.processes})" for worker in script.workers.values())
    parts = [f"jobs {jobs}{more}" if jobs else "", f"workers {workers}" if workers else ""]
    tasks = ", ".join(f"{task.name} (queue {task.policy.queue})" for task in script.tasks.values())
    parts.append(f"tasks {tasks}" if tasks else "")
    parts.append(f"handlers for {events}" if events else "")
    parts.append("a main loop of its own" if script.main_loop else "")
    return "; ".join(filter(None, parts))
