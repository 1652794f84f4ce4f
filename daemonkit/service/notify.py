"""What systemd is told, and what it hands over: sd_notify(3), sd_listen_fds(3).

One datagram a message.  A service manager that is gone does not matter; one whose queue is full is waited for, but
only for ``PATIENCE``: a READY=1 that is thrown away would be a start that times out.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, MutableMapping
from typing import Final

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
PATIENCE: Final = 100_000  # microseconds


class Notifier:
    """Speaks to the service manager that started us; without one, every call does nothing."""

    def __init__(self, address: str | None, watchdog_usec: int | None = None) -> None:
        """Speak to the socket at ``address``; ``watchdog_usec`` is within what time it wants to hear WATCHDOG=1."""
        self._address = address
        self._watchdog_usec = watchdog_usec

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Take NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID out of ``environ``: no child is to speak for us."""
        address = environ.pop("NOTIFY_SOCKET", None)
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = pid in ("", str(os.getpid()))
        return cls(address or None, int(usec) if ours and usec.isdigit() and int(usec) > 0 else None)

    def to_environment(self) -> dict[str, str]:
        """The variables again, for another image of this process."""
        environ = {"NOTIFY_SOCKET": self._address} if self._address else {}
        if self._watchdog_usec:
            environ |= {"WATCHDOG_USEC": str(self._watchdog_usec), "WATCHDOG_PID": str(os.getpid())}
        return environ

    @property
    def is_active(self) -> bool:
        """Whether somebody listens."""
        return self._address is not None

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds after which WATCHDOG=1 is to be sent: half of what is allowed (sd_watchdog_enabled(3))."""
        return self._watchdog_usec / 2e6 if self._watchdog_usec and self.is_active else None

    def ready(self, status: str | None = None, main_pid: int | None = None) -> bool:
        """READY=1: started, or reloaded."""
        return self.send("READY=1", *_status(status), *([f"MAINPID={main_pid}"] if main_pid else []))

    def reloading(self) -> bool:
        """RELOADING=1, with the time that Type=notify-reload wants (systemd.service(5))."""
        return self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> bool:
        """STOPPING=1."""
        return self.send("STOPPING=1")

    def watchdog(self) -> bool:
        """WATCHDOG=1: the loop turns."""
        return self.send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """EXTEND_TIMEOUT_USEC=: what is under way may take ``seconds`` more."""
        return self.send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def send(self, *assignments: str) -> bool:
        """Send VARIABLE=value assignments in one datagram; tell whether it was taken."""
        if not self._address or not assignments:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A socket for each message: none to be closed by whoever closes descriptors, none to be left in a child.
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                # The kernel's own time-out: poll(2) on an unconnected socket knows nothing of the receiver's queue.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *divmod(PATIENCE, 1_000_000)))
                sock.sendto("\n".join(assignments).encode(), address)
        except OSError:
            return False  # gone, or its queue stayed full: nobody to tell
        return True


def listen_fds(environ: MutableMapping[str, str]) -> list[int]:
    """The sockets passed to this process, close-on-exec; the variables are taken out of ``environ``."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = list(range(FIRST_FD, FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def is_supervised(environ: Mapping[str, str], pid: int) -> str | None:
    """Why this process must not go to the background, or None if it may.

    INVOCATION_ID is inherited by all that a unit runs, an init script or a desktop's terminal among them; only
    SYSTEMD_EXEC_PID tells who is watched (systemd.exec(5)).
    """
    if pid == 1:
        return "this is PID 1"
    if environ.get("NOTIFY_SOCKET"):
        return "a service manager waits for word (NOTIFY_SOCKET is set)"
    if environ.get("INVOCATION_ID") and environ.get("SYSTEMD_EXEC_PID", str(pid)) == str(pid):
        return "systemd runs this process as a service (INVOCATION_ID is set)"
    return None


def _status(text: str | None) -> list[str]:
    return [f"STATUS={' '.join(text.split())}"] if text else []
