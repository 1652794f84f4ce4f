"""Which broker a command is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from daemonkit.cli.common import configuration_options, configured

if TYPE_CHECKING:
    from daemonkit.queue.broker import Broker


def on_broker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what tells which broker is meant; the subcommand is given that, open."""

    @click.pass_context
    @wraps(function)
    def resolved(ctx: click.Context, /, *args: Any, **values: Any) -> Any:
        given = {key: values.pop(key) for key in ("broker", "run_dir")}
        is_put = ctx.info_name == "put"
        with opened(url_of(ctx, given, values.pop("config_path")), make=is_put) as broker:
            return function(broker, *args, **values)

    return configuration_options("broker", "run_dir")(resolved)


def url_of(ctx: click.Context, given: dict[str, str | None], config_path: str | None) -> str:
    """The URL of the broker that is meant."""
    return configured(ctx, given, config_path).broker


@contextmanager
def opened(url: str, *, make: bool = False) -> Iterator[Broker]:
    """The broker at ``url``, made if it is not there and ``make`` says so; closed afterwards."""
    from daemonkit.queue.connect import connect

    broker = connect(url, make=make)
    try:
        yield broker
    finally:
        broker.close()
