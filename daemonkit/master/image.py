"""The daemon's program: from the handover to ready, and from stopped to gone.

It is always entered by exec, from the launcher or from its own earlier self, so nothing of theirs is left in it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from daemonkit import config, control, objects
from daemonkit.api import default
from daemonkit.config.options import OPTIONS
from daemonkit.config.trust import check_trusted
from daemonkit.core import privileges
from daemonkit.core.board import Board
from daemonkit.core.logs import Sink, flush_streams
from daemonkit.core.loop import Loop
from daemonkit.core.pidfile import PidFile
from daemonkit.core.signals import Signals
from daemonkit.core.stop import Stop, StopNow
from daemonkit.core.timer import Timer
from daemonkit.core.title import take_title
from daemonkit.errors import DaemonkitError, StartError, UsageError
from daemonkit.handover import Generation, Handover
from daemonkit.loader import Loader, add_working_directory
from daemonkit.master import requests
from daemonkit.master.clustering import add_agent, preload
from daemonkit.master.consuming import add_consumer, warn_of_broker
from daemonkit.master.keeper import Keeper
from daemonkit.master.log import open_log
from daemonkit.master.master import DEFAULT_SIGNALS, Master
from daemonkit.master.parts import Parts
from daemonkit.master.upgrade import GOOD
from daemonkit.script import Script
from daemonkit.service.notify import Notifier, listen_fds

log = logging.getLogger("daemonkit")


def main(fd: int) -> None:
    """Be the daemon described by the handover in ``fd``; never returns."""
    handover = Handover.load(fd)
    if handover.check_only:
        leave(_check(handover))
    if handover.server_fds:
        _serve_forks(handover)
    leave(_Image(handover).run())


def leave(code: int) -> NoReturn:
    """End the process now: exit functions are run, threads that the script left behind are not waited for."""
    flush_streams()
    atexit._run_exitfuncs()
    os._exit(code)


class _Image:
    """One life of the program."""

    def __init__(self, handover: Handover) -> None:
        take_title(f"{handover.name}: master")
        self._handover = handover
        self._pidfile = PidFile.adopt(handover.pid_path, handover.lock_fd)
        self._status_fd = handover.status_fd
        if self._status_fd >= 0:
            os.set_inheritable(self._status_fd, False)
        self._board = Board()
        self._board.tell(script=handover.script)
        self._server: control.Server | None = None
        self._socket_file: control.FileId | None = None
        self._sink: Sink | None = None

    def run(self) -> int:
        """Start, serve, clean up; return the exit code."""
        try:
            signals = Signals(Stop(graceful_timeout=20.0, last_resort=self._last_resort))
            generation = self._handover.generation
            loop = Loop(signals.install(DEFAULT_SIGNALS, held=generation["caught"] if generation else ()))
            with contextlib.suppress(OSError):
                self._pidfile.write_pid()
            master = self._start(signals, loop)
            return master.serve()
        except StopNow:
            late = signals.stop.signal is None
            self._fail("was not ready within ready_timeout" if late else "stopped by a signal before it was ready")
        except UsageError as error:  # a declaration that cannot be meant
            self._fail(str(error), error.exit_code)
            return error.exit_code
        except (DaemonkitError, OSError) as error:
            self._fail(str(error))
        except BaseException as error:  # a mistake of ours: told with all there is to tell
            log.exception("daemonkit itself failed")
            self._fail(f"daemonkit itself failed, {type(error).__name__}: {error}")
        finally:
            self._clean_up()
        return 1

    def _start(self, signals: Signals, loop: Loop) -> Master:
        """Make the parts, load the script, run its `start` hooks, say that we are ready."""
        handover, notifier = self._handover, Notifier.from_environment(os.environ)
        default.listen_fds = handover.listen_fds or list(listen_fds(os.environ))
        self._handover = handover = handover._replace(listen_fds=default.listen_fds)
        configuration = _configuration(handover, handover.script_options)
        sink, sock = self._open_files(configuration)
        if handover.generation is None:
            objects.remove_left(handover.pid_path)
        notifier.extend_timeout(configuration.options.ready_timeout)
        board = self._board
        timer = Timer(signals, board)
        if not handover.detached:  # a launcher sees to it otherwise
            signals.stop.set_deadline(configuration.options.ready_timeout)
        script = _load(handover, signals, board)
        configuration = _with_script(handover, script, configuration)
        add_consumer(script, handover.name, configuration.options, sink)
        warn_of_broker(script, configuration.options)
        page = add_agent(script, handover.name, configuration)
        if page is not None:
            self._handover = handover = handover._replace(page_fd=page.fd)
        parts = Parts(handover, configuration, self._pidfile, sink, signals, loop, board, timer, notifier)
        master = Master(parts, script, default)
        if script.needs_children:
            master.hire(lambda: self._give_back(parts, sock, page is not None))
        if page is not None:
            master.join_cluster(page)
        self._server = control.Server(
            sock, loop, lambda message, client: requests.serve(master, message, client), self._socket_file
        )
        master.upgrade.server = self._server
        if error := master.start():
            master.wind_up()
            late = signals.stop.interrupted and signals.stop.signal is None
            raise StartError(f"{error.split(':')[0]} was not done within ready_timeout" if late else error)
        signals.stop.clear_deadline()
        self._ready(master)
        return master

    def _give_back(self, parts: Parts, sock: socket.socket, is_clustered: bool) -> None:
        """In the fork server: what is the master's alone (the PID file has gone at the fork)."""
        if is_clustered:
            preload(parts.configuration.options.coordinator)
        if self._status_fd >= 0:
            os.close(self._status_fd)
        sock.close()
        parts.board.close()
        parts.loop.close()
        parts.signals.close()

    def _open_files(self, configuration: config.Configuration) -> tuple[Sink, socket.socket]:
        """Open log and socket and become ``user``; what root opens stands where nobody else can put links."""
        handover = self._handover
        owner = privileges.resolve(configuration.options.user, configuration.options.group)
        if owner is None or os.geteuid() != 0:
            return self._open_log(configuration), self._listen()
        sink = self._open_log(configuration) if _is_roots(os.path.dirname(configuration.options.log)) else None
        sock = self._listen() if _is_roots(handover.run_dir) else None
        if sink:
            sink.chown(owner.uid, owner.gid)
        if sock and handover.generation is None:
            os.chown(handover.socket_path, owner.uid, owner.gid, follow_symlinks=False)
            objects.make_registry_for(handover.pid_path, owner.uid, owner.gid)
        privileges.drop(owner)
        return sink or self._open_log(configuration), sock or self._listen()

    def _open_log(self, configuration: config.Configuration) -> Sink:
        """Open the log; until we are ready the starting terminal sees what goes there."""
        handover = self._handover
        self._sink = sink = open_log(handover, configuration)
        sink.echo = handover.detached and handover.generation is None
        if handover.why_in_front:
            log.info("staying in front: %s", handover.why_in_front)
        return sink

    def _listen(self) -> socket.socket:
        generation = self._handover.generation
        if generation and generation["control_fd"] >= 0:
            os.set_inheritable(generation["control_fd"], False)
            if file := generation["control_file"]:
                self._socket_file = file[0], file[1]
            return socket.socket(fileno=generation["control_fd"])
        sock = control.listen(self._handover.socket_path)
        self._socket_file = control.file_at(self._handover.socket_path)
        return sock

    def _ready(self, master: Master) -> None:
        """Tell whoever waits; from here on the log is all there is.

        Told last: whoever has heard of it finds it in the log, and finds a daemon that runs and answers.
        """
        parts, handover = master.parts, self._handover
        if handover.generation:
            _take_over(master, handover.generation)
        log.info("ready, pid %d%s", os.getpid(), ", new code" if handover.generation else "")
        if handover.detached:
            parts.sink.take_over_streams()
        parts.board.state("running")
        jobs = len(master.script.jobs)
        parts.notifier.ready(f"{jobs} timer job{'' if jobs == 1 else 's'}", main_pid=os.getpid())
        for fd in handover.generation["waiting_fds"] if handover.generation else ():
            if self._server:
                self._server.adopt(fd).answer({"ok": True})
        self._tell({"ready": True})
        if self._server:
            Keeper(parts.pidfile, self._server, handover.socket_path, parts.loop).begin()

    def _fail(self, why: str, code: int = 1) -> None:
        """Tell whoever waits why there will be no daemon, and with what code the command is to exit."""
        if self._sink is not None:
            self._sink.echo = False
            self._sink.write(logging.ERROR, f"not started: {why}")
        if self._status_fd < 0 and (self._sink is None or self._sink.path):
            with contextlib.suppress(OSError):
                os.write(2, f"{why}\n".encode(errors="backslashreplace"))
        for fd in self._handover.generation["waiting_fds"] if self._handover.generation else ():
            with contextlib.suppress(OSError):
                os.write(fd, json.dumps({"ok": False, "error": why}).encode() + b"\n")
        self._tell({"failed": why, "code": code})

    def _tell(self, message: dict[str, object]) -> None:
        fd, self._status_fd = self._status_fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # the launcher may be gone
                os.write(fd, json.dumps(message).encode() + b"\n")
            os.close(fd)

    def _clean_up(self) -> None:
        """Leave nothing of ours in the run directory."""
        path, server = self._handover.socket_path, self._server
        if server is not None:
            server.close()
        if self._pidfile.is_intact() or (server is not None and server.is_reached_at(path)):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._pidfile.i_am_locking():
            objects.remove_own(self._handover.pid_path)
            self._pidfile.release()

    def _last_resort(self) -> None:
        log.error("the code in hand does not let itself be interrupted; ending the process")
        self._clean_up()
        os._exit(1)


def _is_roots(directory: str) -> bool:
    """Whether root alone can change ``directory``, or it is not there and root would make it."""
    try:
        check_trusted(directory)
    except FileNotFoundError:
        return _is_roots(os.path.dirname(directory))
    except OSError:
        return False
    return True


def _load(handover: Handover, signals: Signals, board: Board) -> Script:
    """Import the script; a TERM meanwhile ends that at once, for nothing has been accepted yet."""
    import time

    board.enter(f"importing {handover.target}", time.monotonic_ns())
    signals.stop.urgent = True
    if signals.stop.signal is not None:
        raise StopNow
    default.loading = Loader(default)
    if handover.is_module:
        add_working_directory(handover.cwd)
    try:
        with signals.interruptible():
            return default.loading.load(handover.target, handover.is_module, handover.args)
    finally:
        gc.enable()
        default.loading = None
        signals.stop.urgent = False
        board.leave()


def _configuration(handover: Handover, script: Mapping[str, Any]) -> config.Configuration:
    return config.load(
        handover.name,
        command_line=handover.command_line,
        environ=handover.environ,
        script=script,
        config_path=handover.config_path,
        cwd=handover.cwd,
        uid=handover.uid,
        overlay=handover.overlay,
    )


def _with_script(handover: Handover, script: Script, so_far: config.Configuration) -> config.Configuration:
    """The configuration with the script's own options under it.

    Raises:
        StartError: the script asks for something that was settled before it was loaded.
    """
    loaded = _configuration(handover, script.options)
    hint = f"start it as its own command (python {handover.target} start), or say so on the command line"
    is_named = "name" in handover.command_line or "DAEMONKIT_NAME" in handover.environ
    if script.name not in (None, handover.name) and not is_named:
        raise StartError(f"the script names its daemon {script.name!r}, it was started as {handover.name!r}; {hint}")
    for option in OPTIONS:
        before, after = (getattr(each.options, option.key) for each in (so_far, loaded))
        if before != after and not option.late:
            raise StartError(f"the script asks for {option.key} = {after!r} after that was settled; {hint}")
    return loaded


def _take_over(master: Master, generation: Generation) -> None:
    """Put the jobs that are still declared the same back on their grids, with their counts."""
    master.ready_at = generation["ready_at"]
    for name, old in generation["jobs"].items():
        job = master.script.jobs.get(name)
        if job is None:
            continue
        job.record.load(old["record"])
        job.paused = old["paused"]
        if job.when == old["when"] and (old["planned"] is not None or job.schedule.kind == "after"):
            job.planned = old["planned"]
            job.paused = job.paused or job.planned is None


def _check(handover: Handover) -> int:
    """Only load the script; say on stderr why not.  Without the daemon that wants to know there is nobody to tell."""
    from daemonkit.core import prctl

    prctl.die_with_parent(signal.SIGKILL)
    default.loading = Loader(default)
    if handover.is_module:
        add_working_directory(handover.cwd)
    try:
        script = default.loading.load(handover.target, handover.is_module, handover.args)
        _with_script(handover, script, _configuration(handover, handover.script_options))
    except DaemonkitError as error:
        print(error, file=sys.stderr)
        return 1
    os.write(handover.status_fd, GOOD)
    return 0


def _serve_forks(handover: Handover) -> NoReturn:
    """Be a fork server that has loaded the script; if it cannot be loaded, tell the master why."""
    from daemonkit.core import prctl
    from daemonkit.master import entrance
    from daemonkit.processes.forkserver import MASTERS
    from daemonkit.processes.worker import Note

    prctl.die_with_parent(signal.SIGKILL)
    # Threads that the import starts inherit this: else they would take the signals that the server waits for.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, *MASTERS))
    take_title(f"{handover.name}: fork server")
    notes = entrance.take_notes(handover)
    default.listen_fds = handover.listen_fds
    try:
        configuration = _configuration(handover, handover.script_options)
        sink = open_log(handover, configuration)
        default.loading = Loader(default)
        if handover.is_module:
            add_working_directory(handover.cwd)
        script = default.loading.load(handover.target, handover.is_module, handover.args)
        configuration = _with_script(handover, script, configuration)
        default.settings = configuration.settings
        add_consumer(script, handover.name, configuration.options, sink)
        if add_agent(script, handover.name, configuration, handover.page_fd) is not None:
            preload(configuration.options.coordinator)
        guard = entrance.guard_for(configuration.options.fork_guard, handover.listen_fds)
        guard.check()
        guard.in_child()
    except Exception as error:  # noqa: BLE001 - whatever it is, the master is told
        notes.send(Note.FAILED, 0, str(error).encode()[: entrance.FAILURE])
        leave(1)
    default.loading = None
    entrance.serve(handover, script, sink, notes)
