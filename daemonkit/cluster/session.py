"""What is known of a session with servers elsewhere: above all until when it can be counted on.

Each reply that a majority of the servers had a part in, as in every write, proves that the session lived when its
request was sent: no other majority can have ended it.  Pings prove nothing, for a follower answers them also while it
is cut off from its leader; nor does a sync, which a leader answers that is cut off from its followers.

What that majority knew of the session may have been older: its followers tell the leader every half tick which sessions
they have heard of, and we may have been silent since the proof before, a quarter of the time-out.  So the session is
counted on for six tenths of its time-out after a proof; the servers end it after three quarters at the earliest.
"""

from __future__ import annotations

import threading
from typing import Final

from daemonkit.cluster.recipe import boot_time
from daemonkit.cluster.tree import State

PROOFS: Final = 4  # within a time-out, while something stands or falls with the session
SURE: Final = 0.6  # of the time-out: for so long after a proof it is counted on


class Session:
    """Told by the threads of a library, read by ours."""

    def __init__(self, timeout: float) -> None:
        """There is none yet; ``timeout`` is what will be asked for."""
        self.state = State.CONNECTING
        self.session = ""
        self.timeout = timeout  # seconds, as negotiated with the servers
        self._proven = 0.0  # the session lived then
        self._usable = threading.Event()  # connected, or refused
        self._closed = threading.Event()
        self._has_begun = False
        self._stakes: set[int] = set()
        self._at_stake = threading.Event()

    @property
    def valid_until(self) -> float:
        """Until then (seconds of CLOCK_BOOTTIME) the session lives for sure."""
        return self._proven + self.timeout * SURE

    def connect(self, session: str) -> None:
        """There is a connection, with the session of that name."""
        if session != self.session:
            self._proven = 0.0
        self.session, self.state = session, State.CONNECTED
        self._usable.set()

    def lose(self, *, is_gone: bool) -> None:
        """The connection is lost, or the session ``is_gone``."""
        self._usable.clear()
        if is_gone:
            self.session, self._proven = "", 0.0
        self.state = State.LOST if is_gone else State.SUSPENDED

    def refuse(self) -> None:
        """The servers refuse us."""
        self.lose(is_gone=True)
        self.state = State.REFUSED
        self._usable.set()

    def prove(self, session: str, sent: float) -> bool:
        """``session`` lived at the moment ``sent``, when a request was sent that a majority has had a part in.

        Tell whether it was not counted on any more until now.
        """
        if not session or session != self.session:
            return False
        had_lapsed = boot_time() >= self.valid_until
        self._proven = max(self._proven, sent)
        return had_lapsed

    def add_stake(self, stake: object) -> bool:
        """Something stands or falls with the session; tell whether it is the first thing ever."""
        is_first, self._has_begun = not self._has_begun, True
        self._stakes.add(id(stake))
        self._at_stake.set()
        return is_first

    def remove_stake(self, stake: object) -> None:
        """It does no more."""
        self._stakes.discard(id(stake))
        if not self._stakes and self.state is not State.CLOSED:
            self._at_stake.clear()

    def wait(self, timeout: float) -> bool:
        """Wait for a connection, or a refusal; tell whether one came in that time."""
        return self._usable.wait(timeout)

    def is_at_stake(self, pause: float) -> bool:
        """Wait for ``pause`` seconds, and until something stands or falls with the session; False: it is closed."""
        self._closed.wait(pause)
        self._at_stake.wait()
        return not self._closed.is_set()

    def close(self) -> None:
        """Nothing is to come any more."""
        self.state = State.CLOSED
        self._closed.set()
        self._at_stake.set()
