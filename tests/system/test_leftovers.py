"""What a crashed daemon leaves running is ended before the next one starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from harness import Box, await_end

WORKER = """
@worker(count=2)
def crunch(stop):
    stop.wait()

program("sleeper", ["sleep", "1000"])
"""


def children(box: Box) -> dict[str, int]:
    return {child["name"]: child["pid"] for child in box.children()}


def test_children_without_a_master_are_ended_by_the_next_start(box: Box) -> None:
    master = box.start(WORKER)
    before = children(box)
    assert set(before) == {"fork server", "worker crunch-0", "worker crunch-1", "worker sleeper-0"}
    os.kill(before["fork server"], signal.SIGSTOP)  # so it cannot end them
    os.kill(master, signal.SIGKILL)
    await_end(master)
    assert all(os.path.exists(f"/proc/{pid}") for pid in before.values())

    box.start(WORKER)

    for pid in before.values():
        await_end(pid)
    assert set(children(box)) == set(before)
    assert not set(children(box).values()) & set(before.values())


def test_a_process_that_only_looks_like_a_leftover_is_spared(box: Box) -> None:
    master = box.start(WORKER)
    looks = ["beat: worker crunch-0", "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    environ = {**os.environ, "DAEMON_PID_FILE": "/elsewhere/beat.pid"}
    with subprocess.Popen(
        looks, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True
    ) as innocent:
        assert innocent.stdout
        assert innocent.stdout.readline() == "up\n"
        os.kill(master, signal.SIGKILL)
        await_end(master)

        box.start(WORKER)

        assert innocent.poll() is None
        innocent.communicate("")
    assert innocent.returncode == 0


def test_a_master_that_has_lost_its_fork_server_has_no_more_descriptors_than_before(box: Box) -> None:
    pid = box.start('@worker\ndef crunch(stop):\n    log.info("crunch")\n    stop.wait()\n')
    box.await_log("] INFO test: crunch")
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for count in (1, 2):
        os.kill(children(box)["fork server"], signal.SIGKILL)
        box.await_log("] INFO test: crunch", count + 1)
    assert len(os.listdir(f"/proc/{pid}/fd")) <= before + 2
