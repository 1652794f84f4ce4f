"""The name of a process in ps."""

from __future__ import annotations

import os
from collections.abc import Callable

_setters: tuple[Callable[[str], None], ...] = ()  # of the title, and of the short name


def take_title(title: str) -> None:
    """Be known by ``title`` in ps, cut to the room that the command line had.

    The environment's room is left alone: /proc/PID/environ tells operators, and the next start, whose process this is.
    """
    global _setters
    if not _setters:
        _setters = _found(title)
    set_title, set_short_name = _setters
    set_title(title)
    # The short name, without spaces: from 3.12 on Python looks for its number of threads behind so many spaces in
    # /proc/self/stat, and would warn of a fork in a process that has one.
    set_short_name(title.replace(": ", ":").replace(" ", "-"))


def _found(title: str) -> tuple[Callable[[str], None], ...]:
    # Not with the module: it imports logging and threading, whose work after each fork doubles the cost of a child.
    from setproctitle import setproctitle, setthreadtitle

    os.environ["SPT_NOENV"] = "1"  # it is looked for with the first title alone
    setproctitle(title)
    del os.environ["SPT_NOENV"]
    return setproctitle, setthreadtitle
