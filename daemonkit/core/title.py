"""The name of a process in ps."""

from __future__ import annotations

import os


def take_title(title: str) -> None:
    """Be known by ``title`` in ps, cut to the room that the command line had.

    The environment's room is left alone: /proc/PID/environ tells operators, and the next start, whose process this is.
    """
    # Not with the module: it imports logging and threading, whose work after each fork doubles the cost of a child.
    from setproctitle import setproctitle, setthreadtitle

    os.environ["SPT_NOENV"] = "1"
    setproctitle(title)
    del os.environ["SPT_NOENV"]
    # The short name, without spaces: from 3.12 on Python looks for its number of threads behind so many spaces in
    # /proc/self/stat, and would warn of a fork in a process that has one.
    setthreadtitle(title.replace(": ", ":").replace(" ", "-"))
