"""System V objects and daemons: gone with their maker, found after a crash, shared with PHP and C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Box, await_end
from ipc_peers import Objects

from daemonkit import ipc
from daemonkit.ipc import kernel, registry

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "etc" / "examples"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
needs_php = pytest.mark.skipif(shutil.which("php") is None, reason="needs php (Debian: php-cli)")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc (Debian: gcc, libc6-dev)")

MAKES_THREE = """
from daemonkit import ipc
room, queue = ipc.Semaphore(None), ipc.MessageQueue(None)
memory = ipc.SharedMemory(None, 4096)
@on("start")
def tell(): print("made", room.key, queue.key, memory.key)
@on("start")
def hold(): room.acquire()
@every(60)
def beat(): ...
"""


def made(box: Box, count: int = 1) -> list[tuple[str, int]]:
    """The keys that the daemon says it has made, the last time."""
    lines = [line for line in box.await_log("made ", count).splitlines() if "made " in line]
    keys = [int(word) for word in lines[-1].partition("made ")[2].split()]
    return list(zip((kernel.SEMAPHORE, kernel.QUEUE, kernel.MEMORY), keys, strict=True))


def there(objects: list[tuple[str, int]]) -> list[bool]:
    """Which of them are in the kernel."""
    return [key in {row["key"] for row in kernel.listed(kind).values()} for kind, key in objects]


def listed(box: Box, action: str = "list") -> list[dict[str, object]]:
    """What ``ipc list --json`` or ``ipc clean --json`` says."""
    done = box.call("ipc", action, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


# --- a daemon's objects ---


def test_row_28_objects_left_by_a_crash_are_found_and_removed_at_the_next_start(box: Box) -> None:
    pid = box.start(MAKES_THREE)
    first = made(box)
    os.kill(pid, signal.SIGKILL)
    await_end(pid)
    assert there(first) == [True] * 3
    again = box.start(MAKES_THREE)
    second = made(box, 2)
    assert there(first) == [False] * 3
    assert there(second) == [True] * 3
    log = box.log.read_text()
    for kind in kernel.KINDS:
        assert f"removed {kind} 0x" in log
    assert log.count(f", left by pid {pid}, which is dead") == 3
    assert {each["creator"] for each in listed(box)} == {again}
    box.call("kill", "beat")
    assert there(second) == [False] * 3


def test_row_28_objects_left_by_a_crash_are_listed_and_removed_by_hand(box: Box) -> None:
    pid = box.start(MAKES_THREE)
    objects = made(box)
    assert [each["is_left"] for each in listed(box)] == [False] * 3
    assert box.call("ipc", "clean").stdout == ""
    os.kill(pid, signal.SIGKILL)
    await_end(pid)
    shown = box.call("ipc", "list").stdout.splitlines()
    assert shown[0].split() == ["KIND", "KEY", "ID", "HOLDS", "CREATOR", "STATE", "DAEMON"]
    assert [line.split()[0] for line in shown[1:]] == ["semaphore", "queue", "memory"]
    assert all(line.split()[-3:] == [str(pid), "dead", "beat"] for line in shown[1:])
    # It was held when its holder was killed, and is free again.
    assert listed(box)[0] == {
        "kind": "semaphore",
        "key": objects[0][1],
        "id": listed(box)[0]["id"],
        "creator": pid,
        "creator_is_dead": True,
        "daemon": "beat",
        "is_left": True,
        "value": 1,
    }
    assert [each["kind"] for each in listed(box, "clean")] == ["semaphore", "queue", "memory"]
    assert there(objects) == [False] * 3
    assert listed(box) == []
    assert not (box.run_dir / "beat.ipc").exists()


def test_row_28_a_semaphore_held_by_a_killed_daemon_is_released_to_who_waits(box: Box) -> None:
    pid = box.start(MAKES_THREE)
    room = ipc.Semaphore.attach(made(box)[0][1])
    assert not room.acquire(0)
    os.kill(pid, signal.SIGKILL)
    assert room.acquire(20)
    await_end(pid)
    assert len(listed(box, "clean")) == 3


def test_a_daemon_removes_its_objects_when_it_ends(box: Box) -> None:
    box.start(MAKES_THREE)
    objects = made(box)
    assert there(objects) == [True] * 3
    assert {each["daemon"] for each in listed(box)} == {"beat"}
    assert box.call("kill", "beat").returncode == 0
    assert there(objects) == [False] * 3
    assert [path.name for path in box.run_dir.iterdir()] == []


def test_a_start_that_fails_leaves_no_objects(box: Box) -> None:
    done = box.call("start", box.script(MAKES_THREE + "\n@on('start')\ndef fail(): raise ValueError('no')\n"))
    assert done.returncode == 1
    assert there(made(box)) == [False] * 3
    assert not (box.run_dir / "beat.ipc").exists()


def test_an_object_that_a_jobs_child_has_made_lives_as_long_as_the_daemon(box: Box) -> None:
    box.start("""
from daemonkit import ipc
import subprocess
@after(0.001)
def make():
    text = "from daemonkit import ipc; print('made', ipc.MessageQueue(None).key)"
    log.info(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout)
@every(60)
def beat(): ...
""")
    key = int(next(line for line in box.await_log("made ").splitlines() if "made " in line).rpartition(" ")[2])
    assert [(each["creator_is_dead"], each["is_left"]) for each in listed(box)] == [(True, False)]
    assert listed(box, "clean") == []
    assert there([(kernel.QUEUE, key)]) == [True]
    box.call("kill", "beat")
    assert there([(kernel.QUEUE, key)]) == [False]


def test_a_reexec_keeps_the_objects(box: Box) -> None:
    box.start(MAKES_THREE.replace("room.acquire()", "...").replace("None", f"'reexec {box.mark}'"))
    first = made(box)
    assert box.call("reexec", "beat").returncode == 0
    assert made(box, 2) == first
    assert there(first) == [True] * 3
    box.call("kill", "beat")
    assert there(first) == [False] * 3


def test_a_kill_that_needs_force_removes_the_objects_too(box: Box) -> None:
    box.start(MAKES_THREE + "\n@on('SIGTERM')\ndef stay(): ...\n")
    objects = made(box)
    done = box.call("kill", "--timeout", "0.2", "beat")
    assert done.returncode == 0, done.stderr
    assert there(objects) == [False] * 3
    assert [path.name for path in box.run_dir.iterdir()] == []


@needs_root
def test_a_daemon_that_dropped_root_removes_its_objects_as_well(open_box: Box) -> None:
    open_box.log.touch()
    shutil.chown(open_box.log, "nobody")
    script = open_box.path / "beat.py"
    script.write_text("from daemonkit import every, on\n" + MAKES_THREE)
    # Python itself may stand where that user may not read it.
    early = "from daemonkit import ipc; ipc.SharedMemory, ipc.MessageQueue, ipc.Semaphore"
    (open_box.path / "sitecustomize.py").write_text(early)
    open_box.environ["PYTHONPATH"] = str(open_box.path)
    done = open_box.call("start", "--user", "nobody", script)
    assert done.returncode == 0, done.stdout + done.stderr
    objects = made(open_box)
    pid = open_box.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await_end(pid)
    assert there(objects) == [True] * 3
    assert open_box.call("start", "--user", "nobody", script).returncode == 0
    assert there(objects) == [False] * 3
    objects = made(open_box, 2)
    assert open_box.call("kill", "beat").returncode == 0
    assert there(objects) == [False] * 3
    assert [path.name for path in open_box.run_dir.iterdir()] == []


def test_a_daemon_without_objects_loads_nothing_for_them(box: Box) -> None:
    box.start("""
@after(0.001)
def tell(): print("loaded", [name for name in sys.modules if "daemonkit.ipc" in name], "end")
@every(60)
def beat(): ...
""")
    assert "loaded [] end" in box.await_log(" end")


def test_a_script_without_a_daemon_is_listed_and_cleaned_too(box: Box) -> None:
    text = "from daemonkit import ipc; ipc.MessageQueue(None)"
    subprocess.run([sys.executable, "-c", text], env=box.environ, check=True)
    assert [(each["daemon"], each["is_left"]) for each in listed(box)] == [(None, True)]
    said = box.call("ipc", "clean").stdout
    assert said.startswith("removed queue 0x")
    assert said.endswith(", which is dead\n")
    assert box.call("ipc", "list").stdout == ""


def test_files_that_are_no_registries_are_left_alone_and_do_not_hide_the_others(box: Box) -> None:
    foreign = box.run_dir / "data.ipc"
    foreign.write_text("ARROW1")
    text = "from daemonkit import ipc; ipc.MessageQueue(None)"
    subprocess.run([sys.executable, "-c", text], env=box.environ, check=True)
    (box.run_dir / "_a.ipc").mkdir()
    (box.run_dir / "_b.ipc").symlink_to(foreign)
    for action, said in (("list", "dead"), ("clean", "removed queue")):
        done = box.call("ipc", action)
        assert done.returncode == 1
        assert said in done.stdout
        assert done.stderr.count("not a plain file") == 2
    assert foreign.read_text() == "ARROW1"


def test_a_run_directory_that_is_not_there_has_no_objects(box: Box) -> None:
    done = box.call("ipc", "list", "--run-dir", box.path / "missing")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- PHP ---


def php(objects: Objects, text: str) -> str:
    """What a PHP script says; ``$key`` is the test's."""
    head = "error_reporting(E_ALL); $key = crc32($argv[1]) & 0x7fffffff; "
    command = ["php", "-d", "display_errors=1", "-r", head + text, "--", objects.name]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@needs_php
def test_php_computes_the_same_keys(objects: Objects) -> None:
    for project in ("a", "Z", "~"):
        said = php(objects, f"echo ftok('{ROOT}', '{project}');")
        assert int(said) == ipc.ftok(ROOT, project)
    room = ipc.Semaphore(objects.name)
    assert int(php(objects, "echo $key;")) == room.key
    room.remove()


@needs_php
def test_php_finds_our_semaphore_taken_and_free_and_never_sets_it_back(objects: Objects) -> None:
    tries = "$s = sem_get($key, 1); echo sem_acquire($s, true) ? 'in' : 'full';"
    room = ipc.Semaphore(objects.name)
    with room:
        assert php(objects, tries) == "full"
        assert room.value == 0
    assert php(objects, tries) == "in"
    assert room.value == 1  # given back when PHP ended
    assert php(objects, "sem_remove(sem_get($key));") == ""
    with pytest.raises(FileNotFoundError):
        ipc.Semaphore.attach(objects.name)
    registry.remove_all(objects.path)


@needs_php
def test_a_semaphore_that_php_has_made_is_shared_and_given_back_when_php_is_killed(objects: Objects) -> None:
    text = '$k = crc32($argv[1]) & 0x7fffffff; $s = sem_get($k, 2); sem_acquire($s); echo "in\\n"; fgets(STDIN);'
    pipe = subprocess.PIPE
    with subprocess.Popen(["php", "-r", text, "--", objects.name], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        room = ipc.Semaphore.attach(objects.name)
        assert room.value == 1
        room.acquire()
        assert not room.acquire(0)
        # A second PHP does not take itself for the first.
        assert php(objects, "$s = sem_get($key, 2); echo sem_acquire($s, true) ? 'in' : 'full';") == "full"
        holder.kill()
        assert room.acquire(20)
    # Now no PHP is left that has it; the next one does not set it back, either, while we hold it.
    assert php(objects, "$s = sem_get($key, 2); echo sem_acquire($s, true) ? 'in' : 'full';") == "full"
    room.release()
    room.release()
    assert room.value == 2
    room.remove()


@needs_php
def test_messages_go_to_php_and_come_from_php(objects: Objects) -> None:
    queue = ipc.MessageQueue(objects.name)
    queue.send(b"to \x00 PHP", 7)
    said = php(
        objects,
        "$q = msg_get_queue($key); msg_receive($q, -9, $type, 8192, $body, false); echo $type, bin2hex($body);"
        "msg_send($q, 3, \"from \\0 PHP\", false); msg_send($q, 2, 'first', false);",
    )
    assert said == "7" + b"to \x00 PHP".hex()
    assert queue.receive(ipc.LOWEST_FIRST, timeout=10) == (b"first", 2)
    assert queue.receive(timeout=10) == (b"from \x00 PHP", 3)
    assert php(objects, "echo msg_stat_queue(msg_get_queue($key))['msg_qnum'];") == "0"
    queue.remove()


@needs_php
def test_a_queue_that_php_has_made_is_read(objects: Objects) -> None:
    php(objects, "msg_send(msg_get_queue($key, 0600), 4, 'hello', false);")
    queue = ipc.MessageQueue(objects.name)
    assert not queue.is_new
    assert queue.receive(timeout=10) == (b"hello", 4)
    queue.remove()


@needs_php
def test_memory_is_shared_with_shmop_both_ways(objects: Objects) -> None:
    with ipc.SharedMemory(objects.name, 100) as memory:
        memory[0:5] = b"hello"
        said = php(
            objects,
            "$m = shmop_open($key, 'w', 0, 0); echo shmop_size($m), shmop_read($m, 0, 5);shmop_write($m, 'world', 50);",
        )
        assert said == "100hello"
        assert memory[50:55] == b"world"
        memory.remove()
    php(objects, "shmop_write(shmop_open($key, 'c', 0600, 64), 'made by PHP', 0);")
    with ipc.SharedMemory.attach(objects.name) as memory:
        assert (memory.size, memory[0:11]) == (64, b"made by PHP")
        memory.remove()


@needs_php
def test_a_variable_of_shm_put_var_lies_in_the_memory_in_phps_own_serialisation(objects: Objects) -> None:
    php(objects, "$m = shm_attach($key, 1000, 0600); shm_put_var($m, 5, 'text'); shm_detach($m);")
    with ipc.SharedMemory.attach(objects.name) as memory:
        assert memory[0:6] == b"PHP_SM"
        assert b's:4:"text";' in memory[0 : memory.size]
        memory.remove()


# --- C ---

C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
struct message { long type; char body[8192]; };
int main(int argc, char **argv) {
    key_t key = ftok(argv[1], argv[2][0]);
    struct sembuf take = {0, -1, SEM_UNDO | IPC_NOWAIT};
    int set = semget(key, 1, 0), queue = msgget(key, 0);
    char *memory = shmat(shmget(key, 0, 0), NULL, 0);
    struct message message;
    ssize_t size = msgrcv(queue, &message, sizeof message.body, 0, 0);
    printf("%d %s %.*s %s\n", key, semop(set, &take, 1) ? "full" : "in", (int) size, message.body, memory);
    message.type = 5;
    memcpy(message.body, "from C", 6);
    strcpy(memory, "C was here");
    return msgsnd(queue, &message, 6, 0);
}
"""


@needs_gcc
def test_a_c_program_shares_all_three_by_ftok(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "peer.c").write_text(C)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "peer", tmp_path / "peer.c"], check=True)
    key = ipc.ftok(tmp_path, "x")
    room, queue = ipc.Semaphore(key), ipc.MessageQueue(key)
    with ipc.SharedMemory(key, 100) as memory:
        for state, text in (("full", b"for C"), ("in", b"C was here")):
            queue.send(b"to C")
            memory[0 : len(text) + 1] = text + b"\0"
            if state == "full":
                room.acquire()
            done = subprocess.run([tmp_path / "peer", tmp_path, "x"], capture_output=True, text=True, check=True)
            assert done.stdout == f"{key} {state} to C {text.decode()}\n"
            assert queue.receive(timeout=10) == (b"from C", 5)
            assert memory[0:11] == b"C was here\0"
            if state == "full":
                room.release()
        assert room.value == 1
        memory.remove()
    room.remove()
    queue.remove()


# --- the examples ---


def example(name: str, objects: Objects) -> list[str]:
    """What an example says."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert registry.find(objects.path) == []
    return done.stdout.splitlines()


def test_the_room_for_one_holds_one_at_a_time_and_survives_a_death(objects: Objects) -> None:
    said = example("ipc_room.py", objects)
    assert said.pop() == "all have gone, room for 1"
    inside: str | None = None
    for line in said:
        _, visitor, *what = line.split()
        assert (inside in (None, "3")) if what == ["is", "in"] else (inside == visitor)
        inside = visitor if what == ["is", "in"] else None
    assert sorted(line.split()[1] for line in said if line.endswith("is in")) == list("12345")
    assert sorted(line.split()[1] for line in said if line.endswith("leaves")) == list("1245")


def test_the_queue_brings_every_message_of_five_children(objects: Objects) -> None:
    said = example("ipc_queue.py", objects)
    assert said == [*(f"child {n} wrote 100 messages" for n in range(5)), "50 were urgent, 0 are left"]


def test_the_counter_loses_no_step(objects: Objects) -> None:
    assert example("ipc_counter.py", objects) == ["counted to 20000, of 20000"]
