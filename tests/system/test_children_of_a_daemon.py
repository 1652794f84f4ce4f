"""The table of faults, as far as children of a daemon are concerned."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Box, await_end

from daemonkit.core.pidfile import inspect

MANY = 500


def rows(box: Box) -> dict[str, Any]:
    """By name, once all that are to run do."""
    return {row["name"]: row for row in box.children()}


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def await_all(pidfds: list[int]) -> None:
    """Sleep until all these processes have ended."""
    poll, left = select.poll(), set(pidfds)
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    until = time.monotonic() + PATIENCE
    while left:
        ready = poll.poll(max(until - time.monotonic(), 0) * 1000)
        assert ready, f"{len(left)} processes did not end"
        for fd, _ in ready:
            poll.unregister(fd)
            left.discard(fd)


@contextlib.contextmanager
def watched(pids: list[int]) -> Iterator[list[int]]:
    pidfds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield pidfds
    finally:
        for fd in pidfds:
            os.close(fd)


@contextlib.contextmanager
def cgroup(controller: str, **limits: int) -> Iterator[Path]:
    """A cgroup (version 1 or 2) with these limits; skips where none can be made."""
    root = Path("/sys/fs/cgroup")
    place = root / controller if (root / controller).is_dir() else root
    path = place / f"daemonkit-{uuid.uuid4().hex}"
    try:
        path.mkdir()
        for name, value in limits.items():
            (path / f"{controller}.{name}").write_text(str(value))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        yield path
    finally:
        for _ in range(50):
            try:
                path.rmdir()
                break
            except OSError:
                select.select([], [], [], 0.1)  # the kernel tells nobody when the last one has left


# --- law 5 ---


def test_row_21_a_master_that_is_killed_takes_500_workers_with_it(box: Box) -> None:
    master = box.start(f"@worker(count={MANY})\ndef crunch(stop):\n    log.info('is up')\n    stop.wait()\n")
    box.await_log("is up", MANY)
    children = [row["pid"] for row in rows(box).values()]
    assert len(children) == MANY + 1
    server = rows(box)["fork server"]["pid"]
    assert {parent(pid) for pid in children} == {server, master}
    with watched([*children]) as pidfds:
        os.kill(master, signal.SIGKILL)
        await_all(pidfds)
    assert not box.processes()


def test_row_21_grandchildren_that_left_go_with_the_master_too(box: Box) -> None:
    master = box.start(
        """
        import subprocess

        @worker
        def crunch(stop):
            subprocess.Popen(["setsid", "sh", "-c", "(sleep 1000 & echo left $! >> log.txt) &"])
            with open("/proc/self/stat"):
                log.info("is up")
            stop.wait()
        """,
        "--chdir",
        str(box.path),
    )
    pid = int(box.await_file(box.path / "log.txt", "left").split()[1])
    with watched([pid]) as pidfds:
        os.kill(master, signal.SIGKILL)
        await_all(pidfds)
    await_end(master)


# --- ends ---


def test_row_22_a_worker_that_runs_out_of_memory_is_told_as_that(box: Box) -> None:
    key = "limit_in_bytes" if Path("/sys/fs/cgroup/memory").is_dir() else "max"
    with cgroup("memory", **{key: 100 * 2**20}) as path:
        box.start(
            f"""
            @worker
            def crunch(stop):
                log.info("is up")
                if not os.path.exists("twice"):
                    open("twice", "w").close()
                    bytearray(2**29)
                stop.wait()

            @on("fork")
            def enter():
                with open("{path}/cgroup.procs", "w") as file:
                    file.write(str(os.getpid()))
            """,
            "--chdir",
            str(box.path),
        )
        log = box.await_log("is up", 2)
        assert "killed by SIGKILL" in log
        assert "respawned at once" in log
        assert box.call("kill", "beat").returncode == 0


def test_row_22_a_fork_server_that_is_killed_is_said_and_replaced_with_all_its_children(box: Box) -> None:
    master = box.start(
        """
        import subprocess

        @worker(count=2)
        def crunch(stop, index):
            subprocess.Popen(["sleep", f"100{index}"])
            if os.fork() == 0:
                log.info("forked %d", os.getpid())
                time.sleep(1000)
            log.info("is up")
            stop.wait()

        @every(3600, fork=True)
        def job():
            log.info("at work")
            time.sleep(1000)
        """
    )
    box.await_log("is up", 2)
    box.await_log("forked", 2)
    with box.popen("trigger", "beat", "job") as waiting:
        box.await_log("at work")
        before = [pid for pid in box.processes() if pid not in (master, waiting.pid)]
        assert len(before) == 8
        os.kill(rows(box)["fork server"]["pid"], signal.SIGKILL)
        out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert "killed by SIGKILL" in out
    log = box.await_log("is up", 4)
    assert "and its 3 children with it; replaced" in log
    assert "killed by SIGKILL" in box.job("job")["last_error"]
    for pid in before:
        await_end(pid)
    assert box.await_child("worker crunch-0", "ready")["restarts"] == 1


def test_row_22_a_fork_server_that_is_killed_again_and_again_is_replaced_later_and_later(box: Box) -> None:
    box.start("@worker\ndef crunch(stop):\n    log.info('is up')\n    stop.wait()\n")
    moments = []
    for count in (1, 2, 3):
        box.await_log("is up", count)
        server = next(row["pid"] for name, row in rows(box).items() if name == "fork server")
        moments.append(time.monotonic())
        os.kill(server, signal.SIGKILL)
    box.await_log("is up", 4)
    moments.append(time.monotonic())
    assert moments[2] - moments[1] > 0.8
    assert moments[3] - moments[2] > 1.6


def test_a_fork_server_that_cannot_load_the_script_any_more_says_so_and_tries_again(box: Box) -> None:
    master = box.start("@worker\ndef crunch(stop):\n    log.info('is up')\n    stop.wait()\n")
    box.await_log("is up")
    good = (box.path / "beat.py").read_text()
    box.script("1 / 0\n")
    os.kill(rows(box)["fork server"]["pid"], signal.SIGKILL)
    log = box.await_log("the script could not be loaded again for the fork server")
    box.await_log("ZeroDivisionError")
    assert "given up" not in log
    (box.path / "good.py").write_text(good)
    (box.path / "good.py").rename(box.path / "beat.py")  # at one blow: it may be about to be read
    box.await_log("is up", 2)
    assert box.pid() == master


# --- no room ---


def test_row_23_a_fork_for_which_there_is_no_room_is_tried_again_and_said_once(box: Box) -> None:
    with cgroup("pids", max="max") as path:  # type: ignore[arg-type]
        master = box.start("@worker\ndef crunch(stop):\n    log.info('is up')\n    stop.wait()\n")
        box.await_log("is up")
        server = rows(box)["fork server"]["pid"]
        (path / "cgroup.procs").write_text(str(server))
        (path / "pids.max").write_text("1")
        os.kill(rows(box)["worker crunch-0"]["pid"], signal.SIGKILL)
        box.await_log("fork a child: Resource temporarily unavailable; tried again until there is room")
        (row,) = (each for each in box.status()["children"] if each["name"] == "worker crunch-0")
        assert (row["state"], row["pid"]) == ("starting", None)
        assert box.call("scale", "beat", "crunch", "3").returncode == 0
        assert box.call("scale", "beat", "crunch", "2").returncode == 0
        (path / "pids.max").write_text("max")
        log = box.await_log("is up", 3)
        assert log.count("tried again until there is room") == 1
        assert box.pid() == master
        assert box.call("kill", "beat").returncode == 0


def test_row_24_a_thousand_children_leave_nothing(box: Box) -> None:
    """Ten thousand, through the same fork server, are in test_children_faults; here the daemon's own tables."""
    box.start(
        "@worker(max_tasks=1, recycle_jitter=0, count=4)\ndef crunch(stop):\n    stop.is_set()\n    stop.is_set()\n"
    )
    box.await_log("recycled", 100)
    before = memory(box)
    log = box.await_log("recycled", 1000)
    assert memory(box) - before < 600 * 1024
    assert "respawned" not in log
    assert len(os.listdir(f"/proc/{box.pid()}/fd")) < 30
    assert len(box.processes()) <= 6


def memory(box: Box) -> int:
    with open(f"/proc/{box.pid()}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- trees ---

LEAVING = """
import subprocess

def leave():
    near = subprocess.Popen(["sleep", "1000"])
    # Two forks and a session of its own, as daemons do.
    twice = ["setsid", "sh", "-c", "(sleep 1001 > /dev/null & echo $!) & wait"]
    far = subprocess.run(twice, stdout=subprocess.PIPE).stdout
    forked = os.fork()
    if forked == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        log.info("forked %d", os.getpid())
        time.sleep(1000)
    os.waitpid(forked, 0)
    log.info("left %d %d", near.pid, int(far))
"""


def left(log: str) -> list[int]:
    words = [*log.partition("left ")[2].split("\n")[0].split(), log.partition("forked ")[2].split("\n")[0]]
    return [int(word) for word in words]


@pytest.mark.parametrize("end", ["kill", "scale", "crash", "stop"])
def test_row_25_what_a_worker_leaves_behind_ends_with_it(box: Box, end: str) -> None:
    box.start(LEAVING + "\n@worker\ndef crunch(stop):\n    leave()\n    stop.wait()\n")
    box.await_log("forked")
    pids = left(box.await_log("left"))
    assert len(pids) == 3
    with watched(pids) as pidfds:
        if end == "kill":
            assert box.call("kill", "beat").returncode == 0
        elif end == "scale":
            assert box.call("scale", "beat", "crunch", "0").returncode == 0
        else:
            number = signal.SIGSEGV if end == "crash" else signal.SIGTERM
            os.kill(rows(box)["worker crunch-0"]["pid"], number)
        await_all(pidfds)


def test_row_25_what_a_forked_job_leaves_behind_ends_with_it(box: Box) -> None:
    box.start(LEAVING + "\n@every(3600, fork=True)\ndef job():\n    leave()\n")
    assert box.call("trigger", "beat", "job").returncode == 0
    near, far = box.log.read_text().partition("left ")[2].split("\n")[0].split()
    await_end(int(near))
    await_end(int(far))
    assert sorted(box.processes().values()) == ["beat: fork server", "beat: master"]


# --- descriptors ---


def test_row_13_a_child_that_outlives_all_holds_neither_lock_nor_socket(box: Box) -> None:
    """A process that was forked by a worker, and left alone by a KILL of all the others at the same time."""
    master = box.start("@worker(count=2)\ndef crunch(stop):\n    log.info('is up')\n    stop.wait()\n")
    box.await_log("is up", 2)
    names = rows(box)
    survivor = names["worker crunch-1"]["pid"]
    for row in names.values():
        links = [os.readlink(entry) for entry in Path(f"/proc/{row['pid']}/fd").iterdir()]
        assert not [link for link in links if "beat.pid" in link or "eventpoll" in link]
    listening = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines() if "beat.sock" in line}
    for row in names.values():
        inodes = {os.readlink(entry)[8:-1] for entry in Path(f"/proc/{row['pid']}/fd").iterdir()}
        assert not inodes & listening
    os.kill(names["fork server"]["pid"], signal.SIGSTOP)
    os.kill(master, signal.SIGKILL)
    await_end(master)
    assert os.path.exists(f"/proc/{survivor}")
    assert not inspect(str(box.run_dir / "beat.pid")).locked
    assert box.call("status", "beat").returncode == 1
    assert box.call("start", box.path / "beat.py").returncode == 0
    await_end(survivor)


def test_a_terminals_interrupt_of_the_whole_group_ends_workers_and_programs_gracefully(box: Box) -> None:
    script = box.script(
        f"""
        nap = "exec >> {box.log}; trap 'echo interrupted' INT; trap 'echo told; exit' TERM; echo is up; sleep 9 & wait"
        program("napper", ["sh", "-c", nap])

        @worker
        def crunch(stop):
            log.info("is up")
            stop.wait()
            log.info("bye")
        """
    )
    process = box.popen("run", script, start_new_session=True, stdout=subprocess.DEVNULL)
    box.await_log("is up", 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    log = box.log.read_text()
    assert "bye" in log
    assert "told" in log
    assert "interrupted" not in log
    assert "respawned" not in log


# --- law 9 ---


def test_a_script_of_timers_alone_has_no_fork_server_and_loads_nothing_of_it(box: Box) -> None:
    (box.path / "beat.py").write_text(
        "import sys\nfrom daemonkit import every, on\n@every(3600, first=0)\ndef look():\n"
        "    print('loaded:', [name for name in sys.modules if name.startswith(('daemonkit', 'subprocess'))])\n"
    )
    assert box.call("start", box.path / "beat.py").returncode == 0
    line = box.await_log("loaded: ").partition("loaded: ")[2].split("\n")[0]
    loaded = set(eval(line))
    assert "daemonkit.master.master" in loaded
    unwanted = {"subprocess", "daemonkit.leftovers"}
    unwanted |= {f"daemonkit.master.{name}" for name in ("crew", "server", "workers", "forked", "place", "roll")}
    assert not unwanted & loaded
    assert not [name for name in loaded if name.startswith("daemonkit.processes")]
    assert list(box.processes().values()) == ["beat: master"]


def test_the_unit_stops_the_master_first_and_lets_it_stop_the_children() -> None:
    from daemonkit.service.unit import ready_made

    assert "\nKillMode=mixed\n" in ready_made()["systemd/daemonkit@.service"]
