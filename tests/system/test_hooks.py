"""Life-cycle hooks, and what is said of an option that a reload cannot change."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness import PATIENCE, Box

from daemonkit.core.pidfile import PidFile


def test_fork_hooks_run_in_a_child_that_a_job_forks(box: Box) -> None:
    told = box.path / "told"
    script = box.script(
        """
        @on("fork")
        def forked():
            open(sys.argv[1], "w").write(str(os.getpid()))

        @after(0.01)
        def work():
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            log.info("child %d ended", pid)
        """
    )
    assert box.call("start", script, told).returncode == 0
    log = box.await_log("ended")
    assert f"child {told.read_text()} ended" in log


def test_a_reload_says_which_changed_options_must_wait_for_the_next_start(box: Box) -> None:
    config = box.path / "daemonkit.toml"
    config.write_text('[daemon]\numask = "022"\n')
    box.environ["DAEMONKIT_CONFIG"] = str(config)
    box.start("@every(60)\ndef work(): pass\n")
    config.write_text('[daemon]\numask = "027"\n')
    assert box.call("reload", "beat").returncode == 0
    box.await_log("umask has changed, and takes effect at the next start")


def test_sys_exit_in_a_signal_handler_stops_the_daemon_with_that_code(box: Box) -> None:
    script = box.script("@every(60)\ndef w(): pass\n@on('SIGUSR1')\ndef leave(): sys.exit(5)\n")
    with box.popen("run", script) as process:
        box.await_log("ready, pid")
        process.send_signal(10)
        process.communicate(timeout=30)
    assert process.returncode == 5


def test_a_start_while_it_stops_waits_for_its_end_and_starts(box: Box) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    pid = box.start(
        "@every(60)\ndef w(): pass\n@on('stop')\ndef linger(): log.info('lingering'); open(GATE).read()\n"
        f"GATE = {str(gate)!r}\n"
    )
    with box.popen("kill", "beat") as ending:
        box.await_log("lingering")
        assert box.status()["state"] == "stopping"
        with box.popen("start", box.path / "beat.py") as starting:
            gate.write_text("")
            starting.communicate(timeout=30)
        assert starting.returncode == 0
        ending.communicate(timeout=30)
    gate.unlink()  # the second one need not wait at it
    assert box.pid() not in (None, pid)


def test_a_start_that_meets_one_who_holds_the_pid_file_for_a_moment_starts(box: Box) -> None:
    """As a `kill` on a slow machine does, when it removes what a daemon has left."""
    pidfile = PidFile(str(box.run_dir / "beat.pid"))
    pidfile.acquire(0, write_pid=False)
    with box.popen("start", box.script("@every(60)\ndef w(): pass\n")) as starting:
        await_watch(starting.pid)
        pidfile.release()
        out, _ = starting.communicate(timeout=60)
    assert starting.returncode == 0, out
    assert box.pid() is not None, out


def await_watch(pid: int) -> None:
    """Return when the process waits for a change of a file (inotify(7))."""
    until = time.monotonic() + PATIENCE
    while "anon_inode:inotify" not in links(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


def links(pid: int) -> set[str]:
    """What its descriptors are."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    return found


def test_a_job_whose_error_cannot_be_put_into_words_is_counted(box: Box) -> None:
    box.start(
        """
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no words")

        @every(0.05)
        def work():
            raise Mute
        """
    )
    box.await_log("job work failed", 2)
    assert "Mute" in box.job("work")["last_error"]


def test_a_reexec_of_a_script_with_a_thread_that_never_ends_goes_through(box: Box) -> None:
    pid = box.start(
        "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n@every(60)\ndef w(): pass\n"
    )
    assert box.call("reexec", "beat").returncode == 0
    assert box.pid() == pid
