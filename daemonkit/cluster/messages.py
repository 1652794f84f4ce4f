"""What the process that holds the session and the daemon's master tell each other over a wire."""

from __future__ import annotations

import base64
import json
from typing import Any, Final, NamedTuple, cast

from daemonkit.cluster.tree import Credentials
from daemonkit.cluster.watching import Value

UNIQUE: Final = 32  # bytes of an id, which is the beginning of an ``ATTACH``


class Word:
    """Kinds of messages; to the master: the first five; from it: the rest."""

    HELLO: Final = 1  # payload: the coordinator's URL
    SESSION: Final = 2  # payload: credentials, with which another process can go on with it
    REPORT: Final = 3  # payload: a report
    VALUE: Final = 4  # id: of what is watched, in the order of its declaration; payload: its value
    LEFT: Final = 5  # the session is let go of, alive
    ATTACH: Final = (
        6  # payload: an id, the same for the daemon's whole life; then credentials, or nothing: a new session
    )
    LEAVE: Final = 7  # let go of the session, alive: another process goes on with it
    RESIGN: Final = 9  # end the session: another process begins one elsewhere
    ASK: Final = 8  # send a report with the peers


class Report(NamedTuple):
    """How things stand."""

    role: str = "follower"  # "leader", "follower"; "member": nothing is led
    token: int = 0
    state: str = "connecting"  # of the session
    session: str = ""
    error: str | None = None
    leader: dict[str, Any] | None = None  # who leads; only when it was asked for
    peers: tuple[dict[str, Any], ...] = ()  # only when it was asked for
    is_answer: bool = False


def pack(what: Report) -> bytes:
    """The payload of a ``REPORT``."""
    return json.dumps(what._asdict()).encode()


def unpack(payload: bytes) -> Report:
    """What ``pack`` has packed."""
    return Report(**json.loads(payload))


def pack_value(value: Value) -> bytes:
    """The payload of a ``VALUE``."""
    data = None if value.data is None else base64.b64encode(value.data).decode()
    return json.dumps(value._replace(data=cast(bytes, data))).encode()


def unpack_value(payload: bytes) -> Value:
    """What ``pack_value`` has packed."""
    path, data, version, children = json.loads(payload)
    return Value(path, None if data is None else base64.b64decode(data), version, tuple(children))


def pack_credentials(what: Credentials | None) -> bytes:
    """The payload of a ``SESSION`` or ``ATTACH``; the descriptors go beside it."""
    return json.dumps([what.session, what.password]).encode() if what else b""


def unpack_credentials(payload: bytes, fds: list[int]) -> Credentials | None:
    """What ``pack_credentials`` has packed."""
    if not payload:
        return None
    session, password = json.loads(payload)
    return Credentials(session, password, fds)
