"""A tree on ZooKeeper: the one place that imports the library kazoo.

Kazoo has threads, which take in what the servers say.  They only note it: what it leads to happens in ``dispatch``.

That the session lives is not taken from the library, which learns of its end only when it can reach a server again: see
``session``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from daemonkit.cluster.address import Address
from daemonkit.cluster.keepalive import KeepAlive
from daemonkit.cluster.listener import Listener
from daemonkit.cluster.mailbox import Mailbox
from daemonkit.cluster.recipe import boot_time
from daemonkit.cluster.session import Ping, Session
from daemonkit.cluster.tree import (
    Credentials,
    Node,
    OnChange,
    State,
    Tree,
    check_data,
    check_path,
    check_version,
    parent_of,
)
from daemonkit.errors import CoordinatorError, CoordinatorLost, MissingLibrary, VersionMismatch

try:
    from kazoo import exceptions, security
    from kazoo.client import KazooClient
    from kazoo.handlers.threading import KazooTimeoutError
    from kazoo.protocol.states import KazooState, KeeperState
    from kazoo.retry import KazooRetry
except ModuleNotFoundError:
    raise MissingLibrary(
        "use a zookeeper: coordinator: the library kazoo is not installed; pip install 'daemonkit[zookeeper]'"
    ) from None

# A write that changes nothing: the majority agrees that there is no such node (ZooKeeper's error transaction).
_NOTHING: Final = "/daemonkit-8b0dd2f5e1c94a0c"
_SPARE: Final = 1 / 3  # of the time-out: for so long a proof is to be good when it is asked for
_LONGEST_PAUSE: Final = 5.0  # seconds between two tries to reach a server
_ACLS: Final = {
    "open": security.OPEN_ACL_UNSAFE,
    "creator": security.CREATOR_ALL_ACL,
    "read": [*security.CREATOR_ALL_ACL, *security.READ_ACL_UNSAFE],
}
_Place = tuple[str, str]  # "node" or "children", and the path
_LOST: Final = (
    exceptions.ConnectionLoss,
    exceptions.ConnectionClosedError,
    exceptions.SessionExpiredError,
    exceptions.OperationTimeoutError,
    exceptions.CancelledError,
    KazooTimeoutError,
)
_REFUSED: Final = "the server refuses user and password, or knows no auth=sasl; see those in the URL"
_REFUSALS: Final = {
    exceptions.NoAuthError: "the ACL of a node forbids it; give USER:PASSWORD@ in the URL of one who may",
    exceptions.InvalidACLError: "the server takes no such ACL; does it know the user?",
    exceptions.AuthFailedError: _REFUSED,
    exceptions.NotEmptyError: "there are nodes below it; delete those first",
    exceptions.NoChildrenForEphemeralsError: "the node above it is ephemeral, and can have none below it",
    exceptions.BadArgumentsError: "the server takes no such path",
}


class ZookeeperTree(Tree):
    """One session with an ensemble."""

    def __init__(self, address: Address, credentials: Credentials | None = None) -> None:
        """Begin to connect, to a session of another process if there are ``credentials``; does not wait."""
        self.url = address.url
        self._address = address
        self._is_rooted = not address.chroot
        self._pid = os.getpid()
        self._status = Session(address.session_timeout)
        self._keep_alive = KeepAlive(self._status, self._prove)
        self._mailbox = Mailbox()
        self._waiting: dict[_Place, dict[OnChange, None]] = {}  # each is to be called once
        self._watchers: dict[_Place, Callable[[Any], None]] = {}
        self._client = _client(address, credentials, self._hear_of_trouble)
        _on_handshake(self._client, self._status)
        self._client.add_listener(self._listen)
        self._client.start_async()

    @property
    def state(self) -> State:
        return self._status.state

    @property
    def session(self) -> str:
        return self._status.session

    @property
    def valid_until(self) -> float:
        return self._status.valid_until

    def keep_valid(self, stake: object) -> None:
        self._keep_alive.add(stake)
        if boot_time() + self._status.timeout * _SPARE > self._status.valid_until:
            with contextlib.suppress(exceptions.NoNodeError):
                self._do("prove the session", lambda client: client.set_async(_NOTHING, b""), proves=True)

    def let_lapse(self, stake: object) -> None:
        self._keep_alive.remove(stake)

    def create(self, path: str, data: bytes = b"", *, ephemeral: bool = False, sequential: bool = False) -> Node | None:
        check_path(f"{path}0" if sequential else path)
        check_data(data, f"create {path}")
        acl = _ACLS[self._address.acl]

        def create(client: Any) -> Any:
            return client.create_async(path, data, acl, ephemeral=ephemeral, sequence=sequential, include_data=True)

        while True:
            try:
                made, stat = self._do(f"create {path}", create, proves=True)
                return _node(made, data, stat)
            except exceptions.NodeExistsError:
                return None
            except exceptions.NoNodeError:
                if parent_of(path) == "/":
                    self._check_chroot()
                self.create(parent_of(path))

    def get(self, path: str, on_change: OnChange | None = None) -> Node | None:
        check_path(path)
        watch = self._watcher(("node", path), on_change)
        while True:
            try:
                data, stat = self._do(f"read {path}", lambda client: client.get_async(path, watch))
                return _node(path, data, stat)
            except exceptions.NoNodeError:
                if watch is None:
                    return None
            if self._do(f"read {path}", lambda client: client.exists_async(path, watch)) is None:
                return None

    def children(self, path: str, on_change: OnChange | None = None) -> list[str] | None:
        check_path(path)
        watch = self._watcher(("children", path), on_change)
        while True:
            try:
                names: list[str] = self._do(f"list {path}", lambda client: client.get_children_async(path, watch))
                return [name for name in names if path != "/" or name != "zookeeper"]
            except exceptions.NoNodeError:
                if watch is None:
                    return None
            if self._do(f"list {path}", lambda client: client.exists_async(path, watch)) is None:
                return None

    def set(self, path: str, data: bytes, version: int | None = None) -> int | None:
        check_path(path)
        check_data(data, f"set {path}")
        expected = -1 if check_version(version, f"set {path}") is None else version
        try:
            stat = self._do(f"set {path}", lambda client: client.set_async(path, data, expected), proves=True)
        except exceptions.NoNodeError:
            return None
        return int(stat.version)

    def delete(self, path: str, version: int | None = None) -> bool:
        check_path(path)
        expected = -1 if check_version(version, f"delete {path}") is None else version
        try:
            self._do(f"delete {path}", lambda client: client.delete_async(path, expected), proves=True)
        except exceptions.NoNodeError:
            return False
        return True

    def fileno(self) -> int:
        return self._mailbox.fileno()

    def dispatch(self) -> bool:
        if self._status.state is State.CLOSED:
            return False
        return self._mailbox.dispatch()

    def forget(self, on_change: OnChange) -> None:
        for waiting in self._waiting.values():
            waiting.pop(on_change, None)

    def credentials(self) -> Credentials | None:
        found = self._client.client_id
        return None if found is None else Credentials(_shown(found[0]), found[1].hex())

    def leave(self) -> None:
        if self._status.state is State.CLOSED:
            return
        self._be_closed()
        # The library ends a connection by ending the session.  Stopped first, it does not connect again.
        self._client._stopped.set()
        if (sock := self._client._connection._socket) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._end_later()

    def forsake(self) -> None:
        pass  # the threads are not here, and the connection is not ours to shut down

    def close(self) -> None:
        if self._status.state is State.CLOSED:
            return
        was_connected = self._status.state is State.CONNECTED
        self._be_closed()
        if self._pid != os.getpid():
            return  # the threads are not here, and the connection is not ours
        if was_connected:
            self._end()
        else:  # nobody can be told; its threads end when they come to see that they are to
            self._end_later()

    def _be_closed(self) -> None:
        """Take in nothing any more, and send nothing by ourselves."""
        self._status.close()
        self._keep_alive.close()
        self._client.remove_listener(self._listen)

    def _end_later(self) -> None:
        threading.Thread(target=self._end, name="end of the session", daemon=True).start()

    def _end(self) -> None:
        with contextlib.suppress(exceptions.WriterNotClosedException):  # a server is waited for that does not answer
            if self._client._stopped.is_set():
                self._client._safe_close()
            else:
                self._client.stop()
            self._client.close()
        self._mailbox.close()

    def _do(self, doing: str, call: Callable[[Any], Any], *, proves: bool = False) -> Any:
        """Have ``call`` done and wait for the reply, which ``proves`` that the session lives."""
        self._check()
        session, sent = self._status.session, boot_time()
        try:
            result = call(self._client).get(timeout=self._status.timeout)
        except (exceptions.NoNodeError, exceptions.NodeExistsError) as error:
            self._answered(session, sent, proves)  # a write that failed is one that a majority has agreed upon
            if isinstance(error, exceptions.NoNodeError) and not self._is_rooted:
                self._check_chroot()
            raise
        except exceptions.BadVersionError:
            raise VersionMismatch(f"{doing}: it has another version by now; read it again") from None
        except _LOST as error:
            why = "; do the servers know auth=sasl?" if self._address.auth == "sasl" else ""
            words = f"{doing} at {self.url}: the connection was lost; it may have been done{why}"
            raise CoordinatorLost(words) from error
        except exceptions.KazooException as error:
            why = _REFUSALS.get(type(error), f"the server says {type(error).__name__}")
            raise CoordinatorError(f"{doing} at {self.url}: {why}") from error
        self._answered(session, sent, proves)
        return result

    def _answered(self, session: str, sent: float, proves: bool) -> None:
        """A server has heard of us; while there are requests, the library sends no pings."""
        if proves:
            self._status.prove(session, sent)
        else:
            self._status.hear(sent)

    def _check(self) -> None:
        """Return when there is a connection, waiting for one no longer than a session's time-out."""
        if self._pid != os.getpid():
            raise CoordinatorError(
                f"use {self.url}: this connection is that of pid {self._pid}; open one after the fork"
            )
        if self._status.state is State.CLOSED:
            raise CoordinatorError(f"use {self.url}: this connection is closed")
        if not self._status.wait(self._address.session_timeout) or self._status.state is State.REFUSED:
            why = self.error or f"reach {self.url}: no server has answered for {self._address.session_timeout:g} s"
            raise CoordinatorError(why)

    def _watcher(self, place: _Place, on_change: OnChange | None) -> Callable[[Any], None] | None:
        """What kazoo is to call: the same for the same ``place``, or there would be more with each look."""
        if on_change is None:
            return None
        self._waiting.setdefault(place, {})[on_change] = None
        return self._watchers.setdefault(place, lambda event: self._mailbox.post(lambda: self._change(place)))

    def _change(self, place: _Place) -> None:
        self._watchers.pop(place, None)
        for call in self._waiting.pop(place, ()):
            call()

    def _tell_state(self) -> None:
        if self.on_state:
            self.on_state()

    def _listen(self, kazoo_state: str) -> None:
        """Called by a thread of kazoo's."""
        if kazoo_state == KazooState.CONNECTED:
            self._status.connect(_shown(self._client._session_id))
            self.error = None
        elif self._client.client_state == KeeperState.AUTH_FAILED:
            self.error = f"use {self.url}: {_REFUSED}"
            self._status.refuse()
        else:
            self._status.lose(is_gone=kazoo_state == KazooState.LOST)
        self._mailbox.post(self._tell_state)

    def _hear_of_trouble(self, words: str) -> None:
        if self._status.state is not State.CONNECTED:
            self.error = f"reach {self.url}: {words}; are the servers running, and is the address right?"

    def _prove(self) -> None:
        """Called by a thread: have the reply to a write prove that the session lives."""
        session, sent = self._status.session, boot_time()

        def replied(result: Any) -> None:
            is_answered = result.successful() or isinstance(result.exception, exceptions.NoNodeError)
            if is_answered and self._status.prove(session, sent):
                self._mailbox.post(self._tell_state)

        self._client.set_async(_NOTHING, b"").rawlink(replied)

    def _check_chroot(self) -> None:
        """Say that there is no tree, if that is why there is no node."""
        if self._do("read /", lambda client: client.exists_async("/")) is None:
            raise CoordinatorError(
                f"use {self.url}: there is no node {self._address.chroot}; create it (zkCli.sh create "
                f"{self._address.chroot}), or correct the URL"
            )
        self._is_rooted = True


def _client(address: Address, credentials: Credentials | None, hear: Callable[[str], None]) -> Any:
    logger = logging.Logger("kazoo", logging.WARNING)
    logger.addHandler(Listener(hear))
    options: dict[str, Any] = {}
    if credentials is not None:
        number = int(credentials.session, 16)
        options["client_id"] = number - (number >> 63 << 64), bytes.fromhex(credentials.password)
    if address.user and address.auth == "digest":
        options["auth_data"] = [("digest", f"{address.user}:{address.password}")]
    elif address.user:
        if importlib.util.find_spec("puresasl") is None:
            raise MissingLibrary(f"use {address.url}: auth=sasl needs the library pure-sasl; pip install pure-sasl")
        options["sasl_options"] = {"mechanism": "DIGEST-MD5", "username": address.user, "password": address.password}
    return KazooClient(
        ",".join(address.hosts) + address.chroot,
        timeout=address.session_timeout,
        default_acl=_ACLS[address.acl],
        connection_retry=KazooRetry(max_tries=-1, delay=0.05, backoff=2, max_jitter=0.4, max_delay=_LONGEST_PAUSE),
        logger=logger,
        use_ssl=address.tls,
        verify_certs=True,
        check_hostname=address.tls,
        ca=address.ca,
        certfile=address.cert,
        keyfile=address.key,
        **options,
    )


def _on_handshake(client: Any, status: Session) -> None:
    """Learn the time-out that was negotiated, which kazoo tells nobody; that it was, is a proof, too."""
    handshake = client._connection._connect

    def connect(*args: Any) -> Any:
        sent = boot_time()
        read_timeout, connect_timeout = handshake(*args)
        status.timeout = read_timeout * 1.5 / 1000  # read_timeout is two thirds of it, in milliseconds
        status.begin(sent)
        status.prove(status.session, sent)
        return read_timeout, connect_timeout

    client._connection._connect = connect
    client._connection.ping_outstanding = Ping(status)


def _node(path: str, data: bytes, stat: Any) -> Node:
    owner = _shown(stat.ephemeralOwner) if stat.ephemeralOwner else ""
    return Node(path, data, stat.version, stat.czxid, owner, stat.ctime / 1000)


def _shown(session_id: int) -> str:
    return f"0x{session_id & 0xFFFFFFFFFFFFFFFF:x}"
