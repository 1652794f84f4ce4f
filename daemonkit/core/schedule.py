"""When a job is due next: pure arithmetic in whole nanoseconds.  Nothing in here reads a clock.

``now`` and ``due`` are readings of the monotonic clock; ``wall`` is the wall clock's, counted from the
epoch (UTC), at the moment of ``now``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

from daemonkit.errors import UsageError

if TYPE_CHECKING:
    from datetime import datetime, tzinfo

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
# cron(8) treats smaller changes of local time specially, and larger ones as corrections of the clock.
CORRECTION = 3 * 60 * MINUTE


class Schedule(Protocol):
    """Says when a job is due.  Objects of this kind never change: the job's only state is its ``due``."""

    @property
    def kind(self) -> str:
        """The decorator's name: ``"every"``, ``"after"``, ``"cron"``."""

    def first(self, now: int, wall: int) -> int | None:
        """When a job that is registered at ``now`` is due first; ``None``: never."""

    def following(self, due: int, now: int, wall: int) -> tuple[int | None, int]:
        """The next due time strictly after ``now``, and how many were missed in between.

        Asked at ``now`` about the job that was due at ``due``.  The missed ones lie in (due, now].
        The due time is ``None`` when the job is never due again.
        """

    def successor(self, due: int, now: int, wall: int) -> int | None:
        """The due time that comes next after ``due``, be it past or not: for jobs that make up every tick."""


class Every:
    """Due at start + ``first_ns`` + n * ``interval_ns``, exactly, for ever.

    ``first_ns`` is ``None`` for one interval, 0 for at once.  The start is the moment that `first` is asked about.
    Raises `UsageError` if the interval is less than a nanosecond.
    """

    __slots__ = ("_delay", "_interval")
    kind: ClassVar[str] = "every"

    def __init__(self, interval_ns: int, first_ns: int | None = None) -> None:
        if interval_ns < 1:
            raise UsageError(f"@every: an interval of {interval_ns} ns cannot be kept; use 1 ns or more")
        self._interval = interval_ns
        self._delay = interval_ns if first_ns is None else first_ns

    def first(self, now: int, wall: int) -> int:
        return now + self._delay

    def following(self, due: int, now: int, wall: int) -> tuple[int, int]:
        late, interval = now - due, self._interval
        if late < interval:
            return due + interval, 0
        missed = late // interval
        return due + (missed + 1) * interval, missed

    def successor(self, due: int, now: int, wall: int) -> int:
        return due + self._interval


class After:
    """Once, ``delay_ns`` after the moment that `first` is asked about."""

    __slots__ = ("_delay",)
    kind: ClassVar[str] = "after"

    def __init__(self, delay_ns: int) -> None:
        self._delay = delay_ns

    def first(self, now: int, wall: int) -> int:
        return now + self._delay

    def following(self, due: int, now: int, wall: int) -> tuple[None, int]:
        return None, 0

    def successor(self, due: int, now: int, wall: int) -> None:
        return None


class Cron:
    """The five fields of crontab(5), in the time zone ``tz``: minute, hour, day, month, weekday.

    ``tz`` is a name such as ``"Europe/Berlin"``; ``None`` means the machine's own zone: ``$TZ``, else
    /etc/localtime, else UTC.  Changes of local time are handled as cron(8) says under "DAYLIGHT SAVING TIME
    and other time changes":

    * A job at a fixed time runs once each time its hour comes.  If that time is skipped, it runs as soon
      as the clock has jumped; in a repeated hour it runs the first time only.
    * A job whose minute or hour begins with ``*`` goes by the clock: not at all in a skipped hour,
      twice in a repeated one.
    * Changes of 3 hours and more are corrections: every job goes by the new time.

    Raises `UsageError` if the expression or the zone is wrong, and if the expression can never come true.
    """

    __slots__ = ("_fixed", "_zone", "expression")
    kind: ClassVar[str] = "cron"

    def __init__(self, expression: str, tz: str | None = None) -> None:
        call = f'@cron("{expression}"' + (")" if tz is None else f', tz="{tz}")')
        self.expression = _checked(expression, call)
        minute, hour, *_ = self.expression.split()
        self._fixed = not minute.startswith("*") and not hour.startswith("*")
        self._zone = _local_zone(call) if tz is None else _named_zone(tz, call)

    def first(self, now: int, wall: int) -> int | None:
        return self._due(self.next_wall(wall), now, wall)

    def following(self, due: int, now: int, wall: int) -> tuple[int | None, int]:
        missed = 0
        upcoming = self.next_wall(self._served(due, now, wall))
        while upcoming is not None and upcoming <= wall:
            missed += 1
            upcoming = self.next_wall(upcoming)
        return self._due(upcoming, now, wall), missed

    def successor(self, due: int, now: int, wall: int) -> int | None:
        return self._due(self.next_wall(self._served(due, now, wall)), now, wall)

    def stepped(self, due: int | None, now: int, expected: int, wall: int) -> int | None:
        """When a job that waits for ``due`` is due after the wall clock was set from ``expected`` to ``wall``.

        ``now``, if its time was skipped: it runs once, however many of its times were skipped.

        As cron(8) says under "DAYLIGHT SAVING TIME and other time changes".  After a step of less than
        3 hours, a job at a fixed time is run now if the step went over its time, and is not run again for a
        time that comes back.  Other jobs, and every job after a larger step, go by the new time at once; a
        job of the minute that the clock now shows is run now, for cron looks once a minute.  A step of less
        than a minute neither skips nor repeats anything, whatever the job.  A late job stays due,
        unless its time comes back.
        """
        if due is None:
            return None
        size = abs(wall - expected)
        special = size < MINUTE or (self._fixed and size < CORRECTION)
        if due <= now:
            # Late, and its time is to come back: run now, it would be run again then.
            return due + (expected - wall) if special and wall < expected else due
        # The time it waits for, not the step, tells what has run already: after two steps back, times that
        # lie before the second one may still have been served before the first.
        awaited = self.next_wall(expected + (due - now) - SECOND)
        if awaited is None:
            return None
        minute = wall - wall % MINUTE
        if special:
            upcoming: int | None = awaited
        elif wall > expected:
            upcoming = self.next_wall(max(minute, awaited) - 1)
        else:
            upcoming = self.next_wall(minute - 1)
        if upcoming is not None and upcoming <= wall:
            return now
        return self._due(upcoming, now, wall)

    def next_wall(self, after: int) -> int | None:
        """The first time strictly after ``after`` at which the job runs, in nanoseconds since the epoch.

        ``None`` if there is none in 50 years.
        """
        from datetime import datetime, timedelta

        second = after // SECOND
        clock = datetime.fromtimestamp(second, self._zone).replace(tzinfo=None, fold=0)
        found = self._search(clock, second)
        runs = self._runs(clock)
        if found is not None and len(runs) == 2:
            # In a repeated hour, the clock is set back over times that it has shown already.
            set_back = timedelta(seconds=runs[1] - runs[0])
            found = min(found, self._search(clock - set_back, second) or found)
        return None if found is None else found * SECOND

    def _search(self, clock: datetime, after: int) -> int | None:
        """The first run after ``after``, in seconds since the epoch, of the local times that follow ``clock``."""
        from cronsim import CronSim

        # The library is asked about bare clock faces.  With a time zone it steps over hours of real time,
        # and leaves out times where the clock changes by half an hour, as in Australia/Lord_Howe.
        for face in CronSim(self.expression, clock):
            for run in self._runs(face):
                if run > after:
                    return run
        return None

    def _runs(self, face: datetime) -> tuple[int, ...]:
        """The seconds since the epoch at which a job for that local time runs: none, one or two."""
        from datetime import timedelta

        first, second = self._readings(face)
        if first == second:
            return (first,)
        special = self._fixed and abs(first - second) * SECOND < CORRECTION
        if first < second:
            return (first,) if special else (first, second)
        if not special:
            return ()
        while first > second:
            face += timedelta(minutes=1)
            first, second = self._readings(face)
        return (first,)

    def _readings(self, face: datetime) -> tuple[int, int]:
        """The seconds since the epoch of a local time, by the offset before and after a change (PEP 495).

        The same in both normally; ascending if the time is repeated, descending if it is skipped.
        """
        before = face.replace(tzinfo=self._zone)
        return int(before.timestamp()), int(before.replace(fold=1).timestamp())

    @staticmethod
    def _served(due: int, now: int, wall: int) -> int:
        # A job runs for any time up to a second ahead: the two clocks cannot be read at one moment, and a
        # wall clock read first, or set back by a little, would have its time come once more.
        return wall - (now - due) + SECOND

    @staticmethod
    def _due(upcoming: int | None, now: int, wall: int) -> int | None:
        return None if upcoming is None else now + (upcoming - wall)


def jittered(due: int, jitter_ns: int, chance: Callable[[], float]) -> int:
    """``due`` delayed by up to ``jitter_ns``; the grid itself goes on from ``due``.

    ``chance`` gives a number in [0, 1).
    """
    return due + int(chance() * jitter_ns)


def _checked(expression: str, call: str) -> str:
    """The expression with single spaces, if it has five right fields and ever comes true."""
    from datetime import datetime

    from cronsim import CronSim, CronSimError

    fields = expression.split() if isinstance(expression, str) else ()
    if len(fields) != 5:
        raise UsageError(f"{call}: Wrong number of fields; the five fields are minute hour day month weekday")
    try:
        upcoming = next(CronSim(expression, datetime(2000, 1, 1)), None)
    except (CronSimError, ValueError) as error:  # int() refuses thousands of digits with ValueError
        why = str(error) if isinstance(error, CronSimError) else "Bad number"
        raise UsageError(f"{call}: {why}; the five fields are minute hour day month weekday") from None
    if upcoming is None:
        raise UsageError(f"{call}: no such day in 50 years, so it would never run")
    return " ".join(fields)


def _named_zone(name: str, call: str) -> tzinfo:
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (KeyError, OSError, TypeError, ValueError):  # unknown; a directory; no name; not a relative path
        reason = f'"{name}" is not a time zone known here{_nearest_zone(str(name))}'
        raise UsageError(f"{call}: {reason}") from None


def _nearest_zone(name: str) -> str:
    from difflib import get_close_matches
    from zoneinfo import available_timezones

    known = {zone.lower(): zone for zone in available_timezones()}
    if not known:
        return ", nor is any other; install the package tzdata"
    nearest = get_close_matches(name.lower().replace(" ", "_"), known, n=1)
    return f'; did you mean "{known[nearest[0]]}"?' if nearest else ', as "Europe/Berlin" or "UTC" are'


def _local_zone(call: str) -> tzinfo:
    """The zone of `time.localtime`, with its rules for daylight saving: tzset(3)."""
    from datetime import UTC
    from zoneinfo import ZoneInfo

    name = os.environ.get("TZ")
    if name is None:
        path = "/etc/localtime"
    elif not name.removeprefix(":"):
        return UTC
    elif not name.removeprefix(":").startswith("/"):
        return _posix_zone(name) or _named_zone(name.removeprefix(":"), f"{call}, where TZ={name}")
    else:
        path = name.removeprefix(":")
    try:
        with open(path, "rb") as file:
            return ZoneInfo.from_file(file)
    except (OSError, ValueError):  # as the C library does, whose times the machine's logs show
        return UTC


def _posix_zone(rule: str) -> tzinfo | None:
    """The zone of a rule such as ``CET-1CEST,M3.5.0,M10.5.0/3``; ``None`` if ``rule`` is not one."""
    import io
    import struct
    from zoneinfo import ZoneInfo

    # zoneinfo reads such rules only at the end of a file, where they go on after its last change (RFC 9636):
    # here is a file without any change.
    empty = struct.pack(">4sc15x6l7x", b"TZif", b"2", 0, 0, 0, 0, 1, 1)
    try:
        return ZoneInfo.from_file(io.BytesIO(empty * 2 + b"\n" + os.fsencode(rule) + b"\n"))
    except ValueError:
        return None
