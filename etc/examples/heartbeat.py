"""A daemon that watches the machine: load, memory and disk, each second.

    daemonkit start etc/examples/heartbeat.py
    daemonkit logs -f heartbeat

HUP (``daemonkit reload heartbeat``) reads the thresholds again, from the configuration's [settings.heartbeat].
USR1 reports.
"""

import logging
import os
import shutil

from daemonkit import every, main, on, settings

log = logging.getLogger("heartbeat")


def memory_used() -> float:
    """Per cent of memory in use (proc(5), meminfo)."""
    with open("/proc/meminfo") as file:
        values = {key: int(rest.split()[0]) for key, rest in (line.split(":", 1) for line in file)}
    return 100 * (1 - values["MemAvailable"] / values["MemTotal"])


def readings() -> dict[str, float]:
    """The state of the machine."""
    disk = shutil.disk_usage("/")
    return {
        "load": os.getloadavg()[0],
        "memory": memory_used(),
        "disk": 100 * disk.used / disk.total,
    }


@every(1)
def beat() -> None:
    """Log the readings; those above their threshold as a warning."""
    now = readings()
    text = f"load {now['load']:.2f}, memory {now['memory']:.1f} %, disk {now['disk']:.1f} %"
    above = [key for key, value in now.items() if value > settings().get(key, float("inf"))]
    if above:
        log.warning("%s: %s above threshold", text, ", ".join(above))
    else:
        log.info(text)


@on("reload")
@on("start")
def show_thresholds() -> None:
    """Say what is in force."""
    log.info("thresholds %s", dict(settings()) or "none")


@on("SIGUSR1")
def report() -> None:
    """Report on request."""
    log.info("report: %s", ", ".join(f"{key} {value:.2f}" for key, value in readings().items()))


if __name__ == "__main__":
    main()
