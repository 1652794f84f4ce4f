"""Who tells the truth: each fault is made for real, on daemonkit and on its peers with a PID file."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peers
from peers import Peer
from rig import PYTHON, as_a_user, box, end, goal, is_alive, run, running, table

REASON = "no_such_module"
Kind = Callable[..., Peer]


class Verdict(NamedTuple):
    """Whether it was right, and what was seen."""

    is_right: bool
    seen: str

    def __str__(self) -> str:
        return f"{'yes' if self.is_right else '**no**'}: {self.seen}"


def main() -> None:
    """Try every fault on everybody."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="of many starts at once; the goal says 20")
    parser.add_argument("--starts", type=int, default=50, help="at once; the goal says 200")
    chosen = parser.parse_args()
    as_a_user()
    faults: dict[str, Callable[[Kind], Verdict]] = {
        "an import fails": import_fails,
        "stale PID file": stale_pid_file,
        "PID reused": reused_pid,
        "session leader": leads_a_session,
        "umask": umask,
        f"{chosen.starts} starts at once, {chosen.rounds} rounds": lambda kind: at_once(kind, chosen),
    }
    verdicts = [(fault, [attempt(kind) for kind in peers.WITH_PID_FILE]) for fault, attempt in faults.items()]
    table("Right?", ("", "daemonkit", "python-daemon", "daemonocle"), [[fault, *seen] for fault, seen in verdicts])
    goal("faults that daemonkit tells wrong", sum(not mine.is_right for _, (mine, *_) in verdicts), 0)


def import_fails(kind: Kind) -> Verdict:
    """Its start should fail, and the reason should be told."""
    with box() as path:
        peer = kind(path, f"import {REASON}")
        code, said = run(*peer.start)
        stop_all(peer)
        told = "reason told" if REASON in said else "reason not told"
        return Verdict(code != 0 and REASON in said, f"exit code {code}, {told}")


def stale_pid_file(kind: Kind) -> Verdict:
    """The number of a dead process should be no obstacle."""
    with box() as path, subprocess.Popen([PYTHON, "-c", ""]) as dead:
        dead.wait()
        peer = kind(path)
        peer.pid_path.write_text(f"{dead.pid}\n")
        run(*peer.start)
        living = settled(peer)
        stop_all(peer)
        return Verdict(len(living) == 1, "starts" if living else "refuses")


def reused_pid(kind: Kind) -> Verdict:
    """A stop should not hit whoever has the number by now."""
    with box() as path, running(PYTHON, "-c", "import time; time.sleep(600)") as innocent:
        peer = kind(path)
        peer.pid_path.write_text(f"{innocent.pid}\n")
        run(*peer.stop)
        time.sleep(0.2)
        spared = is_alive(innocent.pid)
        return Verdict(spared, "spared" if spared else "the innocent was ended")


def leads_a_session(kind: Kind) -> Verdict:
    """A session leader can get a terminal again."""
    return of_running(kind, lambda pid: os.getsid(pid) != pid, lambda right: "is none" if right else "is one")


def umask(kind: Kind) -> Verdict:
    """Files that everybody may write are nobody's wish."""
    with box() as path:
        peer = kind(path)
        run(*peer.start)
        (pid,) = settled(peer)
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        stop_all(peer)
    value = next(line.split()[1] for line in lines if line.startswith("Umask"))
    return Verdict(value == "0022", value)


def of_running(kind: Kind, is_right: Callable[[int], bool], words: Callable[[bool], str]) -> Verdict:
    """Ask something about a daemon that runs."""
    with box() as path:
        peer = kind(path)
        run(*peer.start)
        right = is_right(settled(peer)[0])
        stop_all(peer)
        return Verdict(right, words(right))


def at_once(kind: Kind, chosen: argparse.Namespace) -> Verdict:
    """One should win and say so, the others say "already"; the PID file should name the one that lives."""
    wrong: list[str] = []
    for _ in range(chosen.rounds):
        with box() as path:
            peer = kind(path)
            launched = [
                subprocess.Popen(peer.start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                for _ in range(chosen.starts)
            ]
            answers = [(process.communicate()[0], process.returncode) for process in launched]
            claims = sum(code == 0 and "already" not in said for said, code in answers)
            living = settled(peer)
            named = peer.pid_path.read_text().strip() if peer.pid_path.exists() else "nobody"
            stop_all(peer)
        if claims != 1 or len(living) != 1 or named != str(living[0]):
            right = living and named == str(living[0])
            wrong.append(f"{claims} say success, {len(living)} live, file {'right' if right else 'wrong'}")
    return Verdict(not wrong, wrong[0] if wrong else "1 says success, 1 lives, file right")


def settled(peer: Peer) -> list[int]:
    """The daemons that live, after they have had the time to begin or to give up."""
    until = time.monotonic() + 5
    while not peer.pids() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)
    return [pid for pid in peer.pids() if is_alive(pid)]


def stop_all(peer: Peer) -> None:
    """End whatever was started."""
    for pid in peer.pids():
        end(pid, signal.SIGKILL)


if __name__ == "__main__":
    peers.require()
    main()
