"""Whether this daemon leads, readable by all of its processes at any moment, without asking anybody.

The process that holds the session writes it into a memfd (memfd_create(2)) that all share: until when it leads for
sure, and with which token.  So a leader that was stopped, or cut off, sees by the clock that its time is up,
whoever is alive to tell it.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, NamedTuple

from daemonkit.cluster.recipe import boot_time
from daemonkit.errors import NotLeader

_SIZE: Final = 64
_TOKEN, _UNTIL, _LIMIT = 0, 1, 2  # in units of eight bytes


class Terms(NamedTuple):
    """What is written there."""

    token: int  # of the leadership; 0: there was none yet
    until: float  # it is held until then (seconds of CLOCK_BOOTTIME); 0: it is not held
    limit: float  # nobody else has it until then: what acts for it must have ended

    @property
    def is_held(self) -> bool:
        """Whether the daemon leads now."""
        return boot_time() < self.until


class Page:
    """The shared memory."""

    def __init__(self, fd: int = -1) -> None:
        """Make it, or map the one behind ``fd``."""
        if fd < 0:
            fd = os.memfd_create("daemonkit-leadership", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        # Each item is written and read by one move of eight aligned bytes: a reader sees the old or the new ones.  The
        # module struct would not do: it fills with zeros what it is about to write, and a reader may see those.
        memory = memoryview(mmap.mmap(fd, _SIZE))
        self._numbers, self._times = memory.cast("q"), memory.cast("d")

    def grant(self, token: int, until: float) -> None:
        """The daemon leads with ``token`` until then."""
        # The token is there before it counts; nor is the limit of one leadership ever seen beside the token of the one
        # before.
        self._numbers[_TOKEN] = token
        self._times[_LIMIT] = until
        self._times[_UNTIL] = until

    def revoke(self, limit: float | None = None) -> None:
        """The daemon leads no more; what acts for it must have ended by ``limit`` (None: as was said before)."""
        self._times[_UNTIL] = 0.0
        if limit is not None:
            self._times[_LIMIT] = limit

    def read(self) -> Terms:
        """What is written there now."""
        until, limit = self._times[_UNTIL], self._times[_LIMIT]  # before the token: see ``grant``
        return Terms(self._numbers[_TOKEN], until, limit)


class CurrentLeadership:
    """``current_leadership``: what a leader's jobs and workers may know of their leadership."""

    @property
    def token(self) -> int:
        """The fencing number: it grows with each leadership in the cluster.

        Pass it on to whatever is written to; that can refuse a smaller one than it has seen, from a leader whose time
        was up without his knowing.  In a process that was started for a leadership it is that one's, whatever comes.

        Raises:
            NotLeader: this daemon does not lead.
        """
        if _token:
            return _token
        terms = _page.read() if _page else None
        if terms is None or not terms.is_held:
            raise NotLeader(
                "current_leadership: this daemon does not lead; leader=True runs a job or worker when it does"
            )
        return terms.token

    def is_held(self) -> bool:
        """Whether this daemon leads: for sure, and now; in a process that was started for a leadership, by that one."""
        terms = _page.read() if _page else None
        return terms is not None and terms.is_held and _token in (0, terms.token)

    def time_left(self) -> float:
        """Seconds until the leadership may be another's, if it is not prolonged meanwhile; it usually is."""
        terms = _page.read() if _page and self.is_held() else None
        return max(terms.until - boot_time(), 0.0) if terms else 0.0


def use(page: Page) -> None:
    """Let ``current_leadership`` read ``page``."""
    global _page
    _page = page


def begin(token: int) -> None:
    """This process was started for the leadership with ``token``."""
    global _token
    _token = token


def limit_of(token: int) -> float:
    """When what was started for the leadership with ``token`` must have ended (seconds of CLOCK_BOOTTIME)."""
    terms = _page.read() if _page else None
    return terms.limit if terms is not None and terms.token == token else 0.0


_page: Page | None = None
_token = 0
current_leadership = CurrentLeadership()
