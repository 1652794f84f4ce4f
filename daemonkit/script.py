"""What a script declares: timer jobs, signal handlers, life-cycle hooks, workers, perhaps a main loop of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, overload

from daemonkit.core.duration import describe, positive_seconds, seconds
from daemonkit.core.job import Forking, Job, Policy
from daemonkit.core.plain import why_not_run
from daemonkit.core.schedule import After, Cron, Every, Schedule
from daemonkit.core.signals import RESERVED
from daemonkit.errors import UsageError

if TYPE_CHECKING:
    from daemonkit.cluster.watching import Value
    from daemonkit.processes.worker import Worker
    from daemonkit.queue.outlet import Outlet
    from daemonkit.queue.task import Task

EVENTS: Final = ("start", "stop", "reload", "fork", "leader", "follower")
OVERLAPS: Final = ("skip", "queue", "kill")
SHORTEST: Final = 0.001  # seconds: below it a grid is all interrupts and no work
SECOND: Final = 1_000_000_000
_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})

_USUAL: Final = Policy()  # shared: 100,000 jobs may be declared

P = ParamSpec("P")
R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])


class Script:
    """The declarations of one daemon, in the order in which they were made."""

    def __init__(self, name: str | None = None, **options: Any) -> None:
        """Begin an empty list of declarations.

        Args:
            name: the daemon's name; default: the stem of the script's file.
            options: defaults for the configuration's keys, weaker than file, environment and command line.
        """
        self.name = name
        self.options: Mapping[str, Any] = options
        self.jobs: dict[str, Job] = {}
        self.handlers: dict[str | int, list[Callable[[], Any]]] = {}
        self.workers: dict[str, Worker] = {}
        self.tasks: dict[str, Task[..., Any]] = {}
        self.broker: str | None = None  # the URL in force, in a daemon
        self.watches: list[tuple[str, Callable[[Value], object]]] = []  # paths in the cluster
        self._outlet: Outlet | None = None
        self.main_loop: Callable[[], Any] | None = None
        self._forks = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been declared."""
        return not (self.jobs or self.handlers or self.workers or self.tasks or self.watches or self.main_loop)

    @property
    def needs_children(self) -> bool:
        """Whether anything that is declared runs in a process of its own."""
        return self._forks or bool(self.workers) or bool(self.tasks)

    @property
    def may_lead(self) -> bool:
        """Whether anything that is declared is the leader's."""
        is_declared = any(job.policy.leader for job in self.jobs.values()) or any(
            w.leader for w in self.workers.values()
        )
        return is_declared or bool(self.handlers.keys() & {"leader", "follower"})

    def every(
        self,
        interval: float | str,
        *,
        name: str | None = None,
        first: float | str | None = None,
        jitter: float | str = 0,
        coalesce: bool = True,
        misfire_grace_time: float | str | None = None,
        fork: bool = False,
        timeout: float | str | None = None,
        overlap: str = "skip",
        max_instances: int = 1,
        leader: bool = False,
    ) -> Callable[[Function], Function]:
        """Run the function every ``interval``, on a fixed grid of the monotonic clock.

        Args:
            interval: seconds, or text such as "90s", "5m", "1h30m".
            name: the job's name; default: the function's.
            first: delay of the first run; default one interval, 0 is at once.
            jitter: each run is delayed by a random time up to this; the grid stays.
            coalesce: merge ticks that were missed into one run; False makes up for each.
            misfire_grace_time: a run later than this is not done but counted as missed.
            overlap: ticks that fall into the job's own run are skipped ("skip"), merged into one more run right
                after it ("queue"), or, with ``fork``, end the run that is under way ("kill").
            fork: run it in a child of its own, so that a crash, hang or leak of it cannot touch the daemon.
            timeout: with ``fork``: a run that takes longer is ended with all its descendants, TERM first.
            max_instances: with ``fork``: so many runs may be under way at the same time.
            leader: run it only while this daemon leads those of its name in the cluster; the ticks of others are no
                missed ones.

        Raises:
            UsageError: a value that cannot be meant, or a name that is taken.
        """
        what = f"@every({interval!r})"
        forking = self._forking(what, fork, timeout, overlap, max_instances)
        length = _duration(interval, "@every")
        if length < SHORTEST:
            raise UsageError(f"{what}: the interval must be {SHORTEST} s or more")
        start = None if first is None else _nanoseconds(first, "@every, first")
        policy = _policy(what, jitter, coalesce, misfire_grace_time, overlap, leader, forking)
        if policy.jitter >= length * SECOND:
            raise UsageError(f"{what}: jitter={jitter!r} must be shorter than the interval, or ticks would be lost")
        schedule = Every(round(length * SECOND), start)
        return self._timer(what, name, schedule, policy, f"every {describe(length)}")

    def after(
        self, delay: float | str, *, name: str | None = None, leader: bool = False
    ) -> Callable[[Function], Function]:
        """Run the function once, ``delay`` after the daemon is ready (seconds, or text such as "5m").

        ``leader``: only if the daemon leads at that moment.

        Raises:
            UsageError: a value that cannot be meant, or a name that is taken.
        """
        what = f"@after({delay!r})"
        length = _duration(delay, "@after")
        when = f"once after {describe(length)}"
        return self._timer(what, name, After(round(length * SECOND)), _policy(what, leader=leader), when)

    def cron(
        self,
        expression: str,
        tz: str | None = None,
        *,
        name: str | None = None,
        jitter: float | str = 0,
        coalesce: bool = True,
        misfire_grace_time: float | str | None = None,
        fork: bool = False,
        timeout: float | str | None = None,
        overlap: str = "skip",
        max_instances: int = 1,
        leader: bool = False,
    ) -> Callable[[Function], Function]:
        """Run the function at the wall-clock times of crontab(5)'s five fields, in time zone ``tz``.

        Daylight-saving nights and clock steps are met as cron(8) documents.  The options are those of ``every``.

        Raises:
            UsageError: a value that cannot be meant, or a name that is taken.
        """
        what = f"@cron({expression!r})"
        forking = self._forking(what, fork, timeout, overlap, max_instances)
        policy = _policy(what, jitter, coalesce, misfire_grace_time, overlap, leader, forking)
        zone = f" {tz}" if tz else ""
        return self._timer(what, name, Cron(expression, tz), policy, f"cron {expression}{zone}")

    def on(self, event: str | int) -> Callable[[Function], Function]:
        """Call the function on a signal ("SIGUSR1") or a life-cycle event: "start", "stop", "reload", "fork".

        "leader" and "follower" tell that the daemon leads those of its name in the cluster from now on, or no more.
        "fork" runs in each child that Python code of the daemon forks (os.register_at_fork), before its own code.
        Several for one event run in the order of definition.  A handler for a signal takes the place of what
        daemonkit does by default; the log is reopened on SIGHUP and SIGUSR1 all the same.

        Raises:
            UsageError: no such event or signal, or one that daemonkit lives on.
        """
        key = _event(event)

        def declare(function: Function) -> Function:
            _check_callable(f"@on({event!r})", function)
            self.handlers.setdefault(key, []).append(function)
            return function

        return declare

    def worker(
        self, count: int | Callable[..., Any] = 1, name: str | None = None, **options: Any
    ) -> Callable[[Function], Function]:
        """Keep ``count`` processes of the function alive: ``def crunch(stop)`` or ``def crunch(stop, index)``.

        The function is a loop that ends when ``stop.is_set()``; ``stop.wait(5)`` sleeps and wakes at once on a stop.
        One that ends unasked is replaced at once, then with exponential backoff.

        Args:
            count: how many; ``daemonkit scale`` changes it.
            name: the workers' name; default: the function's.
            options: those of ``processes.declare.worker``.

        Raises:
            UsageError: a value that cannot be meant, or a name that is taken.
        """
        if callable(count):  # @worker without parentheses
            return self.worker()(count)
        from daemonkit.config.options import check_keywords
        from daemonkit.processes import declare

        check_keywords("@worker", declare.worker, options)
        number = count

        def declare_worker(function: Function) -> Function:
            made = declare.worker(function, number, name, **options)
            self._add_worker(made)
            return function

        return declare_worker

    def program(self, name: str, argv: Sequence[str], count: int = 1, **options: Any) -> None:
        """Keep ``count`` processes of the program ``argv`` alive, as a worker is; ``options`` are a worker's.

        Raises:
            UsageError: a value that cannot be meant, or a name that is taken.
        """
        from daemonkit.config.options import check_keywords
        from daemonkit.processes import declare

        check_keywords(f"program({name!r})", declare.program, options)
        self._add_worker(declare.program(name, argv, count, **options))

    @overload
    def task(self, queue: Callable[P, R]) -> Task[P, R]: ...
    @overload
    def task(
        self, queue: str = "default", name: str | None = None, **options: Any
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(self, queue: Any = "default", name: str | None = None, **options: Any) -> Any:
        """Let the function be called later, by another process: ``send_mail.put("a@b.c", delay=10)``.

        A plain call still calls it.  A daemon whose script declares tasks consumes their queues.

        Args:
            queue: where its tasks are put.
            name: of the task, for producers in other languages; default: the function's.
            options: those of ``queue.declare.policy``.

        Raises:
            UsageError: a value that cannot be meant, or a name that is taken.
        """
        if callable(queue):  # @task without parentheses
            return self.task()(queue)
        from daemonkit.config.options import check_keywords
        from daemonkit.queue import declare
        from daemonkit.queue.outlet import Outlet, configured_url
        from daemonkit.queue.task import Task

        check_keywords("@task", declare.policy, options)

        def declare_task(function: Callable[P, R]) -> Task[P, R]:
            own = declare.check_name(name or getattr(function, "__name__", ""), "@task")
            if own in self.tasks:
                raise UsageError(f"@task: there is a task named {own!r} already; give this one a name=")
            policy = declare.policy(f"@task {own}", queue, **options)
            if any(each.policy.queue == queue and each.policy.mode != policy.mode for each in self.tasks.values()):
                raise UsageError(f"@task {own}: all tasks of the queue {queue!r} must have the same mode=")
            outlet = self._outlet or Outlet(lambda: self.broker or configured_url(self.name, self.options, function))
            made = Task(own, function, policy, outlet)
            self.tasks[own], self._outlet = made, outlet
            return made

        return declare_task

    def watch(self, path: str, func: Callable[[Value], object]) -> None:
        """Have the daemon call ``func`` with the value at ``path`` in the cluster, at first and after each change.

        It is called between two jobs, as a signal's handler is.

        Args:
            path: as in "/config/x"; nothing needs to be there.
            func: takes a ``Value``: path, data (None: there is none), version, children (the names below it).

        Raises:
            UsageError: the path cannot be meant, or ``func`` is no function.
        """
        from daemonkit.cluster.tree import check_path

        if not callable(func):
            raise UsageError(f"cluster.watch({path!r}): {func!r} is no function")
        self.watches.append((check_path(path, "cluster.watch"), func))

    def _add_worker(self, made: Worker) -> None:
        if made.name in self.workers:
            raise UsageError(f"@worker: there is a worker named {made.name!r} already; give this one a name=")
        self.workers[made.name] = made

    def _forking(
        self, what: str, fork: bool, timeout: float | str | None, overlap: str, max_instances: int
    ) -> Forking | None:
        """What is asked of the job's own process; None for a job that has none."""
        _check_children(what, fork, timeout, overlap, max_instances)
        if not fork:
            return None
        self._forks = True
        return Forking(None if timeout is None else _duration(timeout, f"{what}, timeout"), max_instances)

    def _timer(
        self, what: str, name: str | None, schedule: Schedule, policy: Policy, when: str
    ) -> Callable[[Function], Function]:
        def declare(function: Function) -> Function:
            _check_callable(what, function)
            own = name or str(getattr(function, "__name__", type(function).__name__))
            if not isinstance(own, str) or not own.isprintable() or not own:
                raise UsageError(f"{what}: name={own!r} must be a text that can be printed")
            if own in self.jobs:
                raise UsageError(f"{what}: there is a job named {own!r} already; give this one a name=")
            self.jobs[own] = Job(own, function, schedule, policy, when)
            return function

        return declare


def _event(event: str | int) -> str | int:
    if isinstance(event, str) and event in EVENTS:
        return event
    try:
        if isinstance(event, str):
            text = event.upper()
            number = signal.Signals[text if text.startswith("SIG") else f"SIG{text}"]
        else:
            number = signal.Signals(event)
    except (KeyError, ValueError):
        from difflib import get_close_matches

        known = [*EVENTS, *(number.name for number in signal.Signals)]
        near = get_close_matches(str(event), known, 1) or get_close_matches(f"SIG{event}".upper(), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; events are {', '.join(EVENTS)} and the signals"
        raise UsageError(f"@on({event!r}): no such signal or event{hint}") from None
    if number in RESERVED or number in _FAULTS:
        raise UsageError(f"@on({event!r}): {number.name} cannot be had: daemonkit or the kernel needs it")
    return int(number)


def _check_callable(what: str, function: Any) -> None:
    name = getattr(function, "__name__", repr(function))
    if not callable(function):
        raise UsageError(f"{what}: put it above a function; {name} is none")
    if reason := why_not_run(function):
        raise UsageError(f"{what}: {name} {reason}")
    if (code := getattr(function, "__code__", None)) is None:
        return
    given = len(function.__defaults__ or ()) + (1 if hasattr(function, "__self__") else 0)
    if code.co_argcount > given:
        raise UsageError(f"{what}: {name} wants {code.co_argcount - given} argument(s); it is called with none")


def _check_children(what: str, fork: bool, timeout: float | str | None, overlap: str, max_instances: int) -> None:
    if not isinstance(fork, bool):
        raise UsageError(f"{what}: fork={fork!r} must be True or False")
    if overlap not in OVERLAPS:
        raise UsageError(f"{what}: overlap={overlap!r} is not one of {', '.join(OVERLAPS)}")
    if type(max_instances) is not int or max_instances < 1:
        raise UsageError(f"{what}: max_instances={max_instances!r} must be a whole number, 1 or more")
    if fork or (timeout is None and overlap != "kill" and max_instances == 1):
        return
    wanted = {"timeout=": timeout is not None, 'overlap="kill"': overlap == "kill", "max_instances > 1": True}
    option = next(option for option, is_set in wanted.items() if is_set)
    raise UsageError(f"{what}: {option} is for a job with a process of its own; add fork=True")


def _policy(
    what: str,
    jitter: float | str = 0,
    coalesce: bool = True,
    grace: float | str | None = None,
    overlap: str = "skip",
    leader: bool = False,
    forking: Forking | None = None,
) -> Policy:
    if not isinstance(leader, bool):
        raise UsageError(f"{what}: leader={leader!r} must be True or False")
    is_usual = type(jitter) is int and jitter == 0 and coalesce is True and grace is None and overlap == "skip"
    if is_usual and not leader and forking is None:
        return _USUAL
    return Policy(
        _nanoseconds(jitter, f"{what}, jitter"),
        coalesce,
        None if grace is None else _nanoseconds(grace, f"{what}, misfire_grace_time"),
        overlap,
        leader,
        forking,
    )


def _duration(value: float | str, what: str) -> float:
    """Numbers, the usual case, without the parser of texts: 100,000 jobs may be declared."""
    if type(value) is int and value > 0:
        return value
    return positive_seconds(value, what=what)


def _nanoseconds(value: float | str, what: str) -> int:
    return 0 if value == 0 and type(value) is int else round(seconds(value, what=what) * SECOND)
