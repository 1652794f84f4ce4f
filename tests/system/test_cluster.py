"""One daemon of many leads, whatever happens to it, to its servers, and to the network between them (row 34)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import runpy
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import PATIENCE, Box, await_end
from zookeeper import LOCAL, Ensemble, Network, Server, ensemble, stop

from daemonkit.cluster.connect import connect
from daemonkit.cluster.election import Candidacy
from daemonkit.core.inotify import wait_until

EXAMPLES = Path(__file__).parents[2] / "etc" / "examples"
SESSION = 2.0  # seconds, where one is to end
CALM = 20.0  # where none is to, however busy the machine: one is sure for six tenths of it
BEAT = 0.05  # seconds between two writes of a leader
SLACK = 5.0  # seconds: what a busy machine may make of that, and less than a calm session is sure for
LEADER = """
import fcntl
from daemonkit import current_leadership

def write(what):
    with open("WITNESS", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines()
        last = max((int(line.split()[1]) for line in lines), default=0)
        token = current_leadership.token
        verdict = "accepted" if token >= last else "refused"
        file.write(f"{verdict} {token} {what} HOST {time.monotonic()}\\n")

@every(BEAT, leader=True)
def act():
    write("act")
"""


class Write(NamedTuple):
    """What a leader has written, or tried to."""

    verdict: str
    token: int
    what: str
    host: str
    at: float  # monotonic seconds


class Host(Box):
    """A daemon's own box: as good as a machine of its own."""

    def __init__(self, path: Path, witness: Path, coordinator: str, network: Network | None = None) -> None:
        path.mkdir()
        super().__init__(path)
        self.name = path.name
        self.network = network
        self._witness = witness
        self.environ["DAEMONKIT_COORDINATOR"] = coordinator

    def command(self, *args: str | Path) -> list[str]:
        return [*(self.network.prefix if self.network else ()), *super().command(*args)]

    def lead(self, more: str = "", *args: str) -> int:
        """Start a daemon that leads if it may; return its PID."""
        text = LEADER.replace("WITNESS", str(self._witness)).replace("HOST", self.name).replace("BEAT", str(BEAT))
        return self.start(text + more, *args)

    @property
    def cluster(self) -> dict[str, Any]:
        """Its place in the cluster, as it sees it."""
        found = self.status()["cluster"]
        assert isinstance(found, dict)
        return found

    def await_cluster(self, look: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Ask for that again and again until ``look`` is true of it: nobody tells when it changes."""
        until = time.monotonic() + PATIENCE
        while not look(found := self.cluster):
            assert time.monotonic() < until, found
        return found

    def child(self, name: str, other_than: int = 0) -> int:
        """The PID of one of its processes; where that is yet to be forked, or to be known, once it is."""
        until = time.monotonic() + PATIENCE
        while True:
            pids = [each["pid"] for each in self.status()["children"] if each["name"] == name]
            if found := [int(pid) for pid in pids if pid not in (None, other_than)]:
                return found[0]
            assert time.monotonic() < until, pids

    def signal_all(self, number: int) -> None:
        """Send a signal to the daemon and all below it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Cluster:
    """Hosts, and a witness that accepts the writes of leaders in the order of their tokens alone."""

    def __init__(self, path: Path, coordinator: str) -> None:
        self.path = path
        self.witness = path / "witness"
        self.witness.touch()
        self.coordinator = coordinator
        self.hosts: list[Host] = []

    def host(self, coordinator: str | None = None, network: Network | None = None) -> Host:
        """One host more."""
        name = f"h{len(self.hosts)}"
        self.hosts.append(Host(self.path / name, self.witness, coordinator or self.coordinator, network))
        return self.hosts[-1]

    @contextlib.contextmanager
    def unwritten(self) -> Iterator[None]:
        """Nobody is in the middle of a write within the block."""
        with open(self.witness) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def writes(self) -> list[Write]:
        with open(self.witness) as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # no line is half there
            lines = file.read().splitlines()
        found = []
        for line in lines:
            verdict, token, what, host, at = line.split()
            found.append(Write(verdict, int(token), what, host, float(at)))
        return found

    def await_writes(self, look: Callable[[list[Write]], bool]) -> list[Write]:
        """Sleep until ``look`` is true of what was written."""
        found = wait_until(str(self.path), lambda: writes if look(writes := self.writes()) else None, PATIENCE)
        assert found is not None, self.witness.read_text()[-2000:]
        return found

    def await_leader(self, *hosts: Host, after: float = 0.0) -> Host:
        """Sleep until one of ``hosts`` has acted as the leader, later than ``after``."""
        names = {host.name for host in hosts or self.hosts}
        writes = self.await_writes(lambda all: any(each.host in names and each.at > after for each in all))
        last = next(each for each in reversed(writes) if each.host in names)
        return next(host for host in self.hosts if host.name == last.host)

    def gap(self, old: Host, new: Host) -> float:
        """Seconds from the last write of one leader to the first of the next."""
        writes = self.writes()
        last = max(each.at for each in writes if each.host == old.name)
        return min(each.at for each in writes if each.host == new.name and each.at > last) - last

    def check(self) -> None:
        """Nobody has ever acted beside another, nor after him with an older token."""
        writes = self.writes()
        assert [each for each in writes if each.verdict == "refused"] == []
        owners: dict[int, str] = {}
        for each in writes:
            assert owners.setdefault(each.token, each.host) == each.host

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for host in self.hosts:
                stack.callback(host.close)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ensemble]:
    """Three servers that no test harms."""
    with ensemble(tmp_path_factory.mktemp("zookeeper")) as made:
        yield made


@pytest.fixture(params=["local", "zookeeper"])
def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A coordinator's URL, where nobody leads."""
    return _coordinator(request, tmp_path, CALM)


@pytest.fixture(params=["local", "zookeeper"])
def brief(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same, with sessions that are soon over."""
    return _coordinator(request, tmp_path, SESSION)


def _coordinator(request: pytest.FixtureRequest, path: Path, session: float) -> str:
    if request.param == "local":
        return f"local:{path}/cluster"
    return url(request.getfixturevalue("servers"), path, session)


def url(servers: Ensemble, path: Path, session: float = SESSION) -> str:
    """Of a chroot of our own."""
    with connect(servers.url()) as made:
        made.set(f"/{path.name}", b"")
    return servers.url(f"/{path.name}", session_timeout=session)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Cluster]]:
    made: list[Cluster] = []

    def make(coordinator: str) -> Cluster:
        made.append(Cluster(tmp_path, coordinator))
        return made[-1]

    yield make
    for each in made:
        each.close()


Make = Callable[[str], Cluster]


def others(cluster: Cluster, *hosts: Host) -> list[Host]:
    return [host for host in cluster.hosts if host not in hosts]


def start(cluster: Cluster, count: int, more: str = "", *args: str) -> Host:
    """Start so many hosts; return the one that leads."""
    for _ in range(count):
        cluster.host().lead(more, *args)
    return cluster.await_leader()


def test_one_leads_and_a_clean_stop_hands_over_at_once(coordinator: str, make: Make) -> None:
    cluster = make(coordinator)
    hooks = """
@on("leader")
def led():
    log.info("begins to lead")

@on("follower")
def followed():
    log.info("ceases to lead")

@worker(leader=True)
def crunch(stop):
    log.info("crunch %d", current_leadership.token)
    while not stop.wait(60):
        pass
    write("last")
"""
    first = start(cluster, 3, hooks)
    mine = first.await_cluster(lambda said: len(said["peers"]) == 3)
    assert (mine["role"], mine["state"]) == ("leader", "connected")
    assert mine["token"] == cluster.writes()[-1].token
    for other in others(cluster, first):
        theirs = other.await_cluster(lambda said: said["leader"])
        assert (theirs["role"], theirs["token"], theirs["leader"]["token"]) == ("follower", None, mine["token"])
        assert other.job("act")["state"] == "standby"
        refused = other.call("trigger", "beat", "act")
        assert refused.returncode == 1
        assert "only the leader runs it, and this daemon does not lead" in refused.stderr
    text = first.call("status", "beat").stdout
    assert f"cluster: leader, token {mine['token']}, session {mine['session']}, connected" in text
    first.await_log(f"crunch {mine['token']}")
    titles = first.processes().values()
    assert sum(title.strip() == "beat: cluster" for title in titles) == 1
    assert first.call("kill", "beat").returncode == 0
    second = cluster.await_leader(*others(cluster, first))
    assert cluster.gap(first, second) < SLACK
    log = first.log.read_text()
    assert log.count("begins to lead") == log.count("ceases to lead") == 1
    # Its worker's last write, made after it was told to stop, was still the leader's.
    assert [each.what for each in cluster.writes() if each.host == first.name][-1] == "last"
    assert second.cluster["token"] > mine["token"]
    cluster.check()


def test_a_stop_that_has_to_kill_hands_over_all_the_same(servers: Ensemble, tmp_path: Path, make: Make) -> None:
    cluster = make(url(servers, tmp_path, 10))
    more = """
@worker
def deaf(stop):
    log.info("deaf")
    while True:
        time.sleep(60)
"""
    first = start(cluster, 2, more, "--graceful-timeout", "0.3")
    first.await_log("] INFO test: deaf")
    assert first.call("kill", "beat").returncode == 0
    second = cluster.await_leader(*others(cluster, first))
    assert cluster.gap(first, second) < SLACK
    assert "killed: " in first.log.read_text()
    cluster.check()


def test_the_death_of_the_master_alone_hands_over_at_once(coordinator: str, make: Make) -> None:
    cluster = make(coordinator)
    first = start(cluster, 2)
    os.kill(first.pid() or 0, signal.SIGKILL)
    second = cluster.await_leader(*others(cluster, first))
    assert cluster.gap(first, second) < SLACK
    for pid in first.processes():
        await_end(pid)
    cluster.check()


def test_the_death_of_the_process_with_the_session_changes_no_leadership(coordinator: str, make: Make) -> None:
    cluster = make(coordinator)
    # The next process has five seconds to go on with the session: on a busy machine one may be too short.
    first = start(cluster, 2, "from daemonkit.master import leading\nleading.DECISION = 5.0\n")
    token, session = first.cluster["token"], first.cluster["session"]
    killed = first.child("cluster")
    os.kill(killed, signal.SIGKILL)
    at = time.monotonic()
    cluster.await_writes(lambda all: all[-1].at > at + 1.2 * SESSION)  # nobody has given it up meanwhile
    assert {each.token for each in cluster.writes()} == {token}
    first.child("cluster", other_than=killed)
    after = first.await_cluster(lambda said: said["state"] == "connected" and said["session"])
    assert (after["role"], after["token"], after["session"]) == ("leader", token, session)
    assert first.call("reload", "beat").returncode == 0  # which replaces it, too
    after = first.cluster
    assert (after["role"], after["token"]) == ("leader", token)
    at = time.monotonic()
    cluster.await_writes(lambda all: all[-1].at > at + 1)
    assert {each.token for each in cluster.writes()} == {token}
    cluster.check()


def test_the_death_of_all_its_processes_hands_over_when_the_session_is_over(brief: str, make: Make) -> None:
    cluster = make(brief)
    first = start(cluster, 2)
    first.signal_all(signal.SIGKILL)
    second = cluster.await_leader(*others(cluster, first))
    assert cluster.gap(first, second) < SESSION * 1.5 + SLACK
    cluster.check()


def test_a_leader_that_was_stopped_past_its_session_acts_no_more_when_it_goes_on(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path))
    more = "@worker(leader=True)\ndef crunch(stop):\n    while True:\n        time.sleep(0.01)\n"
    first = start(cluster, 2, more, "--graceful-timeout", "60")
    crunch = first.child("worker crunch-0")
    with cluster.unwritten():  # else one that was stopped there would keep the next one from writing
        stop(*first.processes())
    second = cluster.await_leader(*others(cluster, first))
    at = time.monotonic()
    first.signal_all(signal.SIGCONT)
    await_end(crunch)  # killed: its leadership was over long before it could be asked to end
    first.await_log("leads no more")
    cluster.await_writes(lambda all: all[-1].at > at + 1)
    assert {each.host for each in cluster.writes() if each.at > at} == {second.name}
    assert first.cluster["role"] == "follower"
    cluster.check()


def test_a_leader_whose_process_with_the_session_hangs_stops_before_another_may_lead(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path))
    first = start(cluster, 2)
    agent = first.child("cluster")
    os.kill(agent, signal.SIGSTOP)
    second = cluster.await_leader(*others(cluster, first))
    assert cluster.gap(first, second) > 0
    first.await_log("its time was up")
    os.kill(agent, signal.SIGCONT)
    first.await_cluster(lambda said: said["state"] == "connected")
    cluster.check()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_leaders_worker_is_killed_in_time_while_the_master_is_busy_and_the_session_without_its_process(
    servers: Ensemble, tmp_path: Path, make: Make, fate: int
) -> None:
    cluster = make(url(servers, tmp_path))
    more = """
@worker(leader=True)
def crunch(stop):
    while True:
        write("crunch")
        time.sleep(BUSY)

@on("SIGUSR1")
def busy():
    log.info("busy")
    while not os.path.exists("DONE"):
        time.sleep(0.01)
    log.info("idle")
"""
    done = tmp_path / "done"
    first = start(cluster, 2, more.replace("BUSY", str(BEAT)).replace("DONE", str(done)))
    cluster.await_writes(lambda all: any(each.what == "crunch" for each in all))
    agent = first.child("cluster")
    os.kill(first.pid() or 0, signal.SIGUSR1)
    first.await_log("] INFO test: busy")
    os.kill(agent, fate)
    second = cluster.await_leader(*others(cluster, first))
    at = time.monotonic()
    cluster.await_writes(lambda all: all[-1].at > at + 1)
    cluster.check()  # nothing of the first's was refused
    assert cluster.gap(first, second) > 0
    first.await_log("killed: it has not ended before its limit")
    if fate == signal.SIGSTOP:
        os.kill(agent, signal.SIGCONT)
    done.touch()
    first.await_log("INFO test: idle")
    first.await_cluster(lambda said: (said["role"], said["state"]) == ("follower", "connected"))
    assert [title for title in first.processes().values() if "crunch" in title] == []
    cluster.check()


BUSY = """
@worker(leader=True)
def crunch(stop):
    log.info("crunch")
    while True:
        write("crunch")
        time.sleep(BEAT)

@on("SIGUSR1")
def busy():
    log.info("busy")
    while not os.path.exists("DONE"):
        time.sleep(0.01)
"""


def keep_busy(host: Host, done: Path) -> int:
    """Start it as the leader, with a worker that hears nothing and a master that is busy until ``done`` is there."""
    host.lead(BUSY.replace("DONE", str(done)).replace("BEAT", str(BEAT)), "--graceful-timeout", "60")
    host.await_log("] INFO test: crunch")
    found = host.child("worker crunch-0")
    os.kill(host.pid() or 0, signal.SIGUSR1)
    host.await_log("] INFO test: busy")
    return found


def test_a_leaders_worker_is_killed_in_time_while_the_master_is_busy_and_no_server_answers(
    tmp_path: Path, make: Make
) -> None:
    with ensemble(tmp_path, LOCAL) as servers:
        cluster = make(servers.url(session_timeout=SESSION))
        crunch = keep_busy(cluster.host(), tmp_path / "done")
        stop(servers.servers[0].pid)
        at = time.monotonic()
        await_end(crunch)
        assert cluster.writes()[-1].at < at + SESSION
        (tmp_path / "done").touch()
        cluster.close()


def test_a_leaders_worker_is_killed_at_once_while_the_master_is_busy_and_the_session_is_ended(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path, 20))
    host = cluster.host()
    crunch = keep_busy(host, tmp_path / "done")
    with connect(cluster.coordinator) as outside:
        leader = outside.leader("beat")
        assert leader is not None
        servers.end_session(leader.session)
        await_end(crunch, SLACK)  # far from what the session was sure for
    (tmp_path / "done").touch()
    host.await_log("leads no more")
    host.await_log("] INFO test: crunch", 2)
    cluster.check()


def test_a_leaders_worker_is_killed_at_once_while_the_master_is_busy_and_the_local_directory_is_gone(
    tmp_path: Path, make: Make
) -> None:
    cluster = make(f"local:{tmp_path}/cluster")
    host = cluster.host()
    crunch = keep_busy(host, tmp_path / "done")
    (tmp_path / "cluster").rename(tmp_path / "cluster.old")
    await_end(crunch)  # of itself a local leadership has no end
    (tmp_path / "done").touch()
    host.await_log("] INFO test: crunch", 2)
    cluster.check()


def test_a_leader_whose_time_was_up_leads_again_when_its_session_turns_out_to_live(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path, 10))
    host = cluster.host()
    host.lead()
    cluster.await_leader()
    mine, agent = host.cluster, host.child("cluster")
    os.kill(agent, signal.SIGSTOP)
    host.await_log("its time was up")
    os.kill(agent, signal.SIGCONT)
    at = time.monotonic()
    cluster.await_leader(after=at)
    again = host.cluster
    assert (again["role"], again["session"]) == ("leader", mine["session"])
    cluster.check()


def test_a_leadership_that_seems_over_to_the_master_while_it_is_prolonged_is_taken_up_again(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path, CALM))
    host = cluster.host()
    more = """
@on("SIGUSR1")
def hesitate():
    from daemonkit.cluster import leadership
    clock = leadership.boot_time

    def late():
        leadership.boot_time = clock
        return clock() + 3600

    leadership.boot_time = late
"""
    host.lead(more)
    cluster.await_leader()
    mine = host.cluster
    os.kill(host.pid() or 0, signal.SIGUSR1)
    host.await_log("its time was up")
    host.await_log(f": leads, token {mine['token']}", 2)
    assert host.cluster["session"] == mine["session"]
    cluster.check()


def test_a_session_that_the_servers_end_is_another_ones_leadership(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path, 10))
    first = start(cluster, 2)
    mine = first.cluster
    servers.end_session(mine["session"])
    second = cluster.await_leader(*others(cluster, first))
    assert second.cluster["token"] > mine["token"]
    first.await_log("leads no more")
    assert cluster.gap(first, second) < SLACK
    cluster.check()


def test_a_leader_that_is_cut_off_stops_before_its_successor_begins(tmp_path: Path, make: Make) -> None:
    with contextlib.closing(Network()) as network, ensemble(tmp_path, (network.ours,) * 3) as servers:
        cluster = make(servers.url(session_timeout=SESSION))
        first = cluster.host(network=network)
        first.lead()
        cluster.await_leader()
        cluster.host().lead()
        network.cut()
        second = cluster.await_leader(*others(cluster, first))
        assert 0 < cluster.gap(first, second) < SESSION * 2 + SLACK
        network.heal()
        first.await_log("leads no more")
        first.await_cluster(lambda said: said["state"] == "connected")
        cluster.await_writes(lambda all: all[-1].at > time.monotonic() - BEAT * 4)
        assert first.cluster["role"] == "follower"
        cluster.check()
        cluster.close()


def test_a_leader_that_is_cut_off_with_a_server_of_its_own_stops_as_well(tmp_path: Path, make: Make) -> None:
    """The server, in the minority, goes on answering its clients for a while: longer than the session lasts."""
    with contextlib.closing(Network()) as network:
        servers = Ensemble(tmp_path, (network.ours, network.ours, network.theirs), ["syncLimit=40"])
        servers.prefixes[network.theirs] = network.prefix
        try:
            servers.start()
            if servers.leader() is servers.servers[2]:  # let one of the majority lead
                servers.servers[2].kill()
                assert servers.leader() in servers.servers[:2]  # before it can stand for election again
                servers.servers[2].start(network.prefix)
                servers.servers[2].await_ready()
            cluster = make(f"zookeeper://{network.theirs}:{servers.servers[2].port}?session_timeout=1")
            first = cluster.host(network=network)
            first.lead()
            cluster.await_leader()
            majority = ",".join(f"{each.host}:{each.port}" for each in servers.servers[:2])
            cluster.host(f"zookeeper://{majority}?session_timeout=1").lead()
            network.cut()
            second = cluster.await_leader(*others(cluster, first))
            assert cluster.gap(first, second) > 0
            at = time.monotonic()
            cluster.await_writes(lambda all: all[-1].at > at + 1)  # else the first would be seen to act beside it
            network.heal()
            cluster.check()
            cluster.close()
        finally:
            servers.close()


@pytest.mark.parametrize("harm", [("rm", "-rf", "cluster"), ("mv", "cluster", "cluster.old")], ids=["rm", "mv"])
def test_a_local_directory_that_is_gone_is_begun_anew_by_all_and_one_leads(
    tmp_path: Path, make: Make, harm: Sequence[str]
) -> None:
    cluster = make(f"local:{tmp_path}/cluster")
    first = start(cluster, 3)
    before = first.cluster
    subprocess.run(harm, cwd=tmp_path)  # rm may fail: they are back before it has done
    cluster.await_writes(lambda writes: any(each.token > before["token"] for each in writes))
    late = cluster.host()
    late.lead()
    for host in cluster.hosts:
        host.await_cluster(lambda found: len(found["peers"]) == 4 and found["role"] in ("leader", "follower"))
    until = time.monotonic() + PATIENCE
    while not _agree(found := [host.cluster for host in cluster.hosts]):  # rm may have had some begin twice
        assert time.monotonic() < until, found
    holders = [host.child("cluster") for host in cluster.hosts]
    used = [cpu_time(pid) for pid in holders]
    time.sleep(3)
    assert all(cpu_time(pid) - earlier <= 2 for pid, earlier in zip(holders, used, strict=True))
    for host in cluster.hosts:
        began = time.monotonic()
        assert host.call("kill", "beat").returncode == 0
        assert time.monotonic() - began < CALM


def _agree(found: Sequence[dict[str, Any]]) -> bool:
    """Whether those four hosts have one leader, and nothing to complain of."""
    roles = sorted(each["role"] for each in found)
    tokens = {each["leader"] and each["leader"]["token"] for each in found}
    is_one = roles == ["follower", "follower", "follower", "leader"] and len(tokens) == 1
    return is_one and {each["error"] for each in found} == {None}


def cpu_time(pid: int) -> int:
    """Of a process, in ticks of 10 ms (proc_pid_stat(5))."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


def test_servers_are_lost_one_and_two_and_all_come_back(tmp_path: Path, make: Make) -> None:
    with ensemble(tmp_path) as servers:
        cluster = make(servers.url(session_timeout=SESSION))
        start(cluster, 2)
        lost = servers.leader()
        lost.kill()
        at = time.monotonic()
        cluster.await_writes(lambda all: all[-1].at > at + 1.2 * SESSION)  # two of three are enough
        other = next(each for each in servers.servers if each.pid)
        other.kill()
        at = time.monotonic()
        for host in cluster.hosts:  # one of three is not: nobody leads
            host.await_cluster(lambda said: said["role"] == "follower")
        silent = time.monotonic()
        assert max(each.at for each in cluster.writes()) < silent
        assert max(each.at for each in cluster.writes()) < at + SESSION
        for server in (other, lost):
            server.start()
        cluster.await_leader(after=silent)
        cluster.check()
        cluster.close()


def test_without_a_server_the_daemon_starts_and_says_so_and_leads_when_there_is_one(tmp_path: Path, make: Make) -> None:
    servers = Ensemble(tmp_path, LOCAL)
    cluster = make(servers.url(session_timeout=SESSION))
    host = cluster.host()
    host.lead()
    said = host.await_cluster(lambda said: said["error"])
    assert (said["role"], said["state"]) == ("follower", "connecting")
    assert said["error"].startswith(f"reach {cluster.coordinator}: Connection dropped: socket connection error")
    assert said["error"] in host.call("status", "beat").stdout
    try:
        servers.start()
        cluster.await_leader()
    finally:
        cluster.close()
        servers.close()


@pytest.mark.parametrize("count", [50, 500])
def test_of_many_candidates_one_is_woken_when_the_leader_goes(servers: Ensemble, tmp_path: Path, count: int) -> None:
    woken: list[Candidacy] = []

    class Counted(Candidacy):
        def touch(self) -> None:
            woken.append(self)
            super().touch()

    there = url(servers, tmp_path, 60)
    sessions = [connect(there) for _ in range(count if count <= 50 else 20)]
    try:
        candidates = []
        for n in range(count):
            session = sessions[n % len(sessions)]
            if n < len(sessions):
                session.join(group=str(n))  # waits for the connection
            candidates.append(session.elect("job"))
            candidates[-1].__class__ = Counted
            session.dispatch()
        assert [each.is_held for each in candidates] == [True] + [False] * (count - 1)
        tokens = [each.token for each in candidates]
        assert tokens == sorted(tokens)
        for each in sessions:
            each.dispatch()
        woken.clear()
        before = sum(_packets(server) for server in servers.servers)
        sessions[0].resign(candidates[0])
        until = time.monotonic() + PATIENCE
        while not candidates[1].is_held:
            assert time.monotonic() < until
            sessions[1].wait(PATIENCE)
        for each in sessions:
            each.wait(0.001)
        assert [each for each in woken if each is not candidates[0]] == [candidates[1]]
        assert sum(each.is_held for each in candidates) == 1
        # What the sessions' heartbeats cost meanwhile aside, a herd would have cost one at least for each candidate.
        assert sum(_packets(server) for server in servers.servers) - before < 40
    finally:
        for each in sessions:
            each.close()


def _packets(server: Server) -> int:
    """How many packets it has sent to clients."""
    (line,) = (line for line in server.told("mntr").splitlines() if line.startswith("zk_packets_sent"))
    return int(line.split("\t")[1])


def test_jobs_workers_and_tasks_have_a_connection_of_their_own_and_the_master_none(
    coordinator: str, make: Make
) -> None:
    cluster = make(coordinator)
    host = cluster.host()
    host.start(
        """
        from daemonkit import cluster

        @every(0.1, fork=True)
        def forked():
            with cluster.lock("x", timeout=10) as held:
                log.info("job has it: %s", held.is_held())

        @worker
        def crunch(stop):
            cluster.set("/crunch", b"was here")
            cluster.join({"port": 80})
            log.info("worker: %s", [each.data for each in cluster.members()])
            stop.wait()

        @every(0.1)
        def inline():
            cluster.get("/crunch")
        """
    )
    host.await_log("job has it: True", 2)
    host.await_log("worker: [{'port': 80}]")
    host.await_log("UsageError: cluster: this runs in the daemon's own process, which must not wait for others")
    with connect(coordinator) as outside:
        assert outside.get("/crunch").data == b"was here"
        assert [each.daemon for each in outside.members()] == ["beat"]
        assert host.call("kill", "beat").returncode == 0
        outside.set("/seen", b"")  # its server has seen by now all that was done before, also if it is not the same
        assert outside.members() == []  # its session was closed


def test_what_is_watched_in_the_cluster_is_told_between_two_jobs(coordinator: str, make: Make) -> None:
    cluster = make(coordinator)
    host = cluster.host()
    host.start(
        """
        from daemonkit import cluster

        def changed(value):
            log.info("value %s %s %s pid %d", value.data, value.children, value.version, os.getpid())

        cluster.watch("/config/x", changed)
        """
    )
    host.await_log(f"value None () 0 pid {host.pid()}")
    with connect(coordinator) as outside:
        outside.set("/config/x", b"1")
        host.await_log("value b'1' () 0")
        outside.set("/config/x/below", b"")
        host.await_log("value b'1' ('below',) 0")
        os.kill(host.child("cluster"), signal.SIGKILL)
        outside.set("/config/x", b"2")
        host.await_log("value b'2' ('below',) 1")
    assert host.log.read_text().count("value b'1' ('below',) 0") == 1  # who came after told nothing twice
    mine = host.cluster
    assert (mine["role"], mine["token"]) == ("member", None)


def test_a_master_that_was_busy_hears_the_newest_value_and_of_its_new_leadership(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    there = url(servers, tmp_path, CALM)
    cluster = make(there)
    host = cluster.host()
    more = """
from daemonkit import cluster

cluster.watch("/x", lambda value: log.info("value %s", value.data))

@worker(leader=True)
def crunch(stop):
    log.info("crunch %d", current_leadership.token)
    stop.wait()

@on("leader")
def led():
    log.info("begins with %d", current_leadership.token)

@on("SIGUSR1")
def busy():
    log.info("busy")
    while not os.path.exists("DONE"):
        time.sleep(0.01)
"""
    host.lead(more.replace("DONE", str(tmp_path / "done")))
    cluster.await_leader()
    mine = host.cluster
    os.kill(host.pid() or 0, signal.SIGUSR1)
    host.await_log("] INFO test: busy")
    with connect(there) as outside:
        for number in range(1500):  # more than there is room for between the two
            outside.set("/x", b"%d" % number)
        servers.end_session(mine["session"])
        until = time.monotonic() + PATIENCE
        while (leader := outside.leader("beat")) is None or leader.token == mine["token"]:
            assert time.monotonic() < until
            outside.wait(0.05)
    (tmp_path / "done").touch()
    host.await_log("value b'1499'")
    host.await_log(f"begins with {leader.token}")
    host.await_log(f"crunch {leader.token}")
    cluster.check()


def test_a_configuration_in_the_cluster_lies_over_the_file_and_each_change_is_a_reload(
    coordinator: str, make: Make
) -> None:
    cluster = make(coordinator)
    host = cluster.host()
    file = host.path / "daemonkit.toml"
    file.write_text('[cluster]\nconfig = "/config/beat"\n[daemon]\ngraceful_timeout = 7\n[settings]\na = 1\nb = 1\n')
    host.environ["DAEMONKIT_CONFIG"] = str(file)
    with connect(coordinator) as outside:
        outside.set("/config/beat", b"[settings]\na = 2\n")
        host.start(
            """
            @on("reload")
            def reloaded():
                log.info("settings %s", dict(settings()))

            @worker
            def crunch(stop):
                log.info("crunch with %s", dict(settings()))
                stop.wait()
            """
        )
        host.await_log("settings {'a': 2, 'b': 1}")
        host.await_log("crunch with {'a': 2, 'b': 1}")
        outside.set("/config/beat", b"[settings]\na = 3\n[daemon]\nlog_level = 'DEBUG'\n")
        host.await_log("settings {'a': 3, 'b': 1}")
        host.await_log("crunch with {'a': 3, 'b': 1}")
        outside.set("/config/beat", b"[daemon]\nlog_lvl = 1\n")
        host.await_log(
            "reload: read /config/beat in the cluster:2: [daemon] has the unknown key 'log_lvl'; did you mean"
        )
        outside.set("/config/beat", b"not TOML")
        host.await_log("reload: read /config/beat in the cluster: not TOML")
        for poison, words in (("[" * 5000, ": nested too deep"), ("1" * 5000, ": not TOML: Exceeds the limit")):
            outside.set("/config/beat", f"[settings]\na = {poison}".encode())
            host.await_log(f"reload: read /config/beat in the cluster{words}")
        outside.delete("/config/beat")
        host.await_log("settings {'a': 1, 'b': 1}")
        count = host.log.read_text().count("settings {'a': 1, 'b': 1}")
        assert host.call("reload", "beat").returncode == 0
        host.await_log("settings {'a': 1, 'b': 1}", count + 1)
    assert "Traceback" not in host.log.read_text()


def test_the_command_shows_who_leads_who_is_there_and_who_has_which_lock(coordinator: str, make: Make) -> None:
    cluster = make(coordinator)
    first = start(cluster, 2)
    mine = first.await_cluster(lambda found: len(found["peers"]) == 2)

    def said(*words: str) -> str:
        done = first.call("cluster", *words, coordinator)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (leader,) = json.loads(said("status", "--json"))["leaders"]
    assert (leader["name"], leader["token"], leader["members"]) == ("beat", mine["token"], 2)
    head, row = said("status").splitlines()
    assert head.split() == ["NAME", "LEADER", "SINCE", "TOKEN", "MEMBERS"]
    assert row.split()[0] == "beat"
    assert str(mine["token"]) in row
    assert [each["group"] for each in json.loads(said("members", "--json"))] == ["beat", "beat"]
    assert len(said("members").splitlines()) == 3
    with connect(coordinator) as outside, outside.lock("x"):
        (lock,) = json.loads(said("locks", "--json"))
        assert (lock["name"], lock["kind"], lock["is_held"], lock["pid"]) == ("x", "exclusive", True, os.getpid())
        assert "held" in said("locks")
    assert said("locks") == f"no locks at {outside.url}\n"
    assert said("set", "/config/x", "1") == "/config/x has version 0\n"
    assert json.loads(said("set", "/config/x", "2", "--version", "0", "--json"))["version"] == 1
    assert said("get", "/config/x") == "2"
    refused = first.call("cluster", "set", "/config/x", "3", "--version", "0", coordinator)
    assert (refused.returncode, "/config/x" in refused.stderr) == (1, True)
    shown = json.loads(said("watch", "/config", "-n", "1", "--json"))
    assert (shown["data"], shown["children"]) == ("", ["x"])
    with connect(coordinator) as outside:
        outside.set("/daemonkit/members/beat/zz", json.dumps({"host": "\x1b[31m", "pid": 1}).encode())
    assert "\x1b" not in said("members")


def test_what_nobody_has_meant_ends_neither_the_session_nor_its_process(coordinator: str, make: Make) -> None:
    cluster = make(coordinator)
    host = cluster.host()
    host.lead()
    cluster.await_leader()
    mine, agent = host.cluster, host.child("cluster")
    damaged = [b'{"pid":"x"}', b"\xff", b"[]", b'{"pid":{}}', b'{"since":[]}', b"9" * 5000, b"[" * 50_000]
    with connect(coordinator) as outside:
        for number, data in enumerate(damaged):
            for group in ("members", "leaders", "locks"):
                outside.set(f"/daemonkit/{group}/beat/zz{number}", data)
            found = host.call("status", "--json", "beat")
            assert found.returncode == 0, found.stderr
    said = host.await_cluster(lambda said: said["leader"] or said["error"])
    assert (said["role"], said["session"]) == ("leader", mine["session"])
    assert host.child("cluster") == agent


def test_a_value_that_is_deleted_and_made_again_is_told_though_it_is_the_same(servers: Ensemble, make: Make) -> None:
    cluster = make(servers.url())
    host = cluster.host()
    host.start(
        """
        from daemonkit import cluster

        cluster.watch("/again", lambda value: log.info("value %s", value.data))
        """
    )
    host.await_log("value None")
    with connect(cluster.coordinator) as outside:
        outside.set("/again", b"1")
        host.await_log("value b'1'")
        agent = host.child("cluster")
        os.kill(agent, signal.SIGSTOP)  # it sees the two changes as one
        outside.delete("/again")
        outside.set("/again", b"1")
        os.kill(agent, signal.SIGCONT)
        host.await_log("value b'1'", 2)


def test_wrong_coordinators_are_told_at_the_start(make: Make) -> None:
    cluster = make("zokeeper://h")
    host = cluster.host()
    done = host.call("start", host.script("@every(1, leader=True)\ndef f(): pass\n"))
    assert done.returncode == 2
    assert "did you mean zookeeper:?" in done.stderr
    done = host.call("start", host.script("@worker\ndef cluster(stop): pass\n@on('leader')\ndef f(): pass\n"))
    assert "the name 'cluster' is that of the daemon's own process" in done.stderr


def test_a_coordinator_that_refuses_is_told_in_the_status_and_nothing_is_led(servers: Ensemble, make: Make) -> None:
    cluster = make(servers.url("/not/there"))
    host = cluster.host()
    host.lead()
    host.await_log("there is no node /not/there; create it")
    assert "there is no node /not/there" in host.await_cluster(lambda said: said["error"])["error"]
    with connect(servers.url()) as outside:
        outside.set("/not/there", b"")
        cluster.await_leader()
        outside.set("/closed", b"")
    host.await_cluster(lambda said: said["error"] is None)


def test_a_path_that_is_refused_keeps_nobody_from_leading_at_once_nor_busy(
    servers: Ensemble, tmp_path: Path, make: Make
) -> None:
    cluster = make(url(servers, tmp_path))
    with connect(cluster.coordinator.replace("//", "//me:secret@")) as owner:
        owner.set("/secret", b"")
    first = start(cluster, 2, 'from daemonkit import cluster\ncluster.watch("/secret", lambda value: None)\n')
    (second,) = others(cluster, first)
    second.await_cluster(lambda said: said["error"] and "the ACL of a node forbids it" in said["error"])
    at = time.monotonic()
    cluster.await_writes(lambda all: all[-1].at > at + 3.3)  # by now it tries again after 3.2 seconds
    holder = second.child("cluster")
    used = cpu_time(holder)
    assert first.call("kill", "beat").returncode == 0
    assert cluster.await_leader(second) is second
    assert cluster.gap(first, second) < SLACK
    assert cpu_time(holder) - used < 50
    cluster.check()


def test_the_example_hands_out_parts_and_the_next_takes_over(tmp_path: Path, make: Make) -> None:
    cluster = make(f"local:{tmp_path}/cluster")
    first, second = cluster.host(), cluster.host()
    for host in (first, second):
        done = host.call("start", EXAMPLES / "leader.py")
        assert done.returncode == 0, done.stderr
        host.await_log("ready, pid")
        first.await_log("this one leads, token")
    assert first.call("kill", "leader").returncode == 0
    assert "another leads" in first.log.read_text()
    second.await_log("this one leads, token")
    second.await_log(f"works on part {second.status('leader')['cluster']['token']}/1")


def test_the_nightly_example_refuses_a_latecomer(tmp_path: Path) -> None:
    nightly = runpy.run_path(str(EXAMPLES / "nightly.py"))
    report = tmp_path / "report"
    assert nightly["replace"](str(report), 7, "first")
    assert not nightly["replace"](str(report), 6, "late")
    assert nightly["replace"](str(report), 7, "again")
    assert report.read_text() == "7\nagain\n"


def test_a_reload_with_another_coordinator_lets_its_workers_end_before_another_may_lead(
    tmp_path: Path, make: Make
) -> None:
    cluster = make(f"local:{tmp_path}/one")
    more = """
@worker(leader=True)
def crunch(stop):
    log.info("crunch")
    while not stop.wait(60):
        pass
    for _ in range(20):
        write("ends")
        time.sleep(BEAT)
"""
    first = cluster.host()
    file = first.path / "daemonkit.toml"
    first.environ["DAEMONKIT_CONFIG"] = str(file)
    del first.environ["DAEMONKIT_COORDINATOR"]
    file.write_text(f'[daemon]\ncoordinator = "local:{tmp_path}/one"\n')
    first.lead(more.replace("BEAT", str(BEAT)))
    first.await_log("] INFO test: crunch")
    second = cluster.host()
    second.lead()
    with connect(f"local:{tmp_path}/two") as there:
        other = there.elect("beat")
        there.dispatch()
        assert other.is_held
        file.write_text(f'[daemon]\ncoordinator = "local:{tmp_path}/two"\n')
        assert first.call("reload", "beat").returncode == 0
        cluster.await_leader(second)
        first.await_cluster(lambda said: said["coordinator"] == there.url and said["state"] == "connected")
        writes = cluster.writes()
        cluster.check()  # now: the first leads there next, and the tokens of two coordinators are not to be compared
    assert len([each for each in writes if each.what == "ends"]) >= 20
    assert max(each.at for each in writes if each.host == first.name) < min(
        each.at for each in writes if each.host == second.name
    )


def test_a_reload_with_another_coordinator_leads_there_and_no_more_here(tmp_path: Path, make: Make) -> None:
    cluster = make(f"local:{tmp_path}/one")
    host = cluster.host()
    file = host.path / "daemonkit.toml"
    host.environ["DAEMONKIT_CONFIG"] = str(file)
    del host.environ["DAEMONKIT_COORDINATOR"]
    file.write_text(f'[daemon]\ncoordinator = "local:{tmp_path}/one"\n')
    host.lead()
    cluster.await_leader()
    file.write_text(f'[daemon]\ncoordinator = "local:{tmp_path}/two"\n')
    done = host.call("reload", "beat")
    assert done.returncode == 0, done.stderr
    host.await_log("leads no more")
    host.await_log(": leads, token", 2)
    for name, count in (("one", 0), ("two", 1)):
        with connect(f"local:{tmp_path}/{name}") as outside:
            assert len(outside.leaders()) == count
