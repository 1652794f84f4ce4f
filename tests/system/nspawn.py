"""Boot this machine's own systemd in a container over a throw-away copy of ``/``.

The copy is an overlay with its upper layer in memory.  nspawn is PID 1 of a PID namespace and lives in a mount
namespace of its own: when it ends, however it ends, the kernel kills all that ran in the machine and takes the mounts
away.  It is itself tied to the test by a parent-death signal.  (The systemd inside would survive a killed nspawn.)
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import daemonkit

BOOT_TIMEOUT = 120.0  # seconds
COMMAND_TIMEOUT = 60.0  # seconds
HOME = "/opt/daemonkit"  # in the machine: where the package under test lives
PYTHON = "/opt/python"  # in the machine: the interpreter that runs this test
COMMAND = f"{HOME}/bin/daemonkit"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
CGROUP = "daemonkit-test-{}"
NEEDED = ("systemd-nspawn", "setpriv", "unshare", "nsenter", "mount")

# Runs in the new namespaces and then becomes nspawn; nothing forks, so the parent-death signal holds for nspawn.
# /run is covered because nspawn leaves directories there (propagate, locks).  What the host would start at boot is
# deleted from the copy: the machine boots the same everywhere.
SCRIPT = """
set -e
box=$1 stage=$2; shift 2
while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs"; shift; done; shift
mount -t tmpfs -o mode=0755 tmpfs "$box"
mkdir "$box/upper" "$box/work" "$box/root"
mount -t overlay -o "lowerdir=/,upperdir=$box/upper,workdir=$box/work" overlay "$box/root"
mount -t tmpfs -o mode=0755 tmpfs /run
rm -rf "$box"/root/etc/systemd/system/* "$box"/root/etc/rc[0-6S].d/* "$box/root/etc/fstab"
cp -a "$stage/." "$box/root/"
exec systemd-nspawn --quiet --directory="$box/root" --boot --register=no --keep-unit --notify-ready=yes \\
    --private-network --link-journal=no --resolv-conf=off --timezone=off --console=read-only "$@" \\
    systemd.unit=multi-user.target
"""

MASKED = ("systemd-logind.service", "getty.target", "systemd-tmpfiles-clean.timer", "systemd-update-utmp.service",
          "systemd-update-utmp-runlevel.service", "systemd-networkd.service", "systemd-resolved.service")  # fmt: skip


class BootFailed(AssertionError):
    """The container ended, or was not up in time; the message has its console."""


class Machine:
    """A booted systemd; commands run inside it with all its namespaces."""

    def __init__(self, leader: int) -> None:
        """Name the machine by its PID 1, as the host numbers it."""
        self.leader = leader

    def run(self, *argv: str, timeout: float = COMMAND_TIMEOUT,
            environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command inside as root with a clean environment; its exit code is the caller's to judge."""
        return subprocess.run(
            [*self._enter(), *argv], env=dict(environment), timeout=timeout, check=False, stdin=subprocess.DEVNULL,
            capture_output=True, text=True,
        )  # fmt: skip

    def check(self, *argv: str, timeout: float = COMMAND_TIMEOUT) -> str:
        """Run a command that has to succeed; give back what it printed."""
        done = self.run(*argv, timeout=timeout)
        assert done.returncode == 0, f"{argv}: exit {done.returncode}\n{done.stdout}{done.stderr}{self._journal()}"
        return done.stdout

    def unit_property(self, unit: str, name: str) -> str:
        """One property of a unit, as ``systemctl show`` prints it."""
        return self.check("systemctl", "show", "--value", f"--property={name}", unit).rstrip("\n")

    def path(self, inside: str) -> Path:
        """The host's name of a file inside; no component may be an absolute symbolic link."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Create or replace a file inside, and the directories above it."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    @contextmanager
    def follow(self, unit: str) -> Iterator[Follower]:
        """Follow what the journal gets about ``unit`` from now on, from it and from systemd."""
        mark = uuid.uuid4().hex
        wanted = [f"_SYSTEMD_UNIT={unit}", "+", f"UNIT={unit}", "+", f"SYSLOG_IDENTIFIER={mark}"]
        until = time.monotonic() + COMMAND_TIMEOUT
        while True:
            process = subprocess.Popen(
                [*self._enter(), "journalctl", "--quiet", "--follow", "--lines=all", "--output=cat", *wanted],
                env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None
            try:
                follower = Follower(process.stdout)
                if self._follows(follower, mark):
                    yield follower
                    return
                assert time.monotonic() < until, "journalctl cannot follow: see fs.inotify.max_user_instances"
            finally:
                # journalctl ends when nobody reads it; a signal would only reach nsenter, its parent.
                process.stdout.close()
                process.wait(COMMAND_TIMEOUT)

    def _follows(self, follower: Follower, mark: str) -> bool:
        """Whether it does, and shows marks of ours; without an inotify instance it shows what there is, and ends.

        What is written while it starts may be lost: nothing happens until it has shown them.
        """
        for _ in range(2):
            self.check("logger", "--tag", mark, mark)
            try:
                follower.wait_for(mark)
            except AssertionError:
                return False
        return True

    def _enter(self) -> list[str]:
        kinds = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        return ["nsenter", f"--target={self.leader}", *kinds, "--root", "--"]  # --root leaves us in its /

    def _journal(self) -> str:
        tail = self.run("journalctl", "--quiet", "--no-pager", "--lines=40", "--output=short-monotonic")
        return f"--- journal ---\n{tail.stdout}"


class Follower:
    """Reads a growing log until it says what is waited for."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Read from ``stream``, which stays the caller's."""
        self._stream = stream
        self._buffer = b""

    def wait_for(self, text: str, timeout: float = COMMAND_TIMEOUT) -> str:
        """Return the next line that holds ``text``; what comes before is passed over.

        Raises:
            AssertionError: no such line within ``timeout`` seconds; the message has those that came.
        """
        end = time.monotonic() + timeout
        seen: list[str] = []
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                seen.append(line.decode(errors="replace"))
                if text in seen[-1]:
                    return seen[-1]
                continue
            ready = select.select([self._stream], [], [], max(end - time.monotonic(), 0))[0]
            chunk = os.read(self._stream.fileno(), 65536) if ready else b""
            if not chunk:
                raise AssertionError(f"no line with {text!r} within {timeout:g} s; seen:\n" + "\n".join(seen))
            self._buffer += chunk


def missing() -> str | None:
    """Why no machine can be booted here, or None."""
    if os.geteuid() != 0:
        return "booting a container takes root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


@contextmanager
def boot(directory: Path) -> Iterator[Machine]:
    """Boot a machine that has the package under test installed; gone without a trace when the block is left.

    Args:
        directory: an empty directory; holds mounts only inside the machine's own namespace.

    Raises:
        BootFailed: nspawn ended, or systemd inside it did not come up within ``BOOT_TIMEOUT`` seconds.
    """
    box, stage, console = directory / "box", directory / "stage", directory / "console"
    box.mkdir()
    _stage(stage)
    binds = [f"--bind-ro={sys.base_prefix}:{PYTHON}", f"--bind-ro={sysconfig.get_path('purelib')}:{HOME}/packages"]
    with _cgroups(CGROUP.format(os.getpid())) as cgroups, _notify_socket() as (notify, address):
        with console.open("wb") as output:
            nspawn = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL",
                 "unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
                 "sh", "-c", SCRIPT, "sh", str(box), str(stage), *map(str, cgroups), "--",
                 f"--machine=daemonkit-{os.getpid()}", *binds],
                env={**ENVIRONMENT, "NOTIFY_SOCKET": address}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            machine = Machine(_wait_until_booted(nspawn, notify, console))
            machine.check("ldconfig")  # an interpreter with a shared library is found at its new place
            yield machine
        finally:
            _end(nspawn)


@contextmanager
def _notify_socket() -> Iterator[tuple[socket.socket, str]]:
    name = f"daemonkit-nspawn-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"\0{name}")
        yield notify, f"@{name}"


def _wait_until_booted(nspawn: subprocess.Popen[bytes], notify: socket.socket, console: Path) -> int:
    """Wait for nspawn's READY=1, which it passes on from the systemd inside; return that one's PID."""
    end = time.monotonic() + BOOT_TIMEOUT
    leader = ""
    pidfd = os.pidfd_open(nspawn.pid)
    try:
        while True:
            ready = select.select([notify.fileno(), pidfd], [], [], max(end - time.monotonic(), 0))[0]
            if notify.fileno() not in ready:
                why = "nspawn ended" if ready else f"not up within {BOOT_TIMEOUT:g} s"
                raise BootFailed(f"{why}:\n{console.read_text(errors='replace')}")
            said = notify.recv(65536).decode().splitlines()
            for line in said:
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    leader = line.partition("=")[2]
            if "READY=1" in said and leader:
                return _from_outside(nspawn.pid, leader)
    finally:
        os.close(pidfd)


def _from_outside(unshare: int, leader: str) -> int:
    """The PID that the machine's PID 1 has for us; nspawn, which calls it ``leader``, counts in its own namespace."""
    for nspawn in _children(unshare):
        for pid in _children(nspawn):
            if f"\t{leader}\t1\n" in Path(f"/proc/{pid}/status").read_text():  # NSpid (proc(5))
                return pid
    raise BootFailed(f"no child of nspawn is its pid {leader}")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _end(unshare: subprocess.Popen[bytes]) -> None:
    """Kill PID 1 of the outer namespace; its parent, ``unshare``, ends when the kernel has ended all the others."""
    if unshare.poll() is None:
        for pid in _children(unshare.pid) or [unshare.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    unshare.wait(COMMAND_TIMEOUT)


@contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """A cgroup of our own in each hierarchy that systemd uses: nspawn leaves its two behind in the caller's."""
    made: list[Path] = []
    try:
        for parent in _own_cgroups():
            _sweep(parent)
            made.append(parent / name)
            made[-1].mkdir()
        yield made
    finally:
        for top in made:
            _remove(top)


def _sweep(parent: Path) -> None:
    """Remove what tests that were themselves killed have left: empty cgroups are all that outlives them."""
    for left in parent.glob(CGROUP.format("*")):
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            _remove(left)


def _remove(top: Path) -> None:
    for path, _, _ in os.walk(top, topdown=False):
        with suppress(FileNotFoundError):  # another test has swept it up
            os.rmdir(path)


def _own_cgroups() -> Iterator[Path]:
    """This process's directories in cgroup v2 and in v1's ``name=systemd`` (cgroups(7), proc(5))."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        key = "" if kind == "cgroup2" else "name=systemd" if "name=systemd" in options.split(",") else None
        root, where = left.split(" ")[3:5]
        if key is None or key not in own or not own[key].startswith(root):
            continue
        yield Path(where, own[key].removeprefix(root).lstrip("/"))


def _stage(stage: Path) -> None:
    """Lay out the files that the machine has and the host has not."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = stage / HOME[1:] / "lib" / version / "site-packages"
    shutil.copytree(Path(daemonkit.__file__).parent, site / "daemonkit", ignore=shutil.ignore_patterns("__pycache__"))
    files = {
        f"{HOME}/pyvenv.cfg": f"home = {PYTHON}/bin\ninclude-system-site-packages = false\n",
        f"{HOME}/lib/{version}/site-packages/packages.pth": f"{HOME}/packages\n",
        COMMAND: f"#!{HOME}/bin/python\nfrom daemonkit.cli import run\nraise SystemExit(run())\n",
        "/etc/ld.so.conf.d/daemonkit.conf": f"{PYTHON}/lib\n",
        "/etc/machine-id": f"{uuid.uuid4().hex}\n",  # not the host's: its journal may be large
        "/etc/systemd/journald.conf.d/test.conf": "[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n",
    }
    for name, text in files.items():
        path = stage / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (stage / COMMAND[1:]).chmod(0o755)
    links = {f"{HOME}/bin/python": f"{PYTHON}/bin/{version}", "/usr/bin/daemonkit": COMMAND}
    links |= {f"/etc/systemd/system/{unit}": "/dev/null" for unit in MASKED}
    for name, target in links.items():
        path = stage / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    for directory in (stage, *(path for path in stage.rglob("*") if path.is_dir())):
        directory.chmod(0o755)  # cp -a gives them to directories of the machine: pytest's 0700 must not reach /
