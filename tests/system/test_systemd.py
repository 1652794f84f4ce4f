"""Under a real service manager: a systemd that is booted for it, and the init script with and without that systemd."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.nspawn import COMMAND, HOME, PYTHON, Machine, boot, missing

ETC = Path(__file__).parents[2] / "etc"
HEAD = "import logging, os, signal, socket, sys, time\nfrom daemonkit import *\nlog = logging.getLogger('test')\n"
QUICK = "[Service]\nRestartSec=0\n"  # a drop-in: the unit itself is as it is printed
WATCHED = QUICK + "WatchdogSec=2\n"
HARDENED = 2.5  # exposure, of 10

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with boot(tmp_path_factory.mktemp("machine")) as machine:
        yield machine


class Service:
    """One daemon under a service manager; its name is the test's."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.unit = f"{name}.service"
        self.script = f"/etc/daemonkit/{name}.py"
        self.gate = f"/etc/daemonkit/{name}.gate"
        self.init = f"/etc/init.d/{name}"
        self.command = "daemonkit"

    def write(self, text: str) -> None:
        """Write the script; ``pass_gate()`` in it waits for ``open_gate``."""
        gate = f"def pass_gate():\n    with open({self.gate!r}) as gate: gate.read()\n"
        self.machine.write(self.script, HEAD + gate + textwrap.dedent(text))

    def install(self, text: str, *flags: str, drop_in: str = QUICK) -> None:
        """Write the script and the unit that ``daemonkit unit`` prints for it."""
        self.write(text)
        unit = self.machine.check(self.command, "unit", "--systemd", *flags, self.script)
        self.machine.write(f"/etc/systemd/system/{self.unit}", unit)
        self.machine.write(f"/etc/systemd/system/{self.unit}.d/test.conf", drop_in)
        self.machine.check("systemctl", "daemon-reload")

    def install_init(self, text: str, *flags: str) -> None:
        """Write the script and the init script that ``daemonkit unit`` prints for it."""
        self.write(text)
        printed = self.machine.check("daemonkit", "unit", "--initd", *flags, self.script)
        self.machine.write(self.init, printed, mode=0o755)

    def make_gate(self) -> None:
        """Close the gate: who passes it is held there."""
        self.machine.check("mkfifo", self.gate)

    def open_gate(self) -> None:
        """Let through whoever waits; blocks until somebody does."""
        self.machine.path(self.gate).write_text("")

    def do(self, *action: str) -> str:
        """``systemctl ACTION`` on the unit, which has to succeed."""
        return self.machine.check("systemctl", *action, self.unit)

    def start(self) -> int:
        """Start it; its main PID, as the machine numbers it."""
        self.do("start")
        return self.main_pid

    @property
    def state(self) -> str:
        """active, inactive, activating, reloading, failed."""
        return self.machine.unit_property(self.unit, "ActiveState")

    @property
    def main_pid(self) -> int:
        """What systemd takes for the daemon; 0 if it runs none."""
        return int(self.machine.unit_property(self.unit, "MainPID"))

    @property
    def pid_written(self) -> int:
        """What stands in the PID file."""
        return int(self.machine.path(f"/run/daemonkit/{self.name}.pid").read_text())

    def journal(self, output: str = "cat") -> str:
        """All that the journal has about the unit; what was written before is in it, as late as journald may read."""
        self.machine.check("journalctl", "--sync")
        return self.machine.check("journalctl", f"--unit={self.unit}", f"--output={output}")

    def leftovers(self) -> list[str]:
        """Its files in the run directory, and its processes."""
        listing = self.machine.run("find", "/run/daemonkit", "-name", f"{self.name}.*").stdout.splitlines()
        return listing + self.machine.run("pgrep", "--full", "--list-full", self.script).stdout.splitlines()

    def remove(self) -> None:
        """Stop it and delete its units, so that the next test sees none of it."""
        self.machine.run("daemonkit", "kill", "--timeout", "2", self.name)
        for name in (self.unit, f"{self.name}.socket"):
            self.machine.run("systemctl", "stop", name)
            self.machine.run("systemctl", "reset-failed", name)
        files = f"/etc/systemd/system/{self.name}.* {self.init} /etc/default/{self.name} /var/lib/daemonkit/{self.name}"
        self.machine.check("sh", "-c", f"rm -rf {files}")
        self.machine.check("systemctl", "daemon-reload")


@pytest.fixture
def service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Service]:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[:48].strip("-")
    made = Service(machine, name)
    yield made
    made.remove()


BEATS = """
@every(1)
def beat(): pass
@on("stop")
def stopped(): log.info("stop hook")
"""


# -- the life of a unit


def test_the_unit_is_active_when_the_script_is_ready_and_not_before(service: Service) -> None:
    service.install(BEATS + "@on('start')\ndef begin():\n    log.info('at the gate')\n    pass_gate()\n")
    service.make_gate()
    with service.machine.follow(service.unit) as journal:
        service.do("start", "--no-block")
        journal.wait_for("at the gate")
        assert service.state == "activating"
        service.open_gate()
        journal.wait_for("Started")
    assert service.state == "active"
    assert service.main_pid == service.pid_written


def test_an_enabled_unit_is_wanted_at_boot(service: Service) -> None:
    service.install(BEATS)
    service.do("enable", "--now")
    assert service.do("is-enabled").strip() == "enabled"
    assert service.unit in service.machine.unit_property("multi-user.target", "Wants").split()
    assert service.state == "active"
    service.do("disable", "--now")
    assert service.state == "inactive"


def test_a_start_that_fails_fails_for_systemctl_too_and_the_journal_has_the_traceback(service: Service) -> None:
    service.install("raise ValueError('no such luck')", drop_in="[Service]\nRestart=no\n")
    assert service.machine.run("systemctl", "start", service.unit).returncode == 1
    assert service.state == "failed"
    said = service.journal()
    assert "ValueError: no such luck" in said
    assert service.leftovers() == []


def test_a_reload_lasts_until_the_reload_hooks_are_done(service: Service) -> None:
    service.install(BEATS + "@on('reload')\ndef again():\n    log.info('at the gate')\n    pass_gate()\n")
    pid = service.start()
    service.make_gate()
    with service.machine.follow(service.unit) as journal:
        service.do("reload", "--no-block")
        journal.wait_for("at the gate")
        assert service.state == "reloading"
        service.open_gate()
        journal.wait_for("Reloaded")
    assert (service.state, service.main_pid) == ("active", pid)


def test_a_reload_that_fails_leaves_the_daemon_running_and_says_so(service: Service) -> None:
    service.install(BEATS + "@on('reload')\ndef again(): raise ValueError('bad threshold')\n")
    pid = service.start()
    assert service.machine.run("systemctl", "reload", service.unit).returncode == 1
    assert (service.state, service.main_pid) == ("active", pid)
    assert "bad threshold" in service.journal()


def test_reexec_runs_new_code_under_the_same_main_pid(service: Service) -> None:
    service.install(BEATS + "@on('start')\ndef begin(): log.info('old code')\n")
    pid = service.start()
    service.write(BEATS + "@on('start')\ndef begin(): log.info('new code')\n")
    with service.machine.follow(service.unit) as journal:
        service.machine.check("daemonkit", "reexec", service.name)
        journal.wait_for("new code")
    assert (service.state, service.main_pid, service.pid_written) == ("active", pid, pid)
    assert service.machine.unit_property(service.unit, "NRestarts") == "0"


def test_the_watchdog_is_fed_on_after_a_reexec(service: Service) -> None:
    service.install(
        BEATS + "seen = [0]\n@every(0.5)\ndef count():\n    seen[0] += 1\n    log.info('seen %d', seen[0])\n",
        drop_in=WATCHED,
    )
    pid = service.start()
    service.machine.check("daemonkit", "reexec", service.name)
    with service.machine.follow(service.unit) as journal:
        journal.wait_for("seen 8")  # twice the watchdog's time
    assert (service.state, service.main_pid) == ("active", pid)


def test_between_old_and_new_code_the_watchdog_waits_as_long_as_both_may_take(service: Service) -> None:
    service.install(
        BEATS.replace("def stopped(): ", "def stopped(): time.sleep(3); ") + "@every(0.1)\ndef tick(): pass\n",
        drop_in=WATCHED,
    )
    pid = service.start()
    service.machine.check("daemonkit", "reexec", service.name)
    assert (service.state, service.main_pid) == ("active", pid)
    assert service.machine.unit_property(service.unit, "NRestarts") == "0"


def test_a_job_that_hangs_is_bitten_by_the_watchdog_and_the_daemon_restarted(service: Service) -> None:
    service.install(
        f"""
        import threading
        @every(0.1)
        def work():
            mark = "/run/daemonkit/{service.name}.hung"
            if not os.path.exists(mark):
                open(mark, "w").close()
                log.info("hanging")
                threading.Event().wait()
            log.info("working")
        """,
        drop_in=WATCHED,
    )
    with service.machine.follow(service.unit) as journal:
        pid = service.start()
        journal.wait_for("hanging")
        journal.wait_for("Watchdog timeout")
        journal.wait_for("Started")
        journal.wait_for("working")
    assert service.state == "active"
    assert service.main_pid == service.pid_written != pid
    assert service.machine.unit_property(service.unit, "NRestarts") == "1"


def test_killed_by_sigkill_it_is_restarted(service: Service) -> None:
    service.install(BEATS)
    with service.machine.follow(service.unit) as journal:
        pid = service.start()
        journal.wait_for("Started")
        service.do("kill", "--signal=KILL", "--kill-who=main")
        journal.wait_for("code=killed")
        journal.wait_for("Started")
    assert service.main_pid == service.pid_written != pid
    assert service.machine.run("daemonkit", "status", service.name).returncode == 0


def test_stopped_it_leaves_nothing(service: Service) -> None:
    service.install(BEATS)
    service.start()
    assert service.leftovers() != []
    service.do("stop")
    assert service.state == "inactive"
    assert service.machine.unit_property(service.unit, "Result") == "success"
    assert service.leftovers() == []
    said = service.journal()
    assert "stop hook" in said
    assert "Killing process" not in said


def test_daemonkit_kill_stops_it_for_good(service: Service) -> None:
    service.install(BEATS)
    with service.machine.follow(service.unit) as journal:
        service.start()
        service.machine.check("daemonkit", "kill", service.name)
        journal.wait_for("Deactivated successfully")
    assert service.state == "inactive"
    assert service.leftovers() == []


def test_the_journal_has_each_line_with_its_priority(service: Service) -> None:
    service.install(
        BEATS
        + """
@on("start")
def begin():
    log.info("an info")
    log.warning("a warning")
    log.error("an error")
    log.critical("a critical")
    print("a print")
    print("a complaint", file=sys.stderr)
    os.system("echo from a child")
"""
    )
    service.start()
    lines = service.journal("json").splitlines()
    entries = [json.loads(line) for line in lines]
    own = [entry for entry in entries if entry.get("_TRANSPORT") == "stdout"]
    found = {entry["MESSAGE"]: int(entry["PRIORITY"]) for entry in own}
    expected = {"test: an info": 6, "test: a warning": 4, "test: an error": 3, "test: a critical": 2, "a print": 6}
    assert {text: found.get(text) for text in expected} == expected
    assert "a complaint" in found
    assert "from a child" in found
    assert all(entry["_SYSTEMD_UNIT"] == service.unit for entry in own)


def test_start_under_systemd_stays_in_front_and_says_so(service: Service) -> None:
    service.write(BEATS)
    text = (
        f"[Service]\nType=notify\nRuntimeDirectory=daemonkit\nRuntimeDirectoryPreserve=yes\nExecStart={COMMAND} start"
    )
    service.machine.write(f"/etc/systemd/system/{service.unit}", f"{text} {service.script}\n")
    service.machine.check("systemctl", "daemon-reload")
    with service.machine.follow(service.unit) as journal:
        pid = service.start()
        assert "NOTIFY_SOCKET" in journal.wait_for("staying in front")
    assert pid == service.pid_written


def test_a_listening_socket_is_handed_to_the_script_and_kept_through_reexec(service: Service) -> None:
    service.install(
        """
        @every(0.05)
        def answer():
            with socket.socket(fileno=os.dup(listen_fds()[0])) as listening:
                listening.setblocking(False)
                try:
                    client, _ = listening.accept()
                except BlockingIOError:
                    return
                with client:
                    client.sendall(b"%d" % os.getpid())
        """
    )
    path = f"/run/{service.name[:20]}.listen"
    service.machine.write(f"/etc/systemd/system/{service.name}.socket", f"[Socket]\nListenStream={path}\n")
    service.machine.check("systemctl", "daemon-reload")
    service.machine.check("systemctl", "start", f"{service.name}.socket")
    assert service.state == "inactive"

    def ask() -> int:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(service.machine.path(path)))
            return int(client.recv(100))

    pid = ask()
    assert pid == service.main_pid
    service.machine.check("daemonkit", "reexec", service.name)
    assert ask() == pid


# -- the sandbox


def test_the_exposure_of_the_loaded_unit_is_low(service: Service) -> None:
    service.install(BEATS)
    service.start()
    said = service.machine.check("systemd-analyze", "security", "--no-pager", service.unit)
    line = next(line for line in said.splitlines() if "Overall exposure level" in line)
    assert float(line.split(":")[1].split()[0]) <= HARDENED


WORKS: dict[str, str] = {
    "ctypes callback": "import ctypes; ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 7)() == 7",
    "load and memory": "os.getloadavg() and open('/proc/meminfo').read()",
    "sockets": "[socket.socket(family).close() for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)]",
    "name resolution": "socket.getaddrinfo('localhost', 80)",
    "temporary file": "import tempfile; tempfile.TemporaryFile().write(b'x')",
    "state directory": "open(os.path.join(os.environ['STATE_DIRECTORY'], str(os.getpid())), 'w').close()",
    "child": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "thread": "import threading; t = threading.Thread(target=int); t.start(); t.join()",
    "fork": "os.waitpid(os.fork() or os._exit(0), 0)",
    "process-shared lock": "import multiprocessing; multiprocessing.get_context('fork').Lock().acquire()",
    "shared memory": "from multiprocessing import shared_memory as m; m.SharedMemory(create=True, size=9).unlink()",
    "database": "import sqlite3; sqlite3.connect('/tmp/x.db').execute('create table if not exists x (y)')",
    "tls": "import ssl; ssl.create_default_context()",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))",
    "epoll, timerfd, pidfd": "import select; select.epoll().close(); os.close(os.pidfd_open(os.getpid()))",
}
FORBIDDEN: dict[str, str] = {
    "change the system": "open('/etc/daemonkit-was-here', 'w')",
    "read root's home": "os.listdir('/root/.')",
    "new namespace": "os.unshare(0x20000) if hasattr(os, 'unshare') else open('/proc/self/nope')",
    "packet socket": "socket.socket(17, socket.SOCK_RAW)",
    "change the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'w')",
    "writable code": "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "foreign files": "open('/etc/shadow-of-another').read()",
}


@pytest.mark.parametrize("user", [[], ["--user", "nobody"]], ids=["root", "nobody"])
def test_in_the_sandbox_a_normal_script_works_and_a_rogue_one_does_not(service: Service, user: list[str]) -> None:
    service.install(
        f"""
        def tried(statement):
            try:
                exec(statement, globals())
            except OSError as error:
                return f"{{type(error).__name__}}: {{error}}"
            except Exception as error:
                return f"{{type(error).__name__}}: {{error}}"

        @every(60)
        def probe(): pass
        @on("start")
        def begin():
            import json
            answer = {{key: tried(code) for key, code in {WORKS | FORBIDDEN!r}.items()}}
            answer["uid"] = os.geteuid()
            log.info("answer=%s", json.dumps(answer))
        """,
        *user,
    )
    service.machine.write("/etc/shadow-of-another", "secret", mode=0o600)
    service.machine.check("chown", "daemon", "/etc/shadow-of-another")
    with service.machine.follow(service.unit) as journal:
        service.start()
        answer = json.loads(journal.wait_for("answer=").partition("answer=")[2])
    assert answer["uid"] == (65534 if user else 0)
    assert {key: answer[key] for key in WORKS} == dict.fromkeys(WORKS)
    assert [key for key in FORBIDDEN if answer[key] is None] == []


def test_run_as_another_user_it_is_found_by_status_reloaded_and_stopped_clean(service: Service) -> None:
    service.install(BEATS + "@on('reload')\ndef again(): log.info('reloaded as uid %d', os.geteuid())\n",
                    "--user", "nobody")  # fmt: skip
    pid = service.start()
    assert service.machine.path(f"/proc/{pid}").stat().st_uid == 65534
    assert service.machine.run("daemonkit", "status", service.name).returncode == 0
    with service.machine.follow(service.unit) as journal:
        service.do("reload")
        journal.wait_for("reloaded as uid 65534")
    service.machine.check("daemonkit", "reexec", service.name)
    assert service.main_pid == pid
    service.do("stop")
    assert service.machine.unit_property(service.unit, "Result") == "success"
    assert service.machine.run("daemonkit", "status", service.name).returncode == 3


# -- what is printed


def test_a_daemon_that_cannot_start_yet_is_tried_for_ever(service: Service) -> None:
    service.install(BEATS, drop_in="")
    wait, interval = (
        service.machine.check("systemctl", "show", "--value", f"--property={name}", service.unit).strip()
        for name in ("RestartUSec", "StartLimitIntervalUSec")
    )
    burst = int(service.machine.unit_property(service.unit, "StartLimitBurst"))
    assert in_seconds(wait) * burst > in_seconds(interval)


def in_seconds(span: str) -> float:
    """A time span as systemctl prints it (systemd.time(7))."""
    units = {"ms": 0.001, "s": 1, "min": 60, "h": 3600}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)(ms|s|min|h)\b", span))


def test_a_script_in_tmp_is_not_hidden_from_its_unit(service: Service) -> None:
    service.script = f"/tmp/{service.name}.py"
    service.install(BEATS)
    service.start()
    assert service.state == "active"


def test_an_interpreter_in_a_home_directory_is_not_hidden_from_its_unit(service: Service) -> None:
    machine, venv = service.machine, "/srv/venv"
    real = os.path.basename(os.readlink(machine.path(f"{HOME}/bin/python")))
    machine.check("mkdir", "-p", "/root/python/bin", f"{venv}/bin")
    machine.check("ln", "-s", f"{PYTHON}/lib", "/root/python/lib")
    machine.check("cp", f"{PYTHON}/bin/{real}", "/root/python/bin/python")
    machine.check("ln", "-s", "/root/python/bin/python", f"{venv}/bin/python")
    machine.check("ln", "-s", f"{HOME}/lib", f"{venv}/lib")
    machine.write(f"{venv}/pyvenv.cfg", "home = /root/python/bin\ninclude-system-site-packages = false\n")
    command = machine.path(COMMAND).read_text().replace(HOME, venv)
    machine.write(f"{venv}/bin/daemonkit", command, mode=0o755)
    service.command = f"{venv}/bin/daemonkit"
    service.install(BEATS)
    service.start()
    assert f"ExecStart={venv}/bin/daemonkit" in service.do("cat")
    assert service.state == "active"


def test_a_log_file_of_ones_own_can_be_written(service: Service) -> None:
    service.machine.check("mkdir", "-p", "/srv/logs")
    service.install(BEATS + "@on('start')\ndef begin(): log.info('here')\n", "--log", "/srv/logs/own.log")
    service.start()
    assert "here" in service.machine.path("/srv/logs/own.log").read_text()


@pytest.mark.parametrize("kind", ["--systemd", "--initd"])
def test_nothing_printed_is_relative_to_where_it_was_printed(service: Service, kind: str) -> None:
    service.write(BEATS)
    machine = service.machine
    machine.write("/srv/app/etc/daemonkit.toml", "[daemon]\ngraceful_timeout = 77\n")
    at_srv_app = ("env", "--chdir=/srv/app", "DAEMONKIT_LOG_LEVEL=DEBUG")
    text = machine.check(*at_srv_app, "daemonkit", "unit", kind, "--run-dir", "run", "--log", "my.log", service.script)
    words = text.split()
    for flag, value in (("--log", "/srv/app/my.log"), ("--config", "/srv/app/etc/daemonkit.toml")):
        assert (flag, value) in itertools.pairwise(words)
    assert ("--log-level", "DEBUG") in itertools.pairwise(words)
    assert "/srv/app/run" in text
    assert "--run-dir run" not in text


@pytest.mark.parametrize("kind", ["--systemd", "--initd"])
def test_what_a_user_prints_is_for_root_to_start(service: Service, kind: str) -> None:
    service.write(BEATS)
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    environ = ("env", "XDG_RUNTIME_DIR=/run/user/65534", "HOME=/nonexistent")
    text = service.machine.check(*as_nobody, *environ, "daemonkit", "unit", kind, service.script)
    assert "/run/daemonkit" in text
    assert "65534" not in text


# -- the ready-made files


def test_the_template_runs_any_script_by_its_name(service: Service) -> None:
    machine, unit = service.machine, f"daemonkit@{service.name}.service"
    service.write(BEATS)
    machine.write("/etc/systemd/system/daemonkit@.service", (ETC / "systemd/daemonkit@.service").read_text())
    machine.check("systemctl", "daemon-reload")
    machine.check("systemctl", "start", unit)
    assert machine.unit_property(unit, "ActiveState") == "active"
    assert int(machine.unit_property(unit, "MainPID")) == service.pid_written
    machine.check("systemctl", "reload", unit)
    machine.check("systemctl", "stop", unit)
    assert machine.unit_property(unit, "Result") == "success"
    assert service.leftovers() == []


def test_two_daemons_share_the_run_directory_and_one_stop_leaves_the_other(service: Service) -> None:
    other = Service(service.machine, f"{service.name}-2")
    for each in (service, other):
        each.install(BEATS)
        each.start()
    service.do("stop")
    assert other.main_pid == other.pid_written
    assert service.machine.run("daemonkit", "status", other.name).returncode == 0
    other.remove()


def test_logrotate_lets_a_classic_daemon_write_into_the_new_file(service: Service) -> None:
    machine, log = service.machine, f"/var/log/daemonkit/{service.name}.log"
    machine.write("/etc/logrotate.d/daemonkit", (ETC / "logrotate.d/daemonkit").read_text())
    service.write("@every(0.1)\ndef beat(): log.info('beat')\n")
    machine.check("daemonkit", "start", service.script)
    pid = service.pid_written
    old = machine.path(log).stat().st_ino
    machine.check("logrotate", "--force", "--state", "/run/logrotate.state", "/etc/logrotate.d/daemonkit")
    machine.check("daemonkit", "reload", service.name)  # answered after what was asked before it
    assert machine.path(log).stat().st_ino != old
    assert os.readlink(machine.path(f"/proc/{pid}/fd/1")).endswith(f"{service.name}.log")
    machine.check("daemonkit", "kill", service.name)


# -- the init script

WITHOUT_SYSTEMD = 'mount -t tmpfs tmpfs /run/systemd && exec "$@"'


def sysv(service: Service, *words: str) -> int:
    """The exit code of a command on a machine that, as far as it can see, is not run by systemd."""
    return service.machine.run("unshare", "--mount", "sh", "-c", WITHOUT_SYSTEMD, "sh", *words).returncode


def test_service_gives_every_lsb_exit_code_on_a_sysv_machine(service: Service) -> None:
    def act(*action: str) -> int:
        return sysv(service, "service", service.name, *action)

    service.install_init(BEATS)
    # Not running.
    assert act("status") == 3
    assert act("stop") == 0
    assert act("reload") == 7
    assert act("force-reload") == 7
    assert act("try-restart") == 0
    assert act("status") == 3
    # Running.
    assert act("start") == 0
    assert act("status") == 0
    first = service.pid_written
    assert act("start") == 0
    assert act("reload") == 0
    assert act("force-reload") == 0
    assert service.pid_written == first
    assert act("restart") == 0
    second = service.pid_written
    assert act("try-restart") == 0
    third = service.pid_written
    assert len({first, second, third}) == 3
    # Dead, with a PID file.
    service.machine.check("kill", "-KILL", str(third))
    await_exit(service.machine, third)
    assert act("status") == 1
    assert act("reload") == 7
    assert act("restart") == 0
    assert act("stop") == 0
    assert act("status") == 3
    assert service.leftovers() == []
    # Not an action.
    assert act("frobnicate") == 2
    assert sysv(service, service.init) == 2


def await_exit(machine: Machine, pid: int) -> None:
    """Return when the machine's process ``pid`` is gone and reaped."""
    machine.check("python3", "-c", f"{WAIT}\nwait({pid})")


WAIT = """
import os, select, sys
def wait(pid):
    try:
        select.select([os.pidfd_open(pid)], [], [], 30)
    except ProcessLookupError:
        pass
"""


def test_the_init_script_refuses_in_the_codes_of_lsb(service: Service) -> None:
    service.install_init("raise ValueError('broken')")
    assert sysv(service, service.init, "start") == 1
    assert service.leftovers() == []
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", service.init)
    assert [sysv(service, *as_nobody, action) for action in ("start", "stop", "restart", "reload")] == [4, 4, 4, 4]
    assert sysv(service, *as_nobody, "status") == 3
    without_command = ("sh", "-c", f'mount --bind /dev/null {COMMAND} && "$@"', "sh", service.init)
    assert sysv(service, *without_command, "start") == 5
    service.machine.check("rm", service.script)
    assert sysv(service, service.init, "start") in (5, 6)
    assert sysv(service, service.init, "status") == 3


def test_default_file_switches_it_off_and_gives_it_options(service: Service) -> None:
    service.install_init("@on('start')\ndef begin(): log.info('umask %s', os.environ.get('MINE'))\n" + BEATS)
    service.machine.write(f"/etc/default/{service.name}", "ENABLED=no\n")
    assert sysv(service, service.init, "start") == 6
    assert sysv(service, service.init, "status") == 3
    service.machine.write(f"/etc/default/{service.name}", "export DAEMONKIT_LOG_LEVEL=DEBUG MINE=yours\n")
    assert sysv(service, service.init, "start") == 0
    log = service.machine.path(f"/var/log/daemonkit/{service.name}.log").read_text()
    assert "yours" in log
    assert sysv(service, service.init, "stop") == 0


def test_systemd_runs_the_init_script_through_its_generator(service: Service) -> None:
    def act(*action: str) -> int:
        return service.machine.run("service", service.name, *action).returncode

    machine = service.machine
    service.install_init(BEATS + "@on('reload')\ndef again(): log.info('again')\n")
    machine.check("systemctl", "daemon-reload")
    assert machine.unit_property(service.unit, "Type") == "forking"
    assert act("status") == 3
    assert act("stop") == 0
    assert act("start") == 0
    assert (service.state, act("status")) == ("active", 0)
    first = service.pid_written
    assert service.main_pid == first
    assert service.unit in machine.check("cat", f"/proc/{first}/cgroup")
    assert act("start") == 0
    assert act("reload") == 0
    assert act("force-reload") == 0
    assert service.main_pid == first
    machine.check("daemonkit", "reexec", service.name)
    assert service.main_pid == first
    assert act("restart") == 0
    second = service.main_pid
    assert second == service.pid_written != first
    assert act("try-restart") == 0
    assert service.main_pid == service.pid_written != second
    assert act("stop") == 0
    assert (service.state, act("status")) == ("inactive", 3)
    assert service.leftovers() == []
    assert act("try-restart") == 0
    assert service.state == "inactive"


def test_the_init_script_called_by_hand_under_systemd_goes_through_systemd(service: Service) -> None:
    service.install_init(BEATS)
    service.machine.check("systemctl", "daemon-reload")
    assert service.machine.run(service.init, "start").returncode == 0
    assert service.state == "active"
    assert service.main_pid == service.pid_written
    assert service.machine.run(service.init, "status").returncode == 0
    assert service.machine.run(service.init, "stop").returncode == 0
    assert service.state == "inactive"


def test_the_init_script_forks_although_what_called_it_is_supervised(service: Service) -> None:
    # As from a unit under a systemd older than 248, which does not say which process it watches.
    service.install_init(BEATS)
    supervised = ("env", "INVOCATION_ID=0123456789abcdef", "NOTIFY_SOCKET=/run/nobody-listens", service.init)
    assert sysv(service, *supervised, "start") == 0
    assert service.machine.path(f"/proc/{service.pid_written}/stat").read_text().rpartition(")")[2].split()[1] == "1"
    assert sysv(service, *supervised, "stop") == 0


def test_the_ready_made_init_script_runs_the_example(service: Service) -> None:
    machine = service.machine
    machine.write("/etc/init.d/heartbeat", (ETC / "init.d/heartbeat").read_text(), mode=0o755)
    machine.write("/etc/daemonkit/heartbeat.py", (ETC / "examples/heartbeat.py").read_text())
    assert sysv(service, "service", "heartbeat", "start") == 0
    assert sysv(service, "service", "heartbeat", "status") == 0
    assert sysv(service, "service", "heartbeat", "stop") == 0
    machine.check("rm", "/etc/init.d/heartbeat")
