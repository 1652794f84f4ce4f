"""A daemon below which the calls of ``background`` run."""

from __future__ import annotations

import os
from typing import Final

from daemonkit import config
from daemonkit.config import options
from daemonkit.core import asking
from daemonkit.errors import ControlError, ForkServerLost, NotAllowed, UsageError

_ANSWER_TIME: Final = 30.0  # seconds that it has to start a child; its first one needs a fork server as well


class Host:
    """The daemon, by name."""

    def __init__(self, name: str | None, run_dir: str | None) -> None:
        """Find it in ``run_dir`` (None: as the command would), when it is needed."""
        if not name:
            raise UsageError('start="daemon": say which with daemon="NAME"')
        self.name = options.check_name(name)
        self._run_dir = run_dir

    def take(self, fd: int) -> None:
        """Have it start the program of ``background`` as a child of its own, with ``fd``, the other end of our wire.

        Raises:
            ForkServerLost: it does not run, or refuses.
        """
        command_line = {"run_dir": self._run_dir}
        found = config.load(self.name, command_line=command_line, environ=os.environ, cwd=os.getcwd())
        path = os.path.join(found.options.run_dir, f"{self.name}.sock")
        try:
            answer = asking.ask(path, {"do": "background", "pid": os.getpid()}, timeout=_ANSWER_TIME, fds=[fd])
        except (ControlError, NotAllowed) as error:
            raise ForkServerLost(f"background: hand calls to the daemon {self.name}: {error}; does it run?") from error
        if not answer.get("ok"):
            raise ForkServerLost(f"background: the daemon {self.name}: {answer.get('error')}")
