"""Ask a daemon something through its control socket: one JSON object a line, a request up, its answer down."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from daemonkit.errors import ControlError, NotAllowed

_CHUNK: Final = 65536
_CRED: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid

Message = dict[str, Any]


def ask(
    path: str,
    message: Message,
    *,
    pid: int | None = None,
    uid: int | None = None,
    timeout: float = 5.0,
    fds: Sequence[int] = (),
) -> Message:
    """Send one request to the daemon listening at ``path`` and return its answer.

    Args:
        path: the control socket.
        message: the request.
        pid: who must be listening (unix(7), SO_PEERCRED); another is not talked to.
        uid: whose process it must be,
        timeout: seconds for the whole exchange.
        fds: one descriptor at most, of which the daemon gets a copy.

    Raises:
        ControlError: nobody listens, the wrong process does, or there is no answer in time.
        NotAllowed: the socket belongs to another user.
    """
    end = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _connect(sock, path, timeout)
            if pid is not None and peer(sock)[0] not in (pid, 0):
                raise ControlError(f"ask {path}: pid {peer(sock)[0]} listens there, not the daemon, pid {pid}")
            if uid is not None and peer(sock)[1] != uid:
                raise NotAllowed(f"ask {path}: a process of user {peer(sock)[1]} listens there, not one of user {uid}")
            data = json.dumps(message).encode() + b"\n"
            sent = socket.send_fds(sock, [data], fds) if fds else 0
            sock.sendall(data[sent:])
            return _receive(sock, end)
        except TimeoutError:
            raise ControlError(
                f"ask {path}: no answer within {timeout:g} s; the daemon is busy, stopped or still at it"
            ) from None
        except NotAllowed:
            raise
        except PermissionError:
            raise NotAllowed(f"ask {path}: it belongs to another user; try as root or as that user") from None
        except (OSError, ValueError) as error:
            if isinstance(error, ControlError):
                raise
            raise ControlError(f"ask {path}: {error}") from None


def _connect(sock: socket.socket, path: str, timeout: float) -> None:
    """Connect, waiting while too many others wait; a non-blocking socket would not (connect(2), EAGAIN)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *divmod(round(timeout * 1e6), 1000000)))
    try:
        with short(path) as name:
            sock.connect(name)
    except BlockingIOError:
        raise TimeoutError from None
    sock.settimeout(timeout)


def listener(path: str) -> int | None:
    """The PID of the living process that listens at ``path``, be it too busy to answer; None if there is none.

    A child that was forked off it, and outlives it, has inherited its socket but is not meant.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _connect(sock, path, 0.1)
            pid = peer(sock)[0]
        except OSError:
            return None
        return pid if os.path.exists(f"/proc/{pid}/exe") else None  # a zombie has none (proc(5))


def _receive(sock: socket.socket, end: float) -> Message:
    data = bytearray()
    while not data.endswith(b"\n"):
        sock.settimeout(max(end - time.monotonic(), 0.001))
        chunk = sock.recv(_CHUNK)
        if not chunk:
            raise ControlError("the daemon closed the connection without an answer")
        data += chunk
    answer = json.loads(data)
    if not isinstance(answer, dict):
        raise ControlError("the daemon's answer is no object")
    return answer


def peer(sock: socket.socket) -> tuple[int, int]:
    """PID and uid of the process at the other end (unix(7), SO_PEERCRED)."""
    pid, uid, _ = _CRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CRED.size))
    return pid, uid


@contextlib.contextmanager
def short(path: str) -> Iterator[str]:
    """A name for ``path`` that fits into sun_path's 108 bytes (unix(7)), however deep the run directory lies."""
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
