"""What daemonkit has made of System V objects, and by whom: so that what the dead have left can be found and removed.

A registry is a file of JSON lines.  ``NAME.ipc``, beside a daemon's PID file, is for the objects that the daemon and
its children make; ``_scripts.ipc`` is for all others.  The lines are only a hint where to look: whether an object is
there is asked of the kernel, and whether its creator lives, by PID and start time, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from daemonkit.core.pidfile import inspect
from daemonkit.errors import DaemonkitError, IpcError, NotAllowed
from daemonkit.ipc import kernel
from daemonkit.ipc.bound import Bound, interrupted_after
from daemonkit.ipc.creator import lives, start_of, world
from daemonkit.ipc.keys import in_hex

PID_FILE: Final = "DAEMON_PID_FILE"  # in the environment of a daemon and of all that it starts (daemonkit.handover)
SUFFIX: Final = ".ipc"
SCRIPTS: Final = f"_scripts{SUFFIX}"  # no daemon's name begins with an underscore
PATIENCE: Final = 10.0  # seconds to wait for another process that changes the file

_HEAD: Final = b'{"kind":'  # so each line begins
_PRUNED_ABOVE: Final = 64 * 1024  # bytes of the file, from which on entries of gone objects are dropped

_libc = ctypes.CDLL(None, use_errno=True)


class Entry(NamedTuple):
    """One object that was made."""

    kind: str
    key: int
    id: int
    pid: int
    start: int  # of its creator, in clock ticks after the machine's (proc(5), /proc/PID/stat)
    world: str  # boot and namespaces in which these numbers mean something

    @property
    def creator_lives(self) -> bool:
        """Whether the very process that made it has not ended."""
        return lives(self.pid, self.start)


class Found(NamedTuple):
    """An entry whose object is there."""

    entry: Entry
    daemon: str | None  # the name of the daemon in whose registry it stands
    is_left: bool  # neither creator nor daemon lives
    is_ours: bool  # belongs to the owner of the registry; others' are never removed
    row: dict[str, int]  # the kernel's own description

    @property
    def title(self) -> str:
        """``semaphore 0x00000abc``."""
        return f"{self.entry.kind} {in_hex(self.entry.key)}"

    @property
    def sizes(self) -> dict[str, int]:
        """What it holds, by the kernel's words."""
        if self.entry.kind == kernel.QUEUE:
            return {"messages": self.row["qnum"], "bytes": self.row["cbytes"]}
        if self.entry.kind == kernel.MEMORY:
            return {"bytes": self.row["size"], "attached": self.row["nattch"]}
        made = kernel.Object(self.entry.kind, self.entry.key, self.entry.id, False)
        return {"value": kernel.value(made, 0) or 0}

    @property
    def content(self) -> str:
        """The same in words: ``messages 3, bytes 192``."""
        return ", ".join(f"{name} {number}" for name, number in self.sizes.items())


def note(made: kernel.Object) -> str:
    """Write a new object down; return the path of the registry.  If that cannot be done, it is removed again.

    Raises:
        IpcError: the registry cannot be written.
    """
    me = os.getpid()
    path = ""
    try:
        path = path_for_new()
        entry = Entry(made.kind, made.key, made.id, me, start_of(me) or 0, world())
        with _locked(path, os.O_CREAT) as fd:
            if os.fstat(fd).st_size > _PRUNED_ABOVE:
                _write(fd, _kept(fd))
            _append(fd, entry)
    except BaseException as error:
        kernel.remove(made.kind, made.id)
        if not isinstance(error, OSError | DaemonkitError):
            raise
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        advice = "set DAEMONKIT_RUN_DIR, or keep it out of the registry with keep=True"
        raise IpcError(f"make {made}: write it down in {path or 'a registry'}: {why}; {advice}") from error
    return path


def forget(path: str, made: kernel.Object) -> None:
    """Strike out an object that was removed."""
    with contextlib.suppress(FileNotFoundError), _locked(path) as fd:
        _rewrite(path, fd, [entry for entry in _read(fd) if (entry.kind, entry.id) != (made.kind, made.id)])


def of_daemon(pid_path: str) -> str:
    """The registry beside a PID file."""
    return pid_path.removesuffix(".pid") + SUFFIX


def registries(run_dir: str) -> list[str]:
    """The registries in a run directory."""
    try:
        return sorted(os.path.join(run_dir, name) for name in os.listdir(run_dir) if name.endswith(SUFFIX))
    except FileNotFoundError:
        return []


def find(path: str) -> list[Found]:
    """The objects of a registry that are there.

    Raises:
        NotAllowed: the registry belongs to another user.
    """
    try:
        with _locked(path) as fd:
            return _look(path, fd)
    except FileNotFoundError:
        return []


def remove_left(path: str) -> list[Found]:
    """Remove the objects of a registry whose creator and daemon are dead; tell which.

    Raises:
        NotAllowed: the registry, or one of them, belongs to another user; the others are removed.
    """
    return _remove(path, lambda found: found.is_left)


def remove_of_dead_creators(path: str) -> list[Found]:
    """The same for a daemon that begins: it holds its PID file itself, so only the creators are looked at."""
    return _remove(path, lambda found: not found.entry.creator_lives)


def remove_all(path: str) -> list[Found]:
    """Remove all objects of a registry: those of a daemon that ends."""
    return _remove(path, lambda found: True)


def path_for_new() -> str:
    """Where this process writes down what it makes: the registry of its daemon, or that of mere scripts."""
    if pid_path := os.environ.get(PID_FILE):
        return of_daemon(pid_path)
    run_dir = os.environ.get("DAEMONKIT_RUN_DIR")
    if not run_dir:
        from daemonkit import config

        run_dir = config.load(None, command_line={}, environ=os.environ, cwd=os.getcwd()).options.run_dir
    run_dir = os.path.abspath(run_dir)
    if not os.path.isdir(run_dir):
        from daemonkit.config.trust import prepare_run_dir

        prepare_run_dir(run_dir)
    return os.path.join(run_dir, SCRIPTS)


def _remove(path: str, is_wanted: Callable[[Found], bool]) -> list[Found]:
    removed: list[Found] = []
    refused: list[NotAllowed] = []
    with contextlib.suppress(FileNotFoundError), _locked(path) as fd:
        for found in _look(path, fd):
            if found.is_ours and is_wanted(found):
                try:
                    kernel.remove(found.entry.kind, found.entry.id)
                    removed.append(found)
                except NotAllowed as error:
                    refused.append(error)
        _rewrite(path, fd, _kept(fd))
    if refused:
        raise refused[0]
    return removed


def _look(path: str, fd: int) -> list[Found]:
    """The entries of this boot and these namespaces whose objects are there, with what else is known of them."""
    entries, here = _read(fd), world()
    tables = {kind: kernel.listed(kind) for kind in {entry.kind for entry in entries}}
    owner, daemon = os.fstat(fd).st_uid, os.path.basename(path).removesuffix(SUFFIX)
    is_daemons = os.path.basename(path) != SCRIPTS
    runs = is_daemons and inspect(path.removesuffix(SUFFIX) + ".pid").locked
    found = []
    for entry in dict.fromkeys(entries):
        row = tables[entry.kind].get(entry.id)
        # A number is given out again only after 32,768 removals; a key that differs tells even then.
        if row is not None and row["key"] == entry.key and entry.world == here:
            is_left = not runs and not entry.creator_lives
            found.append(Found(entry, daemon if is_daemons else None, is_left, row["cuid"] == owner, row))
    return found


def _kept(fd: int) -> list[Entry]:
    """The entries but for those whose objects are gone; what is in other namespaces cannot be seen, and stays."""
    entries, here = _read(fd), world()
    tables = {kind: kernel.listed(kind) for kind in {entry.kind for entry in entries}}
    boot = here.partition(" ")[0]
    return [
        entry
        for entry in entries
        if (entry.world == here and tables[entry.kind].get(entry.id, {}).get("key") == entry.key)
        or (entry.world != here and entry.world.partition(" ")[0] == boot)
    ]


@contextlib.contextmanager
def _locked(path: str, flags: int = 0) -> Iterator[int]:
    """The registry, opened and locked, and still the one that has that name."""
    while True:
        fd = _open(path, flags)
        try:
            _lock(path, fd)
            if _is_at(path, fd):  # not removed, or removed and made anew, by whom we waited for
                yield fd
                return
        finally:
            os.close(fd)


def _lock(path: str, fd: int) -> None:
    bound = Bound(PATIENCE)
    with interrupted_after(bound.left()):
        while _libc.flock(fd, fcntl.LOCK_EX) != 0:
            if (code := ctypes.get_errno()) != errno.EINTR:
                raise OSError(code, os.strerror(code), path)
            if bound.left() == 0:
                raise IpcError(f"lock {path}: not to be had for {PATIENCE:g} s; see lslocks for who holds it")


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _open(path: str, flags: int) -> int:
    what_it_is_not = f"open {path}: not a plain file; remove it or choose another run directory"
    try:
        fd = os.open(path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except PermissionError:
        raise NotAllowed(f"open {path}: permission denied; try as root or as the user who made it") from None
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):  # a directory, a link, a socket
            raise IpcError(what_it_is_not) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IpcError(what_it_is_not)
    return fd


def _read(fd: int) -> list[Entry]:
    """The entries; a line that a crash has left unfinished is passed over."""
    entries = []
    for line in os.pread(fd, os.fstat(fd).st_size, 0).splitlines():
        with contextlib.suppress(ValueError, TypeError):
            entry = Entry(**json.loads(line))
            if entry.kind in kernel.KINDS and isinstance(entry.world, str) and all(type(n) is int for n in entry[1:5]):
                entries.append(entry)
    return entries


def _append(fd: int, entry: Entry) -> None:
    line, size = json.dumps(entry._asdict()).encode() + b"\n", os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":  # a crash has left half a line
        line = b"\n" + line
    if os.pwrite(fd, line, size) < len(line):
        os.ftruncate(fd, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write(fd: int, entries: list[Entry]) -> None:
    """In place: a daemon that has dropped root cannot make a new file in root's directory."""
    text = b"".join(json.dumps(entry._asdict()).encode() + b"\n" for entry in entries)
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))


def _rewrite(path: str, fd: int, entries: list[Entry]) -> None:
    """The same; an empty registry is removed, where that may be done; a file that is none of ours is left alone."""
    if not _HEAD.startswith(os.pread(fd, len(_HEAD), 0)):
        return
    _write(fd, entries)
    if not entries:
        with contextlib.suppress(PermissionError):
            os.unlink(path)
