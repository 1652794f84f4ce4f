"""Jobs in a process of their own: what they do to themselves touches nobody else."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest
from harness import Box, await_end


def children(box: Box) -> list[dict[str, Any]]:
    return [row for row in box.children() if row["name"].startswith("job ")]


def test_a_forked_job_runs_in_a_child_of_the_fork_server_under_its_title(box: Box) -> None:
    box.start(
        """
        @every(3600, first=0, fork=True)
        def report():
            log.info("parent %d", os.getppid())
            time.sleep(1000)
        """
    )
    log = box.await_log("parent")
    processes = box.processes()
    server = next(pid for pid, title in processes.items() if title == "beat: fork server")
    assert f"parent {server}" in log
    (row,) = children(box)
    assert (row["name"], processes[row["pid"]]) == ("job report", "beat: job report")
    assert "job report" in box.call("status", "beat").stdout


def test_a_job_without_fork_stays_in_the_master(box: Box) -> None:
    master = box.start(
        "@every(3600, first=0)\ndef inline(): log.info('in %d', os.getpid())\n@every(99, fork=True)\ndef other(): ...\n"
    )
    assert f"in {master}" in box.await_log(": in ")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('bad day')", "ValueError: bad day (pid "),
        ("sys.exit(3)", "exited with status 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("os.close(1); os.close(2); os.abort()", "killed by SIGABRT"),
    ],
)
def test_what_goes_wrong_in_a_forked_job_is_counted_and_told_and_touches_nobody(box: Box, body: str, said: str) -> None:
    master = box.start(f"@every(3600, fork=True)\ndef bad():\n    {body}\n")
    done = box.call("trigger", "beat", "bad")
    assert done.returncode == 1
    assert said in done.stderr
    job = box.job("bad")
    assert (job["runs"], job["failures"]) == (1, 1)
    assert said in job["last_error"]
    assert said in box.call("status", "beat").stdout
    assert box.pid() == master
    if "raise" in body:
        assert "Traceback" in box.log.read_text()


def test_trigger_waits_for_the_end_and_the_receipt_is_in_the_status(box: Box) -> None:
    box.start("@every(3600, fork=True)\ndef work():\n    time.sleep(0.3)\n    log.info('worked')\n")
    assert box.call("trigger", "beat", "work").returncode == 0
    assert "worked" in box.log.read_text()
    job = box.job("work")
    assert job["duration"] >= 0.3
    assert job["failures"] == 0
    found = re.search(r" exited with status 0 after (\d+\.\d\d) s ", job["receipt"])
    assert found
    assert float(found[1]) == pytest.approx(job["duration"], abs=0.01)
    assert "work: last process: pid" in box.call("status", "beat").stdout


def test_a_job_that_takes_too_long_gets_term_and_its_last_words_are_heard(box: Box) -> None:
    box.start(
        """
        def clean_up(number, frame):
            log.info("cleaning up")
            sys.exit(0)

        @every(3600, fork=True, timeout=2)  # time enough to come to the next line, also on a busy machine
        def slow():
            signal.signal(signal.SIGTERM, clean_up)
            time.sleep(1000)
        """
    )
    done = box.call("trigger", "beat", "slow")
    assert done.returncode == 1
    assert "took longer than its timeout, 2 s (pid" in done.stderr
    assert "cleaning up" in box.log.read_text()
    assert box.job("slow")["failures"] == 1


def test_a_job_that_ignores_term_is_killed_with_its_whole_tree(box: Box) -> None:
    box.start(
        """
        import subprocess

        @every(3600, fork=True, timeout=2)
        def slow():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            inner = subprocess.Popen(["sleep", "1000"])
            outer = subprocess.Popen(["setsid", "sh", "-c", "sleep 1001 & echo $!; wait"], stdout=subprocess.PIPE)
            log.info("tree %d %d %d", inner.pid, outer.pid, int(outer.stdout.readline()))
            time.sleep(1000)
        """
    )
    done = box.call("trigger", "beat", "slow")
    assert done.returncode == 1
    assert "killed by SIGKILL" in done.stderr
    tree = box.log.read_text().partition("tree ")[2].split("\n")[0].split()
    assert len(tree) == 3
    for pid in tree:
        await_end(int(pid))


def fifo(box: Box) -> str:
    os.mkfifo(box.path / "gate")
    return str(box.path / "gate")


GATED = """
@every(0.2, first=0, fork=True, overlap={overlap!r}, max_instances={most})
def work():
    log.info("begin")
    open({gate!r}).close()
    log.info("end")

@every(0.2)
def tick():
    log.info("tick")
"""


def test_overlap_skip_counts_the_ticks_that_fall_into_a_run(box: Box) -> None:
    gate = fifo(box)
    box.start(GATED.format(overlap="skip", most=1, gate=gate))
    box.await_log("begin")
    log = box.await_log("tick", 6)
    assert log.count("begin") == 1
    assert box.job("work")["missed"] >= 3
    done = box.call("trigger", "beat", "work")
    assert done.returncode == 1
    assert "it is running, 1 of max_instances=1" in done.stderr
    with open(gate, "w"):
        box.await_log("begin", 2)


def test_overlap_queue_runs_once_more_right_after(box: Box) -> None:
    gate = fifo(box)
    box.start(GATED.format(overlap="queue", most=1, gate=gate).replace("@every(0.2, first=0", "@every(3600"))
    with box.popen("trigger", "beat", "work") as first:
        box.await_log("begin")
        with box.popen("trigger", "beat", "work") as second, box.popen("trigger", "beat", "work") as third:
            box.await_log("tick", 5)
            assert len(children(box)) == 1
            with open(gate, "w"):
                assert [each.wait(60) for each in (first, second, third)] == [0, 0, 0]
    assert box.job("work")["runs"] in (2, 3)


def test_overlap_kill_ends_the_run_in_hand_for_the_next(box: Box) -> None:
    gate = fifo(box)
    box.start(GATED.format(overlap="kill", most=1, gate=gate))
    log = box.await_log("begin", 3)
    assert "job work: ended for the next run (pid" in log
    assert "killed by SIGTERM" in log
    assert box.job("work")["failures"] >= 1


def test_so_many_instances_run_at_once_and_no_more(box: Box) -> None:
    gate = fifo(box)
    box.start(GATED.format(overlap="skip", most=3, gate=gate))
    box.await_log("begin", 3)
    box.await_log("tick", 10)
    assert len(children(box)) == 3
    assert box.log.read_text().count("begin") == 3


def test_cron_jobs_can_be_forked(box: Box) -> None:
    # On a day that is far off: it must not run by itself when it is triggered.
    box.start("@cron('0 0 29 2 *', fork=True, timeout='60s')\ndef work(): log.info('in %d', os.getpid())\n")
    assert box.call("trigger", "beat", "work").returncode == 0
    assert int(box.log.read_text().partition("test: in ")[2].split()[0]) != box.pid()


def test_law_3_a_child_has_nothing_of_what_jobs_have_opened_or_changed(box: Box) -> None:
    box.start(
        """
        import socket
        import threading
        state = []

        @after(0.01)
        def spoil():
            global kept
            kept = socket.create_connection(listener)
            opened.append(open(__file__))
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            state.append("spoilt")
            os.chdir("/tmp")
            log.info("spoilt")

        opened = []
        server = socket.create_server(("127.0.0.1", 0))
        listener = server.getsockname()
        server.set_inheritable(False)

        @every(3600, fork=True)
        def look():
            with os.scandir("/proc/self/fd") as found:
                links = [os.readlink(f"/proc/self/fd/{each.name}") for each in found]
            sockets = [link for link in links if link.startswith("socket:")]
            log.info("state %r, %d threads, %d sockets", state, threading.active_count(), len(sockets))
            log.info("files %s", [link for link in links if "beat" in link])
        """
    )
    box.await_log("spoilt")
    assert box.call("trigger", "beat", "look").returncode == 0
    log = box.log.read_text()
    # Two sockets: the listener that the import has opened, and where notes are sent.
    assert "state [], 1 threads, 2 sockets" in log
    assert "files []" in log


def test_a_child_has_no_descriptors_but_streams_log_and_notes(box: Box) -> None:
    box.start(
        """
        @every(3600, fork=True)
        def look():
            with os.scandir("/proc/self/fd") as found:
                links = sorted(os.readlink(f"/proc/self/fd/{each.name}") for each in found)
            log.info("links %s", [link for link in links if not link.endswith("/fd")])
        """
    )
    assert box.call("trigger", "beat", "look").returncode == 0
    line = box.log.read_text().partition("links ")[2].split("\n")[0]
    links = [link.partition(":")[0] for link in eval(line)]
    assert links == sorted(["/dev/null", *[str(box.log)] * 3, "socket"])


def test_a_stop_lets_a_forked_job_finish(box: Box) -> None:
    box.start(
        "@every(3600, first=0, fork=True)\ndef work():\n    log.info('begin')\n    time.sleep(1)\n    log.info('end')\n"
    )
    box.await_log("begin")
    assert box.call("kill", "beat").returncode == 0
    log = box.log.read_text()
    assert "end" in log
    assert "killed" not in log


def test_a_stop_ends_a_forked_job_that_will_not_finish(box: Box) -> None:
    box.start(
        "@every(3600, first=0, fork=True)\ndef work():\n    log.info('begin')\n    time.sleep(1000)\n",
        "--graceful-timeout",
        "2",
    )
    box.await_log("begin")
    with box.popen("trigger", "beat", "work") as refused:
        assert refused.wait(60) == 1
    assert box.call("kill", "beat").returncode == 0
    assert "job work: ended: the daemon stops (pid" in box.log.read_text()


def test_who_waits_for_a_triggered_job_is_told_that_the_daemon_stopped(box: Box) -> None:
    box.start(
        "@every(3600, fork=True)\ndef work():\n    log.info('begin')\n    time.sleep(1000)\n", "--graceful-timeout", "1"
    )
    with box.popen("trigger", "beat", "work") as waiting:
        box.await_log("begin")
        assert box.call("kill", "beat").returncode == 0
        out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert "the daemon stops" in out


def test_a_reload_gives_forked_jobs_the_new_code_and_lets_the_old_run_finish(box: Box) -> None:
    gate = fifo(box)
    text = "@every(3600, fork=True)\ndef work():\n    log.info('{0} begin')\n    {1}\n    log.info('{0} end')\n"
    box.start(text.format("old", f"open({gate!r}).close()"))
    with box.popen("trigger", "beat", "work") as waiting:
        box.await_log("old begin")
        box.script(text.format("new", "pass"))
        done = box.call("reload", "beat")
        assert done.returncode == 0, done.stderr
        states = sorted(row["state"] for row in box.status()["children"] if row["name"] == "fork server")
        assert states == ["retiring", "running"]
        with open(gate, "w"):
            assert waiting.wait(60) == 0
    assert box.call("trigger", "beat", "work").returncode == 0
    log = box.log.read_text()
    assert log.count("old end") == 1
    assert log.count("new end") == 1
    assert len([row for row in box.status()["children"] if row["name"] == "fork server"]) == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_children_follow_a_log_that_was_rotated_and_are_stamped_with_their_title(
    box: Box, number: signal.Signals
) -> None:
    gate = fifo(box)
    master = box.start(
        f"@worker\ndef crunch(stop):\n    log.info('before')\n    open({gate!r}).close()\n"
        "    log.info('after')\n    os.system('echo from below')\n    stop.wait()\n"
    )
    box.await_log("before")
    os.rename(box.log, box.path / "daemon.log.1")
    os.kill(master, number)
    box.await_file(box.log)
    with open(gate, "w"):
        log = box.await_log("from below")
    line = next(line for line in log.splitlines() if "after" in line)  # the reload's new worker may have come by, too
    assert " beat: worker crunch-0[" in line
    assert "after" not in (box.path / "daemon.log.1").read_text()


def test_thousands_of_runs_leave_nothing_in_the_master(box: Box) -> None:
    box.start("@every(0.002, fork=True, max_instances=4)\ndef work(): ...\n@every(0.1)\ndef look(): runs()\n" + RUNS)
    sizes = []
    for count in (200, 1500):
        box.await_log(f"reached {count}")
        sizes.append(memory(box.pid()))
    assert sizes[1] - sizes[0] < 600 * 1024
    assert len(os.listdir(f"/proc/{box.pid()}/fd")) < 30


RUNS = """
def runs():
    import daemonkit.api
    count = daemonkit.api.default.jobs["work"].record.runs
    for mark in (200, 1500):
        if count >= mark:
            log.info("reached %d", mark)
    return count
"""


def memory(pid: int | None) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
