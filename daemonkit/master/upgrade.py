"""Execute the new code in place (SIGUSR2, ``daemonkit reexec``): same PID, lock never released, timer grid kept.

The new code is tried first, in a child that only imports it.  If that fails, the old code goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

from daemonkit.core.logs import flush_streams
from daemonkit.core.loop import READ
from daemonkit.core.signals import WAKING
from daemonkit.core.stop import HOOK_GRACE
from daemonkit.errors import told
from daemonkit.handover import Generation, JobState

if TYPE_CHECKING:
    import subprocess

    from daemonkit.control import Client, Server
    from daemonkit.master.master import Master

log = logging.getLogger("daemonkit")

GOOD = b"good"  # what a trial leaves in its memfd when the new code has been loaded


class Upgrade:
    """Tries the new code, and replaces the program by it."""

    def __init__(self, master: Master) -> None:
        """Upgrade ``master``, when asked."""
        self._master = master
        self._waiting: list[Client] = []
        self._trial: subprocess.Popen[bytes] | None = None
        self.server: Server | None = None

    def begin(self, client: Client | None = None) -> None:
        """Try the new code in a child; ``client`` is told the outcome."""
        if client is not None:
            self._waiting.append(client)
        if self._trial is not None:
            return
        try:
            self._try()
        except (OSError, ImportError) as error:
            self._refuse(f"the new code could not be tried: {told(error)}")

    def _try(self) -> None:
        import subprocess

        verdict = os.memfd_create("daemonkit-verdict", os.MFD_CLOEXEC)
        handover = self._master.parts.handover._replace(check_only=True, lock_fd=-1, status_fd=verdict, generation=None)
        fd = handover.store()
        self._trial = trial = subprocess.Popen(
            handover.command(fd),
            pass_fds=(fd, verdict),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(errors := os.memfd_create("daemonkit-trial", os.MFD_CLOEXEC)),
            cwd=handover.cwd if os.path.isdir(handover.cwd) else None,
        )
        os.close(fd)
        pidfd = os.pidfd_open(trial.pid)
        loop, timer = self._master.parts.loop, self._master.parts.timer
        bound = timer.once("upgrade bound", self._master.configuration.options.ready_timeout, trial.kill)

        def tried(_: int) -> None:
            loop.unwatch(pidfd)
            os.close(pidfd)
            timer.pause(bound)
            self._tried(errors, verdict)

        loop.watch(pidfd, tried, READ)

    def give_up(self) -> None:
        """The daemon stops: so does the trial of the new code, if there is one."""
        trial, self._trial = self._trial, None
        if trial is not None:
            trial.kill()
            trial.wait()

    def _tried(self, errors: int, verdict: int) -> None:
        trial, self._trial = self._trial, None
        code = trial.wait() if trial else 1
        # The status may have gone to somebody else's wait(); the word is written by the new code's end alone.
        is_good = os.pread(verdict, 8, 0) == GOOD
        os.close(verdict)
        with open(errors, errors="replace") as file:
            file.seek(0)
            text = file.read()[-20000:].strip()
        if is_good:
            self._execute()
        else:
            self._refuse(text or f"the new code could not be tried (status {code})")

    def _refuse(self, why: str) -> None:
        log.error("upgrade refused, the old code goes on: %s", why)
        for client in self._waiting:
            with contextlib.suppress(OSError):
                client.answer({"ok": False, "error": why})
        self._waiting.clear()

    def _execute(self) -> None:
        master, parts = self._master, self._master.parts
        log.info("executing the new code")
        hooks = master.script.handlers.get("stop")
        master.end_children()
        options = master.configuration.options  # from here to the new code nobody feeds the watchdog
        parts.notifier.extend_timeout(options.graceful_timeout + HOOK_GRACE + options.ready_timeout)
        master.wind_up()
        parts.timer.disarm()
        parts.signals.block_all()
        if parts.signals.stop.signal is not None:
            parts.signals.unblock_all()
            self._refuse("the daemon was asked to stop meanwhile")
            return
        for number in set(parts.signals.take()) - WAKING:
            os.kill(os.getpid(), number)  # blocked, it waits in the kernel for the new image
        handover = parts.handover._replace(lock_fd=parts.pidfile.fileno(), status_fd=-1, generation=self._generation())
        environ = {**os.environ, **parts.notifier.to_environment()}
        flush_streams()
        _keep_from_new_image()
        try:
            handover.execute(environ)
        except OSError as error:
            parts.signals.stop.clear_deadline()
            parts.signals.unblock_all()
            if hooks:
                master.script.handlers["stop"] = hooks
            for fd in handover.descriptors():
                os.set_inheritable(fd, False)
            self._refuse(f"execute {sys.executable}: {error.strerror}")
            master.start()
            master.resume()

    def _generation(self) -> Generation:
        """What the new image takes over."""
        jobs: dict[str, JobState] = {
            name: {"when": job.when, "planned": job.planned, "paused": job.paused, "record": job.record.dump()}
            for name, job in self._master.script.jobs.items()
        }
        return {
            "jobs": jobs,
            "caught": [number for number in self._master.script.handlers if isinstance(number, int)],
            "ready_at": self._master.ready_at,
            "control_fd": self.server.sock.fileno() if self.server else -1,
            "control_file": list(self.server.file) if self.server and self.server.file else None,
            "waiting_fds": [fd for client in self._waiting if (fd := client.sock.fileno()) >= 0],
        }


def _keep_from_new_image() -> None:
    """Let no descriptor of the old code pile up in the new: those that go along are made inheritable afterwards."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)
