"""Where a script's tasks are put: one connection a process, made when it is needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from daemonkit.config import load
from daemonkit.config.options import name_of
from daemonkit.config.trust import prepare_run_dir
from daemonkit.queue.broker import Broker, NewTask
from daemonkit.queue.connect import connect
from daemonkit.queue.current import undisturbed
from daemonkit.queue.forking import exclusively


class Outlet:
    """Puts tasks, from any thread; after a fork over a connection of the child's own."""

    def __init__(self, find_url: Callable[[], str]) -> None:
        """Connect to the broker that ``find_url`` names, when something is put."""
        self._find_url = find_url
        self._broker: Broker | None = None
        self._forsaken: list[Broker | None] = []
        os.register_at_fork(after_in_child=self._forsake)

    def put_many(self, queue: str, tasks: Sequence[NewTask]) -> list[str]:
        """Put ``tasks``, all or none; return their ids.

        Raises:
            UsageError: the broker's URL, or a task, cannot be meant.
            BrokerError: the broker cannot be reached, or refuses.
        """
        with self.broker() as broker:
            return broker.put_many(queue, tasks)

    @contextlib.contextmanager
    def broker(self) -> Iterator[Broker]:
        """The connection, for as long as the block lasts ours alone; a task's time-out waits for its end.

        Raises:
            UsageError: the broker's URL cannot be meant.
            BrokerError: it cannot be reached.
        """
        with undisturbed(), exclusively:
            if self._broker is None:
                self._broker = connect(self._find_url())
            yield self._broker

    def _forsake(self) -> None:
        self._forsaken.append(self._broker)  # the parent's, which must not even be closed here
        self._broker = None


def configured_url(name: str | None, given: Mapping[str, Any], function: Callable[..., Any]) -> str:
    """The broker of the daemon that would run the script in which ``function`` is declared.

    Args:
        name: the daemon's, if the script says it.
        given: options that the script gives.
        function: of a task.

    Raises:
        ConfigError: the configuration is wrong.
        UsageError: so is an option of the script's.
        RunDirectoryError: the run directory, where the broker's file is to be, cannot be used.
    """
    code = getattr(function, "__code__", None)
    found = load(
        name or name_of(code.co_filename if code else function.__module__),
        command_line={},
        environ=os.environ,
        script=given,
        cwd=os.getcwd(),
    )
    options = found.options
    if options.broker.startswith(f"sqlite:{options.run_dir}/"):
        prepare_run_dir(options.run_dir, owner=options.user)  # the first to come may be a producer
    return options.broker
