"""semaphore: a room for one, given back by the dead, made by fifty at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import sysv_ipc
from ipc_peers import Objects

from daemonkit import ipc
from daemonkit.errors import IpcTimeout, NoSuchObject, UsageError
from daemonkit.ipc import kernel

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_a_room_for_one_is_full_with_one(objects: Objects) -> None:
    room = ipc.Semaphore(objects.name)
    with room:
        assert room.value == 0
        assert not room.acquire(0)
    assert room.value == 1
    assert room.acquire(0)
    room.release()
    room.remove()


def test_a_counting_semaphore_has_room_for_as_many_as_it_says(objects: Objects) -> None:
    room = ipc.Semaphore(objects.name, 3)
    assert [room.acquire(0) for _ in range(4)] == [True, True, True, False]
    assert [ipc.Semaphore(objects.name, 7).value, ipc.Semaphore.attach(objects.name).value] == [0, 0]
    room.remove()


@pytest.mark.parametrize("timeout", [0.0, 0.05, 0.3])
def test_a_wait_ends_at_its_time_out(objects: Objects, timeout: float) -> None:
    room = ipc.Semaphore(None, 0)
    began = time.monotonic()
    assert not room.acquire(timeout)
    assert timeout <= time.monotonic() - began < timeout + 5
    with pytest.raises(IpcTimeout, match="held by others for"), room.held(timeout):
        pytest.fail("nobody may be in here")
    room.remove()


def test_held_gives_back_when_the_block_raises(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    with pytest.raises(ZeroDivisionError), room.held(5):
        assert room.value == 0
        _ = 1 / 0
    assert room.value == 1
    room.remove()


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_time_out_that_cannot_be_meant_is_refused(objects: Objects, timeout: float) -> None:
    room = ipc.Semaphore(None)
    with pytest.raises(UsageError, match="0 or more"):
        room.acquire(timeout)
    room.remove()


@pytest.mark.parametrize("value", [-1, 32768, 1.5, "1"])
def test_a_value_that_cannot_be_meant_is_refused(objects: Objects, value: object) -> None:
    with pytest.raises(UsageError, match="use 0 to 32767"):
        ipc.Semaphore(objects.name, value)  # type: ignore[arg-type]


def test_what_a_killed_process_held_is_given_back(objects: Objects) -> None:
    holder = objects.start("""
        room = ipc.Semaphore(name)
        room.acquire()
        say("in")
        hear()
    """)
    assert holder.hear() == "in"
    room = ipc.Semaphore.attach(objects.name)
    assert not room.acquire(0)
    assert room.last_pid == holder.pid
    holder.process.send_signal(signal.SIGKILL)
    assert room.acquire(20)
    holder.kill()
    room.release()
    ipc.Semaphore(objects.name).remove()


def test_without_undo_it_is_not_given_back(objects: Objects) -> None:
    objects.run("ipc.Semaphore(name, 2, undo=False).acquire()")
    room = ipc.Semaphore.attach(objects.name)
    assert room.value == 1
    room.remove()


def test_a_child_does_not_give_back_what_its_parent_holds(objects: Objects) -> None:
    said = objects.run("""
        with ipc.Semaphore(name) as room:
            pid = os.fork()
            if pid == 0:
                os._exit(0 if not room.acquire(0) else 1)
            say(os.waitpid(pid, 0)[1])
            say(room.value)
        room.remove()
    """)
    assert said.split() == ["0", "0"]


def test_who_waits_learns_that_the_semaphore_was_removed(objects: Objects) -> None:
    room = ipc.Semaphore(objects.name, 0)
    waiters = [
        objects.start(f"""
            room = ipc.Semaphore.attach(name)
            say("waits")
            try:
                room.acquire({timeout})
            except NoSuchObject as error:
                say(error)
        """)
        for timeout in (None, 25)
    ]
    assert [waiter.hear() for waiter in waiters] == ["waits"] * 2
    room.remove()
    for waiter in waiters:
        assert "it is not there any more; somebody has removed it" in waiter.hear()
        waiter.end()
    for use in (room.acquire, room.release, lambda: room.acquire(1), lambda: room.value):
        with pytest.raises(NoSuchObject, match="somebody has removed it"):
            use()
    room.remove()  # it is gone already


def test_attaching_to_nothing_is_told(objects: Objects) -> None:
    with pytest.raises(NoSuchObject, match="there is none with this key"):
        ipc.Semaphore.attach(objects.name)


def test_fifty_processes_at_once_make_one_semaphore_with_one_value(objects: Objects) -> None:
    # All are forked by one process, wait for its pipe to close, and then rush.  In the room each plants a file that
    # must not be there yet.
    said = objects.run("""
        gate, opener = os.pipe()
        flag = os.path.join(os.environ["DAEMONKIT_RUN_DIR"], "inside")
        pids = []
        for _ in range(50):
            pid = os.fork()
            if pid == 0:
                os.close(opener)
                os.read(gate, 1)
                try:
                    room = ipc.Semaphore(name)
                    with room:
                        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
                        os.unlink(flag)
                    os._exit(room.is_new)
                except BaseException as error:
                    print(repr(error), file=sys.stderr)
                    os._exit(2)
            pids.append(pid)
        os.close(opener)
        say(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
        say(ipc.Semaphore.attach(name).value)
    """)
    assert said.splitlines() == [str([0] * 49 + [1]), "1"]
    ipc.Semaphore.attach(objects.name).remove()


def test_what_died_between_making_and_preparing_is_prepared_by_the_next(objects: Objects) -> None:
    kernel.make(kernel.SEMAPHORE, objects.name, 0o600, 3)
    room = ipc.Semaphore(objects.name, 5)
    assert (room.value, room.is_new) == (5, False)
    room.remove()


def test_what_died_while_preparing_does_not_hold_the_lock(objects: Objects) -> None:
    made = kernel.make(kernel.SEMAPHORE, objects.name, 0o600, 3)
    holder = objects.start("""
        from daemonkit.ipc import kernel
        made = kernel.find(kernel.SEMAPHORE, name)
        say(kernel.operate(made.id, [(2, 1, kernel.SEM_UNDO)], 5))
        hear()
    """)
    assert holder.hear() == "0"
    second = objects.start("say(ipc.Semaphore(name, 5).value)")
    holder.kill()
    assert second.hear() == "5"
    second.end()
    kernel.remove(kernel.SEMAPHORE, made.id)


def test_who_attaches_waits_until_the_maker_has_prepared_it(objects: Objects) -> None:
    kernel.make(kernel.SEMAPHORE, objects.name, 0o600, 3)
    early = objects.start("""
        say("waits")
        say(ipc.Semaphore.attach(name).value)
    """)
    assert early.hear() == "waits"
    room = ipc.Semaphore(objects.name, 4)
    assert early.hear() == "4"
    early.end()
    room.remove()


def test_a_set_of_another_program_is_left_as_it_is(objects: Objects) -> None:
    theirs = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, initial_value=2)
    ours = ipc.Semaphore(theirs.key, 1)
    assert (ours.value, ours.is_new) == (2, False)
    with ours:
        assert theirs.value == 1
    theirs.remove()


def test_a_c_program_that_waits_for_the_first_operation_sees_it(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    assert sysv_ipc.Semaphore(room.key).o_time > 0
    room.remove()


def test_giving_back_too_much_is_an_error(objects: Objects) -> None:
    room = ipc.Semaphore(None, 32767)
    with pytest.raises(ValueError, match="value must remain"):
        room.release()
    room.remove()


def test_a_signals_handler_runs_while_waiting_and_the_wait_goes_on(objects: Objects) -> None:
    ipc.Semaphore(objects.name, 0)
    waiter = objects.start("""
        room = ipc.Semaphore.attach(name)
        signal.signal(signal.SIGUSR1, lambda *_: say("signal"))
        for timeout in (None, 25):
            say("waits")
            say(room.acquire(timeout))
    """)
    room = ipc.Semaphore.attach(objects.name)
    for _ in range(2):
        assert waiter.hear() == "waits"
        waiter.await_sleep()
        waiter.process.send_signal(signal.SIGUSR1)
        assert waiter.hear() == "signal"
        room.release()
        assert waiter.hear() == "True"
    waiter.end()
    room.remove()


@pytest.mark.parametrize("timeout", [None, 25])
def test_what_a_signals_handler_raises_comes_through(objects: Objects, timeout: float | None) -> None:
    said = objects.run(f"""
        def alarm(*_):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TimeoutError("of the user")
        signal.signal(signal.SIGALRM, alarm)
        room = ipc.Semaphore(name, 0)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 1)  # once more, if the wait was only about to begin
            room.acquire({timeout})
        except OSError as error:
            say(repr(error))
        room.remove()
    """)
    assert said == "TimeoutError('of the user')\n"


def test_threads_wait_beside_each_other(objects: Objects) -> None:
    room = ipc.Semaphore(None, 0)
    had = []
    threads = [threading.Thread(target=lambda: had.append(room.acquire(20))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for _ in threads:
        room.release()
    for thread in threads:
        thread.join(20)
    assert had == [True] * 5
    room.remove()


@needs_root
def test_another_users_semaphore_is_refused_in_a_sentence(objects: Objects) -> None:
    room = ipc.Semaphore(None)
    text = f"""
import os
os.environ["DAEMONKIT_RUN_DIR"] = "/tmp"
from daemonkit import ipc
from daemonkit.ipc import kernel
Semaphore = ipc.Semaphore  # loaded while we may
os.setuid(65534)
for use in (lambda: Semaphore.attach({room.key}), lambda: kernel.remove("semaphore", {room.id})):
    try:
        use()
    except PermissionError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "permission denied; its owner must grant it by mode=" in said[0]
    assert "it belongs to another user; try as root" in said[1]
    room.remove()


@needs_root
def test_a_mode_grants_it_to_others(objects: Objects) -> None:
    room = ipc.Semaphore(None, mode=0o666)
    text = f"""
import os
from daemonkit import ipc
Semaphore = ipc.Semaphore  # loaded while we may
os.setuid(65534)
with Semaphore.attach({room.key}) as room:
    print(room.value)
"""
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "0\n"
    room.remove()


def test_without_the_library_there_is_one_clear_sentence_and_the_rest_works() -> None:
    text = """
import sys
sys.modules["sysv_ipc"] = None
from daemonkit import ipc
one, other = ipc.Channel.pair()
with one, other:
    one.send(b"works")
    print(other.receive(), ipc.ftok("/", 1) != 0)
for name in ("Semaphore", "MessageQueue", "SharedMemory"):
    try:
        getattr(ipc, name)
    except ImportError as error:
        print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.splitlines()
    sentence = "use System V IPC: the library sysv_ipc is not installed; pip install 'daemonkit[ipc]'"
    assert said == ["b'works' True", *[f"MissingLibrary {sentence}"] * 3]


def test_ipc_is_reached_from_the_package_and_loads_nothing_before_it_is_used() -> None:
    text = """
import sys, daemonkit
from daemonkit import *
print(sorted(name for name in sys.modules if "ipc" in name))
from daemonkit import ipc
print(daemonkit.ipc is ipc, sorted(name for name in sys.modules if "ipc" in name))
ipc.Channel
print("sysv_ipc" in sys.modules)
ipc.Semaphore
print("sysv_ipc" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == ["[]", "True ['daemonkit.ipc']", "False", "True"]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mutex'"):
        _ = ipc.Mutex
