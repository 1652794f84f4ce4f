"""Workers that share one piece of work: primes, each worker its own numbers.

    daemonkit start etc/examples/crunch.py
    daemonkit status crunch
    daemonkit scale crunch crunch 4
    daemonkit trigger crunch report

Change this file and ``daemonkit reload crunch``: the workers are replaced one by one.
"""

import logging
import os

from daemonkit import StopFlag, every, main, on, worker

log = logging.getLogger("crunch")
BLOCK = 10_000  # numbers in one piece of work


def is_prime(number: int) -> bool:
    """By trial division."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@worker(count=2, heartbeat_timeout="1m", max_rss="200M")
def crunch(stop: StopFlag, index: int) -> None:
    """Count the primes of one block after the other, and rest a little."""
    start = index * 1_000_000
    while not stop.is_set():
        log.info("%d primes from %d on", sum(map(is_prime, range(start, start + BLOCK))), start)
        start += BLOCK
        stop.wait(1)


@every("1m", fork=True, timeout="10s")
def report() -> None:
    """In a process of its own: what it does to itself concerns nobody else."""
    log.info("load %s", os.getloadavg())


@on("fork")
def in_each_child() -> None:
    """Workers and reports give way to whoever sits in front of the machine."""
    os.nice(5)


if __name__ == "__main__":
    main()
