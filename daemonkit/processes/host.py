"""A daemon below which the calls of ``background`` run."""

from __future__ import annotations

import os
import time
from typing import Final

from daemonkit import config
from daemonkit.config import options
from daemonkit.core import asking
from daemonkit.core.chance import about
from daemonkit.errors import ControlError, ForkServerLost, NotAllowed, UsageError

_ANSWER_TIME: Final = 30.0  # seconds that it has to start a child; its first one needs a fork server as well
_PAUSE: Final = 0.1  # seconds between two tries


class Host:
    """The daemon, by name."""

    def __init__(self, name: str | None, run_dir: str | None) -> None:
        """Find it in ``run_dir`` (None: as the command would), when it is needed."""
        if not isinstance(name, str) or not name:
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
        end = time.monotonic() + _ANSWER_TIME
        while (why := self._ask(path, fd, end)) is not None:
            # It has too much to do, or executes new code: it, or the next, is there in a moment.
            if time.monotonic() > end or asking.listener(path) is None:
                raise ForkServerLost(f"background: hand calls to the daemon {self.name}: {why}; does it run?")
            time.sleep(about(_PAUSE, 0.5))

    def _ask(self, path: str, fd: int, end: float) -> str | None:
        """Ask once; return why that was in vain."""
        request = {"do": "background", "pid": os.getpid()}
        left = max(end - time.monotonic(), _PAUSE)
        try:
            answer = asking.ask(path, request, timeout=left, fds=[fd], uid=os.geteuid())
        except NotAllowed as error:
            raise ForkServerLost(f"background: hand calls to the daemon {self.name}: {error}") from error
        except ControlError as error:
            return str(error)
        return None if answer.get("ok") else str(answer.get("error"))
