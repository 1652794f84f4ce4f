"""The public object, and the default one that the module-level decorators speak to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from daemonkit.script import Script

if TYPE_CHECKING:
    from daemonkit.loader import Loader


class Daemon(Script):
    """A daemon as an object: the same decorators as methods, for scripts that prefer one.

    ``Daemon("name", graceful_timeout=5)``: keyword arguments are defaults for the configuration's keys.
    """

    def __init__(self, name: str | None = None, **options: Any) -> None:
        """Begin a daemon with nothing declared; the name defaults to the stem of the script's file."""
        super().__init__(name, **options)
        self.settings: Mapping[str, Any] = {}
        self.listen_fds: list[int] = []
        self.loading: Loader | None = None

    def main(self, func: Callable[[], Any] | None = None) -> None:
        """Make the script its own command: ``python x.py start|kill|status|run ...``; does not return.

        Args:
            func: the script's own main loop.  Timer jobs then interrupt it, run by the SIGALRM handler between
                two of its bytecodes, never nested.  The daemon ends when it returns.

        Raises:
            SystemExit: always, with the command's exit code.
        """
        if default.loading is not None:
            default.loading.choose(self, func)
        from daemonkit.cli import run_script

        run_script(self)


default = Daemon()
