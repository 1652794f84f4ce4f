"""What one image of the daemon's process hands to the next: from launcher to daemon, from old code to new.

It travels as JSON in a memfd (memfd_create(2)) whose number is the image's argument; descriptors travel by
being inheritable.  No file is written, nothing is seen in ps, and its size has no limit.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final, NamedTuple, NoReturn, TypedDict

# Without garbage collections while modules and script are read: a tenth of that time, and there is no garbage yet.
_BOOT = (
    "import gc, sys; gc.disable(); sys.path.append(sys.argv[1]);"
    " from daemonkit.master.image import main; main(int(sys.argv[2]))"
)


PID_FILE: Final = "DAEMON_PID_FILE"  # in the environment of the image: whose it and its children are


class JobState(TypedDict):
    """Where a timer job stands."""

    when: str
    planned: int | None
    paused: bool
    record: list[Any]


class Generation(TypedDict):
    """What the old image of a re-exec leaves to the new one."""

    jobs: dict[str, JobState]
    caught: list[int]  # signals that wait in the kernel until the new code catches them
    ready_at: float | None
    control_fd: int
    control_file: list[int] | None
    waiting_fds: list[int]


class Handover(NamedTuple):
    """All that an image needs to know; paths are absolute."""

    name: str
    target: str  # the script's path, or the module's name
    is_module: bool
    args: list[str]
    cwd: str  # where the launcher stood: the working directory for reading the configuration again
    command_line: dict[str, Any]  # options given on the command line
    environ: dict[str, str]  # DAEMONKIT_* variables of the launcher
    config_path: str | None
    script_options: dict[str, Any]  # of a script that is its own command; others tell theirs when they are loaded
    run_dir: str
    uid: int  # of the launcher: whose default directories are meant, also after privileges were dropped
    detached: bool  # a classic daemon; False: in front of a terminal or supervisor
    why_in_front: str | None = None
    check_only: bool = False
    lock_fd: int = -1
    status_fd: int = -1  # the launcher listens at its other end until "ready" or "failed"
    listen_fds: list[int] = []  # noqa: RUF012 - never changed; a tuple would come back from JSON as a list
    generation: Generation | None = None
    page_fd: int = -1  # of a fork server's image: where it is written whether the daemon leads
    overlay: list[str] = []  # noqa: RUF012 - one text or none: the configuration that the cluster has
    server_fds: list[int] = []  # noqa: RUF012 - of a fork server's image: its wire, and where its children send notes

    @property
    def script(self) -> str:
        """What is run, as it is named on a command line."""
        return f"-m {self.target}" if self.is_module else self.target

    @property
    def pid_path(self) -> str:
        """The PID file."""
        return os.path.join(self.run_dir, f"{self.name}.pid")

    @property
    def socket_path(self) -> str:
        """The control socket."""
        return os.path.join(self.run_dir, f"{self.name}.sock")

    def descriptors(self) -> list[int]:
        """The descriptors that go with it."""
        listed = [self.lock_fd, self.status_fd, *self.listen_fds, *self.server_fds]
        if self.generation:
            listed += [self.generation["control_fd"], *self.generation["waiting_fds"]]
        return [fd for fd in listed if fd >= 0]

    def store(self) -> int:
        """Write it into a new memfd and return that."""
        fd = os.memfd_create("daemonkit-handover", os.MFD_CLOEXEC)
        with open(fd, "w", closefd=False) as file:
            json.dump(self._asdict(), file)
        return fd

    @classmethod
    def load(cls, fd: int) -> Handover:
        """Read it back and close ``fd``."""
        with open(fd) as file:
            file.seek(0)
            return cls(**json.load(file))

    def command(self, fd: int) -> list[str]:
        """The command line of an image that reads its handover from ``fd``.

        The interpreter's own options go along; -P keeps the working directory off the module search path.
        """
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return [sys.executable, *_interpreter_options(), "-P", "-c", _BOOT, here, str(fd)]

    def execute(self, environ: dict[str, str], keep: int | None = None) -> NoReturn:
        """Replace this program by the daemon's image; every other descriptor above 2 is closed on the way.

        Args:
            environ: the image's environment.
            keep: a memfd from ``store``, made beforehand.

        Raises:
            OSError: the interpreter cannot be executed any more.
        """
        fd = self.store() if keep is None else keep
        for number in [fd, *self.descriptors()]:
            os.set_inheritable(number, True)
        os.execve(sys.executable, self.command(fd), {**environ, PID_FILE: self.pid_path})


def _interpreter_options() -> list[str]:
    options = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    for flag, letter in (("isolated", "-I"), ("no_site", "-S"), ("dont_write_bytecode", "-B")):
        if getattr(sys.flags, flag):
            options.append(letter)
    options += [f"-W{option}" for option in sys.warnoptions]
    options += [f"-X{key}" if value is True else f"-X{key}={value}" for key, value in sys._xoptions.items()]
    return options
