"""How soon another leads, on three ZooKeeper servers and on one host, against plain kazoo; locks; who is woken."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kazoo.client import KazooClient
from rig import DAEMONKIT, PYTHON, as_a_user, box, end, goal, median, percentile, run, table

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from zookeeper import Ensemble, ensemble

from daemonkit.cluster.connect import connect
from daemonkit.cluster.coordinator import Coordinator
from daemonkit.cluster.election import Candidacy
from daemonkit.cluster.recipe import Recipe

PATIENCE = 60.0  # seconds
SPREAD = 1.5  # seconds
STANDS = 1.0  # seconds until one that does not lead stands in line, which it tells nobody
LOOK = 0.0005  # seconds between two looks whether somebody leads
OURS = """
import os, time
from daemonkit import main, on

@on("leader")
def led():
    with open(os.environ["BENCH_OUT"], "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\\n")

if __name__ == "__main__":
    main()
"""
PLAIN = """
import os, signal, sys, time
from kazoo.client import KazooClient
client = KazooClient(sys.argv[1], timeout=float(sys.argv[2]))
client.start()

def lead():
    with open(os.environ["BENCH_OUT"], "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\\n")
    signal.pause()

def leave(number, frame):
    client.stop()
    os._exit(0)

signal.signal(signal.SIGTERM, leave)
client.Election("/plain/" + sys.argv[3], str(os.getpid())).run(lead)
"""
TICKING = """
import json, os, time
from daemonkit import every, main, on
from daemonkit.api import default
seen = []

@every(0.01)
def tick():
    seen.append(default.jobs["tick"].record.lateness)

@on("stop")
def tell():
    with open(os.environ["BENCH_OUT"], "w") as file:
        json.dump(seen, file)

LEADER

if __name__ == "__main__":
    main()
"""


class Out:
    """Where those who begin to lead write their PID and the moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        os.environ["BENCH_OUT"] = str(path)

    def leader(self, after: float, but: int = 0) -> tuple[int, float]:
        """PID and moment of the first one that has begun after ``after``."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            for line in self.path.read_text().splitlines():
                pid, moment = line.split()
                if float(moment) > after and int(pid) != but:
                    return int(pid), float(moment)
            time.sleep(LOOK)
        raise TimeoutError("nobody leads")


class Pair:
    """Two daemons of one name, each in a run directory of its own."""

    def __init__(self, path: Path, url: str) -> None:
        self.out = Out(path / "out")
        script = path / "ours.py"
        script.write_text(OURS)
        self.run_dirs = {name: path / name for name in ("one", "two")}
        self._start = [DAEMONKIT, "start", "--coordinator", url]
        self._script = str(script)
        for run_dir in self.run_dirs.values():
            run_dir.mkdir(mode=0o755)
            self.start(run_dir)
        self.out.leader(0.0)

    def start(self, run_dir: Path) -> None:
        """One of them."""
        code, said = run(*self._start, "--run-dir", str(run_dir), "--log", str(run_dir / "log"), self._script)
        assert code == 0, said
        time.sleep(STANDS)

    def master(self, run_dir: Path) -> int:
        """Its PID."""
        return int((run_dir / "ours.pid").read_text())

    def leading(self) -> Path:
        """The run directory of the one that leads."""
        pid = int(self.out.path.read_text().splitlines()[-1].split()[0])
        return next(run_dir for run_dir in self.run_dirs.values() if self.master(run_dir) == pid)

    def child(self, run_dir: Path, name: str) -> int:
        """The PID of one of its processes."""
        _, said = run(DAEMONKIT, "status", "--json", "--run-dir", str(run_dir), "ours")
        return int(next(each["pid"] for each in json.loads(said)["children"] if each["name"] == name))

    def tree(self, run_dir: Path) -> list[int]:
        """All its processes, the master first."""
        found = [self.master(run_dir)]
        for pid in found:
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def hand_over(self, fault: Callable[[Pair, Path], None]) -> float:
        """Milliseconds from the fault of the one that leads until the other does."""
        first = self.leading()
        old = self.master(first)
        time.sleep(random.uniform(0, SPREAD))  # a session that was only just heard of lasts longer
        began = time.monotonic()
        fault(self, first)
        _, moment = self.out.leader(began, old)
        for pid in self.tree(first) if (first / "ours.pid").exists() and Path(f"/proc/{old}").exists() else ():
            end(pid)
        until = time.monotonic() + PATIENCE
        while Path(f"/proc/{old}").exists() and time.monotonic() < until:
            time.sleep(LOOK)
        self.start(first)
        return (moment - began) * 1000

    def close(self) -> None:
        """Stop both."""
        for run_dir in self.run_dirs.values():
            run(DAEMONKIT, "kill", "--run-dir", str(run_dir), "ours")


def clean(pair: Pair, run_dir: Path) -> None:
    """TERM to the master."""
    os.kill(pair.master(run_dir), signal.SIGTERM)


def master_killed(pair: Pair, run_dir: Path) -> None:
    """kill -9 to the master alone."""
    os.kill(pair.master(run_dir), signal.SIGKILL)


def all_killed(pair: Pair, run_dir: Path) -> None:
    """kill -9 to all at once: stopped first, so that none can act on the death of another."""
    tree = pair.tree(run_dir)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def main() -> None:
    """All in one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kills", type=int, default=3, help="rounds of what waits for a session's end")
    parser.add_argument("--count", type=int, default=500, help="lock and unlock, a round")
    chosen = parser.parse_args()
    as_a_user()
    with box() as path, TemporaryDirectory(prefix="zk-") as files, ensemble(Path(files)) as servers:
        hand_overs(path, servers, chosen.rounds, chosen.kills)
        agent_killed(path, servers, chosen.rounds)
        locks(path, servers, chosen.rounds, chosen.count)
        for count in (50, 500):
            candidates(servers, count)
        storm(path, servers)


def hand_overs(path: Path, servers: Ensemble, rounds: int, kills: int) -> None:
    """From the fault to the next leader."""
    rows: list[tuple[object, ...]] = []
    found: dict[str, list[float]] = {}

    def measure(name: str, count: int, once: Callable[..., float], *arguments: object) -> None:
        times = found[name] = [once(*arguments) for _ in range(count)]
        rows.append((name, median(times), max(times)))

    for engine, url in (("local", f"local:{path}/cluster"), ("ZooKeeper", servers.url(session_timeout=4))):
        with pair(path / engine, url) as two:
            measure(f"{engine}, clean stop", rounds, two.hand_over, clean)
            measure(f"{engine}, kill -9 of the master", rounds, two.hand_over, master_killed)
    for session in (1, 4):
        with plain(path / f"plain{session}", servers, session) as hand_over:
            if session == 1:
                measure("kazoo alone, clean stop", rounds, hand_over, signal.SIGTERM)
            measure(f"kazoo alone, kill -9, session {session} s", kills, hand_over, signal.SIGKILL)
        with pair(path / f"ours{session}", servers.url(session_timeout=session)) as two:
            measure(f"ZooKeeper, kill -9 of all, session {session} s", kills, two.hand_over, all_killed)
    table("Milliseconds from the fault until the next one leads", ("", "p50", "most"), rows)
    goal("clean stop on ZooKeeper, ms", median(found["ZooKeeper, clean stop"]), 50)
    goal("clean stop on one host, ms", median(found["local, clean stop"]), 20)
    goal("kill -9 of the master, ms at most", max(found["ZooKeeper, kill -9 of the master"]), 300)
    for session in (1, 4):
        theirs = median(found[f"kazoo alone, kill -9, session {session} s"])
        ours = median(found[f"ZooKeeper, kill -9 of all, session {session} s"])
        goal(f"kill -9 of all by kazoo alone, session {session} s", ours / theirs, 1.1)


@contextmanager
def pair(path: Path, url: str) -> Iterator[Pair]:
    """Two daemons for the time of a block."""
    path.mkdir()
    made = Pair(path, url)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def plain(path: Path, servers: Ensemble, session: float) -> Iterator[Callable[[int], float]]:
    """Two programs with kazoo's own Election; what is yielded measures one hand-over."""
    path.mkdir()
    out = Out(path / "out")
    command = [PYTHON, "-c", PLAIN, servers.hosts, str(session), f"s{session}"]
    processes = [subprocess.Popen(command) for _ in range(2)]
    out.leader(0.0)
    time.sleep(STANDS)

    def hand_over(number: int) -> float:
        old = int(out.path.read_text().splitlines()[-1].split()[0])
        process = next(each for each in processes if each.pid == old)
        time.sleep(random.uniform(0, SPREAD))
        began = time.monotonic()
        process.send_signal(number)
        _, moment = out.leader(began, old)
        process.wait()
        processes[processes.index(process)] = subprocess.Popen(command)
        time.sleep(STANDS)
        return (moment - began) * 1000

    try:
        yield hand_over
    finally:
        for process in processes:
            process.kill()
            process.wait()


def agent_killed(path: Path, servers: Ensemble, rounds: int) -> None:
    """Whether the leadership goes on, and how soon that is known."""
    times = []
    kept = 0
    with pair(path / "agent", servers.url(session_timeout=4)) as two:
        for _ in range(rounds):
            first = two.leading()
            while (before := status(first))["state"] != "connected":
                pass
            killed = two.child(first, "cluster")
            began = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            until = began + PATIENCE
            while time.monotonic() < until:
                now = status(first)
                if (now["state"], now["role"]) == ("connected", "leader") or now["role"] == "follower":
                    break
            times.append((time.monotonic() - began) * 1000)
            kept += (now["token"], now["session"]) == (before["token"], before["session"])
    table(
        "kill -9 of the process with the session, milliseconds until it is decided, as `status` shows it",
        ("", "p50", "most", "goes on"),
        [("ZooKeeper, session 4 s", median(times), max(times), f"{kept} of {rounds}")],
    )
    goal("decided within, ms at most", max(times), 1000)


def status(run_dir: Path) -> dict[str, object]:
    """A daemon's place in its cluster."""
    found: dict[str, object] = json.loads(run(DAEMONKIT, "status", "--json", "--run-dir", str(run_dir), "ours")[1])[
        "cluster"
    ]
    return found


def locks(path: Path, servers: Ensemble, rounds: int, count: int) -> None:
    """Lock and unlock, nobody else there."""
    client: Any = KazooClient(servers.hosts)
    client.start()
    theirs: Any = client.Lock("/plain/lock")
    zookeeper, local = connect(servers.url()), connect(f"local:{path}/locks")

    def plain_lock() -> None:
        with theirs:
            pass

    def our_lock(coordinator: Coordinator) -> None:
        with coordinator.lock("x"):
            pass

    runs: dict[str, Callable[[], None]] = {
        "kazoo": plain_lock,
        "daemonkit": lambda: our_lock(zookeeper),
        "daemonkit, local": lambda: our_lock(local),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, act in runs.items():
            began = time.perf_counter()
            for _ in range(count):
                act()
            rates[name].append(count / (time.perf_counter() - began))
    rows = [(name, median(each), percentile(each, 0.1), max(each)) for name, each in rates.items()]
    table("Lock and unlock, uncontended, a second", ("", "p50", "p10", "most"), rows)
    shares = [mine / theirs for mine, theirs in zip(rates["daemonkit"], rates["kazoo"], strict=True)]
    goal("daemonkit by kazoo", median(shares), 0.8, at_least=True)
    for each in (zookeeper, local):
        each.close()
    client.stop()
    client.close()


def candidates(servers: Ensemble, count: int) -> None:
    """Who is woken when a leader goes, and what the servers send for that."""
    woken: list[Recipe] = []

    class Counted(Candidacy):
        def touch(self) -> None:
            woken.append(self)
            super().touch()

    sessions = [connect(servers.url(session_timeout=20)) for _ in range(21)]
    stand: list[Candidacy] = []
    for n in range(count):
        session = sessions[n % 20 + 1 if n else 0]  # the leader has one of its own
        if n < len(sessions):
            session.join(group="bench")  # waits for the connection
        made = session.elect(f"of{count}")
        made.__class__ = Counted
        session.dispatch()
        stand.append(made)
    time.sleep(1)
    woken.clear()
    before = sent(servers)
    began = time.monotonic()
    sessions[0].close()
    while not stand[1].is_held:
        sessions[2].wait(PATIENCE)
    took = (time.monotonic() - began) * 1000
    for session in sessions[1:]:
        session.wait(0.02)
    packets, others = sent(servers) - before, len({id(each) for each in woken if each is not stand[0]})
    head = ("", "others woken", "packets that the servers sent", "ms until the next leads")
    table("The leader goes", head, [(f"{count} candidates", others, packets, took)])
    goal(f"woken of {count}", others, 1)
    for session in sessions[1:]:
        session.close()


def sent(servers: Ensemble) -> int:
    """Packets that the servers have sent so far."""
    lines = [line for server in servers.servers for line in server.ask("mntr").splitlines()]
    return sum(int(line.split("\t")[1]) for line in lines if line.startswith("zk_packets_sent"))


def storm(path: Path, servers: Ensemble) -> None:
    """Ticks of 10 ms, without and with a process beside them that connects again and again."""
    late: dict[str, list[float]] = {}
    for name, text in (("no cluster", ""), ("in a cluster", '@on("leader")\ndef led(): pass')):
        where = path / name.replace(" ", "-")
        where.mkdir()
        script, out = where / "ticking.py", where / "out"
        script.write_text(TICKING.replace("LEADER", text))
        os.environ["BENCH_OUT"] = str(out)
        options = ["--run-dir", str(where), "--log", str(where / "log")]
        code, said = run(DAEMONKIT, "start", *options, "--coordinator", servers.url(session_timeout=1), str(script))
        assert code == 0, said
        until = time.monotonic() + 10
        while time.monotonic() < until:
            for number in (signal.SIGSTOP, signal.SIGCONT):  # for both: the servers need the processor, too
                for server in servers.servers:
                    server.signal(number)
                time.sleep(random.uniform(0.3, 0.9))
        run(DAEMONKIT, "kill", *options[:2], "ticking")
        late[name] = [each / 1000 for each in json.loads(out.read_text())]
    rows = [(name, median(each), percentile(each, 0.99), max(each)) for name, each in late.items()]
    table("A timer of 10 ms, microseconds late, while the servers come and go", ("", "p50", "p99", "most"), rows)
    mine, without = (percentile(late[name], 0.5) for name in ("in a cluster", "no cluster"))
    goal("lateness in a cluster by that without, p50", mine / without, 1.25)


if __name__ == "__main__":
    main()
