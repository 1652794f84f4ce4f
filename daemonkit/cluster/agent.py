"""The process that holds the daemon's session with the coordinator: ``NAME: cluster``.

It tells the master what it needs to know, and no more; the master never waits for it.  When the master ends, so does
the session, at once.  When this process is killed, the next one goes on with the session.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from daemonkit.cluster.connect import connect
from daemonkit.cluster.coordinator import Coordinator
from daemonkit.cluster.election import Candidacy
from daemonkit.cluster.leadership import Page
from daemonkit.cluster.messages import UNIQUE, Report, Word, pack, pack_credentials, pack_value, unpack_credentials
from daemonkit.cluster.recipe import boot_time
from daemonkit.cluster.tree import Credentials, State, Tree
from daemonkit.cluster.watching import Value
from daemonkit.errors import DaemonkitError
from daemonkit.processes.stopflag import StopFlag
from daemonkit.processes.wire import Closed, Wire
from daemonkit.processes.worker import Restarts, Worker

log = logging.getLogger("daemonkit.cluster")

_FIRST: Final = 0.2  # seconds until a coordinator that refuses is tried again; doubled
_LONGEST: Final = 10.0  # up to this
_LOOKS: Final = 8  # within the time that the leadership is sure for: that is to be prolonged on the page
_SHORTEST: Final = 0.02  # seconds between them
_NEWS, _ANSWER = 0, 1  # the numbers of reports


class Settings(NamedTuple):
    """What the process has to know of the daemon."""

    daemon: str  # its name: what is led, and the group of its peers
    coordinator: str
    stands: bool  # whether it is to be elected
    watches: tuple[str, ...]  # paths
    page: Page


class Agent:
    """One process, one session at a time."""

    def __init__(self, settings: Settings, stop: StopFlag, wire: Wire) -> None:
        """Nothing is connected before the master says so."""
        self._settings = settings
        self._stop = stop
        self._wire = wire
        self._coordinator: Coordinator | None = None
        self._candidacy: Candidacy | None = None
        self._told: tuple[Report, Credentials | None] = (Report(), None)
        self._outbox = _Outbox(wire)
        self._trouble = _Trouble()
        self._leadership = _Leadership(settings.page)
        self._is_attached = False
        self._unique = ""  # in the names of the daemon's nodes

    def run(self) -> None:
        """Hold the session until the flag is set, or the master has ended."""
        with contextlib.suppress(Closed, BrokenPipeError, ConnectionResetError):
            self._wire.send(Word.HELLO, os.getpid(), self._settings.coordinator.encode())
            while not self._stop.is_set():
                self._turn()
        self._resign()

    def _turn(self) -> None:
        has_news = self._sleep_and_hear()
        if not self._is_attached:
            return
        now = boot_time()
        is_tried = now >= self._trouble.until
        try:
            if self._coordinator is None and is_tried:
                self._connect(None)
            if self._coordinator is not None and (is_tried or has_news):
                self._look(self._coordinator)
        except DaemonkitError as error:
            self._trouble.begin(str(error), now)
        except (Closed, BrokenPipeError, ConnectionResetError):  # of the wire: the master has ended
            raise
        except Exception as error:  # noqa: BLE001 - what others have written must not end us; it is told with its trace
            self._trouble.begin(_unexpected(error), now, error)
        if self._coordinator is not None and self._coordinator.tree.state is State.REFUSED:
            self._trouble.begin(self._coordinator.tree.error or "refused", now)
            self._forget()
        self._tell()

    def _look(self, coordinator: Coordinator) -> None:
        try:
            coordinator.look()
        finally:  # what is refused may be one path's alone
            self._tell()  # the master first
            coordinator.settle()
        self._trouble.end()

    def _sleep_and_hear(self) -> bool:
        """Tell whether there are news of the coordinator's."""
        poll = select.poll()
        news = self._coordinator.fileno() if self._coordinator else -1
        for fd in (self._stop.fileno(), news):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        poll.register(self._wire.fileno(), select.POLLIN | (select.POLLOUT if self._wire.is_waiting else 0))
        left = self._patience()
        ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000 + 0.999)}
        if self._stop.fileno() in ready:
            self._stop.drain()
        if self._wire.fileno() in ready:
            self._outbox.flush()
            self._hear()
        return news in ready

    def _patience(self) -> float | None:
        """Seconds that may be slept; None: until something comes."""
        if not self._is_attached:
            return None
        now = boot_time()
        due: list[float] = []
        if self._trouble.until > now or self._coordinator is None:
            due.append(self._trouble.until)
        if self._candidacy is not None and self._coordinator is not None and self._told[0].role == "leader":
            sure = self._coordinator.tree.valid_until
            if sure != float("inf"):
                due.append(now + max((sure - now) / _LOOKS, _SHORTEST))
        return max(min(due) - now, 0.0) if due else None

    def _hear(self) -> None:
        while (message := self._wire.receive()) is not None:
            if message.kind == Word.ATTACH:
                self._is_attached = True
                payload = bytes(message.payload)
                self._unique = payload[:UNIQUE].decode()
                with self._trouble.noted():
                    self._connect(unpack_credentials(payload[UNIQUE:], message.fds))
                for fd in message.fds:
                    os.close(fd)
                self._stop.ready()
                self._tell()
            elif message.kind in (Word.LEAVE, Word.RESIGN):
                self._is_attached = False
                self._let_go(goes_on=message.kind == Word.LEAVE)
                self._wire.send(Word.LEFT, os.getpid())
            elif message.kind == Word.ASK:
                self._answer()

    def _connect(self, credentials: Credentials | None) -> None:
        settings = self._settings
        self._coordinator = made = connect(settings.coordinator, settings.daemon, credentials)
        self._candidacy = made.elect(settings.daemon, unique=self._unique) if settings.stands else None
        made.join(group=settings.daemon, wait=False, unique=self._unique)
        self._leadership.begin(may_go_on=credentials is not None)
        for number, path in enumerate(settings.watches):
            made.watch(path, self._teller(number))

    def _teller(self, number: int) -> Callable[[Value], None]:
        return lambda value: self._outbox.send(Word.VALUE, number, pack_value(value))

    def _tell(self) -> None:
        """Let page and master know what has changed: first of all that we lead no more."""
        tree = self._coordinator.tree if self._coordinator else None
        has_lapsed = tree is not None and self._leadership.write_down(tree, self._candidacy)
        credentials = tree.credentials() if tree else None
        if credentials is not None and credentials[:2] != (self._told[1] or ("", ""))[:2]:
            self._wire.send(Word.SESSION, os.getpid(), pack_credentials(credentials), list(credentials.fds))
            self._told = self._told[0], credentials
        report = self._report()
        if report != self._told[0] or has_lapsed:
            self._told = report, self._told[1]
            self._outbox.send(Word.REPORT, _NEWS, pack(report))

    def _report(self) -> Report:
        tree = self._coordinator.tree if self._coordinator else None
        leads = self._candidacy is not None and self._candidacy.is_held
        return Report(
            "member" if not self._settings.stands else "leader" if leads else "follower",
            self._candidacy.token if self._candidacy is not None and leads else 0,
            tree.state.value if tree else "connecting",
            tree.session if tree else "",
            self._trouble.words or (tree.error if tree else None),
        )

    def _answer(self) -> None:
        report = self._report()._replace(is_answer=True)
        coordinator = self._coordinator
        if coordinator is not None and coordinator.tree.state is State.CONNECTED:
            try:
                leader = coordinator.leader(self._settings.daemon) if self._settings.stands else None
                peers = tuple(each._asdict() for each in coordinator.members(self._settings.daemon))
                report = report._replace(leader=leader and leader._asdict(), peers=peers)
            except DaemonkitError as error:  # what is known without them is told
                report = report._replace(error=report.error or str(error))
            except Exception as error:
                log.exception("daemonkit itself failed; the daemon goes on")
                report = report._replace(error=report.error or _unexpected(error))
        self._outbox.send(Word.REPORT, _ANSWER, pack(report))

    def _let_go(self, *, goes_on: bool) -> None:
        """Hold no session any more; it ``goes_on`` in another process, or ends."""
        if not goes_on:
            self._resign()
        elif self._coordinator is not None:
            self._coordinator.tree.leave()
        self._coordinator = self._candidacy = None
        self._told = Report(), None
        self._outbox.clear()  # who goes on tells all of it anew

    def _forget(self) -> None:
        """It is no use; another will be tried."""
        if self._coordinator is not None:
            self._leadership.revoke()
            self._coordinator.close()
        self._coordinator = self._candidacy = None

    def _resign(self) -> None:
        if self._coordinator is not None:
            self._leadership.revoke()
            self._coordinator.close()


class _Leadership:
    """Ours, as it is written on the page that the daemon's processes share."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._granted = 0  # the token of a leadership that may go on
        self._is_taking_over = False  # until it is known whether the leadership of another process goes on with us

    def begin(self, *, may_go_on: bool) -> None:
        """There is a session, a new one or that of another process, whose leadership ``may_go_on`` with us."""
        self._is_taking_over = may_go_on
        if may_go_on:
            self._granted = self._page.read().token

    def write_down(self, tree: Tree, candidacy: Candidacy | None) -> bool:
        """Write down whether we lead, and until when; tell if we do, and the master may think not."""
        leads = candidacy is not None and candidacy.is_held
        if self._is_taking_over and candidacy is not None:
            is_known = tree.state is State.CONNECTED and not candidacy.is_due
            self._is_taking_over = not is_known and tree.state in (State.CONNECTING, State.CONNECTED)
        if self._is_taking_over and not leads:
            return False
        token = candidacy.token if candidacy is not None and leads else 0
        before = self._page.read()
        is_over = self._granted not in (0, token) and tree.state is not State.SUSPENDED
        if token:
            self._page.grant(token, tree.valid_until)
        else:
            # When the session is gone, or our place in it, another may lead, however long it was sure before.
            self._page.revoke(boot_time() if is_over else None)
        if is_over:
            os.kill(os.getppid(), signal.SIGCHLD)  # as if a child had ended: the fork server looks whose limit has come
        if is_over or token:
            self._granted = token
        return bool(token) and boot_time() >= before.until

    def revoke(self) -> None:
        """We lead no more."""
        self._page.revoke()


class _Outbox:
    """What the master is to hear, when it listens; of what it has not heard by then, the newest of each kind."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._newest: dict[tuple[int, int], bytes] = {}

    def send(self, kind: int, number: int, payload: bytes) -> None:
        """Send it, or keep it instead of what is kept for the same ``kind`` and ``number``."""
        self._newest.pop((kind, number), None)
        self._newest[kind, number] = payload  # the last one
        self.flush()

    def flush(self) -> None:
        """Send as much as there is room for; one message at most waits in the wire."""
        self._wire.flush()
        while self._newest and not self._wire.is_waiting:
            kind, number = key = next(iter(self._newest))
            self._wire.send(kind, number, self._newest.pop(key))

    def clear(self) -> None:
        """Forget what is kept."""
        self._newest.clear()


class _Trouble:
    """What keeps us from the coordinator, and when it is tried again."""

    def __init__(self) -> None:
        self.words: str | None = None
        self.until = 0.0
        self._pause = 0.0

    def begin(self, words: str, now: float, unexpected: Exception | None = None) -> None:
        if words != self.words:
            log.error("%s; tried again until it can be done", words, exc_info=unexpected)
        self.words = words
        self._pause = min(self._pause * 2, _LONGEST) if self._pause else _FIRST
        self.until = now + self._pause

    def end(self) -> None:
        self.words, self._pause, self.until = None, 0.0, 0.0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except DaemonkitError as error:
            self.begin(str(error), boot_time())


def _unexpected(error: Exception) -> str:
    return f"daemonkit itself failed: {type(error).__name__}: {error}"


def worker(settings: Settings) -> Worker:
    """The worker whose one process that is."""

    def hold(stop: StopFlag, fds: list[int]) -> None:
        with socket.socket(fileno=fds[0]) as sock:
            sock.setblocking(False)
            Agent(settings, stop, Wire(sock)).run()

    restarts = Restarts(most=2**31, window=10.0, backoff=0.05, longest=0.5)  # the session waits for the next one
    return Worker("cluster", hold, readiness=True, is_titled=True, is_last=True, wants_fds=True, restarts=restarts)
