"""The daemon's fork server itself, and what its children do first."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypedDict

from daemonkit.core.logs import Sink
from daemonkit.core.title import take_title
from daemonkit.errors import ScriptError, told, traced
from daemonkit.master.clustering import limit
from daemonkit.processes import child, interpreter
from daemonkit.processes.children import serve_wire
from daemonkit.processes.forkserver import MASTERS
from daemonkit.processes.guard import UNNAMED, Guard, connections
from daemonkit.processes.stopflag import StopFlag
from daemonkit.processes.wire import Message, Wire
from daemonkit.processes.worker import Note

if TYPE_CHECKING:
    from daemonkit.handover import Handover
    from daemonkit.script import Script

FAILURE: Final = 20_000  # characters of a failure that are told
_IGNORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # by every Python; no other program expects that


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


def guard_for(policy: str, listen_fds: Iterable[int]) -> Guard:
    """Children share what systemd has handed over, and pairs of sockets; for the rest see ``Guard``."""
    pairs = [connection.fd for connection in connections() if connection.peer == UNNAMED]
    return Guard(policy, keep=[*pairs, *listen_fds])


def take_notes(handover: Handover) -> Wire:
    """In a fresh image that is to be a fork server: where it tells how it fares."""
    for fd in handover.server_fds:
        os.set_inheritable(fd, False)
    return Wire(socket.socket(fileno=handover.server_fds[1]))


def serve(handover: Handover, script: Script, sink: Sink, notes: Wire) -> NoReturn:
    """Be the fork server in a fresh image that has loaded the script, and been guarded."""
    import pickle

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
    return f"{told(error)[:FAILURE]}\n{traced(error, __file__)[-FAILURE:]}".encode(errors="replace")


def _leave_to_the_master(number: int, frame: object) -> None:
    """A terminal sends some signals to the whole group.  Not SIG_IGN: that would outlive an exec."""
