"""A connection to a Redis server, the one place that imports the library redis.

Nothing is sent twice by the library: a script that reserves would do so twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from daemonkit.core.shown import shown
from daemonkit.errors import BrokerError, BrokerFull, MissingLibrary, UsageError
from daemonkit.queue import scripts

try:
    import redis as library
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry
    from redis.sentinel import Sentinel
except ModuleNotFoundError:
    raise MissingLibrary(
        "use a redis: broker: the library redis is not installed; pip install 'daemonkit[redis]'"
    ) from None

TIMEOUT: Final = 10.0  # seconds for a connection, and for a reply
_ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_OLDEST: Final = (6, 2)
_SENTINEL: Final = re.compile(
    r"sentinel://((?P<username>[^:@/]*):(?P<password>[^@/]*)@)?(?P<hosts>[^@/]+)/(?P<service>[^/]+)(/(?P<db>\d*))?"
)

T = TypeVar("T")


class Connection:
    """A connection, made when it is needed and again when it was lost, and one more to be told of changes."""

    def __init__(self, url: str) -> None:
        """Nothing is sent yet."""
        self._url = url
        self.url = shown(url)
        self._pid = os.getpid()
        self._client: Any = None
        self._listener: Any = None
        self._either: select.epoll | None = None  # both of them
        self._prefixes: tuple[str, ...] = ()  # of the keys that are listened for
        self._scripts: dict[str, Any] = {}

    def do(self, act: Callable[[Any], T]) -> T:
        """Have ``act`` done with the library's client.

        Raises:
            BrokerFull: the server's memory is full.
            BrokerError: it cannot be reached, is too old, or throws tasks away when its memory is full.
        """
        if self._pid != os.getpid():
            raise BrokerError(f"use {self.url}: this connection is that of pid {self._pid}; open one after the fork")
        with self._told():
            if self._client is None:
                self._connect()
            return act(self._client)

    def run(self, text: str, key: str, arguments: list[Any]) -> Any:
        """Have the script ``text`` run.

        Raises:
            BrokerError: as ``do``.
        """

        def call(client: Any) -> Any:
            script = self._scripts.get(text)
            if script is None:
                script = self._scripts[text] = client.register_script(scripts.HEAD + text)
            return script(keys=[key], args=arguments, client=client)

        return self.do(call)

    def settings(self, *names: str) -> dict[str, str] | None:
        """The server's settings; None if it does not tell them."""
        return self.do(lambda client: _settings(client, *names))

    def listen(self, prefixes: Iterable[str]) -> int:
        """A descriptor that is readable when somebody else has written a key that begins with one of ``prefixes``.

        It is, too, when a connection is lost.

        Raises:
            BrokerError: as ``do``.
        """
        if self._either is None:
            self._prefixes = tuple(prefixes)
            self.do(self._listen)
        assert self._either is not None
        return self._either.fileno()

    def hear(self) -> None:
        """Take in what that descriptor has told, which may be another one then: ask ``listen``.

        Raises:
            BrokerError: the server is lost.
        """
        with self._told():
            while self._listener is not None and self._listener.can_read(timeout=0):
                self._listener.read_response()
            if self._either is not None and any(event & _ENDED for _, event in self._either.poll(0)):
                self._disconnect()  # its `timeout` was up, say
                self.listen(self._prefixes)  # before anybody looks: what comes meanwhile is not missed

    def stop_listening(self) -> None:
        """Be told no more: there are other prefixes."""
        listener = self._take_listener()
        if listener is not None:
            listener.disconnect()
            self.do(lambda client: client.execute_command("CLIENT", "TRACKING", "OFF"))

    def close(self) -> None:
        """Close both connections; what is done afterwards makes them again."""
        if self._pid == os.getpid():
            self._disconnect()

    def _connect(self) -> None:
        client = _client(self._url)
        try:
            info = client.info("server")
            version = tuple(int(word) for word in str(info["redis_version"]).split(".")[:2])
            if version < _OLDEST:
                raise BrokerError(f"use {self.url}: Redis {info['redis_version']} is too old; 6.2 or newer is wanted")
            policy = (_settings(client, "maxmemory-policy") or {}).get("maxmemory-policy", "noeviction")
            if policy != "noeviction":
                raise BrokerError(
                    f"use {self.url}: its maxmemory-policy is {policy}, which throws tasks away when memory is full; "
                    "set it to noeviction"
                )
        except BaseException:
            _close(client)
            raise
        self._client = client

    def _listen(self, client: Any) -> None:
        """Have a second connection told of each write to such keys (redis.io, "Client-side caching", broadcasting)."""
        self._listener = listener = client.connection_pool.make_connection()
        try:
            listener.connect()
            listener.send_command("CLIENT", "ID")
            number = listener.read_response()
            listener.send_command("SUBSCRIBE", "__redis__:invalidate")
            listener.read_response()
            words = [word for prefix in _shortest(self._prefixes) for word in ("PREFIX", prefix)]
            client.execute_command("CLIENT", "TRACKING", "ON", "REDIRECT", number, "BCAST", "NOLOOP", *words)
            # The client's as well: what it has asked for ends with it, and the listener is not told.  A server closes
            # those that are silent for its `timeout`, but no listeners.
            self._either = either = select.epoll()
            either.register(listener._sock, select.EPOLLIN | select.EPOLLRDHUP)
            either.register(client.connection._sock, select.EPOLLRDHUP)
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        listener = self._take_listener()
        if listener is not None:
            with contextlib.suppress(exceptions.RedisError, OSError):
                listener.disconnect()
        if client is not None:
            _close(client)

    def _take_listener(self) -> Any:
        listener, self._listener = self._listener, None
        either, self._either = self._either, None
        if either is not None:
            either.close()
        return listener

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say in a sentence what the library says; after a lost connection the next call makes another."""
        try:
            yield
        except exceptions.AuthenticationError as error:
            self._disconnect()
            raise BrokerError(f"use {self.url}: {error}; see user and password in the URL") from error
        except exceptions.OutOfMemoryError as error:
            raise BrokerFull(
                f"use {self.url}: its memory is full (maxmemory); raise it, or let consumers work"
            ) from error
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
            if isinstance(error, BrokerError):
                raise
            self._disconnect()
            raise BrokerError(f"reach {self.url}: {error}; is the server running?") from error
        except exceptions.RedisError as error:
            raise BrokerError(f"use {self.url}: {error}") from error


def _close(client: Any) -> None:
    """Close it, and what led to it: neither is done by the library for a client that sentinels have named."""
    pool = client.connection_pool
    manager = getattr(pool, "sentinel_manager", None)
    for close in (client.close, pool.disconnect, *(each.close for each in (manager.sentinels if manager else ()))):
        with contextlib.suppress(exceptions.RedisError, OSError):
            close()


def _settings(client: Any, *names: str) -> dict[str, str] | None:
    try:
        return {name: str(client.config_get(name).get(name, "")) for name in names}
    except exceptions.ResponseError:  # not for us, or renamed
        return None


def _client(url: str) -> Any:
    # One connection, and no command sent twice by the library: a script that reserves would do so twice.
    options: dict[str, Any] = {
        "protocol": 2,  # in 3, what others write would come between the replies
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
    }
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    try:
        if url.startswith("sentinel://"):
            return _masters_client(url, options)
        if url.startswith("rediss:"):
            options["ssl_check_hostname"] = True  # unless the URL says otherwise
        return library.Redis.from_url(url, single_connection_client=True, **options)
    except ValueError as error:
        raise UsageError(f"broker {shown(url)!r}: {error}") from None


def _masters_client(url: str, options: dict[str, Any]) -> Any:
    """A client of the master that the sentinels name, asked again for each connection."""
    found = _SENTINEL.fullmatch(url)
    if found is None:
        raise ValueError("wanted is sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/SERVICE[/DB]")
    pairs = []
    for word in found["hosts"].split(","):
        host, _, port = word.partition(":")
        pairs.append((host, int(port or 26379)))
    sentinel: Any = Sentinel(pairs, socket_timeout=TIMEOUT)  # type: ignore[no-untyped-call]
    login = {name: unquote(found[name]) if found[name] else None for name in ("username", "password")}
    client: Any = sentinel.master_for(found["service"], db=int(found["db"] or 0), **login, **options)
    try:
        return client.client()  # connects
    except BaseException:
        _close(client)
        raise


def _shortest(names: Iterable[str]) -> list[str]:
    """Those that no other is the beginning of: the server takes no overlapping prefixes."""
    found: list[str] = []
    for name in sorted(names):
        if not any(name.startswith(other) for other in found):
            found.append(name)
    return found
