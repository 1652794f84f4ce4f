"""Waits at a beanstalkd for a task to become ready, on a connection of its own.

What that is given it gives back at once, for the connection that holds reservations to take: that one is never blocked
by a reserve, so a touch is never late (protocol.txt: commands are answered in order).  It is given back with a delay of
a second, which reserve-job does not mind: without one, the next who waits would be given it, and would give it back,
and so on among all who wait.
"""

from __future__ import annotations

from daemonkit.errors import BrokerError
from daemonkit.queue.beanstalk import Connection


class Waiter:
    """Connected while it waits, and until somebody closes it."""

    def __init__(self, where: str, patience: float) -> None:
        """Nothing is sent yet."""
        self._where = where
        self._patience = patience
        self._connection: Connection | None = None
        self._queues: frozenset[str] | None = None  # those of the reserve that is not answered yet
        self._given: tuple[str, int] | None = None  # queue, number

    def wait(self, queues: frozenset[str]) -> int:
        """Wait for tasks of ``queues``; return a descriptor that is readable when there is one: then ``hear``.

        Raises:
            BrokerError: the server cannot be reached.
        """
        if self._queues != queues:
            self.rest()
        if self._connection is None:
            self._connection = Connection(self._where, self._patience)
        if self._queues is None:
            self._connection.ask(self._connection.watching(queues))
            self._connection.send([b"reserve"])
            self._queues = queues
        return self._connection.fileno()

    def fileno(self) -> int | None:
        """The descriptor, while it waits."""
        return None if self._connection is None or self._queues is None else self._connection.fileno()

    def rest(self) -> None:
        """Wait no longer.

        Raises:
            BrokerError: the connection was lost.
        """
        if self._queues is None or self._connection is None:
            return
        if self._connection.has_news():
            self.hear(0)  # what goes back because a connection is closed, looks as if somebody had failed
        else:
            self.close()  # a reserve cannot be taken back otherwise

    def hear(self, delay: int = 1) -> None:
        """Take in the answer; what it was given goes back, with a ``delay`` of seconds.

        Raises:
            BrokerError: the connection was lost.
        """
        connection = self._connection
        if connection is None or self._queues is None:
            return
        try:
            found = connection.reply(b"reserve")
            self._queues = None
            if found.word == "RESERVED":
                stats = connection.ask([b"stats-job %d" % found.number])[0]
                if stats.word == "OK":  # else its ttr was up before we came to hear of it, and others have done it
                    fields = stats.fields
                    command = b"release %d %s %d" % (found.number, fields["pri"].encode(), delay)
                    if connection.ask([command])[0].word == "RELEASED" and delay:
                        self._given = fields["tube"], found.number
        except BrokerError:
            self.close()
            raise

    def take_given(self) -> tuple[str, int] | None:
        """The queue and the number of the job that it was given last, once; it may be another's by now, or buried."""
        given, self._given = self._given, None
        return given

    def close(self) -> None:
        """Wait no longer."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self._queues = self._given = None
