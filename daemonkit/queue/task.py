"""A declared task: a function that may be called later, by another process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from daemonkit.errors import PayloadError, UsageError
from daemonkit.queue import payload
from daemonkit.queue.broker import NewTask
from daemonkit.queue.declare import Policy, check_function
from daemonkit.queue.forking import exclusively
from daemonkit.queue.handle import Handle

if TYPE_CHECKING:
    import inspect

    from daemonkit.queue.outlet import Outlet

P = ParamSpec("P")
R = TypeVar("R")


class Task(Generic[P, R]):
    """What ``@task`` makes of a function: a plain call still calls it, ``put`` has it called by the daemon."""

    def __init__(self, name: str, function: Callable[P, R], policy: Policy, outlet: Outlet) -> None:
        """Use ``@task``."""
        functools.update_wrapper(self, function, updated=())
        self.name = name
        self.function = function
        self.policy = policy
        check_function(function, f"@task {name}")
        self._signature: inspect.Signature | None = None
        self._outlet = outlet

    @property
    def signature(self) -> inspect.Signature:
        """How it may be called."""
        if self._signature is None:
            # Not with the module: processes that only run tasks need it not.  The lock: of a fork in the middle of an
            # import, the child could never import that.
            with exclusively:
                import inspect

                self._signature = inspect.signature(self.function)
        return self._signature

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, here and now."""
        return self.function(*args, **kwargs)

    def put(
        self,
        /,
        *args: Any,
        delay: float = 0.0,
        priority: int | None = None,
        ttr: float | None = None,
        key: str | None = None,
        **kwargs: Any,
    ) -> Handle:
        """Have the function called with these arguments by the daemon that consumes its queue.

        When this returns, the task is kept by the broker.

        Args:
            args: what JSON has: text, numbers, True, False, None, lists and dicts.
            delay: not before so many seconds have passed.
            priority: instead of the declared one.
            ttr: seconds, instead of the declared ones.
            key: a second put with the key of a task that is there, in whatever state, is no second task.
            kwargs: as ``args``.

        Raises:
            UsageError: the function cannot be called so, an argument is nothing that JSON has, or an option cannot be
                meant.
            BrokerError: the broker cannot be reached, or refuses.
        """
        return self._put([(args, kwargs)], delay, priority, ttr, key)[0]

    def put_many(
        self,
        calls: Iterable[Sequence[Any] | Mapping[str, Any]],
        *,
        delay: float = 0.0,
        priority: int | None = None,
        ttr: float | None = None,
    ) -> list[Handle]:
        """Put one task for each of ``calls``, all or none, in one step: much faster than one by one.

        Args:
            calls: each the arguments of one call: a tuple or list, or a dict of names.
            delay: as in ``put``,
            priority: as in ``put``,
            ttr: as in ``put``.

        Raises:
            UsageError: as ``put``.
            BrokerError: as ``put``.
        """
        if isinstance(calls, str | bytes | Mapping) or not isinstance(calls, Iterable):
            raise UsageError(f"put_many {self.name}: a list of tuples or dicts is wanted, not {calls!r}")
        return self._put([self._split(call) for call in calls], delay, priority, ttr, None)

    def handle(self, id: str) -> Handle:
        """The handle again of a task that was put before, by whatever process.

        Args:
            id: that of the handle that ``put`` has returned.

        Raises:
            UsageError: it is no text.
        """
        if not isinstance(id, str):
            raise UsageError(f"handle({id!r}) of {self.name}: the id of a handle is wanted, a text")
        return Handle(self._outlet, self.policy.queue, id)

    def check(self, call: payload.Call) -> None:
        """See that the function can be called as a body asks for.

        Raises:
            PayloadError: it does not take such arguments.
        """
        self._bind(call.args, call.kwargs, PayloadError, self.name)

    def __reduce__(self) -> str:
        return str(getattr(self.function, "__qualname__", self.name))  # as the function itself would be pickled

    def _split(self, call: Sequence[Any] | Mapping[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        if isinstance(call, Mapping):
            return (), dict(call)
        if isinstance(call, str | bytes) or not isinstance(call, Sequence):
            raise UsageError(
                f"put {self.name}: each call is a tuple of arguments, or a dict of them; {call!r} is neither"
            )
        return call, {}

    def _put(
        self,
        calls: Sequence[tuple[Sequence[Any], dict[str, Any]]],
        delay: float,
        priority: int | None,
        ttr: float | None,
        key: str | None,
    ) -> list[Handle]:
        policy, made = self.policy, []
        for args, kwargs in calls:
            bound = self._bind(args, kwargs, UsageError, f"put {self.name}")
            body = payload.encode(self.name, list(args), kwargs)
            made.append(
                NewTask(
                    body,
                    policy.priority if priority is None else priority,
                    delay,
                    policy.ttr if ttr is None else ttr,
                    self._digest(bound) if key is None and policy.unique else key,
                )
            )
        return [Handle(self._outlet, policy.queue, id) for id in self._outlet.put_many(policy.queue, made)]

    def _bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], error: type[PayloadError] | type[UsageError], what: str
    ) -> inspect.BoundArguments:
        try:
            return self.signature.bind(*args, **kwargs)
        except TypeError as why:
            raise error(f"{what}: {why}; it is called as {self.name}{self.signature}") from None

    def _digest(self, bound: inspect.BoundArguments) -> str:
        """The same for calls that mean the same, whichever way they are written."""
        # Not with the module: it brings OpenSSL, whose twenty mappings each fork of a task's process would copy.
        with exclusively:
            import hashlib

        given = frozenset(bound.arguments)
        bound.apply_defaults()
        # A default that JSON does not have nobody can give: it may be left out, and may look different elsewhere.
        meant = {name: value for name, value in bound.arguments.items() if name in given or payload.can_be_sent(value)}
        return hashlib.sha256(payload.canonical(self.name, meant)).hexdigest()
