"""Named workers: kept at their number, started anew when they end, replaced one by one, stopped with care."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from harness import Box, await_end

import daemonkit

WAITING = """
@worker(count=2)
def crunch(stop, index):
    log.info("up %d", index)
    stop.wait()
    log.info("bye %d", index)
"""
STUBBORN = """
@worker({})
def crunch(stop):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.info("up")
    while True:
        time.sleep(1000)
"""


def child(box: Box, name: str, daemon: str = "beat") -> dict[str, Any]:
    """One row of the children's table."""
    found: dict[str, Any] = next(each for each in box.status(daemon)["children"] if each["name"] == name)
    return found


def pids(box: Box, daemon: str = "beat") -> dict[str, int]:
    """Who runs, once all that are to run do."""
    return {each["name"]: each["pid"] for each in box.children(daemon)}


def rewrite(box: Box, text: str) -> None:
    box.script(text)


# --- being there ---


def test_the_processes_have_exactly_their_titles(box: Box) -> None:
    box.start(
        WAITING
        + """
@after(0.01)
def never(): ...
@every(3600, first=0, fork=True)
def report():
    log.info("up report")
    time.sleep(1000)
"""
    )
    box.await_log("up ", 3)
    assert sorted(title for title in box.processes().values()) == [
        "beat: fork server",
        "beat: job report",
        "beat: master",
        "beat: worker crunch-0",
        "beat: worker crunch-1",
    ]


def test_a_worker_that_is_killed_is_replaced_at_once_under_its_index(box: Box) -> None:
    box.start(WAITING)
    box.await_log("up ", 2)
    before = pids(box)
    os.kill(before["worker crunch-1"], signal.SIGKILL)
    log = box.await_log("up 1", 2)
    assert f"worker crunch-1: pid {before['worker crunch-1']} killed by SIGKILL" in log
    assert "respawned at once" in log
    after = pids(box)
    assert after["worker crunch-0"] == before["worker crunch-0"]
    assert after["worker crunch-1"] != before["worker crunch-1"]
    row = child(box, "worker crunch-1")
    assert (row["restarts"], row["last"].startswith(f"pid {before['worker crunch-1']} killed by SIGKILL")) == (1, True)


def test_a_crash_loop_is_slowed_down_then_given_up_and_a_scale_tries_again(box: Box) -> None:
    box.start(
        """
        @worker(max_restarts=3, backoff=0.2)
        def crunch(stop):
            raise ValueError("no luck")
        """
    )
    log = box.await_log("given up as fatal")
    assert log.count("respawned at once") == 1
    assert log.count("respawned in 0.") == 2
    assert "worker crunch-0: ValueError: no luck (pid" in log
    assert "Traceback" in log
    row = child(box, "worker crunch-0")
    assert (row["state"], row["pid"], row["restarts"]) == ("fatal", None, 3)
    assert "exited with status 1" in row["last"]
    assert "fatal" in box.call("status", "beat").stdout
    assert box.call("scale", "beat", "crunch", "1").returncode == 0
    box.await_log("given up as fatal", 2)


def test_a_daemon_ends_with_code_1_when_an_essential_worker_is_given_up(box: Box) -> None:
    os.mkfifo(gate := box.path / "gate")
    script = box.script(
        f"""
        @worker(essential=True, max_restarts=1)
        def crunch(stop):
            with open({str(gate)!r}, "rb", buffering=0) as file:
                file.read(1)
            sys.exit(3)

        @worker
        def other(stop):
            gate = os.open({str(gate)!r}, os.O_RDWR)
            os.write(gate, b"..")  # only now may the first one fail, twice
            stop.wait()
            log.info("bye")
        """
    )
    with box.popen("run", script) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    log = out + box.log.read_text()
    assert "exited with status 3" in log
    assert "worker crunch-0 is essential: the daemon ends" in log
    assert "bye" in log


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return", "returned without having been asked to stop (pid"),
        ("sys.exit(7)", "exited with status 7"),
        ("os.abort()", "killed by SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise KeyboardInterrupt", "exited with status 1"),
        ("os._exit(0)", "returned without having been asked to stop"),
    ],
)
def test_row_22_a_worker_that_ends_unasked_is_told_of_and_replaced(box: Box, body: str, said: str) -> None:
    box.start(f"@worker\ndef crunch(stop):\n    log.info('up')\n    {body}\n")
    log = box.await_log(": up", 2)
    assert said in log
    assert "respawned at once" in log


def test_a_worker_that_writes_nonsense_into_all_that_is_open_is_no_harm_to_others(box: Box) -> None:
    box.start(
        """
        @worker(heartbeat_timeout=2)
        def good(stop):
            while not stop.wait(0.1):
                pass
        @worker
        def bad(stop):
            for fd in map(int, os.listdir("/proc/self/fd")):
                link = f"/proc/self/fd/{fd}"
                if os.path.islink(link) and os.readlink(link).startswith("socket:"):
                    for kind in range(12):
                        for number in range(4):
                            os.write(fd, bytes([kind, 0, number]) + bytes(7) + b"nonsense")
                    os.write(fd, b"short")
                    os.write(fd, b"")
            log.info("written")
            stop.wait()
        @after(4)
        def later():
            log.info("four seconds later")
        """
    )
    box.await_log("written")
    log = box.await_log("four seconds later")
    assert "hung" not in log
    assert child(box, "worker good-0")["restarts"] == 0
    assert child(box, "fork server")["state"] == "running"


def test_a_program_that_does_not_exist_is_told_of(box: Box) -> None:
    box.start('program("ghost", ["/no/such/program"], max_restarts=1)\n')
    log = box.await_log("given up as fatal")
    assert "execute /no/such/program: no such program" in log
    assert "exited with status 127" in log


def test_a_program_is_kept_alive_and_begins_as_any_program_does(box: Box) -> None:
    show = "grep -E 'Sig(Ign|Cgt|Blk)' /proc/self/status; ls -l /proc/self/fd | sed 's/.*-> //'; echo shown; sleep 1000"
    box.start(f'program("shell", ["sh", "-c", {show!r}], count=2)\n@every(100, fork=True)\ndef j(): ...\n')
    log = box.await_log("shown", 2)
    ignored = {int(line.split()[-1], 16) for line in log.splitlines() if "SigIgn" in line}
    assert {mask & 0x7FFF_FFFF for mask in ignored} == {0}  # 32 and 33 are the C library's own
    assert "socket:" not in log
    assert "beat.pid" not in log
    before = pids(box)["worker shell-0"]
    os.kill(before, signal.SIGKILL)
    box.await_log("shown", 3)
    assert pids(box)["worker shell-0"] not in (None, before)


# --- readiness and heartbeat ---


def test_a_worker_with_readiness_is_starting_until_it_says_so(box: Box) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    box.start(
        f"""
        @worker(readiness=True)
        def crunch(stop):
            stop.is_set()
            log.info("setting up")
            open({str(gate)!r}).close()
            stop.ready()
            log.info("set up")
            stop.wait()
        """
    )
    box.await_log("setting up")
    assert child(box, "worker crunch-0")["state"] == "starting"
    gate.open("w").close()
    box.await_log("set up")
    assert child(box, "worker crunch-0")["state"] == "ready"


def test_a_worker_is_ready_with_its_first_look(box: Box) -> None:
    box.start("@worker\ndef crunch(stop):\n    stop.is_set()\n    log.info('looked')\n    stop.wait()\n")
    box.await_log("looked")
    assert child(box, "worker crunch-0")["state"] == "ready"


def test_a_worker_that_is_not_ready_in_time_is_killed_and_replaced(box: Box) -> None:
    box.start(
        """
        @worker(readiness=True)
        def crunch(stop):
            log.info("up")
            time.sleep(1000)
        """,
        "--ready-timeout",
        "4",
    )
    log = box.await_log(": up", 2)
    assert "worker crunch-0: was not ready within ready_timeout, 4 s (pid" in log
    assert "killed by SIGKILL" in log


# A worker of a busy machine may well miss half a second: no test in which one must not hang has less than this.
HEARTS = """
@worker(heartbeat_timeout=2)
def crunch(stop):
    stop.is_set()
    log.info("up")
    {}
"""
HUNG = re.compile(r"worker crunch-0: hung: no heartbeat for [23]\.\d s")  # 2.5 s, and not much more


def test_a_worker_that_hangs_is_killed_and_replaced(box: Box) -> None:
    box.start(HEARTS.replace("timeout=2", "timeout=0.5").format("time.sleep(1000)"))
    log = box.await_log(": up", 2)
    assert "worker crunch-0: hung: no heartbeat for 0." in log


def test_row_22_a_worker_that_was_stopped_counts_as_hung(box: Box) -> None:
    box.start(HEARTS.format("stop.wait()"))
    box.await_log(": up")
    os.kill(pids(box)["worker crunch-0"], signal.SIGSTOP)
    assert HUNG.search(box.await_log(": up", 2))


def test_a_worker_that_works_is_not_taken_for_hung_while_the_master_is_busy(box: Box) -> None:
    box.start(
        HEARTS.format("while not stop.wait(0.01): pass")
        + """
@after(0.5)
def busy():
    time.sleep(4)
    log.info("not busy any more")
@after(5.5)
def later():
    log.info("later")
"""
    )
    log = box.await_log("later")
    assert "hung" not in log
    assert log.count(": up") == 1


def test_a_worker_that_rests_is_not_taken_for_hung_but_one_that_works_again_is(box: Box) -> None:
    box.start(HEARTS.format("stop.rest(); time.sleep(4); log.info('rested'); stop.is_set(); time.sleep(1000)"))
    assert "hung" not in box.await_log("rested")
    assert HUNG.search(box.await_log(": up", 2))


def test_a_long_piece_of_work_with_heartbeats_of_its_own_is_no_hang(box: Box) -> None:
    box.start(
        HEARTS.format("for _ in range(16): time.sleep(0.2); stop.heartbeat()\n    log.info('done')\n    stop.wait()")
    )
    assert "hung" not in box.await_log("done")


# --- recycling ---


@pytest.mark.parametrize(
    ("options", "body", "said"),
    [
        ("max_tasks=5", "while not stop.is_set(): log.info('piece')", "recycled: 5 pieces of work, max_tasks"),
        ("max_age=0.5", "stop.wait()", "s old, max_age"),
        ("max_rss='80M'", "big = bytearray(10**8)\n    while not stop.wait(0.1): pass", "MB of memory, max_rss"),
    ],
)
def test_a_worn_worker_makes_room_for_a_fresh_one(box: Box, options: str, body: str, said: str) -> None:
    box.start(f"@worker({options}, recycle_jitter=0)\ndef crunch(stop):\n    log.info('up')\n    {body}\n")
    log = box.await_log(": up", 2)
    assert said in log
    assert "respawned" not in log
    if "max_tasks" in options:
        assert log.partition("recycled")[0].count("piece") >= 5
    assert child(box, "worker crunch-0")["restarts"] == 0


def test_a_worker_that_does_not_heed_its_recycling_is_ended_by_the_schedule(box: Box) -> None:
    box.start(
        """
        @worker(max_tasks=1, recycle_jitter=0, stop_schedule="TERM/0.3/KILL/1")
        def crunch(stop):
            log.info("up")
            while True:
                stop.is_set()
                time.sleep(0.05)
        """
    )
    box.await_log(": up", 2)
    assert "killed by SIGKILL" in child(box, "worker crunch-0")["last"]


# --- scaling ---


def test_scale_makes_more_and_fewer_and_so_do_ttin_and_ttou(box: Box) -> None:
    master = box.start(WAITING)
    box.await_log("up ", 2)
    assert box.call("scale", "beat", "crunch", "4").stdout == "beat: crunch has 4 processes\n"
    box.await_log("up ", 4)
    assert {f"worker crunch-{i}" for i in range(4)} <= pids(box).keys()
    assert box.call("scale", "beat", "crunch", "1").returncode == 0
    log = box.await_log("bye ", 3)
    assert "bye 0" not in log
    os.kill(master, signal.SIGTTIN)
    box.await_log("up 1", 2)
    os.kill(master, signal.SIGTTOU)
    box.await_log("bye 1", 2)
    assert box.call("scale", "beat", "crunch", "0").returncode == 0
    box.await_log("bye 0")
    os.kill(master, signal.SIGTTOU)
    box.await_log("worker crunch: 0 processes", 2)
    os.kill(master, signal.SIGTTIN)
    box.await_log("up 0", 2)


def test_scale_of_what_is_not_there_is_refused(box: Box) -> None:
    box.start(WAITING)
    wrong = box.call("scale", "beat", "brew", "3")
    assert wrong.returncode == 1
    assert "no worker named 'brew'; there are: crunch" in wrong.stderr
    for count in ("-1", "10001", "many"):
        assert box.call("scale", "beat", "crunch", count).returncode == 2


# --- stopping ---


def test_the_piece_of_work_in_hand_is_finished(box: Box) -> None:
    box.start(
        """
        @worker(count=3)
        def crunch(stop):
            while not stop.is_set():
                log.info("begin")
                time.sleep(0.3)
                log.info("end")
        """
    )
    box.await_log("begin", 3)
    assert box.call("kill", "beat").returncode == 0
    log = box.log.read_text()
    assert log.count(" begin") == log.count(" end")
    assert "killed" not in log


def test_a_wait_ends_at_once_also_in_a_thread(box: Box) -> None:
    box.start(
        """
        import threading

        @worker
        def crunch(stop):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            log.info("up")
            thread.join()
            log.info("bye after %s", stop.wait(1000))
        """,
        "--graceful-timeout",
        "20",
    )
    box.await_log(": up")
    assert box.call("kill", "beat").returncode == 0
    assert "bye after True" in box.log.read_text()


def test_a_stop_ends_the_waits_of_all_threads_and_none_of_them_fails(box: Box) -> None:
    box.start(
        """
        import threading

        @worker
        def crunch(stop):
            threads = [threading.Thread(target=stop.wait) for _ in range(40)]
            for thread in threads:
                thread.start()
            log.info("up")
            for thread in threads:
                thread.join()
            log.info("bye")
        """
    )
    box.await_log(": up")
    assert box.call("kill", "beat").returncode == 0
    log = box.log.read_text()
    assert ": bye" in log
    assert "Traceback" not in log


def test_a_worn_worker_ends_the_waits_of_its_other_threads(box: Box) -> None:
    box.start(
        """
        import threading

        @worker(max_tasks=3, recycle_jitter=0, stop_schedule="TERM/30/KILL/5")
        def crunch(stop):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            while not stop.is_set():
                os.sched_yield()
            thread.join()
            log.info("bye")
        """
    )
    log = box.await_log(": bye", 2)
    assert "killed" not in log


def test_a_stubborn_worker_is_ended_by_its_stop_schedule_on_scale_down_and_on_stop(box: Box) -> None:
    box.start(STUBBORN.format('count=2, stop_schedule="TERM/0.5/KILL/1"'), "--graceful-timeout", "60")
    box.await_log(": up", 2)
    before = pids(box)
    assert box.call("scale", "beat", "crunch", "1").returncode == 0
    await_end(before["worker crunch-1"])
    assert os.path.exists(f"/proc/{before['worker crunch-0']}")
    assert box.call("kill", "--timeout", "50", "beat").returncode == 0
    await_end(before["worker crunch-0"])
    assert "had not ended in time" not in box.log.read_text()


def test_when_kill_returns_nothing_is_left_also_of_many_that_were_killed(box: Box) -> None:
    box.start(
        "@worker(count=100, readiness=True)\n"
        "def sleep(stop):\n    stop.ready()\n    log.info('up')\n    time.sleep(1000)\n"
    )
    box.await_log(": up")  # this one does not end by a TERM
    done = box.call("kill", "--timeout", "0", "beat")
    left = box.processes()
    assert (done.returncode, left) == (0, {})
    assert "was killed" in done.stdout


def test_all_that_is_left_is_killed_at_graceful_timeout(box: Box) -> None:
    box.start(STUBBORN.format("count=2"), "--graceful-timeout", "1")
    box.await_log(": up", 2)
    before = pids(box)
    assert box.call("kill", "beat").returncode == 0
    log = box.log.read_text()
    for name in ("worker crunch-0", "worker crunch-1"):
        assert f"killed: pid {before[name]} had not ended in time" in log
    assert "stopped" in log


@pytest.mark.parametrize("urgent", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_term_or_quit_ends_all_at_once(box: Box, urgent: signal.Signals) -> None:
    master = box.start(STUBBORN.format(""), "--graceful-timeout", "600")
    box.await_log(": up")
    os.kill(master, signal.SIGTERM)
    box.await_log("stopping on SIGTERM")
    os.kill(master, urgent)
    await_end(master)
    assert "had not ended in time" in box.log.read_text()


# --- reload ---


# A new one takes over when it says so, and not before: without readiness it is when it has lived for a second, too.
SHOWING = """
@worker(count=3, readiness=True{options})
def crunch(stop, index):
    log.info("{word} %d", index)
    {body}
    stop.wait()
    log.info("bye {word} %d", index)
"""


def showing(word: str, body: str = "stop.ready()", options: str = "") -> str:
    return textwrap.dedent(SHOWING).format(word=word, body=body, options=options)


@pytest.mark.parametrize("how", ["command", "signal"])
def test_reload_replaces_all_workers_by_new_code(box: Box, how: str) -> None:
    master = box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, showing("new"))
    if how == "command":
        done = box.call("reload", "beat")
        assert done.returncode == 0, done.stderr
        log = box.log.read_text()
    else:
        os.kill(master, signal.SIGHUP)
        log = box.await_log("the workers were replaced")
    assert [line.rpartition("test: ")[2] for line in log.splitlines() if " test: " in line][3:] != []
    assert log.count("test: new") == 3
    assert log.count("bye old") == 3
    for index in range(3):
        assert log.index(f"new {index}") < log.index(f"bye old {index}")
    assert not set(before.values()) & set(pids(box).values())
    assert len(pids(box)) == 4


def test_each_replacement_waits_until_the_new_one_is_ready(box: Box) -> None:
    gates = [box.path / f"gate{index}" for index in range(3)]  # each its own: one may be open yet when the next comes
    for gate in gates:
        os.mkfifo(gate)
    box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    wait = f"open({str(box.path / 'gate')!r} + str(index)).close(); stop.ready()"
    rewrite(box, showing("new", wait))
    with box.popen("reload", "beat") as reload:
        for index in range(3):
            box.await_log(f"new {index}")
            log = box.log.read_text()
            assert log.count("test: new") == index + 1
            assert f"bye old {index}" not in log
            assert os.path.exists(f"/proc/{before[f'worker crunch-{index}']}")
            gates[index].open("w").close()
        assert reload.wait(60) == 0


def test_new_code_that_cannot_be_imported_changes_nothing_and_shows_its_traceback(box: Box) -> None:
    box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, "def broken():\n    return 1 / 0\nbroken()\n")
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "in broken" in done.stderr
    assert "the new code cannot be loaded; the old code goes on\nTraceback (most recent call last):\n" in done.stderr
    assert "bye" not in box.log.read_text()
    assert pids(box) == before


def test_a_new_worker_that_fails_takes_those_before_it_back_to_the_old_code(box: Box) -> None:
    box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, showing("new", "if index == 1: raise RuntimeError('not me')\n    stop.ready()"))
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "RuntimeError: not me" in done.stderr
    assert "Traceback" in done.stderr
    log = box.await_log("bye new 0")
    assert log.count("old 0") == 3  # begun, ended, begun again
    assert "bye old 1" not in log
    assert "bye old 2" not in log
    after = pids(box)
    assert (after["worker crunch-1"], after["worker crunch-2"]) == (
        before["worker crunch-1"],
        before["worker crunch-2"],
    )
    assert after["worker crunch-0"] != before["worker crunch-0"]
    os.kill(after["worker crunch-2"], signal.SIGKILL)
    box.await_log("old 2", 2)
    assert "new 2" not in box.log.read_text()


def test_a_new_worker_that_is_never_ready_is_a_failed_reload(box: Box) -> None:
    box.start(showing("old"), "--ready-timeout", "4")
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, showing("new", "pass"))
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "worker crunch-0: was not ready within ready_timeout, 4 s" in done.stderr
    assert pids(box) == before


def test_a_new_worker_that_is_worn_before_it_is_ready_is_a_failed_reload(box: Box) -> None:
    box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    worn = ", max_tasks=2, recycle_jitter=0"
    rewrite(box, showing("new", "while not stop.is_set(): pass", worn))
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "worker crunch-0: was not ready when it was worn: 2 pieces of work, max_tasks; the old code" in done.stderr
    assert pids(box) == before


def test_new_code_that_hangs_in_its_import_is_a_failed_reload(box: Box) -> None:
    box.start(showing("old"), "--ready-timeout", "4")
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, "import subprocess\nsubprocess.run(['sleep', '1000'])\n")
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "the new code was not loaded within ready_timeout, 4 s" in done.stderr
    assert pids(box) == before
    for pid, title in box.processes().items():
        if "sleep" in title:
            await_end(pid)  # it was sent KILL


def test_new_code_without_the_worker_is_a_failed_reload(box: Box) -> None:
    box.start(WAITING)
    box.await_log("up ", 2)
    before = pids(box)
    rewrite(box, WAITING.replace("crunch", "munch"))
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert done.stderr == (
        "daemonkit: beat: the new code has no worker named 'crunch'; reexec the daemon; the old code goes on\n"
    )
    assert {name: pid for name, pid in pids(box).items() if "worker" in name} == {
        name: pid for name, pid in before.items() if "worker" in name
    }


def test_a_worker_that_the_old_code_cannot_have_back_is_told(box: Box) -> None:
    flag = str(box.path / "migrated")
    script = f"""
@worker(readiness=True)
def first(stop):
    if {{old}} and os.path.exists({flag!r}): raise ValueError("migrated already")
    if not {{old}}: open({flag!r}, "w").close()
    log.info("first came up")
    stop.ready()
    stop.wait()

@worker(readiness=True)
def second(stop):
    if not {{old}}: raise KeyError("no second")
    log.info("second came up")
    stop.ready()
    stop.wait()
"""
    box.start(script.format(old=True))
    box.await_log("came up", 2)
    rewrite(box, script.format(old=False))
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "no second" in done.stderr
    assert "the old code goes on, but for" in done.stderr
    assert "worker first-0: ValueError: migrated already" in done.stderr
    assert "migrated already" in box.log.read_text()


def test_threads_and_connections_of_the_script_are_not_its_childrens(box: Box) -> None:
    script = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
connection = socket.create_connection(listener.getsockname())
ours, theirs = socket.socketpair()
threading.Thread(target=time.sleep, args=(1000,), daemon=True, name="poller").start()

@worker
def crunch(stop):
    theirs.send(b"x")
    log.info("read %r", connection.recv(1))
    stop.wait()
"""
    box.start(script)
    log = box.await_log("read b''")
    assert "daemonkit.fork: fork: the child shares the locks of 1 thread ('poller')" in log
    # The second fork server has that thread itself, and yet hears what it is told and reaps.
    assert box.call("reload", "beat").returncode == 0
    box.await_log("read b''", 2)
    assert box.call("kill", "--timeout", "20", "beat").returncode == 0
    assert "had not ended in time" not in box.log.read_text()
    refused = box.call("start", "--fork-guard", "refuse", box.script(script))
    assert refused.returncode == 1
    assert "would share the locks of 1 thread ('poller') and 1 connection" in refused.stderr


def test_a_reload_has_as_many_workers_as_the_new_code_declares_and_those_that_it_adds(box: Box) -> None:
    box.start(showing("old"))
    box.await_log("old", 3)
    rewrite(box, showing("new").replace("count=3", "count=2") + showing("more").replace("crunch", "grind"))
    assert box.call("reload", "beat").returncode == 0
    box.await_log("test: more", 3)
    assert set(pids(box)) == {
        "fork server",
        "worker crunch-0",
        "worker crunch-1",
        *(f"worker grind-{n}" for n in range(3)),
    }
    assert box.call("scale", "beat", "crunch", "4").returncode == 0  # by hand: that stays while the declaration does
    assert box.call("scale", "beat", "grind", "1").returncode == 0
    box.await_log("bye more", 2)
    assert box.call("reload", "beat").returncode == 0
    names = set(pids(box)) - {"fork server"}
    assert names == {"worker grind-0", *(f"worker crunch-{index}" for index in range(4))}


def test_a_fork_server_that_is_replaced_reads_the_code_anew_with_what_it_declares(box: Box) -> None:
    box.start(showing("old"))
    box.await_log("old", 3)
    rewrite(box, showing("new").replace("count=3", "count=4") + showing("more").replace("crunch", "grind"))
    os.kill(pids(box)["fork server"], signal.SIGKILL)
    box.await_log("test: new", 4)
    box.await_log("test: more", 3)


def test_a_reload_gives_a_worker_that_was_given_up_another_chance(box: Box) -> None:
    box.start("@worker(max_restarts=0)\ndef crunch(stop):\n    1 / 0\n")
    box.await_log("given up as fatal")
    rewrite(box, "@worker(max_restarts=0)\ndef crunch(stop):\n    log.info('up'); stop.wait()\n")
    done = box.call("reload", "beat")
    assert done.returncode == 0, done.stderr
    assert child(box, "worker crunch-0")["state"] == "ready"


def test_a_reload_finds_a_worker_that_waits_to_be_respawned(box: Box) -> None:
    box.start("@worker(backoff=600, max_backoff=600)\ndef crunch(stop):\n    1 / 0\n")
    box.await_log("respawned in")
    assert child(box, "worker crunch-0")["state"] == "backoff"
    rewrite(box, "@worker\ndef crunch(stop):\n    log.info('up'); stop.wait()\n")
    assert box.call("reload", "beat").returncode == 0
    assert child(box, "worker crunch-0")["state"] == "ready"
    assert box.await_log("test: up").count("test: up") == 1


def test_a_reload_during_a_reload_is_done_afterwards(box: Box) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    box.start(showing("old"))
    box.await_log("old", 3)
    rewrite(box, showing("new", f"index or open({str(gate)!r}).close(); stop.ready()"))
    with box.popen("reload", "beat") as first:
        box.await_log("new 0")
        rewrite(box, showing("newest"))
        with box.popen("reload", "beat") as second:
            box.await_log("daemonkit: reloaded", 2)
            gate.open("w").close()
            assert first.wait(60) == 0
            assert second.wait(60) == 0
    log = box.log.read_text()
    assert log.count("test: newest") == 3
    assert log.count("bye new ") == 3


def test_a_reload_tells_the_ends_of_what_a_fork_server_was_asked_for_before_it_had_read_the_script(box: Box) -> None:
    gate = box.path / "gate"
    begun = box.path / "begun"
    box.start(
        WAITING
        + f"""
@every(1000, fork=True)
def report(): ...

if os.path.exists({str(gate)!r}):
    open({str(begun)!r}, "w").close()
    time.sleep(1000)
"""
    )
    box.await_log("up ", 2)
    gate.touch()
    os.kill(pids(box)["fork server"], signal.SIGKILL)
    box.await_file(begun)
    gate.unlink()
    with box.popen("trigger", "beat", "report") as trigger:
        box.await_status(lambda status: "job report" in [row["name"] for row in status.get("children", [])])
        assert trigger.poll() is None
        assert box.call("reload", "beat").returncode == 0
        assert trigger.wait(60) == 1
    assert [(row["name"], row["state"]) for row in box.status()["children"]] == [
        ("fork server", "running"),
        ("worker crunch-0", "ready"),
        ("worker crunch-1", "ready"),
    ]
    assert box.call("trigger", "beat", "report").returncode == 0


def test_a_stop_during_a_reload_ends_all(box: Box) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    box.start(showing("old"), "--graceful-timeout", "1")
    box.await_log("old", 3)
    rewrite(box, showing("new", f"open({str(gate)!r}).close(); stop.ready()"))
    with box.popen("reload", "beat") as reload:
        box.await_log("new 0")
        assert box.call("kill", "beat").returncode == 0
        out, _ = reload.communicate(timeout=60)
    assert reload.returncode == 1
    assert "the daemon is stopping" in out
    assert not box.processes()


@pytest.mark.parametrize("count", [1, 5])
def test_a_scale_during_a_reload_is_part_of_it(box: Box, count: int) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    box.start(showing("old"))
    box.await_log("old", 3)
    rewrite(box, showing("new", f"index or open({str(gate)!r}).close(); stop.ready()"))
    with box.popen("reload", "beat") as reload:
        box.await_log("new 0")
        assert box.call("scale", "beat", "crunch", str(count)).returncode == 0
        gate.open("w").close()
        assert reload.wait(60) == 0
    after = pids(box)
    after.pop("fork server")
    assert set(after) == {f"worker crunch-{index}" for index in range(count)}
    news = {
        line.partition("[")[2].partition("]")[0] for line in box.log.read_text().splitlines() if "test: new" in line
    }
    assert {str(pid) for pid in after.values()} <= news


def test_a_worker_that_takes_its_time_to_leave_is_shown_and_waited_for(box: Box) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    box.start(f"@worker\ndef crunch(stop):\n    log.info('old')\n    stop.wait()\n    open({str(gate)!r}).close()\n")
    box.await_log("old")
    old = pids(box)["worker crunch-0"]
    rewrite(box, "@worker\ndef crunch(stop):\n    log.info('new')\n    stop.wait()\n    log.info('bye')\n")
    with box.popen("reload", "beat") as reload:
        box.await_log("new")
        row = box.await_child("worker crunch-0", "stopping")
        assert row["pid"] == old
        assert [each["name"] for each in box.children()].count("worker crunch-0") == 2
        assert reload.poll() is None
        gate.open("w").close()
        assert reload.wait(60) == 0
    await_end(old)


# --- reexec ---


def test_a_reexec_ends_the_workers_gracefully_and_starts_new_ones(box: Box) -> None:
    master = box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, showing("new").replace("crunch", "munch"))
    done = box.call("reexec", "beat")
    assert done.returncode == 0, done.stderr
    log = box.await_log("test: new", 3)
    assert log.count("bye old") == 3
    assert box.pid() == master
    assert not set(before.values()) & set(pids(box).values())
    assert "worker munch-0" in pids(box)


def test_a_reexec_that_is_refused_leaves_the_workers_in_peace(box: Box) -> None:
    box.start(showing("old"))
    box.await_log("old", 3)
    before = pids(box)
    rewrite(box, "1 / 0\n")
    assert box.call("reexec", "beat").returncode == 1
    assert pids(box) == before
    assert "bye" not in box.log.read_text()


def test_a_reexec_that_fails_in_the_last_moment_starts_workers_and_jobs_again(box: Box) -> None:
    """The interpreter vanishes between the trial of the new code and the exec, and comes back later."""
    python, aside = box.path / "python", box.path / "aside"
    python.symlink_to(os.path.realpath(sys.executable))
    paths = [
        str(Path(daemonkit.__file__).parent.parent),
        *(path for path in sys.path if path.endswith("site-packages")),
    ]
    box.environ["PYTHONPATH"] = ":".join(paths)
    script = box.script(
        f"""
        @worker
        def crunch(stop):
            log.info("up")
            stop.wait()

        @every(0.1, fork=True)
        def job(): log.info("job")

        @every(0.1)
        def inline(): log.info("inline")

        @on("stop")
        def vanish():
            if os.path.exists({str(python)!r}):
                os.rename({str(python)!r}, {str(aside)!r})
        """
    )
    started = subprocess.run(
        [str(python), "-m", "daemonkit", "start", script], env=box.environ, capture_output=True, text=True, timeout=60
    )
    assert started.returncode == 0, started.stderr
    box.await_log("test: up")
    box.await_log("test: job")
    master = box.pid()
    done = box.call("reexec", "beat")
    assert done.returncode == 1
    assert "No such file" in done.stderr
    box.await_log("execute a fork server: No such file or directory; tried again")
    os.rename(aside, python)
    log = box.await_log("test: up", 2)
    for name in ("job", "inline"):
        box.await_log(f"test: {name}", log.count(f"test: {name}") + 1)
    assert box.pid() == master


# --- a main loop of the script's own ---


def test_children_wake_a_script_that_has_its_own_loop(box: Box) -> None:
    master = box.start(
        """
        @worker
        def crunch(stop):
            log.info("up")
            stop.wait()
            log.info("bye")

        @every(3600, first=0, fork=True)
        def job():
            log.info("job ran")

        def loop():
            while True:
                signal.pause()

        main(loop)
        """
    )
    box.await_log(": up")
    box.await_log("job ran")
    os.kill(pids(box)["worker crunch-0"], signal.SIGKILL)
    box.await_log(": up", 2)
    box.await_child("worker crunch-0", "ready")
    status = box.await_status(lambda status: status["jobs"][0]["receipt"])
    assert status["jobs"][0]["receipt"].startswith("pid ")
    assert box.call("trigger", "beat", "job").returncode == 0
    assert box.call("reload", "beat").returncode == 0
    box.await_log(": up", 3)
    assert box.call("kill", "beat").returncode == 0
    await_end(master)
    assert "bye" in box.log.read_text()


def test_fork_hooks_run_in_each_child_and_one_that_fails_is_told(box: Box) -> None:
    box.start(
        """
        @on("fork")
        def forked():
            log.info("forked")
            if os.path.exists("broken"):
                raise RuntimeError("hook failed")

        @worker(max_restarts=1)
        def crunch(stop):
            log.info("up")
            stop.wait()
        """,
        "--chdir",
        str(box.path),
    )
    log = box.await_log(": up")
    assert "beat: worker crunch-0[" in log.partition("forked")[0].splitlines()[-1]
    (box.path / "broken").touch()
    os.kill(pids(box)["worker crunch-0"], signal.SIGKILL)
    assert "RuntimeError: hook failed (pid" in box.await_log("given up as fatal")
    assert box.pid() is not None


def test_the_example_with_workers_runs_as_its_text_says(box: Box) -> None:
    text = (Path(__file__).parents[2] / "etc/examples/crunch.py").read_text()
    (box.path / "crunch.py").write_text(text)
    assert box.call("start", box.path / "crunch.py").returncode == 0
    box.await_log("primes from 0 on")
    box.await_log("primes from 1000000 on")
    assert {"worker crunch-0", "worker crunch-1"} <= pids(box, "crunch").keys()
    assert box.call("scale", "crunch", "crunch", "4").returncode == 0
    box.await_log("primes from 3000000 on")
    assert box.call("trigger", "crunch", "report").returncode == 0
    assert "crunch: load (" in box.log.read_text()
    (box.path / "crunch.py").write_text(text.replace("primes from", "new primes from"))
    assert box.call("reload", "crunch").returncode == 0
    assert "new primes from" in box.await_log("new primes from", 4)
    assert box.call("kill", "crunch").returncode == 0


def test_a_service_manager_hears_ready_when_the_last_worker_is_replaced(box: Box) -> None:
    gate, address = box.path / "gate", str(box.path / "notify")
    os.mkfifo(gate)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(30)
        script = box.script(showing("old"))
        process = box.popen("run", script, env={**box.environ, "NOTIFY_SOCKET": address}, stdout=subprocess.DEVNULL)
        heard: list[bytes] = []
        while not any(b"READY=1" in each for each in heard):
            heard.append(manager.recv(4096))
        box.await_log("old", 3)
        rewrite(box, showing("new", f"index or open({str(gate)!r}).close(); stop.ready()"))
        process.send_signal(signal.SIGHUP)
        while b"RELOADING=1" not in heard[-1]:
            heard.append(manager.recv(4096))
        box.await_log("new 0")
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
        manager.settimeout(30)
        gate.open("w").close()
        assert b"READY=1\nSTATUS=reloaded" in manager.recv(4096)
        assert box.log.read_text().count("bye old") == 3
        process.terminate()
        assert process.wait(60) == 0


def test_python_takes_no_child_for_one_with_threads(box: Box) -> None:
    """From 3.12 on it warns of a fork in a process with several, which it counts in /proc/self/stat."""
    box.start(
        """
        import warnings
        warnings.simplefilter("error")

        def fork():
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)

        @worker(max_restarts=0)
        def crunch(stop):
            fork()
            log.info("forked in a worker")
            stop.wait()

        @every(3600, first=0)
        def inline():
            fork()
            log.info("forked in the master")

        @every(3600, first=0, fork=True)
        def job():
            fork()
            log.info("forked in a job")
        """
    )
    box.await_log("forked in", 3)
    assert box.call("reload", "beat").returncode == 0
    assert "Warning" not in box.await_log("forked in a worker", 2)


def test_alarms_of_the_stop_schedules_do_their_work_after_graceful_timeout_too(box: Box) -> None:
    """They are no code of the script, which is interrupted then: the fourth time would be the end of the process."""
    box.start(
        STUBBORN.format('count=20, stop_schedule="TERM/0.5/INT/0.5/TERM/0.5/INT/0.5/TERM/0.5"'),
        "--graceful-timeout",
        "0.4",
    )
    box.await_log(": up", 20)
    assert box.call("kill", "beat").returncode == 0
    log = box.log.read_text()
    assert log.count("had not ended in time") == 20
    assert "interrupted" not in log
    assert "stopped" in log
