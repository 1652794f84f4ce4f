"""The daemon's fork server, as the master has it.

The first is forked off the master right after the script was imported, when nothing of the user's has run yet.  A
later one, for new code or in place of one that was killed, is a fresh image that imports the script itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from daemonkit.core import tree
from daemonkit.core.logs import Sink
from daemonkit.core.loop import READ, WRITE, Loop
from daemonkit.errors import ForkServerLost
from daemonkit.master.clustering import limit
from daemonkit.master.entrance import Entrance, Request
from daemonkit.processes import child
from daemonkit.processes.children import Child, Children, OnEnd, OnStart, fork_server
from daemonkit.processes.guard import Guard
from daemonkit.processes.wire import Closed, DescriptorsLost, Wire, pair
from daemonkit.processes.worker import Note, Worker

if TYPE_CHECKING:
    from daemonkit.handover import Handover
    from daemonkit.script import Script

log = logging.getLogger("daemonkit")

_NOTES: Final = frozenset(Note)
_END_TIME: Final = 5.0  # seconds that a server has to end what is left under it, and itself

OnNote = Callable[[Note, bytes], None]
OnLost = Callable[["Server"], None]
OnLoad = Callable[[str | None], None]


class Notes:
    """What a fork server and its children say, in their own words."""

    def __init__(self, loop: Loop, wire: Wire) -> None:
        """Listen at ``wire``."""
        self.listeners: dict[int, OnNote] = {}  # by the child's id; 0 is the server itself
        self._loop = loop
        self._wire = wire
        loop.watch(wire.fileno(), lambda _: self.read())

    def read(self) -> None:
        """Hand over all that was said."""
        while self._wire.fileno() >= 0:
            try:
                message = self._wire.receive()
            except (DescriptorsLost, struct.error):
                continue  # a failure in more words than there are descriptors for; or what is no note
            except Closed:
                return  # the other wire tells, too; or an empty message
            if message is None:
                return
            if message.kind in _NOTES and (listener := self.listeners.get(message.id)):
                _go_on(listener, Note(message.kind), bytes(message.payload))

    def close(self) -> None:
        """Hear no more."""
        if self._wire.fileno() >= 0:
            self._loop.unwatch(self._wire.fileno())
            self._wire.close()


class Server:
    """One fork server, as the master sees it."""

    def __init__(self, loop: Loop, pid: int, wire: Wire, notes: Wire, on_lost: OnLost, *, is_loaded: bool) -> None:
        """Use ``fork`` or ``execute``."""
        self.pid = pid
        self.children = Children(wire, _log_delay)
        self.notes = Notes(loop, notes)
        self.born = time.monotonic()
        self.is_loaded = is_loaded  # it has read the script
        self.workers: Mapping[str, Worker] = {}  # as its code declares them
        self.is_lost = False  # it has ended; its children are dead, and their ends will be told
        self._loop = loop
        self._on_lost = on_lost
        self._on_empty: Callable[[], object] | None = None
        self._is_hearing = False
        loop.watch(wire.fileno(), self._hear)

    def spawn(
        self, request: Request, on_end: OnEnd, on_start: OnStart | None, on_note: OnNote, fds: Sequence[int] = ()
    ) -> Child:
        """Ask for a child, which is given copies of ``fds``.

        Raises:
            ForkServerLost: the server has ended; ``on_lost`` is called as well.
            OSError: there is no room for the copies.
        """
        if self.is_lost:
            raise ForkServerLost("fork a child: the fork server has ended")

        def ended(child: Child, receipt: Any) -> None:
            self.notes.read()  # its last words were sent before its end was told
            self.notes.listeners.pop(child.id, None)
            _go_on(on_end, child, receipt)

        def started(child: Child) -> None:
            if on_start:
                _go_on(on_start, child)

        payload = json.dumps(request).encode()
        kind = request["kind"]
        closes = kind == "worker" and bool(fds)  # what it speaks over tells it of our end
        limited = kind == "worker" and bool(request["token"])  # a job that has begun is not interrupted
        made = self.children.spawn(payload, ended, started, fds, adopts=kind == "job", closes=closes, limited=limited)
        self.notes.listeners[made.id] = on_note
        self._watch()
        return made

    def on_loaded(self, told: OnLoad) -> None:
        """Call ``told`` when the server has read the script, with None, or could not, with the reason."""

        def noted(note: Note, payload: bytes) -> None:
            if self.is_loaded:
                return  # a child has written what is no note
            self.is_loaded = note == Note.LOADED
            if self.is_loaded:
                import pickle

                self.workers = pickle.loads(payload)
            told(None if self.is_loaded else payload.decode(errors="replace"))

        self.notes.listeners[0] = noted

    def signal(self, child: Child, number: int) -> None:
        """Send ``child`` a signal; KILL goes to its whole tree."""
        if self.is_lost:
            return  # so is the child
        if number == signal.SIGKILL:
            child.kill_tree()
        else:
            child.signal(number)
        self._watch()

    def close(self) -> None:
        """Let it end, and all its children with it; reap it."""
        self.is_lost = True
        self._forget()
        if not self.is_loaded:  # it does not listen yet
            with contextlib.suppress(OSError), open(os.pidfd_open(self.pid), "rb", buffering=0) as pidfd:
                tree.kill(self.pid, pidfd.fileno())
        child.wait_for(self.pid, _END_TIME)

    def retire(self, done: Callable[[], object]) -> None:
        """Close it as soon as its last child has ended, and call ``done``."""
        self._on_empty = done
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        if self._on_empty and not len(self.children) and not self._is_hearing and not self.is_lost:
            self.close()
            self._on_empty()

    def _watch(self) -> None:
        wire = self.children.wire
        self._loop.watch(wire.fileno(), self._hear, READ | WRITE if wire.is_waiting else READ)

    def _hear(self, events: int) -> None:
        self._is_hearing = True
        try:
            self.children.wire.flush()
            self.children.receive()
            self._watch()
        except (ForkServerLost, BrokenPipeError, ConnectionResetError):
            self._lose()
        finally:
            self._is_hearing = False
        self._close_if_empty()

    def _lose(self) -> None:
        self.notes.read()
        self.is_lost = True
        self._forget()
        child.wait_for(self.pid, _END_TIME)
        self._on_lost(self)

    def _forget(self) -> None:
        self.notes.close()
        wire = self.children.wire
        if wire.fileno() >= 0:
            self._loop.unwatch(wire.fileno())
            wire.close()


def _go_on(callback: Callable[..., None], *arguments: Any) -> None:
    """A mistake in what one child's fate leads to must not end the daemon, nor be taken for another's."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("daemonkit itself failed; the daemon goes on")


def fork(
    loop: Loop, script: Script, sink: Sink, guard: Guard, close: Callable[[], None], on_lost: Callable[[Server], None]
) -> Server:
    """Fork the server off this process, which has run nothing of the user's but the script's import.

    ``close`` gives back, in the server, what is the master's alone.

    Raises:
        ForkRefused: the script's import has left threads or connections, and ``guard`` refuses them.
        OSError: there is no room for another process.
    """
    guard.check()
    ours, theirs = pair()
    entrance = Entrance(script, sink, Wire(theirs))

    def prepare() -> None:
        ours.close()
        close()
        guard.in_child()
        entrance.settle()

    pid, wire = fork_server(entrance.enter, prepare, limit=limit)
    theirs.close()
    ours.setblocking(False)
    server = Server(loop, pid, wire, Wire(ours), on_lost, is_loaded=True)
    server.workers = script.workers
    return server


def execute(loop: Loop, handover: Handover, on_lost: OnLost) -> Server:
    """Execute a fresh image that imports the script and becomes a fork server; it tells by a note how that went.

    Raises:
        OSError: there is no room for another process, or no interpreter any more.
    """
    import subprocess

    ours, theirs = pair()
    notes, their_notes = pair()
    fds = [theirs.fileno(), their_notes.fileno()]
    handover = handover._replace(lock_fd=-1, status_fd=-1, generation=None, server_fds=fds)
    fd = handover.store()
    try:
        process = subprocess.Popen(
            handover.command(fd),
            pass_fds=(fd, *fds, *handover.listen_fds, *([handover.page_fd] if handover.page_fd >= 0 else [])),
            stdin=subprocess.DEVNULL,
            cwd=handover.cwd if os.path.isdir(handover.cwd) else None,
        )
    except BaseException:
        ours.close()
        notes.close()
        raise
    finally:
        theirs.close()
        their_notes.close()
        os.close(fd)
    for each in (ours, notes):
        each.setblocking(False)
    process.returncode = 0  # it is ours to reap, by pidfd
    return Server(loop, process.pid, Wire(ours), Wire(notes), on_lost, is_loaded=False)


def _log_delay(late: Child, error: OSError) -> None:
    log.warning("fork a child: %s; tried again until there is room", error.strerror)
