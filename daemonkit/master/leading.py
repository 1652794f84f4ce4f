"""The daemon's place in its cluster: whether it leads, and what begins and ends with that.

The session is held by a process of its own (``cluster.agent``), which the master hears, and never waits for.  Between
two such processes the session goes on: the master keeps what it takes to go on with it, for a second.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import socket
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from daemonkit.cluster.address import without_password
from daemonkit.cluster.leadership import Page
from daemonkit.cluster.messages import Report, Word, pack_credentials, unpack, unpack_credentials, unpack_value
from daemonkit.cluster.recipe import boot_time
from daemonkit.cluster.tree import Credentials
from daemonkit.cluster.watching import Value
from daemonkit.core.job import Job
from daemonkit.core.loop import READ, WRITE
from daemonkit.master.clustering import NAME
from daemonkit.processes.wire import Closed, DescriptorsLost, Message, Wire, pair

if TYPE_CHECKING:
    from daemonkit.master.master import Master

log = logging.getLogger("daemonkit.cluster")

DECISION: Final = 1.0  # seconds in which another process must have gone on with the session of one that has ended
ANSWER: Final = 1.0  # seconds that `status` waits for what only the coordinator knows
_MOST_LEFT: Final = 3600.0  # seconds

OnAnswer = Callable[[dict[str, Any]], None]


class Stand(enum.Enum):
    """Of one process towards the session."""

    SILENT = "only just asked for"
    WAITING = "it could hold the session"
    ATTACHED = "it holds the session"
    LEAVING = "it is to let go of the session"
    LEFT = "it has let go of the session, and waits to be stopped"


class _Line:
    """The wire to one process."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.stand = Stand.SILENT
        self.url = ""
        self.told: set[int] = set()  # the numbers of the values that came over it


class Leading:
    """What the master knows of its leadership, and does for it."""

    def __init__(self, master: Master, page: Page) -> None:
        """Nothing is known before the first process has been started."""
        self.report = Report()
        self._master = master
        self._page = page
        self._lines: list[_Line] = []
        self._session: tuple[str, Credentials | None] = ("", None)  # of which coordinator, and what it takes to go on
        self._values: dict[int, Value] = {}  # by the number of the declaration
        self._asked: list[tuple[Job, OnAnswer]] = []
        self._alarms: dict[str, Job] = {}
        self._token = 0  # with which we lead; 0: we do not
        self._unique = uuid.uuid4().hex.encode()  # in our nodes' names: whoever goes on with the session finds them
        os.register_at_fork(after_in_child=self._close_session)

    @property
    def token(self) -> int:
        """The fencing number with which we lead, for sure and now; 0: we do not."""
        terms = self._page.read()
        if self._token and not terms.is_held:
            self._let_lapse()
        elif self._token and terms.token != self._token:
            self.follow(f"it has ended, and there is another, with token {terms.token}")
        return self._token

    def is_leading(self) -> bool:
        """Whether we lead: for sure, and now."""
        return self.token != 0

    def open(self) -> socket.socket:
        """A wire for a process that is about to be started: its end."""
        ours, theirs = pair()
        ours.setblocking(False)
        line = _Line(Wire(ours))
        self._lines.append(line)
        self._watch(line)
        return theirs

    def ask(self, done: OnAnswer) -> None:
        """Find out who leads and who is there; ``done`` is told all that is known by then."""
        line = self._attached
        if line is None:
            done(self.describe())
            return
        alarm = self._master.parts.timer.once("status of the cluster", ANSWER, self._answer)
        self._asked.append((alarm, done))
        self._send(line, Word.ASK)

    def describe(self) -> dict[str, Any]:
        """What is known, for ``status``."""
        # Not as was reported: a process that has only just taken on the session has not found our place yet.
        token = self.token
        role = "leader" if token else "follower" if self.report.role == "leader" else self.report.role
        left = max(self._page.read().until - boot_time(), 0.0) if token else 0.0
        return {
            "coordinator": without_password(self._master.configuration.options.coordinator),
            "role": role,
            "token": token or None,
            "sure_for": None if left == float("inf") or not left else round(left, 3),
            "state": self.report.state,
            "session": self.report.session or None,
            "error": self.report.error,
            "leader": self.report.leader,
            "peers": list(self.report.peers),
        }

    def follow(self, why: str) -> None:
        """Lead no more: stop what runs for the leadership."""
        if not self._token:
            return
        token, self._token = self._token, 0
        log.log(
            logging.INFO if self._master.is_stopping else logging.WARNING, "leads no more, token %d: %s", token, why
        )
        self._call_off("end of the leadership")
        master = self._master
        if master.crew:
            left = max(self._page.read().limit - boot_time(), 0.0)
            master.crew.workers.end_leaders(min(left, master.configuration.options.graceful_timeout))
        for hook in master.script.handlers.get("follower", ()):
            master.call("follower hook", hook)

    def stop(self) -> None:
        """The daemon stops: it leads no more, and says so when all that it did as the leader is done."""
        self.follow("the daemon stops")
        for alarm, _ in self._asked:
            self._master.parts.timer.pause(alarm)
        self._asked.clear()

    def _lead(self, token: int) -> None:
        if self._token == token:
            return
        if self._token:
            self.follow(f"leads again, with token {token}")
        terms = self._page.read()
        if not terms.is_held or terms.token != token:
            return  # it is over by now; what comes after it will be told
        self._token = token
        log.info("leads, token %d", token)
        self._watch_limit()
        master = self._master
        for hook in master.script.handlers.get("leader", ()):
            master.call("leader hook", hook)
        if master.crew and self.is_leading():
            master.crew.workers.leaders.begin()

    def _watch_limit(self) -> None:
        """See to it that we do not lead longer than is sure, whoever is alive to tell us."""
        left = self._page.read().until - boot_time()
        if not self._token or left == float("inf"):
            return
        if left <= 0:
            self._let_lapse()
        else:
            self._alarm("end of the leadership", min(left, _MOST_LEFT), self._watch_limit)

    def _let_lapse(self) -> None:
        # Prolonged in this very moment, it would go on for the process with the session alone, which would not tell.
        self._page.revoke()
        self.follow("its time was up, and nobody has prolonged it")

    def _hear(self, line: _Line) -> None:
        while line in self._lines:
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    line.wire.flush()  # if nobody is there, that is told behind the last words
                message = line.wire.receive()
            except DescriptorsLost:
                continue
            except (Closed, ConnectionResetError):
                self._lose(line)
                return
            if message is None:
                self._watch(line)
                return
            self._actions[message.kind](self, line, message)

    def _hello(self, line: _Line, message: Message) -> None:
        line.url, line.stand = bytes(message.payload).decode(), Stand.WAITING
        holder = self._attached
        if holder is not None:
            holder.stand = Stand.LEAVING
            if holder.url == line.url:
                self._send(holder, Word.LEAVE)
            else:
                self.follow("the coordinator is another one now")
                self._close_session()
                if self._master.crew:  # not before what runs for the leadership has ended may another lead there
                    self._master.crew.workers.leaders.when_parted(lambda: self._resign(holder))
        self._attach_next()

    def _resign(self, holder: _Line) -> None:
        if holder in self._lines:
            self._send(holder, Word.RESIGN)

    def _left(self, line: _Line, message: Message) -> None:
        line.stand = Stand.LEFT
        self._alarm("decision on the leadership", DECISION, self._decide)
        self._attach_next()

    def _keep(self, line: _Line, message: Message) -> None:
        self._close_session()
        self._session = line.url, unpack_credentials(bytes(message.payload), message.fds)

    def _reported(self, line: _Line, message: Message) -> None:
        report = unpack(bytes(message.payload))
        known = report if report.is_answer else report._replace(leader=self.report.leader, peers=self.report.peers)
        self.report = known
        if line.stand is not Stand.ATTACHED:
            return
        if report.is_answer:
            self._answer()
            return
        if report.role == "leader":
            self._call_off("decision on the leadership")
            self._lead(report.token)
        elif self._token and not self._is_being_decided(report):
            self.follow(report.error or f"the session is {report.state}")

    def _is_being_decided(self, report: Report) -> bool:
        """A process that has only just taken on the session has not found its place yet."""
        return "decision on the leadership" in self._alarms and report.state in ("connecting", "connected")

    def _told(self, line: _Line, message: Message) -> None:
        value = unpack_value(bytes(message.payload))
        # Its first is what it has found, which its predecessor may have told; each further one is a change.
        if message.id in line.told or self._values.get(message.id) != value:
            self._values[message.id] = value
            self._master.take_value(message.id, value)
        line.told.add(message.id)

    def _lose(self, line: _Line) -> None:
        self._master.parts.loop.unwatch(line.wire.fileno())
        line.wire.close()
        self._lines.remove(line)
        if line.stand in (Stand.ATTACHED, Stand.LEAVING):
            self.report = self.report._replace(state="connecting", error="its process has ended, and is replaced")
            self._alarm("decision on the leadership", DECISION, self._decide)
            self._answer()
            self._attach_next()

    def _decide(self) -> None:
        """Nobody has gone on with the session in time: it is given up."""
        self._call_off("decision on the leadership")
        line = self._attached
        if line is not None and self.report.role == "leader":
            return
        self._page.revoke()
        self.follow("no other process has gone on with its session in time")
        if line is None:
            self._close_session()

    def _attach_next(self) -> None:
        """Let a process hold the session, if none does."""
        if any(line.stand in (Stand.ATTACHED, Stand.LEAVING) for line in self._lines):
            return
        for stand in (Stand.WAITING, Stand.LEFT):
            for line in reversed(self._lines):
                if line.stand is stand:
                    url, credentials = self._session
                    known = credentials if url == line.url else None
                    line.stand = Stand.ATTACHED
                    payload = self._unique + pack_credentials(known)
                    self._send(line, Word.ATTACH, payload, list(known.fds) if known else [])
                    return

    def _send(self, line: _Line, kind: int, payload: bytes = b"", fds: list[int] | None = None) -> None:
        try:
            line.wire.send(kind, 0, payload, fds or ())
        except (BrokenPipeError, ConnectionResetError):
            return  # its end will be told
        self._watch(line)

    def _watch(self, line: _Line) -> None:
        events = READ | WRITE if line.wire.is_waiting else READ
        self._master.parts.loop.watch(line.wire.fileno(), lambda _: self._hear(line), events)

    def _answer(self) -> None:
        asked, self._asked = self._asked, []
        for alarm, done in asked:
            self._master.parts.timer.pause(alarm)
            done(self.describe())

    @property
    def _attached(self) -> _Line | None:
        return next((line for line in self._lines if line.stand is Stand.ATTACHED), None)

    def _close_session(self) -> None:
        """Keep no session of ours alive; in a child that was forked, either."""
        url, credentials = self._session
        self._session = url, None
        for fd in credentials.fds if credentials else ():
            os.close(fd)

    def _alarm(self, name: str, delay: float, func: Callable[[], object]) -> None:
        self._call_off(name)
        self._alarms[name] = self._master.parts.timer.once(name, delay, func)

    def _call_off(self, name: str) -> None:
        if alarm := self._alarms.pop(name, None):
            self._master.parts.timer.pause(alarm)

    _actions: Final[dict[int, Callable[[Leading, _Line, Message], None]]] = {
        Word.HELLO: _hello,
        Word.SESSION: _keep,
        Word.REPORT: _reported,
        Word.VALUE: _told,
        Word.LEFT: _left,
    }


def begin(master: Master, page: Page) -> Leading:
    """Let the jobs, workers and hooks of ``master``, which has a crew, depend on its leadership."""
    leading, crew = Leading(master, page), master.crew
    assert crew is not None
    crew.workers.openers[NAME] = leading.open
    crew.workers.get_token = crew.jobs.get_token = lambda: leading.token
    for job in master.script.jobs.values():
        if job.policy.leader:
            job.gate = leading.is_leading
    return leading
