"""The way to one beanstalkd: connected when it is wanted, and again when that was lost.

Two connections.  What is reserved belongs to the first, which never waits, so that a touch is never late.  The second
waits in ``reserve``; what it is given it gives back at once, and the first takes it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from daemonkit.errors import BrokerError
from daemonkit.queue.beanstalk import Connection, Reply
from daemonkit.queue.waiter import Waiter

_FIRST: Final = 0.25  # seconds until a server that cannot be reached is tried again, beside others; doubled
_LONGEST: Final = 30.0  # up to this
INSTANCE: Final = 8  # digits of a server's instance that an id shows


class Line:
    """Both connections, and when to try again."""

    def __init__(self, where: str, patience: float, take_up: Callable[[Connection, bool], None]) -> None:
        """Nothing is sent yet.

        Args:
            where: HOST:PORT, or the path of a socket.
            patience: seconds to wait for it, and for each reply.
            take_up: called with each new connection that is to hold reservations, and whether the server is another
                one than before, or in another life.
        """
        self.where = where
        self.trouble: str | None = None  # why it cannot be used
        self.retry_at = 0.0  # monotonic seconds, before which it is left alone while there are others
        self.waiter = Waiter(where, patience)
        self._patience = patience
        self._take_up = take_up
        self._main: Connection | None = None
        self._facts: Mapping[str, str] = {"id": "", "max-job-size": "0"}  # stats when it was connected last
        self._pause = _FIRST

    @property
    def instance(self) -> str:
        """What tells the server's present life from others, as ids show it; empty if it was never reached."""
        return self._facts["id"][:INSTANCE]

    @property
    def most(self) -> int:
        """Bytes of a job that the server takes."""
        return int(self._facts["max-job-size"])

    @property
    def is_up(self) -> bool:
        """Whether it is connected, as far as we know."""
        return self._main is not None

    def ask(self, *commands: bytes) -> list[Reply]:
        """Have ``commands`` done, over a new connection if need be.

        Raises:
            BrokerError: it cannot be reached, or the connection was lost.
        """
        connection = self.connection()
        with self.losing():
            return connection.ask(commands)

    def connection(self) -> Connection:
        """That which holds our reservations.

        Raises:
            BrokerError: it cannot be reached.
        """
        if self._main is None:
            with self.losing():
                self._main = self._connected()
            self._pause, self.retry_at, self.trouble = _FIRST, 0.0, None
        return self._main

    def begin(self) -> Connection:
        """As ``connection``, but a new one if the server has closed it since: nothing is lost by that.

        Raises:
            BrokerError: it cannot be reached.
        """
        if self._main is not None and self._main.has_news():
            self.close()
        return self.connection()

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """When it cannot be reached, both connections are closed, and it is left alone for a while."""
        try:
            yield
        except BrokerError as error:
            self.close()
            self.trouble = str(error)
            self.retry_at = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, _LONGEST)
            raise
        except BaseException:  # a handler's, such as TaskTimeout: the next would take its reply
            self.close()
            raise

    def close(self) -> None:
        """Close both connections: what is reserved goes back at once."""
        self.waiter.close()
        if self._main is not None:
            self._main.close()
            self._main = None

    def _connected(self) -> Connection:
        connection = Connection(self.where, self._patience)
        facts, before = connection.ask([b"stats"])[0].fields, self._facts
        self._facts = facts
        self._take_up(connection, facts["id"] != before["id"])
        return connection
