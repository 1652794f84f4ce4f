"""What a fork server does with what it is asked, seen from where it is asked; hostile messages, too."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import IMPORTS, Serving, await_end, descriptors, living, zombies
from harness import PATIENCE

from daemonkit.errors import ForkServerLost
from daemonkit.processes.children import Child
from daemonkit.processes.forkserver import MASTERS, Kind, numbered
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import INLINE

READY = "os.write(READY, b'.')\n"
SLEEP = READY + "signal.pause()"


@pytest.fixture
def serving() -> Iterator[Serving]:
    """A fork server; the test fails if it complains, or leaves anything."""
    with Serving() as made:
        yield made
        said = made.close()
        assert not said


def test_a_child_runs_what_was_asked_for_and_its_end_is_told(serving: Serving) -> None:
    receipt = serving.run("raise SystemExit(7)")
    assert (receipt.exit_code, receipt.signal) == (7, None)
    assert len(serving.children) == 0


def test_receipts_tell_the_memory_and_the_time_of_each_child(serving: Serving) -> None:
    small = serving.run("")
    large = serving.run("text = 'x' * 50_000_000\nwhile time.process_time() < 0.2: pass")
    assert large.max_rss > small.max_rss + 45_000_000
    assert large.wall > large.cpu * 0.9 > 0.17
    assert small.max_rss < 60_000_000


def test_a_child_has_only_the_descriptors_that_are_meant_for_it(serving: Serving) -> None:
    """Nor those that came with requests which wait, and no memory of theirs (a mapping would keep it)."""
    serving.process.send_signal(signal.SIGSTOP)  # so that all is there before the first fork
    reader, writer = os.pipe()
    text = """
with open('/proc/self/maps') as file:
    mapped = file.read().count('memfd:')
os.write(message.fds[0], b'%d:%d:%d\\n' % (message.id, len(os.listdir('/proc/self/fd')), mapped))
"""
    asked = [
        serving.spawn(f"{text}# {'x' * size}", [writer] * fds)
        for size, fds in [(0, 1), (INLINE, 1), (0, 2), (INLINE, 3), (0, 1)]
    ]
    os.close(writer)
    serving.process.send_signal(signal.SIGCONT)
    assert all(serving.end_of(each).is_clean for each in asked)
    with open(reader) as file:
        said = sorted(file.read().split())
    # 0, 1, 2, the directory that is listed; what is meant for it; and a large payload keeps its memfd
    assert said == ["1:5:0", "2:6:1", "3:6:0", "4:8:1", "5:5:0"]


def test_a_child_cannot_be_told_from_a_fresh_process_by_its_signals(serving: Serving) -> None:
    text = "with open('/proc/self/status') as file: os.write(TELL, ' '.join(file.read().split()).encode() + b'\\n')"
    _, line = serving.told(text)
    words = line.split()
    libcs_own = 1 << 31 | 1 << 32  # nptl(7)
    masks = {key: int(words[words.index(key) + 1], 16) & ~libcs_own for key in ("SigBlk:", "SigIgn:", "SigCgt:")}
    ignored = sum(1 << (number - 1) for number in (signal.SIGPIPE, signal.SIGXFSZ))
    assert masks == {"SigBlk:": 0, "SigIgn:": ignored, "SigCgt:": 0}


def test_a_result_sent_before_the_end_is_there_when_the_end_is_told(serving: Serving) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for number in range(100):
        receipt = serving.run(f"Wire(socket.socket(fileno=message.fds[0])).send(1, {number})", [theirs.fileno()])
        assert receipt.is_clean
        assert ours.recv(100, socket.MSG_DONTWAIT)
    ours.close()
    theirs.close()


def test_requests_are_forked_in_order_and_all_ends_are_told(serving: Serving) -> None:
    begun: list[int] = []
    ended: list[int] = []
    for _ in range(300):
        serving.children.spawn(b"", lambda made, receipt: ended.append(made.id), lambda made: begun.append(made.id))
    serving.until(lambda: len(ended) == 300)
    assert begun == sorted(begun)
    assert sorted(ended) == begun


def test_signals_reach_the_child(serving: Serving) -> None:
    asked = serving.started(SLEEP)
    asked.child.signal(signal.SIGUSR1)
    assert serving.end_of(asked).signal == signal.SIGUSR1


def test_signals_that_everybody_gets_are_left_to_the_master(serving: Serving) -> None:
    asked = serving.started("for n in (1, 2, 3, 10, 12, 15): signal.signal(n, signal.SIG_IGN)\n" + SLEEP)
    for number in MASTERS:
        serving.process.send_signal(number)
        os.kill(asked.pid, number)
    assert serving.run("").is_clean
    assert asked.receipt is None
    asked.child.kill_tree()
    assert serving.end_of(asked).signal == signal.SIGKILL


def test_a_request_that_waits_can_be_taken_back(serving: Serving) -> None:
    reader, writer = os.pipe()
    serving.process.send_signal(signal.SIGSTOP)
    first, second = serving.spawn("", [writer]), serving.spawn("", [writer])
    first.child.signal(signal.SIGTERM)
    second.child.kill_tree()
    os.close(writer)
    serving.process.send_signal(signal.SIGCONT)
    for asked in (first, second):
        receipt = serving.end_of(asked)
        assert (receipt.pid, receipt.signal, receipt.reason) == (0, signal.SIGKILL, "never begun")
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_messages_about_unknown_and_ended_children_are_ignored(serving: Serving) -> None:
    asked = serving.spawn("")
    serving.end_of(asked)
    asked.child.signal(signal.SIGKILL)
    asked.child.kill_tree()
    for number in (0, 999, 2**64 - 1):
        serving.children.tell(Kind.SIGNAL, number, numbered(9))
        serving.children.tell(Kind.KILL_TREE, number)
    serving.children.tell(200, 1)  # of no known kind
    assert serving.run("").is_clean


def test_a_signal_that_does_not_exist_is_refused_where_it_is_asked_for(serving: Serving) -> None:
    asked = serving.started(SLEEP)
    with pytest.raises(ValueError, match="send signal 999 to pid"):
        asked.child.signal(999)
    asked.child.kill_tree()
    serving.end_of(asked)


def test_a_server_is_told_to_send_a_signal_that_does_not_exist_and_goes_on() -> None:
    with Serving() as serving:
        asked = serving.started(SLEEP)
        serving.children.tell(Kind.SIGNAL, asked.child.id, numbered(999))
        assert serving.run("").is_clean
        assert f"send signal 999 to pid {asked.pid}: Invalid argument" in serving.close()


def test_a_malformed_message_ends_the_server_loudly_and_all_under_it() -> None:
    with Serving() as serving:
        asked = serving.started(SLEEP)
        serving.children.tell(Kind.SIGNAL, asked.child.id, b"too long for a number")
        with pytest.raises(ForkServerLost):
            serving.until(lambda: False)
        assert "struct.error" in serving.close()
        assert serving.process.returncode == 1
    await_end(asked.pid)


def test_a_client_that_does_not_listen_does_not_hold_up_the_server(serving: Serving) -> None:
    reader, writer = os.pipe()
    for _ in range(600):  # twice what the socket takes of STARTED and ENDED
        serving.children.spawn(b"os.write(message.fds[0], b'.')", lambda made, receipt: None, fds=[writer])
        while serving.children.wire.is_waiting:
            assert select.select([], [serving.children.wire.fileno()], [], PATIENCE)[1]
            serving.children.wire.flush()
    os.close(writer)
    with open(reader, "rb") as file:
        assert len(file.read()) == 600  # until the last has closed its end
    serving.until(lambda: not len(serving.children))


def test_a_hundred_megabytes_reach_the_child(serving: Serving) -> None:
    asked, line = serving.told("os.write(TELL, b'%d\\n' % len(message.payload)) #" + "x" * 100_000_000)
    assert int(line) > 100_000_000
    serving.end_of(asked)
    asked, line = serving.told(
        "with open('/proc/self/maps') as file: os.write(TELL, b'%d\\n' % ('memfd:' in file.read()))"
    )
    assert line == "0\n"
    serving.end_of(asked)


def test_a_child_that_closes_all_descriptors_ends_well(serving: Serving) -> None:
    assert serving.run("os.closerange(0, 1000)").exit_code == 0
    assert serving.run("").is_clean


def test_what_enter_raises_or_returns_ends_the_child_alone() -> None:
    enter = """
def enter(message):
    if bytes(message.payload) == b"raise":
        raise RuntimeError("in enter")
    if bytes(message.payload) == b"exit":
        sys.exit("leaves")
"""
    with Serving(enter=enter) as serving:
        for text in ("raise", "exit", "return"):
            assert serving.run(text).exit_code == 1
        assert serving.process.poll() is None
        said = serving.close()
    assert said.count("RuntimeError: in enter") == 1
    assert serving.process.returncode == 0


def test_what_is_in_the_servers_buffers_is_not_the_childrens() -> None:
    with Serving(
        before="sys.stderr = open(2, 'w', closefd=False, buffering=4096); sys.stderr.write('once')"
    ) as serving:
        for _ in range(3):
            serving.run("")
        assert serving.close() == "once"


def test_handlers_that_the_servers_program_has_set_are_not_the_childrens() -> None:
    before = "import faulthandler; faulthandler.enable()\nsignal.signal(signal.SIGALRM, lambda number, frame: None)"
    with Serving(before) as serving:
        asked = serving.started(SLEEP)
        asked.child.signal(signal.SIGALRM)
        assert serving.end_of(asked).signal == signal.SIGALRM


def test_ignored_signals_are_ignored_by_children() -> None:
    program = f"""{IMPORTS}
def enter(message):
    os.kill(os.getpid(), signal.SIGINT)
    child.leave(3)
pid, wire = fork_server(enter, lambda: None, (signal.SIGINT,))
children = Children(wire)
codes = []
children.spawn(b"", lambda made, receipt: codes.append(receipt.exit_code))
import select
while not codes:
    select.select([wire.fileno()], [], [], 30)
    children.receive()
assert codes == [3]
wire.close()
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


def test_the_server_sleeps_when_nothing_happens(serving: Serving) -> None:
    asked = serving.started(SLEEP)
    serving.run("")
    pid = serving.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    assert zombies(pid) == 0
    assert children.read_text().split() == [str(asked.pid)]

    def switches() -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    def is_asleep() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    # Its look for orphans comes a moment after the last end; if it sleeps later than that, it is asleep for good.
    select.select([], [], [], 0.3)
    until = time.monotonic() + PATIENCE
    while not is_asleep():
        assert time.monotonic() < until
    before = switches()
    select.select([], [], [], 0.5)
    assert switches() == before
    asked.child.kill_tree()
    serving.end_of(asked)


def test_the_server_ends_with_its_parent_though_the_wire_is_open_elsewhere() -> None:
    program = f"""{IMPORTS}
ours, theirs = pair()
text = "import signal, socket; from daemonkit.processes.children import serve_wire;"
text += "from daemonkit.processes.wire import Wire; print(1, flush=True);"
text += f"serve_wire(Wire(socket.socket(fileno={{theirs.fileno()}})), None)"
command = [sys.executable, "-c", text]
server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
server.stdout.readline()
holder = subprocess.Popen(["sleep", "1000"], pass_fds=[ours.fileno()], stdout=subprocess.DEVNULL)
print(server.pid, holder.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server, holder = map(int, parent.stdout.readline().split())
        parent.kill()
    try:
        await_end(server)
    finally:
        os.kill(holder, signal.SIGKILL)


def test_a_server_forked_by_a_thread_outlives_it() -> None:
    program = f"""{IMPORTS}
import threading, select, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # that a thread forks is the point
def enter(message):
    child.leave(3)
made = []
thread = threading.Thread(target=lambda: made.append(fork_server(enter, lambda: None)))
thread.start()
thread.join()
pid, wire = made[0]
children = Children(wire)
codes = []
children.spawn(b"", lambda made, receipt: codes.append(receipt.exit_code))
while not codes:
    assert select.select([wire.fileno()], [], [], 30)[0]
    children.receive()
assert codes == [3]
wire.close()
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


def test_nothing_is_open_or_allocated_for_children_that_have_ended(serving: Serving) -> None:
    serving.run("")
    before = descriptors(serving.process.pid)
    for size in (0, INLINE + 1):
        reader, writer = os.pipe()
        for _ in range(20):
            serving.run("#" + "x" * size, [reader, writer])
        os.close(reader)
        os.close(writer)
    assert descriptors(serving.process.pid) == before


def test_an_orphan_of_a_lasting_child_stays_until_that_ends(serving: Serving) -> None:
    # It is ready when the shell, whose title has the same words, is gone.
    orphan = "subprocess.run(['sh', '-c', 'sleep 1000 <&- >&- 2>&- &'])\n" + SLEEP
    # It does not adopt: neither does it say so to the kernel.
    asked = serving.started("prctl.become_subreaper(False)\n" + orphan, adopts=False)
    other = serving.started(SLEEP)
    other.child.signal(signal.SIGKILL)
    serving.end_of(other)
    (sleeper,) = [pid for pid, title in living(serving.title).items() if "sleep 1000" in title]
    assert sleeper
    pidfd = os.pidfd_open(sleeper)
    asked.child.signal(signal.SIGKILL)
    serving.end_of(asked)
    with open(pidfd):
        assert select.select([pidfd], [], [], PATIENCE)[0]


def test_callbacks_get_their_own_row(serving: Serving) -> None:
    rows: list[tuple[Child, Receipt]] = []
    made = serving.children.spawn(b"", lambda child, receipt: rows.append((child, receipt)))
    assert list(serving.children) == [made]
    serving.until(lambda: bool(rows))
    assert rows[0][0] is made
    assert rows[0][1].pid == made.pid
    assert time.monotonic() > rows[0][1].wall > 0
