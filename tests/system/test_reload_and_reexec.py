"""Reload, report, upgrade in place, a main loop of the script's own, and the ways to stop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from harness import PATIENCE, Box, await_end

BEAT = "@every(0.1)\ndef beat(): log.info('beat')\n"
IDLE = "@every(3600)\ndef beat(): pass\n"


@pytest.fixture(autouse=True)
def known_and_compiled(box: Box, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let setproctitle leave the mark of the box in /proc/PID/environ, and let commands compile their code once."""
    bytecode = tmp_path_factory.getbasetemp() / "bytecode"
    box.environ |= {"SPT_NOENV": "1", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}


def configure(box: Box, text: str) -> None:
    """Write the configuration file that the box's commands and daemons read."""
    path = box.path / "daemonkit.toml"
    path.write_text(text)
    path.chmod(0o644)
    box.environ["DAEMONKIT_CONFIG"] = str(path)


# --- reload


@pytest.mark.parametrize("way", ["signal", "command"])
def test_hup_and_reload_read_the_configuration_again_and_run_the_reload_hooks(box: Box, way: str) -> None:
    configure(box, "[settings]\nword = 'old'\n")
    pid = box.start("@on('reload')\ndef again(): log.info('word is %s', settings()['word'])\n")
    configure(box, "[settings]\nword = 'new'\n")
    if way == "signal":
        os.kill(pid, signal.SIGHUP)
    else:
        done = box.call("reload", "beat")
        assert (done.returncode, done.stdout) == (0, "beat was reloaded\n")
    box.await_log("word is new")
    assert box.pid() == pid


def test_reload_returns_the_error_of_a_broken_file_and_the_old_configuration_stays(box: Box) -> None:
    configure(box, "[settings]\nword = 'old'\n")
    pid = box.start("@every(0.1)\ndef beat(): log.info('word is %s', settings()['word'])\n")
    configure(box, "[settings\nword = 'new'\n")
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "daemonkit.toml" in done.stderr
    seen = box.log.read_text().count("word is old")
    text = box.await_log("word is old", seen + 2)
    assert "the old configuration stays" in text
    assert "word is new" not in text
    assert box.pid() == pid


def test_reload_returns_the_error_of_an_unknown_key(box: Box) -> None:
    configure(box, "[daemon]\n")
    box.start(BEAT)
    configure(box, "[daemon]\ngraceful_timeot = 3\n")
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "graceful_timeout" in done.stderr, "the nearest known key is named"


def test_reload_returns_the_error_of_a_failed_hook_and_the_old_configuration_is_back(box: Box) -> None:
    configure(box, "[settings]\nword = 'old'\n")
    pid = box.start(
        """
        @on("reload")
        def again():
            if settings()["word"] == "wrong":
                raise ValueError("cannot use that word")

        @every(0.1)
        def beat(): log.info("word is %s", settings()["word"])
        """
    )
    configure(box, "[settings]\nword = 'wrong'\n")
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "cannot use that word" in done.stderr
    seen = box.log.read_text().count("word is old")
    text = box.await_log("word is old", seen + 2)
    assert "word is wrong" not in text
    assert "Traceback" in text
    configure(box, "[settings]\nword = 'right'\n")
    assert box.call("reload", "beat").returncode == 0
    box.await_log("word is right")
    assert box.pid() == pid


def test_an_on_sighup_handler_takes_the_place_of_reload_and_its_error_reaches_the_command(box: Box) -> None:
    box.start(BEAT + "@on('SIGHUP')\ndef mine(): raise RuntimeError('not today')\n")
    done = box.call("reload", "beat")
    assert done.returncode == 1
    assert "not today" in done.stderr


# --- report and log


def test_usr1_writes_a_status_report_and_reopens_a_renamed_log(box: Box) -> None:
    pid = box.start(BEAT)
    box.await_log("beat", 2)
    old = box.path / "daemon.log.1"
    box.log.rename(old)
    os.kill(pid, signal.SIGUSR1)
    text = box.await_log("RUNS  FAILED  MISSED")
    assert f"beat: running, pid {pid}" in text
    box.await_log("test: beat", 3)
    assert f"beat: running, pid {pid}" not in old.read_text()


def test_a_log_that_cannot_be_reopened_stays_the_one_that_is_open(box: Box) -> None:
    pid = box.start(BEAT)
    old = box.path / "daemon.log.1"
    box.log.rename(old)
    box.log.mkdir()
    os.kill(pid, signal.SIGUSR1)
    text = box.await_file(old, "the old one stays open")
    box.await_file(old, "test: beat", text.count("test: beat") + 2)
    assert box.pid() == pid


# --- upgrade in place


def upgrade(box: Box, way: str, pid: int) -> None:
    if way == "signal":
        os.kill(pid, signal.SIGUSR2)
    else:
        done = box.call("reexec", "beat")
        assert (done.returncode, done.stdout) == (0, f"beat runs the new code, pid {pid}\n"), done.stderr


@pytest.mark.parametrize("way", ["signal", "command"])
def test_reexec_runs_the_new_code_under_the_same_pid_with_counts_and_pauses_kept(box: Box, way: str) -> None:
    rest = "@every(0.2)\ndef rest(): pass\n"
    pid = box.start(BEAT + rest)
    box.await_log("beat", 5)
    assert box.call("pause", "beat", "rest").returncode == 0
    before = box.status()
    box.script(BEAT.replace("'beat'", "'new beat'") + rest + "@every(3600)\ndef more(): pass\n")
    upgrade(box, way, pid)
    box.await_log("new beat", 2)
    after = box.status()
    assert (after["pid"], after["since"]) == (pid, before["since"])
    old, new = ({job["name"]: job for job in status["jobs"]} for status in (before, after))
    assert set(new) == {"beat", "rest", "more"}
    assert new["beat"]["runs"] >= old["beat"]["runs"] + 2
    assert new["rest"]["state"] == "paused"
    assert new["rest"]["runs"] == old["rest"]["runs"]
    assert (box.run_dir / "beat.pid").read_text() == f"{pid}\n"
    assert sorted(os.listdir(box.run_dir)) == ["beat.pid", "beat.sock"]


def test_reexec_keeps_the_grid_of_the_timer(box: Box) -> None:
    box.start("@every(7)\ndef beat(): pass\n")
    before = box.job("beat")["next_run"]
    for _ in range(3):
        assert box.call("reexec", "beat").returncode == 0
    after = box.job("beat")["next_run"]
    steps = (after - before) / 7
    assert steps == pytest.approx(round(steps), abs=0.01)


def test_a_start_hammered_during_upgrades_is_always_told_the_same_pid(box: Box) -> None:
    pid = box.start(IDLE)
    calm, said = threading.Event(), []

    def hammer() -> None:
        while not calm.is_set():
            done = box.call("start", box.path / "beat.py")
            said.append((done.returncode, done.stdout, done.stderr))

    hammers = [threading.Thread(target=hammer) for _ in range(2)]
    for each in hammers:
        each.start()
    try:
        for _ in range(4):
            done = box.call("reexec", "beat")
            assert done.returncode == 0, done.stderr
    finally:
        calm.set()
        for each in hammers:
            each.join()
    assert set(said) == {(0, f"beat is already running, pid {pid}\n", "")}
    assert box.log.read_text().count("new code") >= 4
    assert list(box.processes()) == [pid]


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ("raise RuntimeError('half done')\n", "RuntimeError: half done"),
        ("def f(:\n", "SyntaxError"),
        ("sys.exit(4)\n", "called sys.exit(4)"),
        ("@every(0)\ndef beat(): pass\n", "@every(0)"),
        ("os.kill(os.getpid(), 9)\n", "could not be tried"),
    ],
    ids=["raises", "syntax", "exits", "declares-wrongly", "dies"],
)
def test_new_code_that_does_not_load_is_refused_with_its_traceback_and_the_old_goes_on(
    box: Box, new: str, why: str
) -> None:
    pid = box.start(BEAT)
    box.script(new)
    done = box.call("reexec", "beat")
    assert done.returncode == 1
    assert why in done.stderr
    text = box.log.read_text()
    assert "upgrade refused, the old code goes on" in text
    assert why in text
    box.await_log("test: beat", text.count("test: beat") + 2)
    assert box.status()["pid"] == pid


def test_a_trial_of_new_code_that_hangs_is_ended_at_ready_timeout_and_the_old_goes_on(box: Box) -> None:
    configure(box, "[daemon]\n")
    pid = box.start(BEAT)  # it may take longer than what comes now
    configure(box, "[daemon]\nready_timeout = 1\n")
    assert box.call("reload", "beat").returncode == 0
    box.script("time.sleep(600)\n")
    done = box.call("reexec", "beat")
    assert done.returncode == 1, done.stdout
    text = box.log.read_text()
    box.await_log("test: beat", text.count("test: beat") + 2)
    assert list(box.processes()) == [pid]


def test_new_code_whose_start_hook_fails_ends_the_daemon_in_order_and_says_why(box: Box) -> None:
    pid = box.start(IDLE)
    box.script(IDLE + "@on('start')\ndef begin(): raise RuntimeError('no table')\n")
    done = box.call("reexec", "beat")
    assert done.returncode == 1
    assert "no table" in done.stderr
    await_end(pid)
    assert "no table" in box.log.read_text()
    assert list(box.run_dir.iterdir()) == []


def test_alarms_that_are_due_at_the_moment_of_the_exec_do_not_kill_the_daemon(box: Box) -> None:
    pid = box.start("@every(0.001)\ndef beat(): pass\n")
    for _ in range(5):
        assert box.call("reexec", "beat").returncode == 0
    assert box.status()["pid"] == pid
    assert box.log.read_text().count("ready, pid") == 6


def test_no_signal_is_lost_during_the_exec(box: Box) -> None:
    pid = box.start(
        """
        time.sleep(0.1)  # the new code's own start takes that long, and all that while nobody handles signals

        @on("SIGWINCH")
        def winch(): log.info("winch")

        @on("SIGRTMIN")  # whoever does not catch it dies of it
        def real(): log.info("real")

        @every(3600)
        def beat(): pass
        """
    )
    for count in range(1, 3):
        os.kill(pid, signal.SIGUSR2)
        box.await_log("executing the new code", count)
        os.kill(pid, signal.SIGWINCH)
        os.kill(pid, signal.SIGRTMIN)
        os.kill(pid, signal.SIGHUP)
        for said in ("test: winch", "test: real", "daemonkit: reloaded"):
            box.await_log(said, count)
        box.await_log("ready, pid", count + 1)
    os.kill(pid, signal.SIGUSR2)
    box.await_log("executing the new code", 3)
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    assert list(box.run_dir.iterdir()) == []


def descriptors(box: Box, pid: int) -> list[str]:
    """What the daemon has open while it does nothing but answer one connection, which asks it."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rwb") as file:
        sock.connect(str(box.run_dir / "beat.sock"))
        until = time.monotonic() + PATIENCE
        while True:
            file.write(b'{"do": "jobs"}\n')
            file.flush()
            assert json.loads(file.readline())["ok"]  # its loop turns: all that belongs to it is open
            found = sorted(re.sub(r"\d+", "N", link) for link in links(pid))
            connections = sum(link.startswith("socket:") for link in found)
            if connections == 2:  # it listens, and it hears us: those who asked before are gone
                return found
            assert time.monotonic() < until, found


def links(pid: int) -> list[str]:
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def test_reexec_runs_stop_and_start_hooks_once_each_and_hands_listening_sockets_on(box: Box) -> None:
    pid = box.start("@on('start')\ndef a(): log.info('began')\n@on('stop')\ndef b(): log.info('ended')\n" + IDLE)
    assert box.call("reexec", "beat").returncode == 0
    text = box.log.read_text()
    assert (text.count("test: began"), text.count("test: ended")) == (2, 1)
    before = descriptors(box, pid)
    for _ in range(3):
        assert box.call("reexec", "beat").returncode == 0
    assert descriptors(box, pid) == before, "descriptors pile up"


# --- a main loop of the script's own

OWN_LOOP = """
inside = []

@every(0.02)
def tick():
    if inside:
        log.info("nested in %s", inside)
    inside.append("tick")
    deadline = time.monotonic() + 0.03
    while time.monotonic() < deadline:
        pass
    inside.pop()

@on("SIGWINCH")
def winch():
    if inside:
        log.info("nested in %s", inside)
    log.info("winch")

@on("stop")
def stop():
    log.info("stop hook")
"""


def test_jobs_interrupt_the_scripts_own_loop_and_are_never_nested(box: Box) -> None:
    pid = box.start(
        OWN_LOOP
        + "def loop():\n    n = 0\n    while True:\n        n += 1\n"
        + "        if n % 100_000 == 0:\n            log.info('round')\n"
        + "main(loop)\n"
    )
    box.await_log("round", 2)
    for count in range(1, 6):
        os.kill(pid, signal.SIGWINCH)
        box.await_log("test: winch", count)
    until = time.monotonic() + PATIENCE
    while box.job("tick")["runs"] <= 3:
        assert time.monotonic() < until
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    text = box.log.read_text()
    assert "nested" not in text
    assert "the main loop was left" in text
    assert text.count("test: stop hook") == 1
    assert "Traceback" not in text
    assert list(box.run_dir.iterdir()) == []


@pytest.mark.parametrize("blocked", ["os.read(os.pipe()[0], 1)", "subprocess.run(['sleep', '600'])", "signal.pause()"])
def test_a_loop_that_waits_in_the_kernel_is_interrupted_all_the_same(box: Box, blocked: str) -> None:
    head = (
        "import subprocess\n@every(0.1)\ndef tick(): log.info('tick')\n@on('reload')\ndef again(): log.info('again')\n"
    )
    pid = box.start(head + f"def loop():\n    while True:\n        {blocked}\nmain(loop)\n")
    text = box.await_log("test: tick", 3)
    os.kill(pid, signal.SIGHUP)
    box.await_log("test: again")
    assert box.status()["pid"] == pid
    assert box.call("trigger", "beat", "tick").returncode == 0
    text = box.await_log("test: tick", text.count("test: tick") + 2)
    done = box.call("kill", "beat")
    assert (done.returncode, done.stdout) == (0, f"beat was stopped, pid {pid}\n")
    assert list(box.run_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("end", "code"), [("return", 0), ("raise ValueError('over')", 1), ("sys.exit(3)", 3), ("sys.exit('words')", 1)]
)
def test_the_daemon_ends_with_its_own_loop_and_its_exit_code(box: Box, end: str, code: int) -> None:
    script = box.script(OWN_LOOP + f"def loop():\n    {end}\nmain(loop)\n")
    done = box.call("run", script)
    assert done.returncode == code, done.stderr
    text = box.log.read_text()
    assert text.count("test: stop hook") == 1
    assert ("ValueError: over" in text) == (end.startswith("raise"))
    assert list(box.run_dir.iterdir()) == []


def test_own_loop_and_upgrade_go_together(box: Box) -> None:
    text = OWN_LOOP + "def loop():\n    while True:\n        time.sleep(0.05)\nmain(loop)\n"
    pid = box.start(text)
    box.script(text.replace('log.info("winch")', 'log.info("new winch")'))
    assert box.call("reexec", "beat").returncode == 0
    os.kill(pid, signal.SIGWINCH)
    box.await_log("new winch")
    assert box.call("kill", "beat").returncode == 0
    assert "nested" not in box.log.read_text()


@pytest.mark.parametrize(
    "theft",
    [
        "signal.setitimer(signal.ITIMER_REAL, 0)",
        "signal.alarm(600)",
        "signal.signal(signal.SIGALRM, lambda number, frame: None)",
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
    ],
    ids=["cancelled", "set", "handled", "ignored"],
)
def test_a_loop_of_ones_own_that_takes_the_alarm_does_not_stop_the_jobs(box: Box, theft: str) -> None:
    box.start(
        f"""
        @every(0.05)
        def tick(): log.info("tick")

        def loop():
            time.sleep(0.2)
            {theft}
            log.info("taken")
            while True:
                signal.pause()

        main(loop)
        """
    )
    text = box.await_log("test: taken")
    box.await_log("test: tick", text.count("test: tick") + 5)  # and no signal of ours


# --- jobs that take what daemonkit lives on


@pytest.mark.parametrize(
    "theft",
    [
        "signal.signal(signal.SIGALRM, mine)",
        "signal.alarm(1)",
        "signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)",
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
    ],
)
def test_a_job_that_takes_the_alarm_is_told_in_the_log_and_the_others_go_on(box: Box, theft: str) -> None:
    box.start(
        f"""
        def mine(number, frame):
            log.info("mine rang")

        @after(0.001)
        def thief():
            {theft}
            log.info("taken")

        @every(0.05)
        def tick(): log.info("tick")

        @every(0.2)
        def other(): log.info("other")
        """
    )
    text = box.await_log("taken")
    box.await_log("test: tick", text.count("test: tick") + (25 if "alarm(" in theft else 8))
    text = box.await_log("test: other", 2)
    assert "the timer goes on with a timerfd" in text, text
    if "signal(signal.SIGALRM" in theft:
        assert "job thief has set" in text
    assert box.call("kill", "beat").returncode == 0


# --- the ways to stop


def test_a_hanging_job_is_stopped_hard_after_graceful_timeout_with_exit_status_1(box: Box) -> None:
    script = box.script(
        """
        @after(0.001)
        def hangs():
            log.info("hangs")
            time.sleep(600)

        @on("stop")
        def stop(): log.info("stop hook")
        """
    )
    daemon = box.popen("run", "--graceful-timeout", "0.4", script)
    box.await_log("test: hangs")
    daemon.terminate()
    daemon.communicate(timeout=60)
    assert daemon.returncode == 1
    text = box.log.read_text()
    assert "job hangs: interrupted, the time to finish was up" in text
    assert text.count("test: stop hook") == 1
    assert list(box.run_dir.iterdir()) == []


def test_a_job_that_ends_within_graceful_timeout_makes_exit_status_0(box: Box) -> None:
    script = box.script(
        """
        @after(0.001)
        def slow():
            log.info("begun")
            time.sleep(0.5)
            log.info("finished")
        """
    )
    daemon = box.popen("run", script)
    box.await_log("test: begun")
    daemon.terminate()
    daemon.communicate(timeout=60)
    assert daemon.returncode == 0
    assert "test: finished" in box.log.read_text()


def test_stop_hooks_run_once_in_their_order_and_one_that_fails_does_not_stop_the_next(box: Box) -> None:
    script = box.script(
        IDLE
        + "@on('stop')\ndef first(): log.info('hook 1'); raise OSError('gone')\n"
        + "@on('stop')\ndef second(): log.info('hook 2')\n"
    )
    daemon = box.popen("run", script)
    box.await_log("ready, pid")
    daemon.terminate()
    daemon.communicate(timeout=60)
    text = box.log.read_text()
    assert (text.count("test: hook 1"), text.count("test: hook 2")) == (1, 1)
    assert text.index("hook 1") < text.index("hook 2")
    assert daemon.returncode == 1
    assert "stop hook first failed" in text


HANGING = """
@after(0.001)
def hangs():
    log.info("hangs")
    time.sleep(600)
"""


def await_end_of(daemon: subprocess.Popen[str], *numbers: signal.Signals) -> None:
    """Sleep until ``daemon`` has ended, sending it ``numbers`` meanwhile."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for number in numbers:
            daemon.send_signal(number)
        try:
            daemon.communicate(timeout=0.1 if numbers else 60)
        except subprocess.TimeoutExpired:
            continue
        return
    daemon.kill()
    daemon.communicate()
    pytest.fail(f"it went on in spite of {numbers}")


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGQUIT,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGQUIT),
    ],
    ids=lambda numbers: "-".join(n.name for n in numbers),
)
def test_quit_or_a_second_stop_signal_ends_the_job_in_hand_at_once(
    box: Box, numbers: tuple[signal.Signals, ...]
) -> None:
    daemon = box.popen("run", "--graceful-timeout", "1000", box.script(HANGING))
    box.await_log("test: hangs")
    first, *second = numbers
    daemon.send_signal(first)
    await_end_of(daemon, *second)  # again and again: two of a kind are one to the kernel while the first is pending
    assert daemon.returncode == 1
    assert list(box.run_dir.iterdir()) == []


def test_int_in_the_foreground_stops_in_order_with_exit_status_0(box: Box) -> None:
    daemon = box.popen("run", box.script(IDLE + "@on('stop')\ndef stop(): log.info('hook')\n"))
    box.await_log("ready, pid")
    began = time.monotonic()
    daemon.send_signal(signal.SIGINT)
    said = daemon.communicate(timeout=60)[0]
    assert daemon.returncode == 0, said
    assert time.monotonic() - began < 20
    text = box.log.read_text()
    assert text.count("test: hook") == 1
    assert "Traceback" not in text + said
    assert list(box.run_dir.iterdir()) == []


def test_int_of_a_terminals_whole_group_leaves_neither_daemon_nor_traceback(box: Box) -> None:
    daemon = box.popen("run", box.script(IDLE), start_new_session=True)
    box.await_log("ready, pid")
    os.killpg(daemon.pid, signal.SIGINT)
    said = daemon.communicate(timeout=60)[0]
    assert daemon.returncode == 0, said
    assert "Traceback" not in said


def test_restart_starts_it_again_with_the_same_arguments(box: Box) -> None:
    script = box.script("log.info('args %s', sys.argv[1:])\n" + IDLE)
    assert box.call("start", script, "one", "two").returncode == 0
    pid = box.pid()
    done = box.call("restart", "beat")
    assert done.returncode == 0, done.stderr
    assert box.pid() not in (None, pid)
    assert box.log.read_text().count("'one', 'two']") == 2
