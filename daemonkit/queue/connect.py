"""From a broker's URL to the broker."""

from __future__ import annotations

import os
import re

from daemonkit.core.shown import shown
from daemonkit.errors import UsageError
from daemonkit.queue.broker import Broker

SCHEMES = ("sqlite", "redis", "rediss", "unix", "sentinel", "beanstalk")
_SERVER = re.compile(r"(?P<host>[^\s:/@\[\]]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?")


def connect(url: str, *, make: bool = True) -> Broker:
    """Open the broker that ``url`` names.

    ``sqlite:PATH``, ``sqlite:PATH?synchronous=NORMAL``; ``redis://HOST:PORT/DB``, ``rediss://...`` (TLS), ``unix://PATH``,
    ``sentinel://HOST:PORT,HOST:PORT/SERVICE/DB``; ``beanstalk://HOST:PORT,HOST:PORT``, ``beanstalk:PATH``.

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
        raise UsageError(f"broker {shown(url)!r}: {hint}")
    if scheme == "sqlite":
        return _sqlite(url, rest, make)
    if scheme == "beanstalk":
        return _beanstalk(url, rest)
    from daemonkit.queue.redisbroker import RedisBroker

    return RedisBroker(url)


def _beanstalk(url: str, rest: str) -> Broker:
    from daemonkit.queue.beanstalk import PORT
    from daemonkit.queue.beanstalkbroker import BeanstalkBroker

    if not rest.startswith("//"):
        if not os.path.isabs(rest):
            raise UsageError(f"broker {url!r}: a socket's path must begin with /, hosts with //")
        return BeanstalkBroker(url, [rest])
    servers = []
    for word in rest.removeprefix("//").rstrip("/").split(","):
        found = _SERVER.fullmatch(word)
        port = int(found["port"] or PORT) if found else 0
        if found is None or not 0 < port < 65536:
            raise UsageError(f"broker {shown(url)!r}: {shown(word)!r} is no HOST, HOST:PORT or [ADDRESS]:PORT")
        servers.append(f"{found['host']}:{port}")
    if len(set(servers)) < len(servers):
        raise UsageError(f"broker {url!r}: a server stands there twice")
    return BeanstalkBroker(url, servers)


def _sqlite(url: str, rest: str, make: bool) -> Broker:
    from daemonkit.queue.sqlite import SqliteBroker

    path, _, query = rest.partition("?")
    options = {}
    if query:
        from urllib.parse import parse_qsl

        options = dict(parse_qsl(query, keep_blank_values=True))
    if not os.path.isabs(path):
        raise UsageError(f"broker {url!r}: the path must begin with /, or with RUN_DIR in the configuration")
    synchronous = options.pop("synchronous", "FULL").upper()
    if path.startswith("//"):
        raise UsageError(f"broker {url!r}: one / begins the path, as in sqlite:/{path.lstrip('/')}")
    if options:
        raise UsageError(f"broker {url!r}: after the path only ?synchronous=FULL or NORMAL can stand")
    return SqliteBroker(path, synchronous, make=make)
