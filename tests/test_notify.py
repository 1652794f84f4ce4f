"""service.notify: what arrives at a real socket, and what is left in the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemonkit.service.notify import FIRST_FD, PATIENCE, Notifier, is_supervised, listen_fds


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(10)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def told(self) -> list[str]:
        """The next message, one entry an assignment."""
        return self.socket.recv(65536).decode().split("\n")

    def notifier(self, **environ: str) -> Notifier:
        """A notifier that was started by this manager."""
        return Notifier.from_environment({"NOTIFY_SOCKET": self.address, **environ})


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@daemonkit-test-{uuid.uuid4().hex}")
    yield made
    made.socket.close()


MESSAGES: dict[str, tuple[Callable[[Notifier], bool], list[str]]] = {
    "ready": (lambda n: n.ready(), ["READY=1"]),
    "ready with all": (lambda n: n.ready("3 jobs", 42), ["READY=1", "STATUS=3 jobs", "MAINPID=42"]),
    "stopping": (lambda n: n.stopping(), ["STOPPING=1"]),
    "watchdog": (lambda n: n.watchdog(), ["WATCHDOG=1"]),
    "extend": (lambda n: n.extend_timeout(2.5), ["EXTEND_TIMEOUT_USEC=2500000"]),
    "any": (lambda n: n.send("ERRNO=2", "X_MINE=1"), ["ERRNO=2", "X_MINE=1"]),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_each_message_arrives_in_one_datagram(manager: Manager, what: str) -> None:
    call, expected = MESSAGES[what]
    assert call(manager.notifier()) is True
    assert manager.told() == expected


def test_reloading_carries_the_monotonic_time_of_the_call(manager: Manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert manager.notifier().reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = manager.told()
    assert first == "RELOADING=1"
    name, _, usec = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(usec) <= after


def test_a_status_cannot_smuggle_in_another_assignment(manager: Manager) -> None:
    manager.notifier().ready("done\nMAINPID=1")
    assert manager.told() == ["READY=1", "STATUS=done MAINPID=1"]


def test_without_a_manager_every_call_does_nothing() -> None:
    notifier = Notifier.from_environment({})
    assert not notifier.is_active
    assert [call(notifier) for call, _ in MESSAGES.values()] == [False] * len(MESSAGES)
    assert notifier.watchdog_interval is None
    assert notifier.to_environment() == {}


def test_a_manager_that_is_gone_is_no_error(manager: Manager) -> None:
    notifier = manager.notifier()
    manager.socket.close()
    assert notifier.ready() is False


def test_a_new_manager_at_the_same_address_is_reached(tmp_path: Path) -> None:
    # systemd itself is re-executed on upgrades.
    first = Manager(str(tmp_path / "notify"))
    notifier = first.notifier()
    assert notifier.ready()
    first.socket.close()
    os.unlink(first.address)
    second = Manager(first.address)
    assert notifier.watchdog()
    assert second.told() == ["WATCHDOG=1"]
    second.socket.close()


@pytest.mark.parametrize("address", ["relative", "vsock:2:1234", "/" + "x" * 200, "@"], ids=lambda text: text[:12])
def test_an_address_that_cannot_be_is_no_error(address: str) -> None:
    assert Notifier.from_environment({"NOTIFY_SOCKET": address}).ready() is False


def fill(notifier: Notifier) -> float:
    """Send until the manager's queue is full; how long the refused call took, in seconds."""
    while True:
        start = time.monotonic()
        if not notifier.watchdog():
            return time.monotonic() - start


def test_a_full_queue_is_waited_for_but_not_for_long(manager: Manager) -> None:
    assert PATIENCE / 1e6 * 0.5 < fill(manager.notifier()) < PATIENCE / 1e6 + 5


def test_a_queue_that_is_being_emptied_loses_nothing(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    notifier = manager.notifier()
    fill(notifier)
    monkeypatch.setattr("daemonkit.service.notify.PATIENCE", 30_000_000)  # who empties it may be slow to begin
    got: list[list[str]] = []

    def drain() -> None:
        while not got or got[-1] != ["READY=1"]:
            got.append(manager.told())

    thread = threading.Thread(target=drain)
    thread.start()
    assert notifier.ready()
    thread.join()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.25),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time_if_it_watches_us(
    manager: Manager, environ: dict[str, str], expected: float | None
) -> None:
    assert manager.notifier(**environ).watchdog_interval == expected


def test_the_variables_are_taken_and_come_back_for_the_next_image(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())}
    environ |= {"HOME": "/"}
    given = Notifier.from_environment(environ).to_environment()
    assert environ == {"HOME": "/"}
    again = Notifier.from_environment(given)
    assert given == {}
    assert again.watchdog_interval == 4.0
    assert again.ready()
    assert manager.told() == ["READY=1"]


def test_a_program_that_is_executed_does_not_get_the_socket(manager: Manager) -> None:
    notifier = manager.notifier()
    assert notifier.ready()
    listing = "import os; print(*(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) > 2"
    code = f"{listing} and os.path.lexists(f'/proc/self/fd/{{n}}')))"
    done = subprocess.run([sys.executable, "-c", code], close_fds=False, capture_output=True, text=True, check=True)
    assert "socket:" not in done.stdout


# -- sd_listen_fds(3)

PASSED = """
import os, sys
from daemonkit.service.notify import listen_fds
environ = {**os.environ, "LISTEN_PID": str(os.getpid())}
fds = listen_fds(environ)
left = sorted(key for key in environ if key.startswith("LISTEN_"))
print(fds, [os.get_inheritable(fd) for fd in fds], left)
"""


def test_passed_sockets_are_taken_over_close_on_exec() -> None:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    # The descriptors must be 3 and 4 in the child, so they are put there before it is executed.
    copies = [os.dup(sock.fileno()) for sock in listening]
    actions = [(os.POSIX_SPAWN_DUP2, copy, FIRST_FD + n + 100) for n, copy in enumerate(copies)]
    actions += [(os.POSIX_SPAWN_DUP2, FIRST_FD + n + 100, FIRST_FD + n) for n in range(len(copies))]
    reader, writer = os.pipe()
    actions.append((os.POSIX_SPAWN_DUP2, writer, 1))
    environ = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:admin"}
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", PASSED], environ, file_actions=actions)
    os.close(writer)
    with open(reader) as said:
        assert said.read() == "[3, 4] [False, False] []\n"
    assert os.waitpid(pid, 0)[1] == 0
    for copy in copies:
        os.close(copy)
    for sock in listening:
        sock.close()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "all", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "x"},
    ],
)
def test_what_is_not_meant_for_us_is_no_socket_of_ours(environ: dict[str, str]) -> None:
    assert listen_fds(environ) == []
    assert environ == {}


def test_a_promised_descriptor_that_is_not_open_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        listen_fds({"LISTEN_FDS": "100000", "LISTEN_PID": str(os.getpid())})


# -- who must stay in front


@pytest.mark.parametrize(
    ("environ", "pid", "expected"),
    [
        ({}, 1, "PID 1"),
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, 9, "NOTIFY_SOCKET"),
        ({"INVOCATION_ID": "f00"}, 9, "INVOCATION_ID"),
        ({"INVOCATION_ID": "f00", "SYSTEMD_EXEC_PID": "9"}, 9, "INVOCATION_ID"),
        ({"INVOCATION_ID": "f00", "SYSTEMD_EXEC_PID": "8"}, 9, None),
        ({"SYSTEMD_EXEC_PID": "9"}, 9, None),
        ({"NOTIFY_SOCKET": "", "INVOCATION_ID": ""}, 9, None),
        ({}, 9, None),
    ],
)
def test_who_is_supervised_stays_in_front(environ: dict[str, str], pid: int, expected: str | None) -> None:
    reason = is_supervised(environ, pid)
    assert (reason is None) is (expected is None)
    assert expected is None or expected in str(reason)
