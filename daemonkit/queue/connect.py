"""From a broker's URL to the broker."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl

from daemonkit.errors import UsageError
from daemonkit.queue.broker import Broker

SCHEMES = ("sqlite", "redis", "rediss", "unix", "sentinel")


def connect(url: str, *, make: bool = True) -> Broker:
    """Open the broker that ``url`` names.

    ``sqlite:PATH``, ``sqlite:PATH?synchronous=NORMAL``; ``redis://HOST:PORT/DB``, ``rediss://...`` (TLS), ``unix://PATH``,
    ``sentinel://HOST:PORT,HOST:PORT/SERVICE/DB``.

    ``make``: a file that is not there.

    Raises:
        UsageError: it names none.
        BrokerError: that cannot be reached.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in SCHEMES:
        from difflib import get_close_matches

        near = get_close_matches(scheme, SCHEMES, 1)
        hint = f"did you mean {near[0]}:?" if near and near[0] != scheme else f"there are: {', '.join(SCHEMES)}:"
        raise UsageError(f"broker {url!r}: {hint}")
    if scheme == "sqlite":
        return _sqlite(url, rest, make)
    from daemonkit.queue.redisbroker import RedisBroker

    return RedisBroker(url)


def _sqlite(url: str, rest: str, make: bool) -> Broker:
    from daemonkit.queue.sqlite import SqliteBroker

    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not os.path.isabs(path):
        raise UsageError(f"broker {url!r}: the path must begin with /, or with RUN_DIR in the configuration")
    synchronous = options.pop("synchronous", "FULL").upper()
    if options or path.startswith("//"):
        raise UsageError(f"broker {url!r}: after the path only ?synchronous=FULL or NORMAL can stand")
    return SqliteBroker(path, synchronous, make=make)
