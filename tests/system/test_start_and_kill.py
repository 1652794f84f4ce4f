"""What start says of a name that is taken and of a wrong declaration; what kill knows of a daemon's schedule."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness import PATIENCE, Box

IDLE = "@every(3600)\ndef beat(): pass\n"
BUSY = "@after(0.001)\ndef job():\n    log.info('in hand')\n    time.sleep(600)\n"
STUBBORN = "@on('SIGTERM')\ndef no(): log.info('no')\n" + IDLE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest) -> None:
    """Let setproctitle leave the mark of the box in /proc/PID/environ."""
    for name in {"box", "open_box"} & set(request.fixturenames):
        request.getfixturevalue(name).environ["SPT_NOENV"] = "1"


def elsewhere(box: Box, text: str) -> Path:
    """A script of the same stem in another directory."""
    (box.path / "elsewhere").mkdir()
    return box.script(text, "elsewhere/beat.py")


# --- a name that is taken


@pytest.mark.parametrize("text", [IDLE, BUSY], ids=["idle", "busy"])
def test_start_of_another_script_of_the_same_name_fails_and_names_the_one_that_runs(box: Box, text: str) -> None:
    pid = box.start(text)
    if text == BUSY:
        box.await_log("in hand")
    other = elsewhere(box, IDLE)
    began = time.monotonic()
    done = box.call("start", other)
    assert time.monotonic() - began < PATIENCE  # the job in hand takes ten minutes
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"daemonkit: start {other}: beat is already running, pid {pid}, and it is {box.path / 'beat.py'}; "
        "give this one a name of its own with --name\n"
    )
    assert box.call("start", "--name", "other", other).returncode == 0
    if text == BUSY:
        box.call("kill", "--timeout", "0", "beat")


def test_start_of_the_same_script_by_another_way_is_a_success(box: Box) -> None:
    pid = box.start(IDLE)
    (box.path / "link.py").symlink_to("beat.py")
    for target in ("beat.py", "./beat.py", f"{box.path}/../{box.path.name}/beat.py"):
        done = box.call("start", target)
        assert (done.returncode, done.stdout) == (0, f"beat is already running, pid {pid}\n"), done.stderr
    done = box.call("start", "--name", "beat", "link.py")
    assert (done.returncode, done.stdout) == (0, f"beat is already running, pid {pid}\n"), done.stderr


def test_start_of_a_module_in_the_place_of_a_script_is_another_one(box: Box) -> None:
    pid = box.start(IDLE)
    done = box.call("start", "-m", "beat")
    assert done.returncode == 1
    assert f"beat is already running, pid {pid}, and it is {box.path / 'beat.py'}" in done.stderr


def test_start_still_names_the_script_after_an_upgrade(box: Box) -> None:
    box.start(IDLE)
    assert box.call("reexec", "beat").returncode == 0
    assert f"it is {box.path / 'beat.py'};" in box.call("start", elsewhere(box, IDLE)).stderr


# --- kill's schedule


def end(box: Box) -> tuple[int, str]:
    done = box.call("kill", "beat")
    return done.returncode, done.stdout


@pytest.mark.parametrize("text", [STUBBORN, BUSY], ids=["idle", "busy"])
def test_kill_knows_a_stop_schedule_from_the_command_line_of_the_start(box: Box, text: str) -> None:
    pid = box.start(text, "--stop-schedule", "TERM/0.2/KILL/5", "--graceful-timeout", "60")
    if text == BUSY:
        box.await_log("in hand")
    assert end(box) == (0, f"beat was killed, pid {pid}: it had not ended within 0.2 s\n")


def test_kill_knows_a_stop_schedule_from_the_environment_of_the_start(box: Box) -> None:
    box.environ["DAEMONKIT_STOP_SCHEDULE"] = "TERM/0.2/KILL/5"
    pid = box.start(STUBBORN)
    del box.environ["DAEMONKIT_STOP_SCHEDULE"]
    assert end(box) == (0, f"beat was killed, pid {pid}: it had not ended within 0.2 s\n")


def test_kill_knows_a_stop_schedule_from_the_script(box: Box) -> None:
    text = "d = Daemon(stop_schedule='TERM/0.2/KILL/5')\n@d.on('SIGTERM')\ndef no(): pass\n"
    pid = box.start(text)
    assert end(box) == (0, f"beat was killed, pid {pid}: it had not ended within 0.2 s\n")


def test_kill_knows_a_stop_schedule_that_a_reload_has_changed(box: Box) -> None:
    config = box.path / "daemonkit.toml"
    config.write_text("[daemon]\n")
    box.environ["DAEMONKIT_CONFIG"] = str(config)
    pid = box.start(STUBBORN)
    config.write_text("[daemon]\nstop_schedule = 'TERM/0.2/KILL/5'\n")
    assert box.call("reload", "beat").returncode == 0
    del box.environ["DAEMONKIT_CONFIG"]
    assert end(box) == (0, f"beat was killed, pid {pid}: it had not ended within 0.2 s\n")


def test_kills_own_timeout_is_stronger_than_the_daemons_schedule(box: Box) -> None:
    pid = box.start(STUBBORN, "--stop-schedule", "TERM/600/KILL/5")
    done = box.call("kill", "--timeout", "0.3", "beat")
    assert done.stdout == f"beat was killed, pid {pid}: it had not ended within 0.3 s\n"


def test_kill_goes_by_the_configuration_while_the_script_is_still_imported(box: Box) -> None:
    script = box.script("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nlog.info('in hand')\ntime.sleep(600)\n")
    with box.popen("start", script) as launcher:
        box.await_log("in hand")
        box.environ["DAEMONKIT_STOP_SCHEDULE"] = "TERM/0.2/KILL/5"
        code, said = end(box)
        launcher.communicate(timeout=60)
    assert code == 0
    assert "had not ended within 0.2 s" in said


@needs_root
def test_root_does_not_take_the_word_of_a_daemon_that_runs_as_another_user(open_box: Box) -> None:
    box = open_box
    script = box.path / "beat.py"
    script.write_text("from daemonkit import on\n@on('SIGTERM')\ndef no(): pass\n")
    done = box.call("start", "--user", "65534", "--stop-schedule", "TERM/600/KILL/5", script)
    assert done.returncode == 0, done.stderr
    pid = box.pid()
    box.environ["DAEMONKIT_STOP_SCHEDULE"] = "TERM/0.2/KILL/5"
    assert end(box) == (0, f"beat was killed, pid {pid}: it had not ended within 0.2 s\n")


# --- a declaration that is wrong

WRONG = {
    "every-0": ("@every(0)\ndef beat(): pass\n", "@every"),
    "parsecs": ("@every('5 parsecs')\ndef beat(): pass\n", "parsecs"),
    "cron": ("@cron('61 * * * *')\ndef beat(): pass\n", "61"),
    "twice": (IDLE + IDLE, "already"),
    "signal": ("@on('SIGNONSENSE')\ndef beat(): pass\n", "SIGNONSENSE"),
    "option": ("d = Daemon(graceful_timeout='soon')\n@d.on('start')\ndef begin(): pass\n", "graceful_timeout"),
}


@pytest.mark.parametrize("command", ["start", "run", "check"])
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_declaration_is_wrong_use_for_every_command(box: Box, how: str, command: str) -> None:
    text, expected = WRONG[how]
    done = box.call(command, box.script(text))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(box.run_dir.iterdir()) == []


def test_reexec_of_new_code_with_a_wrong_declaration_still_fails_with_1(box: Box) -> None:
    pid = box.start(IDLE)
    box.script("@every(0)\ndef beat(): pass\n")
    assert box.call("reexec", "beat").returncode == 1
    assert box.pid() == pid


# --- unit, and the script's own arguments


@pytest.mark.parametrize(
    ("args", "is_initd", "own"),
    [
        (["beat.py", "--initd"], True, []),
        (["--initd", "beat.py", "--systemd", "x"], False, ["x"]),
        (["--initd", "beat.py"], True, []),
        (["beat.py", "--initd", "--fast"], True, ["--fast"]),
        (["beat.py", "--region", "--initd"], False, ["--region", "--initd"]),
        (["beat.py", "--", "--initd"], False, ["--", "--initd"]),
        (["--", "beat.py", "--initd"], False, ["--initd"]),
        (["--initd", "--", "beat.py", "--systemd"], True, ["--systemd"]),
        (["-m", "beat", "--", "--initd"], False, ["--initd"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, list) else "",
)
def test_unit_leaves_the_scripts_own_arguments_to_the_script(
    box: Box, args: list[str], is_initd: bool, own: list[str]
) -> None:
    box.script(IDLE)
    done = box.call("unit", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/sh") == is_initd
    target = "-m beat" if "-m" in args else str(box.path / "beat.py")
    assert " ".join([target, *own]) + "\n" in done.stdout


# --- a signal that nobody catches any more


def test_a_signal_that_the_new_code_no_longer_catches_does_not_kill_it(box: Box) -> None:
    pid = box.start("@on('SIGRTMIN')\ndef mine(): log.info('mine')\n" + IDLE)
    gate = box.path / "gate"
    os.mkfifo(gate)
    box.script(f"open({str(gate)!r}).read()\n" + IDLE)
    os.kill(pid, signal.SIGUSR2)
    gate.write_text("")  # lets the trial through
    box.await_log("executing the new code")
    os.kill(pid, signal.SIGRTMIN)
    gate.write_text("")  # ... and the new code, which has not begun to handle signals
    text = box.await_log("ready, pid", 2)
    assert "SIGRTMIN came while the code was replaced, and the new code does not handle it: ignored" in text
    assert "test: mine" not in text
    assert box.status()["pid"] == pid
    box.script(IDLE)
    assert box.call("reexec", "beat").returncode == 0
