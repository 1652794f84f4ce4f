"""NAME and JOB on one command line."""

from __future__ import annotations

import click

from daemonkit.cli.common import Preset


def split(ctx: click.Context, name: str | None, job: str | None) -> tuple[str | None, str | None]:
    """Where the daemon is known, by -m or because the script is its own command, the first word is the job."""
    known = isinstance(ctx.obj, Preset) or ctx.params.get("module") is not None
    return (None, name) if known and job is None else (name, job)
