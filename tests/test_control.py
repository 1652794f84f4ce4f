"""control: requests and answers over a real socket, served by a real loop."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemonkit import control
from daemonkit.core import asking
from daemonkit.core.loop import Loop
from daemonkit.errors import ControlError


class Serving:
    """A server whose loop turns in a thread of the test."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        reader, self._writer = os.pipe2(os.O_NONBLOCK)
        self._reader = reader
        self._loop = Loop(reader)
        self._ended = False
        self.server = control.Server(control.listen(self.path), self._loop, self._serve)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _serve(self, message: asking.Message, client: control.Client) -> None:
        if message["do"] == "large":
            client.answer({"ok": True, "text": "x" * message["size"]})
        else:
            client.answer({"ok": True, "echo": message})

    def _run(self) -> None:
        while not self._ended:
            self._loop.turn(wait=True)
        self.server.close()

    def close(self) -> None:
        self._ended = True
        os.write(self._writer, b"x")
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(self.path)
        return sock


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path / "app.sock")
    yield made
    made.close()


def test_a_request_is_answered(serving: Serving) -> None:
    assert asking.ask(serving.path, {"do": "echo", "x": 1})["echo"] == {"do": "echo", "x": 1}


def test_the_socket_is_for_its_owner_only(serving: Serving) -> None:
    assert os.stat(serving.path).st_mode & 0o777 == 0o600


def test_an_answer_of_many_megabytes_arrives_whole(serving: Serving) -> None:
    answer = asking.ask(serving.path, {"do": "large", "size": 20_000_000}, timeout=30)
    assert len(answer["text"]) == 20_000_000


def test_several_requests_on_one_connection_are_answered_in_order(serving: Serving) -> None:
    with serving.connect() as sock, sock.makefile("rwb") as file:
        for number in range(5):
            file.write(json.dumps({"do": "echo", "n": number}).encode() + b"\n")
            file.flush()
            assert json.loads(file.readline())["echo"]["n"] == number


@pytest.mark.parametrize("line", [b"garbage", b"[]", b'"do"', b'{"do": 1}', b"{}", b"\xff\xfe", b"[" * 50_000])
def test_what_is_no_request_gets_an_error_and_the_connection_lives(serving: Serving, line: bytes) -> None:
    with serving.connect() as sock, sock.makefile("rwb") as file:
        file.write(line + b"\n")
        file.flush()
        assert json.loads(file.readline())["ok"] is False
        file.write(b'{"do": "echo"}\n')
        file.flush()
        assert json.loads(file.readline())["ok"] is True


def test_an_oversized_frame_ends_its_connection_only(serving: Serving) -> None:
    with serving.connect() as sock:
        try:
            sock.sendall(b"x" * (control.MAX_REQUEST * 2))
            assert sock.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed while we were still sending
    assert asking.ask(serving.path, {"do": "echo"})["ok"]


def test_more_clients_than_are_served_push_the_oldest_out(serving: Serving) -> None:
    clients = [serving.connect() for _ in range(control.MAX_CLIENTS)]
    try:
        assert asking.ask(serving.path, {"do": "echo"})["ok"]
        assert clients[0].recv(1) == b""
    finally:
        for sock in clients:
            sock.close()


def test_the_wrong_listener_is_not_talked_to(serving: Serving) -> None:
    with pytest.raises(ControlError, match="not the daemon"):
        asking.ask(serving.path, {"do": "echo"}, pid=os.getpid() + 1)


def test_nobody_listening_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="ask"):
        asking.ask(str(tmp_path / "none.sock"), {"do": "echo"})


def test_a_listener_that_never_answers_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "mute.sock")
    with control.listen(path), pytest.raises(ControlError, match="no answer within"):
        asking.ask(path, {"do": "echo"}, timeout=0.1)


def test_a_path_longer_than_sun_path_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    serving = Serving(deep / "app.sock")
    try:
        assert asking.ask(serving.path, {"do": "echo"})["ok"]
    finally:
        serving.close()
