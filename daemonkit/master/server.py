"""The daemon's fork server: how the master gets one, and what its children do.

The first is forked off the master right after the script was imported, when nothing of the user's has run yet.  A
later one, for new code or in place of one that was killed, is a fresh image that imports the script itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypedDict

from daemonkit.core import tree
from daemonkit.core.logs import Sink
from daemonkit.core.loop import READ, WRITE, Loop
from daemonkit.core.title import take_title
from daemonkit.errors import ForkServerLost, ScriptError, told
from daemonkit.master.clustering import limit
from daemonkit.processes import child, interpreter
from daemonkit.processes.children import Child, Children, OnEnd, OnStart, fork_server, serve_wire
from daemonkit.processes.forkserver import MASTERS
from daemonkit.processes.guard import UNNAMED, Guard, connections
from daemonkit.processes.wire import Closed, DescriptorsLost, Message, Wire, pair
from daemonkit.processes.worker import Note, StopFlag, Worker

if TYPE_CHECKING:
    from daemonkit.handover import Handover
    from daemonkit.script import Script

log = logging.getLogger("daemonkit")

FAILURE: Final = 20_000  # characters of a failure that are told
_END_TIME: Final = 5.0  # seconds that a server has to end what is left under it, and itself
_IGNORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # by every Python; no other program expects that

OnNote = Callable[[Note, bytes], None]
OnLost = Callable[["Server"], None]
OnLoad = Callable[[str | None], None]


class Request(TypedDict):
    """What a child is to be."""

    kind: str  # "worker", "job" or "background"
    name: str
    index: int  # of a worker; else 0
    token: int  # of the leadership that it is started for; 0: of none


def title(daemon: str, request: Request) -> str:
    """The child's title in ps."""
    number = f"-{request['index']}" if request["kind"] == "worker" else ""
    return f"{daemon}: {request['kind']} {request['name']}{number}"


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
            except DescriptorsLost:
                continue  # of a failure in more words than there are descriptors for
            except Closed:
                self.close()
                return
            if message is None:
                return
            if listener := self.listeners.get(message.id):
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
            self.is_loaded = note == Note.LOADED
            if self.is_loaded:
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


def guard_for(policy: str, listen_fds: Iterable[int]) -> Guard:
    """Children share what systemd has handed over, and pairs of sockets; for the rest see ``Guard``."""
    pairs = [connection.fd for connection in connections() if connection.peer == UNNAMED]
    return Guard(policy, keep=[*pairs, *listen_fds])


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


def take_notes(handover: Handover) -> Wire:
    """In a fresh image that is to be a fork server: where it tells how it fares."""
    for fd in handover.server_fds:
        os.set_inheritable(fd, False)
    return Wire(socket.socket(fileno=handover.server_fds[1]))


def serve(handover: Handover, script: Script, sink: Sink, notes: Wire) -> NoReturn:
    """Be the fork server in a fresh image that has loaded the script, and been guarded."""
    entrance = Entrance(script, sink, notes)
    if handover.detached:
        sink.take_over_streams()
    entrance.settle()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the master is gone: the next line ends us
        notes.send(Note.LOADED, 0, pickle.dumps({name: w._replace(func=None) for name, w in script.workers.items()}))
    serve_wire(Wire(socket.socket(fileno=handover.server_fds[0])), entrance.enter, limit=limit)


class Entrance:
    """What a child does first."""

    def __init__(self, script: Script, sink: Sink, notes: Wire) -> None:
        """Children send their notes into ``notes``."""
        self._script = script
        self._sink = sink
        self._notes = notes
        self._name = sink.name

    def settle(self) -> None:
        """In the server: take on its title; its words, and its children's, go to the log alone."""
        take_title(f"{self._name}: fork server")
        self._sink.become(f"{self._name}: fork server")

    def enter(self, message: Message) -> NoReturn:
        """Be the child that ``message`` asks for."""
        request: Request = json.loads(bytes(message.payload))
        worker = self._script.workers.get(request["name"]) if request["kind"] == "worker" else None
        name = f"{self._name}: {worker.title(request['index'])}" if worker else title(self._name, request)
        take_title(name)
        self._sink.become(name)
        for number in set(MASTERS) - {signal.SIGTERM}:
            signal.signal(number, _leave_to_the_master)
        if request["kind"] == "background":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the program can act on it
            child.run(lambda: interpreter.become("daemonkit.processes.detached", message.fds), name, adopts=False)
        if request["token"]:
            from daemonkit.cluster import leadership

            leadership.begin(request["token"])
        be = self._job if request["kind"] == "job" else functools.partial(self._work, message.fds)
        child.run(lambda: self._tell_failure(message.id, be, request), name, adopts=request["kind"] == "job")

    def _tell_failure(self, number: int, be: Callable[[int, Request], Any], request: Request) -> None:
        """What fails is told to the master before it is on its way to the log."""
        try:
            for hook in self._script.handlers.get("fork", ()):
                hook()
            be(number, request)
            if outlet := sys.modules.get("daemonkit.cluster.outlet"):  # a session that is closed leaves nothing behind
                outlet.close()
        except Exception as error:
            with contextlib.suppress(OSError):  # the master is gone, and so are we
                self._notes.send(Note.FAILED, number, failure(error))
            raise

    def _job(self, number: int, request: Request) -> None:
        job = self._script.jobs.get(request["name"])
        if job is None:
            raise ScriptError(f"the new code has no job named {request['name']!r}; reexec the daemon")
        job.func()

    def _work(self, fds: list[int], number: int, request: Request) -> None:
        worker = self._script.workers.get(request["name"])
        if worker is None:
            raise ScriptError(f"the new code has no worker named {request['name']!r}; reexec the daemon")
        if worker.func is None:
            for ignored in _IGNORED:
                signal.signal(ignored, signal.SIG_DFL)
            os.setpgid(0, 0)  # a terminal's ^C is the master's to act on, and an exec does not keep our handlers
            child.execute(worker.argv)
        flag = StopFlag(self._notes, number, worker)
        if worker.wants_fds:
            worker.func(flag, fds)
        else:
            worker.func(*(flag, request["index"])[: 2 if worker.wants_index else 1])


def failure(error: Exception) -> bytes:
    """The payload of a ``FAILED`` note: the error in a line, then its traceback."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next  # ours say nothing to the script's author
    text = "".join(traceback.format_exception(type(error), error, frames))
    return f"{told(error)[:FAILURE]}\n{text[-FAILURE:]}".encode(errors="replace")


def _leave_to_the_master(number: int, frame: object) -> None:
    """A terminal sends some signals to the whole group.  Not SIG_IGN: that would outlive an exec."""


def _log_delay(late: Child, error: OSError) -> None:
    log.warning("fork a child: %s; tried again until there is room", error.strerror)
