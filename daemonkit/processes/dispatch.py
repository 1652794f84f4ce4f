"""Gives calls to children and outcomes to futures: one thread, one lock, one fork server.

Any thread may submit; it sends the request itself if there is room, so that a call does not wait for a thread to wake.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import logging
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any, Final

from daemonkit.errors import ForkServerLost, PoolFull
from daemonkit.processes import pickled
from daemonkit.processes.call import BROKEN, ERROR, LEARNED, PROGRESS, RESULT
from daemonkit.processes.future import Call, Fate
from daemonkit.processes.lasting import lasting
from daemonkit.processes.ownserver import Server
from daemonkit.processes.wire import Closed, Message

log = logging.getLogger("daemonkit.pool")

_ATTEMPTS: Final = 3  # children that a call is given to, if they end before they begin it
_LONGEST: Final = 3_600_000  # milliseconds of one sleep
_LULL: Final = 0.0005  # seconds in which outcomes gather while no child waits for us: one wake-up for many
_BATCH: Final = 256  # outcomes read before room is filled again
Step = tuple[Callable[[Any], None], Any]  # done outside the lock, for it may call what is not ours


class Dispatcher:
    """Everything behind a pool."""

    def __init__(self, width: int, reuse: int | None, max_pending: int | None, first: bytes) -> None:
        """Start nothing yet.

        Args:
            width: calls that run at once.
            reuse: calls for each child; None: any number.
            max_pending: calls that may wait; None: any number.
            first: the initializer's pickle; empty: none.
        """
        self.width = width
        self.is_closing = False
        self._reuse, self._first, self._max_pending = reuse, first, max_pending
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)
        self._pending: deque[Call] = deque()
        self._steps: deque[Step] = deque()
        self._timers: list[tuple[float, int, Call]] = []
        self._order = itertools.count()
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self._wakeup = -1
        self._broken = ""
        self._owner = os.getpid()
        self._is_forsaken = False  # we are a copy in a fork of the owner
        lasting().add(self)

    # What any thread asks.

    def submit(self, call: Call) -> None:
        """Accept the call.

        Raises:
            RuntimeError: the pool is shut down, or belongs to another process.
            BrokenExecutor: its initializer has failed.
            PoolFull: ``max_pending`` calls wait, and the call's limits say not to wait for room.
            OSError: the fork server cannot be started.
        """
        with self._lock:
            self._check_open()
            if self._max_pending is not None and len(self._pending) >= self._max_pending:
                self._await_room(call, self._max_pending)
            server = self._server or self._start()
            self._pending.append(call)
            if len(self._pending) == 1:
                self._fill(server)

    def _await_room(self, call: Call, most: int) -> None:
        while len(self._pending) >= most and threading.current_thread() is not self._thread:
            if not call.limits.block:
                raise PoolFull(f"submit {call.name}: {most} calls wait already (max_pending)")
            self._room.wait()
            self._check_open()

    def _check_open(self) -> None:
        if self._is_forsaken:
            raise RuntimeError(f"submit: this pool belongs to pid {self._owner}; make one after the fork")
        if self._broken:
            raise BrokenExecutor(self._broken)
        if self.is_closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def withdraw(self, call: Call) -> bool:
        """Give the call to no child any more; False if one has begun it, or that was asked before."""
        with self._lock:
            if self._is_forsaken:
                return True
            if call.is_given and not call.is_begun and self._server:
                self._take_in(self._server.crew.recall(call))
            if call.is_given or call.is_begun or call.is_withdrawn:
                return False
            call.is_withdrawn = True
            if self._max_pending is not None and call in self._pending:
                self._pending.remove(call)
                self._room.notify()
            return True

    def kill(self, call: Call) -> bool:
        """End a call that a child has; False if it is over."""
        with self._lock:
            if call.done() or call.is_withdrawn or self._is_forsaken:
                return False
            call.fate = Fate.KILLED
            self._kill(call)
            self.wake()
            return True

    def _kill(self, call: Call) -> None:
        if self._server is not None:
            self._take_in(self._server.crew.kill(call))
        if call in self._pending:  # no child has begun it, or one that has ended gave it back
            self._pending.remove(call)
            self._steps.append((call.lose, None))

    def _take_in(self, calls: list[Call]) -> None:
        """They were with a child, and wait again."""
        if calls:
            self._pending.extendleft(reversed(calls))
            self.wake()

    def close(self, cancel: bool = False, kill: bool = False) -> None:
        """Accept no more; end when all is done, or sooner if what waits is cancelled and what runs is killed."""
        if self._is_forsaken:
            return
        with self._lock:
            self.is_closing = True
            if self._server and (cancel or kill):
                self._take_in(self._server.crew.recall())
            calls = list(self._pending) if cancel or kill else []
            if kill and self._server:
                calls += self._server.crew.calls()
            self._room.notify_all()
        for call in calls:
            if not call.cancel() and kill:
                self.kill(call)
        self.wake()

    def join(self) -> None:
        """Wait until all is done and every process has ended."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and not self._is_forsaken:
            thread.join()

    def wake(self) -> None:
        """Have the thread look at everything."""
        with self._lock:
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)

    # The thread.

    def _start(self) -> Server:
        self._server = server = Server(self._reuse, self._first, self._begun)
        if self._thread is not None:
            self.wake()
            return server
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        thread = threading.Thread(target=self._run, name="daemonkit pool", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there is no room for one more; there may be for the next call
            self._end()
            raise
        self._thread = thread
        return server

    def _end(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            os.close(self._wakeup)
            self._wakeup = -1
        if server:
            server.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("pool: a mistake in daemonkit; its calls are given up")
            self._give_up(f"the pool has ended: {error!r}")
            raise
        finally:
            self._end()

    def _turn(self) -> bool:
        """Sleep until something happens, and act on it; False when all is done."""
        with self._lock:
            server = self._server
            if self.is_closing and not self._pending and not (server and server.crew.calls()):
                return False
            poll = server.poll if server else select.poll()
            poll.register(self._wakeup, select.POLLIN)
            pause = self._pause()
            if server:
                server.watch()
            is_ahead = server is not None and server.crew.is_ahead()
        if is_ahead:
            time.sleep(_LULL)
        ready = {fd for fd, _ in poll.poll(pause)}
        with self._lock:
            if self._wakeup in ready:
                os.eventfd_read(self._wakeup)
                ready.discard(self._wakeup)
            if server and ready:
                self._hear(server, ready)
            if self._timers:
                self._expire()
            if self._server:
                self._fill(self._server)
        _do(self._steps)
        return True

    def _pause(self) -> float | None:
        """Milliseconds until a call's time is up, or so many as poll(2) takes; None: no call has a bound."""
        if not self._timers:
            return None
        return min(max(0.0, self._timers[0][0] - time.monotonic()) * 1000 + 1, _LONGEST)

    def _hear(self, server: Server, ready: set[int]) -> None:
        is_lost = False
        if server.children.wire.fileno() in ready:
            try:
                server.children.wire.flush()
                server.children.receive()
            except (ForkServerLost, BrokenPipeError, ConnectionResetError):
                is_lost = True
        if self._read(server):
            self._settle(server)
        if is_lost:
            while not self._read(server):
                pass
            self._settle(server)
            self._replace(server)

    def _read(self, server: Server) -> bool:
        """Take in outcomes; True if there are no more."""
        for _ in range(_BATCH):
            try:
                message = server.results.receive()
            except (struct.error, IndexError, OSError):  # a child has written something into the socket
                log.warning("pool: a child has written what is no outcome; it is passed over")
                continue
            except Closed:  # all of them are gone: the wire tells, too; or an empty message
                return True
            if message is None:
                return True
            self._take(server, message)
        return False

    def _take(self, server: Server, message: Message) -> None:
        crew = server.crew
        if message.kind <= ERROR:
            if call := crew.finish(message.id):
                self._steps.append((call.succeed if message.kind == RESULT else call.fail, message))
        elif message.kind == PROGRESS:
            if call := crew.find(message.id):
                self._steps.append((call.report, message))
        elif message.kind == LEARNED:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                server.learn(pickled.loads(message.payload))
        elif message.kind == BROKEN and not self._broken:
            _, words, text = pickled.loads(message.payload)
            log.critical("pool: the initializer failed\n%s", text)
            self._give_up_in(f"the pool's initializer failed: {words}")

    def _settle(self, server: Server) -> None:
        lost, given_back = server.crew.settle()
        for call, receipt in lost:
            self._steps.append((call.lose, receipt))
        for call in reversed(given_back):
            if call.attempts < _ATTEMPTS:
                self._pending.appendleft(call)
            else:
                why = f"{call.attempts} children ended before they began it"
                self._steps.append((functools.partial(call.lose, None), why))

    def _replace(self, server: Server) -> None:
        """The fork server is gone: what its children had is lost, what waits is for the next one."""
        running = server.crew.calls()
        log.error("pool: the fork server (pid %d) has ended; %d running calls are lost", server.pid, len(running))
        for call in running:
            self._steps.append((functools.partial(call.lose, None), f"the fork server, pid {server.pid}, has ended"))
        self._server = None
        server.close()
        if not server.crew.has_started:
            for call in self._pending:
                self._steps.append((functools.partial(call.lose, None), "the fork server could not begin; see stderr"))
            self._pending.clear()
        elif self._pending:
            self._start()

    def _fill(self, server: Server) -> None:
        try:
            self._place(server)
            if back := server.crew.spare(self.width):
                self._take_in(back)
                self._place(server)
        except ForkServerLost:
            self.wake()  # the thread will find it gone
        if self._max_pending is not None:
            self._room.notify_all()
        if server.children.wire.is_waiting:
            self.wake()

    def _place(self, server: Server) -> None:
        while self._pending:
            call = self._pending[0]
            if not call.is_withdrawn:
                try:
                    if not server.crew.take(call, self.width):
                        return
                except OSError as error:
                    if isinstance(error, ForkServerLost):
                        raise
                    self._steps.append((functools.partial(call.lose, None), f"no child could be asked for: {error}"))
                    self.wake()
            self._pending.popleft()

    def _begun(self, call: Call) -> None:
        if call.limits.timeout is not None:
            due = time.monotonic() + call.limits.timeout
            heapq.heappush(self._timers, (due, next(self._order), call))
            if self._timers[0][2] is call:
                self.wake()

    def _expire(self) -> None:
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].done()):
            _, _, call = heapq.heappop(self._timers)
            if not call.done() and call.fate is None:
                call.fate = Fate.TIMEOUT
                self._kill(call)

    def _give_up_in(self, why: str) -> None:
        self._broken = why
        calls = list(self._pending) + (self._server.crew.calls() if self._server else [])
        calls = [call for call in calls if not call.is_withdrawn]
        for call in calls:
            call.begin()  # from now on it cannot be cancelled
        self._pending.clear()
        self._steps.append((functools.partial(_break, calls), why))

    def _give_up(self, why: str) -> None:
        with self._lock:
            self._give_up_in(why)
        _do(self._steps)

    def forsake(self) -> None:
        """We are a fork: the thread is not here, and the sockets are its parent's."""
        self._is_forsaken = True
        if self._server:
            self._server.forsake()
        if self._wakeup >= 0:
            os.close(self._wakeup)
            self._wakeup = -1
        self._lock = threading.RLock()


def _do(steps: deque[Step]) -> None:
    while steps:  # each is forgotten when it is done: nothing of ours keeps a result alive
        act, on = steps.popleft()
        try:
            act(on)
        except BaseException:  # such as a sys.exit() in somebody's callback: it is not what ends the pool
            log.exception("pool: a callback or on_progress failed")
        del act, on


def _break(calls: list[Call], why: str) -> None:
    for call in calls:
        if not call.done():
            call.set_exception(BrokenExecutor(why))
