"""Gives calls to children and outcomes to futures: one thread, one lock, one fork server.

Any thread may submit, and does no more than to append the call: what is half done when an exception strikes there
(control-C does at any line of the main thread) is no more than that.
"""

from __future__ import annotations

import functools
import logging
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Final

from daemonkit.errors import ForkServerLost
from daemonkit.processes import child, modules, pickled, steps
from daemonkit.processes.assignment import Assignment, Fate
from daemonkit.processes.attendant import Attendant
from daemonkit.processes.call import BROKEN, ERROR, LEARNED, PROGRESS, RESULT
from daemonkit.processes.deadlines import Deadlines
from daemonkit.processes.gate import Gate
from daemonkit.processes.lasting import lasting
from daemonkit.processes.ownserver import Server
from daemonkit.processes.waiting import Waiting
from daemonkit.processes.wire import Closed, DescriptorsLost, Message

log = logging.getLogger("daemonkit.pool")

_ATTEMPTS: Final = 3  # children that a call is given to, if they end before they begin it
_LULL: Final = 0.0002  # seconds in which outcomes gather while no child waits for us: one wake-up for many
_BATCH: Final = 256  # outcomes read before room is filled again
_NO_OUTCOME: Final = "pool: a child has written what is no outcome; it is passed over"


class Dispatcher:
    """Everything behind a pool."""

    def __init__(
        self, width: int, reuse: int | None, max_pending: int | None, first: bytes, on_forsake: Callable[[], None]
    ) -> None:
        """Start nothing yet.

        Args:
            width: calls that run at once.
            reuse: calls for each child; None: any number.
            max_pending: calls that may wait; None: any number.
            first: the initializer's pickle; empty: none.
            on_forsake: called in a fork of this process.
        """
        self.width = width
        self._on_forsake = on_forsake
        self._gate = Gate()
        self._lock = threading.RLock()
        self._waiting = Waiting(max_pending)
        self._steps: deque[steps.Step] = deque()
        self._deadlines = Deadlines()
        self._make_server = functools.partial(Server, reuse, first)
        self._server: Server | None = None
        self._attendant = Attendant()
        lasting().add(self)

    # What any thread asks.

    def submit(self, call: Assignment) -> None:
        """Accept the call.

        Raises:
            RuntimeError: the pool is shut down, or belongs to another process.
            BrokenExecutor: its initializer has failed.
            PoolFull: ``max_pending`` calls wait, and the call's limits say not to wait for room.
            OSError: the fork server cannot be started.
        """
        while bell := self._accept(call):
            bell.acquire()

    def _accept(self, call: Assignment) -> threading.Lock | None:
        """Append the call; or return what it has to wait for first."""
        with self._lock:
            self._gate.check()
            if self._waiting.is_full and not self._attendant.is_current():
                return self._waiting.bell(call)
            if self._server is None:
                self._start()
            self._waiting.calls.append(call)
            self._attendant.ask()
            return None

    def withdraw(self, call: Assignment) -> bool:
        """Give the call to no child any more; False if one has begun it, or that was asked before."""
        with self._lock:
            if self._gate.is_forsaken:
                return True
            is_given = call.is_given
            if is_given and not call.is_begun and self._server:
                self.wake()  # first: whatever strikes here, the thread takes in what was kept back
                is_given = not self._server.crew.withhold(call)
            if is_given or call.is_begun or call.is_withdrawn:
                return False
            call.fate = Fate.WITHDRAWN
            self._waiting.forget(call)
            return True

    def have_done(self, step: Callable[[None], None]) -> None:
        """Have the thread do what was interrupted; without it, here."""
        with self._lock:
            self._steps.append((step, None))
            is_there = self._attendant.wake()
        if not is_there:
            steps.take(self._steps)

    def kill(self, call: Assignment) -> bool:
        """End a call that a child has; False if it is over."""
        with self._lock:
            if call.done() or call.is_withdrawn or self._gate.is_forsaken:
                return False
            call.fate = Fate.KILLED
            self._kill(call)
            return True

    def _kill(self, call: Assignment) -> None:
        """Its fate is told when its child has ended; or when its turn comes, if none has begun it."""
        self.wake()  # first, as in ``withdraw``
        if self._server is not None:
            self._server.crew.kill(call)

    def _take_in(self, calls: list[Assignment]) -> None:
        """They were with a child, and wait again."""
        if calls := [call for call in calls if not call.is_withdrawn]:
            self._waiting.put_back(calls)
            self.wake()

    def close(self, cancel: bool = False, kill: bool = False) -> None:
        """Accept no more; end when all is done, or sooner if what waits is cancelled and what runs is killed."""
        if self._gate.is_forsaken:
            return
        with self._lock:
            self._gate.is_closing = True
            calls = list(self._waiting.calls) if cancel or kill else []
            if (cancel or kill) and self._server:
                calls += self._server.crew.calls()
            self._waiting.tell_room()
        for call in calls:
            if not call.cancel() and kill:
                self.kill(call)
        self.wake()

    def join(self) -> None:
        """Wait until all is done and every process has ended."""
        self._attendant.join()

    def wake(self) -> None:
        """Have the thread look at everything."""
        self._attendant.wake()

    # The thread.

    def _start(self) -> None:
        born: list[int] = []
        try:
            self._server = self._make_server(self._begun, born)
            self._attendant.attend(self._run)
        except BaseException:  # there is no room for it; or control-C.  The next call starts all again
            server, self._server = self._server, None
            if server:
                server.close()
            for pid in () if server else born:
                child.wait_for(pid, 0.0)
            raise

    def _end(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            self._attendant.end()
        if server:
            server.close()

    def _run(self) -> None:
        with self._lock:  # whoever starts us holds it until that is done
            if not self._attendant.is_current():  # control-C struck there: we were given up
                return
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("pool: a mistake in daemonkit; its calls are given up")
            with self._lock:
                self._give_up_in(f"the pool has ended: {error!r}")
            steps.take(self._steps)
            raise
        finally:
            self._end()

    def _turn(self) -> bool:
        """Sleep until something happens, and act on it; False when all is done."""
        with self._lock:
            server = self._server
            if self._gate.is_closing and not (self._waiting.calls or self._steps or (server and server.crew.calls())):
                return False
            poll = server.poll if server else select.poll()
            pause = self._deadlines.pause()
            if server:
                server.watch()
            is_ahead = server is not None and server.crew.is_ahead()
        if is_ahead:
            time.sleep(_LULL)
        ready = self._attendant.sleep(poll, pause)
        with self._lock:
            self._attendant.looks()
            if self._server:
                self._take_in(self._server.crew.recalled())
            if server and ready:
                self._hear(server, ready)
            self._expire()
            if self._server:
                self._fill(self._server)
        steps.take(self._steps)
        return True

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
            except (struct.error, IndexError, OSError) as error:
                self._miss(server, error)
                continue
            except Closed:  # all of them are gone: the wire tells, too; or an empty message
                return True
            if message is None:
                return True
            self._take(server, message)
        return False

    def _miss(self, server: Server, error: Exception) -> None:
        """If a large outcome has come, and its descriptor has not, the call has no other to wait for."""
        if isinstance(error, DescriptorsLost) and error.kind <= ERROR and (call := server.crew.finish(error.id)):
            self._steps.append((call.miss, error))
        else:
            log.warning(_NO_OUTCOME)

    def _take(self, server: Server, message: Message) -> None:
        crew = server.crew
        if message.kind <= ERROR:
            if call := crew.finish(message.id):
                self._steps.append((call.succeed if message.kind == RESULT else call.fail, message))
        elif message.kind == PROGRESS:
            if call := crew.find(message.id):
                self._steps.append((call.report, message))
        elif message.kind == LEARNED:
            server.children.learn(modules.unpack(bytes(message.payload)))
        elif message.kind == BROKEN and not self._gate.why_broken:
            try:
                _, words, text = pickled.loads(message.payload)
            except Exception:  # noqa: BLE001 - garbage
                log.warning(_NO_OUTCOME)
                return
            log.critical("pool: the initializer failed\n%s", text)
            self._give_up_in(f"the pool's initializer failed: {words}")

    def _settle(self, server: Server) -> None:
        lost, given_back = server.crew.settle()
        for call, receipt in lost:
            self._steps.append((call.lose, receipt))
        for call in reversed(given_back):
            if call.attempts < _ATTEMPTS:
                self._waiting.put_back([call])
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
            self._lose_waiting("the fork server could not begin; see stderr")
        elif self._waiting.calls:
            try:
                self._start()
            except OSError as error:  # there may be room for the next call
                log.error("pool: start a fork server: %s", error)
                self._lose_waiting(f"no fork server could be started: {error}")

    def _lose_waiting(self, why: str) -> None:
        for call in self._waiting.take_all():
            if not call.is_withdrawn:
                self._steps.append((functools.partial(call.lose, None), why))

    def _fill(self, server: Server) -> None:
        try:
            self._place(server)
            if back := server.crew.spare(self.width):
                self._take_in(back)
                self._place(server)
        except ForkServerLost:
            self.wake()  # the thread will find it gone
        self._waiting.tell_room()
        if server.children.wire.is_waiting:
            self.wake()

    def _place(self, server: Server) -> None:
        waiting = self._waiting.calls
        if self._gate.why_broken:  # a child has given them back since: they were given up with the rest
            waiting.clear()
        while waiting:
            call = waiting[0]
            if call.fate is not None:
                if not call.is_withdrawn:  # it was killed, and no child has begun it
                    self._steps.append((call.lose, None))
                    self.wake()
            else:
                try:
                    if not server.crew.take(call, self.width):
                        return
                except OSError as error:
                    if isinstance(error, ForkServerLost):
                        raise
                    self._steps.append((functools.partial(call.lose, None), f"no child could be asked for: {error}"))
                    self.wake()
            waiting.popleft()

    def _begun(self, call: Assignment) -> None:
        timeout = call.limits.timeout
        if timeout is not None and self._deadlines.add(call, timeout):
            self.wake()

    def _expire(self) -> None:
        for call in self._deadlines.late():
            if call.fate is None:
                call.fate = Fate.TIMEOUT
                self._kill(call)

    def _give_up_in(self, why: str) -> None:
        self._gate.why_broken = why
        calls = self._waiting.take_all() + (self._server.crew.calls() if self._server else [])
        calls = [call for call in calls if not call.is_withdrawn]
        for call in calls:
            call.begin()  # from now on it cannot be cancelled
        self._steps.append((functools.partial(_break, calls), why))

    def forsake(self) -> None:
        """We are a fork: the thread is not here, and the sockets are its parent's."""
        self._gate.is_forsaken = True
        if self._server:
            self._server.forsake()
        self._attendant.forsake()
        self._on_forsake()
        self._lock = threading.RLock()


def _break(calls: list[Assignment], why: str) -> None:
    for call in calls:
        if not call.done():
            call.set_exception(BrokenExecutor(why))
