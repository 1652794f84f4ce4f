"""A cron job that runs once in the cluster, on whichever host leads at that moment.

    daemonkit start --coordinator zookeeper://zk1,zk2,zk3 etc/examples/nightly.py      # on each host

What it writes to refuses a smaller token than it has seen: so a host that was asleep at the wrong moment changes
nothing afterwards.  With NIGHTLY_FILE set, the report goes there; NIGHTLY_CRON sets another time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time

from daemonkit import cron, current_leadership, main

log = logging.getLogger("nightly")
FILE = os.environ.get("NIGHTLY_FILE", "/tmp/nightly-report")


@cron(os.environ.get("NIGHTLY_CRON", "30 2 * * *"), leader=True, fork=True, timeout="1h")
def report() -> None:
    """Write the night's report."""
    text = f"report of {time.strftime('%Y-%m-%d %H:%M')} by {socket.gethostname()}"
    if replace(FILE, current_leadership.token, text):
        log.info("%s", text)
    else:
        log.warning("another host leads by now: nothing was written")


def replace(path: str, token: int, text: str) -> bool:
    """Write ``text``, unless somebody with a larger token has written before."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        first = file.readline()
        if first and int(first) > token:
            return False
        file.truncate(0)
        file.write(f"{token}\n{text}\n")
    return True


if __name__ == "__main__":
    main()
