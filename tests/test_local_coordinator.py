"""What only the coordinator of one host has: a directory, which can be moved, removed and damaged."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE

from daemonkit.cluster import files
from daemonkit.cluster.connect import connect as connect_to
from daemonkit.cluster.coordinator import Coordinator
from daemonkit.cluster.tree import State
from daemonkit.errors import CoordinatorError, CoordinatorLost

Connect = Callable[[], Coordinator]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "cluster"


@pytest.fixture
def connect(directory: Path) -> Iterator[Connect]:
    """A function that opens one connection more."""
    directory.parent.mkdir()
    opened: list[Coordinator] = []

    def connect() -> Coordinator:
        opened.append(connect_to(f"local:{directory}"))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def await_true(condition: Callable[[], object], *coordinators: Coordinator) -> None:
    """Take ``coordinators`` forward, when they ask for it, until ``condition`` is true."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        ready, _, _ = select.select([each.fileno() for each in coordinators], [], [], PATIENCE)
        assert ready
        for each in coordinators:
            each.dispatch()


def move(directory: Path) -> None:
    directory.rename(directory.with_name("cluster.old"))


def move_what_is_above(directory: Path) -> None:
    directory.parent.rename(directory.parent.with_name("run.old"))
    directory.parent.mkdir()


def remove_the_lock(directory: Path) -> None:
    (directory / "lock").unlink()


def remove_the_sessions(directory: Path) -> None:
    shutil.rmtree(directory / "sessions")


@pytest.mark.parametrize(
    "harm", [move, move_what_is_above, shutil.rmtree, remove_the_lock, remove_the_sessions], ids=lambda f: f.__name__
)
def test_who_leads_sees_at_once_that_the_directory_is_gone_and_begins_anew(
    connect: Connect, directory: Path, harm: Callable[[Path], object]
) -> None:
    one = connect()
    a, held, member = one.elect("job"), one.lock("x"), one.join({"n": 1})
    assert one.fileno() >= 0
    one.dispatch()
    assert a.is_held
    token, session = a.token, one.tree.session
    one.dispatch()
    harm(directory)
    assert not a.is_held
    assert not held.is_held()
    assert one.tree.state is State.LOST
    other = connect()
    b = other.elect("job")
    other.dispatch()
    assert b.is_held
    assert b.token > token
    assert not a.is_held
    await_true(lambda: len(other.members()) == 1 and a.node and a.node.session == one.tree.session, one)
    assert not a.is_held
    assert one.tree.session != session
    other.close()
    await_true(lambda: a.is_held, one)
    assert a.token > b.token
    assert not held.is_held()
    held.release()
    one.leave(member)
    assert one.members() == []


def test_followers_find_each_other_where_the_directory_was_and_then_sleep(connect: Connect, directory: Path) -> None:
    each = [connect() for _ in range(3)]
    candidates = [one.elect("job") for one in each]
    for one in each:
        one.dispatch()
    shutil.rmtree(directory)
    await_true(lambda: len(list((directory / "nodes/daemonkit/leaders/job").glob("*-*"))) == 3, *each)
    await_true(lambda: sum(one.is_held for one in candidates) == 1, *each)
    for one in each * 2:
        one.wait(0.01)
    assert not any(one.wait(0.01) for one in each)
    assert len({one.token for one in candidates}) == 3


def test_what_is_asked_of_a_directory_that_was_moved_away_is_told_to_be_lost_and_done_the_next_time(
    connect: Connect, directory: Path
) -> None:
    one = connect()
    seen: list[bytes | None] = []
    one.watch("/x", lambda value: seen.append(value.data))
    one.set("/x", b"1")
    one.dispatch()
    move(directory)
    with pytest.raises(CoordinatorLost, match=r"read /x in .*cluster: it was removed or moved away"):
        one.get("/x")
    assert one.get("/x").data is None
    await_true(lambda: seen[-1] is None, one)
    assert seen == [b"1", None]
    with one.lock("x", timeout=PATIENCE) as held:
        assert held.is_held()


COVERED = """
import select, subprocess, sys
from daemonkit.cluster.connect import connect
one = connect("local:" + sys.argv[1])
a = one.elect("job")
one.dispatch()
session = one.tree.session
while one.wait(0):
    pass
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", sys.argv[1]], check=True)
assert select.select([one.fileno()], [], [], float(sys.argv[2]))[0]
one.dispatch()
with connect("local:" + sys.argv[1]) as other:
    (leader,) = other.leaders()
    assert leader.session == one.tree.session != session
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_directory_that_something_is_mounted_over_is_begun_anew_at_once(tmp_path: Path) -> None:
    program = [sys.executable, "-c", COVERED, str(tmp_path / "cluster"), str(PATIENCE)]
    subprocess.run(["unshare", "--mount", *program], check=True, timeout=2 * PATIENCE)


def test_changes_of_which_there_were_too_many_to_be_told_are_seen_all_the_same(
    connect: Connect, directory: Path
) -> None:
    one, other = connect(), connect()
    seen: list[bytes | None] = []
    other.set("/busy", b"")
    for path in ("/busy", "/x"):
        one.watch(path, lambda value: seen.append(value.data))
    one.dispatch()
    crowd = directory / "nodes/busy/crowd"
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 2 + 1):
        crowd.touch()
        crowd.unlink()
    other.set("/x", b"1")
    await_true(lambda: seen[-1] == b"1", one)


def test_a_directory_that_cannot_be_begun_anew_is_told_and_keeps_nobody_busy(connect: Connect, directory: Path) -> None:
    one = connect()
    one.watch("/x", lambda value: None)
    one.dispatch()
    directory.parent.rename(directory.parent.with_name("run.old"))
    with pytest.raises(CoordinatorError, match=r"use .*cluster: no such file or directory"):
        one.dispatch()
    assert select.select([one.fileno()], [], [], 0)[0] == []
    directory.parent.mkdir()
    one.dispatch()
    assert one.tree.state is State.CONNECTED


def test_a_session_of_another_process_whose_file_is_gone_is_not_gone_on_with(connect: Connect, directory: Path) -> None:
    one = connect()
    credentials = one.tree.credentials()
    assert credentials is not None
    with connect_to(one.url, "", credentials) as other:
        assert other.tree.session == one.tree.session
        other.tree.leave()
    os.unlink(directory / "sessions" / one.tree.session)
    with connect_to(one.url, "", credentials) as other:
        assert other.tree.session != credentials.session


KILLED_AT_EACH_STEP = """
import os, sys
from daemonkit.cluster import files
from daemonkit.cluster.connect import connect

def work(step):
    other, left = connect(url), [step]
    def count(event, args):
        if event in EVENTS and str(args[0]).startswith(directory):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
    sys.addaudithook(count)
    while True:
        other.lock("x").release()

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
directory = sys.argv[1]
url = "local:" + directory
coordinator = connect(url)
coordinator.lock("x").release()
for step in range(80):
    if (pid := os.fork()) == 0:
        work(step)
    assert os.waitpid(pid, 0)[1] == 9
    coordinator.lock("x", timeout=float(sys.argv[2])).release()
    assert coordinator.locks() == []
"""


def test_wherever_the_holder_of_a_lock_is_killed_the_lock_is_free(tmp_path: Path) -> None:
    program = [sys.executable, "-c", KILLED_AT_EACH_STEP, str(tmp_path / "cluster"), str(PATIENCE)]
    subprocess.run(program, check=True, timeout=10 * PATIENCE)
    assert {each.name for each in (tmp_path / "cluster/nodes/daemonkit/locks/x").iterdir()} == {"="}


FOREIGN = [
    *(b"", b"[]", b"{}\n", b"nothing\nof ours", b"\xff", b'{"version":"x"}'),
    b'{"version":Infinity,"number":0,"session":"","created":0}',
    b'{"version":0,"number":0,"session":"","created":Infinity}',
]


@pytest.mark.parametrize("text", FOREIGN, ids=repr)
def test_what_is_no_node_of_ours_is_none_and_gives_way(connect: Connect, directory: Path, text: bytes) -> None:
    one = connect()
    one.set("/x", b"1")
    one.set("/above/below", b"1")
    for node in ("x", "above"):
        (directory / "nodes" / node / "=").write_bytes(text)
    assert one.get("/x").data is None
    assert one.children("/") == ["above"]
    assert one.children("/above") == ["below"]
    assert one.set("/x", b"2") == 0
    assert one.get("/x").data == b"2"
    assert one.get("/above").data == b""
    (directory / "nodes/daemonkit").mkdir()
    with one.lock("x", timeout=PATIENCE) as held:
        assert held.is_held()


@pytest.mark.parametrize("text", [b"", b"x", b"-5", b"\xff" * 100], ids=repr)
def test_a_damaged_count_begins_anew_and_still_grows(connect: Connect, directory: Path, text: bytes) -> None:
    one = connect()
    before = one.lock("x")
    (directory / "lock").write_bytes(text)
    (directory / "sessions/foreign").mkdir()
    other = connect()
    with other.lock("y") as held:
        assert held.token > before.token
    with other.lock("y") as again:
        assert again.token > held.token


def test_a_process_that_stands_still_with_the_tree_is_waited_for_no_longer_than_a_bound(
    connect: Connect, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = connect()
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    with open(directory / "lock") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(CoordinatorError, match=r"another process has held .*cluster/lock for 0.2 s"):
            one.lock("x", timeout=0.1)
        assert time.monotonic() - began < PATIENCE
        threading.Timer(0.1, fcntl.flock, (theirs, fcntl.LOCK_UN)).start()
        monkeypatch.setattr(files, "PATIENCE", PATIENCE)
        assert one.set("/x", b"") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_has_a_say_in_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    theirs, link, open_to_all, ours = (tmp_path / name for name in ("theirs", "link", "open", "ours"))
    for each in (theirs, open_to_all, ours):
        each.mkdir(0o700)
    os.chown(theirs, 65534, 65534)
    open_to_all.chmod(0o777)
    link.symlink_to(ours)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    within = theirs / "within"
    within.mkdir(0o700)
    (tmp_path / "file").touch()
    for path, words in {
        theirs: "it must be ours",
        link: "it is a symbolic link of another user's",
        open_to_all: "nobody else may write there",
        within: "theirs belongs to user nobody",
        tmp_path / "file": "it is no directory",
    }.items():
        with pytest.raises(CoordinatorError, match=words):
            connect_to(f"local:{path}")
    assert sorted(tmp_path.rglob("*")) == sorted([theirs, link, open_to_all, ours, within, tmp_path / "file"])


def test_a_session_that_takes_and_gives_back_does_not_grow(connect: Connect, directory: Path) -> None:
    one, other = connect(), connect()
    first = one.lock("first")
    one.join()
    file = directory / "sessions" / one.tree.session
    largest = 0
    for _ in range(300):
        one.lock("x").release()
        largest = max(largest, file.stat().st_size)
    assert 2048 < largest < 8192
    many = [one.lock(f"{n}") for n in range(100)]
    assert all(held.is_held() for held in (first, *many))
    one.close()
    assert other.locks() == []
    assert other.members() == []
    assert not list((directory / "nodes/daemonkit/locks").glob("*/*-*"))
