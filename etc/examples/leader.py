"""One leads, all work: start it in several terminals, kill the one that leads, and see the next take over.

On one host, each in a run directory of its own, as good as a host of its own:

    python etc/examples/leader.py run --run-dir /tmp/one --coordinator local:/tmp/cluster
    python etc/examples/leader.py run --run-dir /tmp/two --coordinator local:/tmp/cluster
    daemonkit cluster status local:/tmp/cluster

On many hosts: --coordinator zookeeper://zk1,zk2,zk3

The leader hands out parts of the work in order; a worker on each host takes them, one each.
"""

from __future__ import annotations

import itertools
import logging

from daemonkit import StopFlag, cluster, current_leadership, main, on, worker
from daemonkit.errors import CoordinatorError, CoordinatorTimeout

log = logging.getLogger("leader")


@on("leader")
def begins() -> None:
    """Called when this daemon leads from now on."""
    log.info("this one leads, token %d", current_leadership.token)


@on("follower")
def ceases() -> None:
    """Called when it does no more."""
    log.info("another leads")


@worker(leader=True)
def hand_out(stop: StopFlag) -> None:
    """Put a part every second, with the token, so that a late one can be told from those of the next leader."""
    parts = cluster.queue("parts")
    for number in itertools.count(1):
        parts.put(f"{current_leadership.token}/{number}".encode())
        if stop.wait(1):
            return


@worker
def work(stop: StopFlag) -> None:
    """Take parts, whoever leads; each is taken by one."""
    parts, seen = cluster.queue("parts"), 0
    while not stop.is_set():
        try:
            part = parts.get(timeout=1)
        except CoordinatorTimeout:
            continue
        except CoordinatorError as error:
            log.warning("%s", error)
            stop.wait(1)
            continue
        token = int(part.split(b"/")[0])
        if token < seen:
            log.warning("part %s is of a leader whose time is up: left out", part.decode())
            continue
        seen = token
        log.info("works on part %s", part.decode())


if __name__ == "__main__":
    main()
