"""registry: what was made, by whom, whether he lives; and never a foreign object."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import sysv_ipc
from ipc_peers import Objects

from daemonkit import ipc
from daemonkit.errors import IpcError, NotAllowed
from daemonkit.ipc import kernel, registry

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def is_there(kind: str, number: int) -> bool:
    return number in kernel.listed(kind)


def test_what_is_made_is_written_down_and_what_is_removed_is_struck_out(objects: Objects) -> None:
    room, queue, memory = ipc.Semaphore(None), ipc.MessageQueue(None), ipc.SharedMemory(None, 10)
    found = {each.entry.kind: each for each in registry.find(objects.path)}
    assert {kind: each.entry.id for kind, each in found.items()} == {
        "semaphore": room.id,
        "queue": queue.id,
        "memory": memory.id,
    }
    assert all(each.entry.pid == os.getpid() and each.entry.creator_lives for each in found.values())
    assert not any(each.is_left for each in found.values())
    assert found["memory"].sizes == {"bytes": 10, "attached": 1}
    assert Path(objects.path).stat().st_mode & 0o777 == 0o600
    memory.close()
    for each in (room, queue, memory):
        each.remove()
    assert registry.find(objects.path) == []
    assert not Path(objects.path).exists()


def test_who_only_opens_it_does_not_write_it_down(objects: Objects) -> None:
    room = ipc.Semaphore(objects.name)
    ipc.Semaphore(objects.name)
    ipc.Semaphore.attach(objects.name)
    assert len(registry.find(objects.path)) == 1
    room.remove()


def test_what_is_to_be_kept_is_not_written_down(objects: Objects) -> None:
    room = ipc.Semaphore(None, keep=True)
    queue, memory = ipc.MessageQueue(None, keep=True), ipc.SharedMemory(None, 1, keep=True)
    assert not Path(objects.path).exists()
    memory.close()
    for each in (room, queue, memory):
        each.remove()


def test_objects_of_the_living_stay_and_those_of_the_dead_are_removed(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    creator = objects.start("""
        ipc.MessageQueue(name)
        say("made")
        hear()
    """)
    assert creator.hear() == "made"
    assert registry.remove_left(objects.path) == []
    creator.kill()
    assert [each.entry.creator_lives for each in registry.find(objects.path)] == [True, False]
    assert [each.entry.kind for each in registry.remove_left(objects.path)] == ["queue"]
    assert room.value == 1
    room.remove()


def test_a_zombie_is_dead(objects: Objects) -> None:
    creator = objects.start("""
        ipc.MessageQueue(name)
        say("made")
        hear()
    """)
    assert creator.hear() == "made"
    creator.process.kill()
    os.waitid(os.P_PID, creator.pid, os.WEXITED | os.WNOWAIT)
    assert len(registry.remove_left(objects.path)) == 1


def test_another_process_with_the_number_of_a_dead_creator_is_not_taken_for_it(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    change(objects.path, start=lambda start: start - 1)
    assert [each.entry.pid for each in registry.remove_left(objects.path)] == [os.getpid()]
    assert not is_there("semaphore", room.id)


def change(path: str, **changes: object) -> None:
    """Edit every line of a registry."""
    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for entry in entries:
        entry.update({key: how(entry[key]) if callable(how) else how for key, how in changes.items()})
    Path(path).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def dead_queue(objects: Objects) -> int:
    objects.run("ipc.MessageQueue(name)")
    return ipc.MessageQueue.attach(objects.name).id


@pytest.mark.parametrize("changes", [{"key": 12345}, {"kind": "semaphore"}, {"pid": 0, "kind": "file"}])
def test_an_entry_that_does_not_fit_its_object_does_nothing_to_it(objects: Objects, changes: dict[str, object]) -> None:
    number = dead_queue(objects)
    change(objects.path, **changes)
    assert registry.find(objects.path) == registry.remove_left(objects.path) == []
    assert is_there("queue", number)
    ipc.MessageQueue.attach(objects.name).remove()


def test_an_object_that_others_have_made_is_neither_shown_nor_removed(objects: Objects) -> None:
    theirs = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX)
    ours = ipc.MessageQueue(theirs.key)
    assert not ours.is_new
    assert registry.find(objects.path) == registry.remove_all(objects.path) == []
    theirs.remove()


@needs_root
def test_an_object_of_another_user_than_the_registrys_is_never_removed(objects: Objects) -> None:
    number = dead_queue(objects)
    os.chown(objects.path, 65534, 65534)
    assert [each.is_ours for each in registry.find(objects.path)] == [False]
    assert registry.remove_left(objects.path) == []
    assert is_there("queue", number)
    os.chown(objects.path, 0, 0)
    assert len(registry.remove_left(objects.path)) == 1


def test_entries_of_an_earlier_boot_are_dropped_and_those_of_other_namespaces_stay(objects: Objects) -> None:
    number = dead_queue(objects)
    before = Path(objects.path).read_text()
    change(objects.path, world=lambda world: re.sub(r" \d+ ", " 1 ", world))
    elsewhere = Path(objects.path).read_text()
    assert registry.find(objects.path) == registry.remove_left(objects.path) == []
    assert Path(objects.path).read_text() == elsewhere
    Path(objects.path).write_text(before)
    change(objects.path, world=lambda world: f"x{world}")
    assert registry.remove_left(objects.path) == []
    assert not Path(objects.path).exists()
    assert is_there("queue", number)
    ipc.MessageQueue.attach(objects.name).remove()


def test_lines_that_a_crash_has_left_unfinished_are_passed_over(objects: Objects) -> None:
    dead_queue(objects)
    with open(objects.path, "r+") as file:
        whole = file.read()
        file.write('{"kind": "queue", "key"\n[]\n\x00\xff\n{"kind": "queue", "pid": "1"}\n5\n')
        file.write(whole)
    assert len(registry.find(objects.path)) == 1
    assert len(registry.remove_left(objects.path)) == 1
    assert not Path(objects.path).exists()


def test_what_is_made_after_a_crash_that_has_left_half_a_line_is_written_down(objects: Objects) -> None:
    dead_queue(objects)
    with open(objects.path, "a") as file:
        file.write('{"kind": "queue", "key"')
    objects.run("ipc.MessageQueue(None)")
    assert len(registry.find(objects.path)) == 2
    assert len(registry.remove_left(objects.path)) == 2


def test_a_line_for_which_there_is_no_room_leaves_the_registry_as_it_was(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    before = Path(objects.path).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(IpcError, match="no space left"):
            ipc.Semaphore(None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path(objects.path).read_bytes() == before
    room.remove()


@pytest.mark.parametrize("what", ["directory", "link", "pipe"])
def test_what_is_no_registry_is_refused_and_nothing_is_left(objects: Objects, what: str) -> None:
    path = Path(objects.path)
    if what == "directory":
        path.mkdir()
    elif what == "link":
        path.symlink_to("elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(IpcError, match=r"write it down in .*_scripts.ipc: .*; set DAEMONKIT_RUN_DIR, or .*keep=True"):
        ipc.MessageQueue(objects.name)
    with pytest.raises(FileNotFoundError):
        ipc.MessageQueue.attach(objects.name)
    path.rmdir() if what == "directory" else path.unlink()


@needs_root
def test_another_users_registry_is_told(objects: Objects) -> None:
    Path(objects.path).touch(mode=0o600)
    objects.run_dir.chmod(0o755)
    said = objects.run("""
        from daemonkit.ipc import registry
        path = registry.path_for_new()
        os.chdir(os.path.dirname(path))
        os.setuid(65534)
        try:
            registry.find(os.path.basename(path))
        except PermissionError as error:
            say(error)
    """)
    assert "open _scripts.ipc: permission denied; try as root or as the user who made it" in said
    assert issubclass(NotAllowed, PermissionError)


def test_twenty_processes_write_down_at_once_and_no_line_is_lost(objects: Objects) -> None:
    peers = [objects.start("say('')\nhear()\nfor _ in range(10): ipc.Semaphore(None)") for _ in range(20)]
    for peer in peers:
        peer.hear()
    for peer in peers:
        peer.tell()
    for peer in peers:
        peer.end()
    assert len(registry.find(objects.path)) == 200
    assert len(registry.remove_left(objects.path)) == 200
    assert not Path(objects.path).exists()


def test_a_lock_that_is_not_given_back_is_waited_for_with_a_bound(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = ipc.Semaphore(None)
    holder = objects.start("""
        import fcntl
        file = open(os.path.join(os.environ["DAEMONKIT_RUN_DIR"], "_scripts.ipc"))
        fcntl.flock(file, fcntl.LOCK_EX)
        say("held")
        hear()
    """)
    assert holder.hear() == "held"
    monkeypatch.setattr(registry, "PATIENCE", 0.2)
    with pytest.raises(IpcError, match=r"not to be had for 0\.2 s; see lslocks"):
        registry.find(objects.path)
    monkeypatch.undo()
    holder.kill()
    room.remove()
    registry.remove_all(objects.path)


def test_a_signal_while_the_lock_is_waited_for_changes_nothing(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    waiter = objects.start("""
        signal.signal(signal.SIGUSR1, lambda *_: say("signal"))
        say("ready")
        hear()
        say("waits")
        ipc.MessageQueue(name).remove()
        say("done")
    """)
    assert waiter.hear() == "ready"
    with open(objects.path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiter.tell()
        assert waiter.hear() == "waits"
        waiter.await_sleep()
        waiter.process.send_signal(signal.SIGUSR1)
        assert waiter.hear() == "signal"
    assert waiter.hear() == "done"
    waiter.end()
    room.remove()


def test_a_registry_that_has_grown_is_pruned(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    line = Path(objects.path).read_text()
    gone = json.dumps({**json.loads(line), "id": 2**31 - 1}) + "\n"
    Path(objects.path).write_text(line + gone * 600)
    other = ipc.Semaphore(None)
    assert len(Path(objects.path).read_text().splitlines()) == 2
    for each in (room, other):
        each.remove()


def test_a_script_without_a_run_directory_makes_the_one_that_the_command_looks_at(objects: Objects) -> None:
    said = objects.run("""
        os.environ["DAEMONKIT_RUN_DIR"] += "/new"
        room = ipc.Semaphore(name)
        say(os.path.exists(os.environ["DAEMONKIT_RUN_DIR"] + "/_scripts.ipc"))
        room.remove()
    """)
    assert said == "True\n"
