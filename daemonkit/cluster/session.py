"""What is known of a session with servers elsewhere: above all until when it can be counted on.

Each reply that a majority of the servers had a part in, as in every write, proves that the session lived when its
request was sent: no other majority can have ended it.  Pings prove nothing, for a follower answers them also while it
is cut off from its leader; nor does a sync, which a leader answers that is cut off from its followers.

What that majority knew of the session may have been older: its followers tell the leader every half tick which sessions
they have heard of, and we may have been silent before: for a third of the time-out between two pings, and for longer
if we were stopped.  So the session is counted on for six tenths of its time-out after a proof, but for 0.85
of it at most after what the leader must have known by then.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from daemonkit.cluster.recipe import boot_time
from daemonkit.cluster.tree import State

SURE: Final = 0.6  # of the time-out: for so long after a proof it is counted on
_KNOWN: Final = 0.85  # of the time-out: for so long after the leader has known of us; the servers wait for all of it
_SPREADING: Final = 0.2  # of the time-out, a half tick and more: until the leader knows what a follower does
_GRAIN: Final = 0.02  # of the time-out, between two moments that are kept


class Session:
    """Told by the threads of a library, read by ours."""

    def __init__(self, timeout: float) -> None:
        """There is none yet; ``timeout`` is what will be asked for."""
        self.state = State.CONNECTING
        self.session = ""
        self.timeout = timeout  # seconds, as negotiated with the servers
        self._until = 0.0
        self._known = 0.0  # the servers' leader has heard of us then, or later
        self._heard: deque[float] = deque()  # a server has heard of us then; the leader learns of it
        self._guard = threading.RLock()
        self._usable = threading.Event()  # connected, or refused

    @property
    def valid_until(self) -> float:
        """Until then (seconds of CLOCK_BOOTTIME) the session lives for sure."""
        return self._until

    def connect(self, session: str) -> None:
        """There is a connection, with the session of that name."""
        with self._guard:
            if session != self.session:
                self._until = 0.0
            self.session, self.state = session, State.CONNECTED
        self._usable.set()

    def lose(self, *, is_gone: bool) -> None:
        """The connection is lost, or the session ``is_gone``."""
        self._usable.clear()
        if is_gone:
            with self._guard:
                self.session, self._until = "", 0.0
        self.state = State.LOST if is_gone else State.SUSPENDED

    def refuse(self) -> None:
        """The servers refuse us."""
        self.lose(is_gone=True)
        self.state = State.REFUSED
        self._usable.set()

    def begin(self, sent: float) -> None:
        """The servers have made the session after ``sent``, or taken it up again: the first to know is their leader."""
        with self._guard:
            self._heard.clear()
            self._known = sent

    def hear(self, sent: float) -> None:
        """A server has answered to what was sent at that moment."""
        with self._guard:
            while self._heard and self._heard[0] <= sent - self.timeout * _SPREADING:
                self._known = self._heard.popleft()
            if not self._heard or self._heard[-1] <= sent - self.timeout * _GRAIN:
                self._heard.append(sent)

    def prove(self, session: str, sent: float) -> bool:
        """``session`` lived at the moment ``sent``, when a request was sent that a majority has had a part in.

        Tell whether it can be counted on again, and could not any more until now.
        """
        with self._guard:
            if not session or session != self.session:
                return False
            now = boot_time()
            had_lapsed = now >= self._until
            self.hear(sent)
            self._until = max(self._until, min(sent + self.timeout * SURE, self._known + self.timeout * _KNOWN))
            return had_lapsed and now < self._until

    def wait(self, timeout: float) -> bool:
        """Wait for a connection, or a refusal; tell whether one came in that time."""
        return self._usable.wait(timeout)

    def close(self) -> None:
        """Nothing is to come any more."""
        self.state = State.CLOSED


class Ping(threading.Event):
    """What a library sets when it sends a ping, and clears when that is answered, or the connection has ended."""

    def __init__(self, status: Session) -> None:
        """Nothing was sent yet; ``status`` hears of what was answered."""
        super().__init__()
        self._status = status
        self._sent = 0.0

    def set(self) -> None:
        """A ping is sent."""
        self._sent = boot_time()
        super().set()

    def clear(self) -> None:
        """It was answered; or the connection has ended, and with the next one ``Session`` begins anew."""
        if self.is_set():
            self._status.hear(self._sent)
        super().clear()
