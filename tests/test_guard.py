"""The fork guard: what it names, what it refuses, what a child finds in the place of its parent's connections."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import atexit, contextvars, ctypes, gc, logging, os, resource, socket, sys, threading
from daemonkit.core import waitid
from daemonkit.processes import child, guard
from daemonkit.processes.guard import ForkHooks, Guard
from daemonkit.errors import ForkRefused, UsageError

logging.basicConfig(format="%(message)s", stream=sys.stdout)
ours, server = socket.socketpair()
atexit.register(lambda: (ours.close(), server.close()))

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def heard():  # what has come over the connection by now
    server.setblocking(False)
    try:
        return server.recv(100)
    except BlockingIOError:
        return None

class Session:
    \"\"\"Says goodbye when it is finalized, as clients of databases do.\"\"\"
    def __del__(self):
        try:
            ours.send(b"QUIT")
        except OSError:
            pass

plain = sys.argv[1:] == ["plain"]
fork = os.fork if plain else Guard("close").fork
"""


def run(program: str, *args: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own: this one has threads and sockets of pytest's."""
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", HEAD + program, *args],
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        stdin=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def lines(program: str, *args: str, stdin: int = subprocess.DEVNULL) -> list[str]:
    """What a program prints that has nothing to complain of."""
    done = run(program, *args, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_connected_stream_sockets_are_named_with_descriptor_and_peer_and_nothing_else_is(tmp_path: Path) -> None:
    program = f"""
server.close(); ours.close()
def connected(family, address):
    listener = socket.socket(family); listener.bind(address); listener.listen()
    client = socket.socket(family); client.connect(listener.getsockname())
    return client, listener
ends = [
    connected(socket.AF_INET, ("127.0.0.1", 0)),
    connected(socket.AF_INET6, ("::1", 0)),
    connected(socket.AF_UNIX, {str(tmp_path / "sock")!r}),
    connected(socket.AF_UNIX, b"\\0abstract-{os.getpid()}"),
]
others = [socket.socketpair(socket.AF_UNIX, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)]
others += [os.pipe(), os.open("/", os.O_RDONLY), socket.socket(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)]
meant, other = socket.socketpair()
def expected(client, listener):
    name = listener.getsockname()
    match client.family:
        case socket.AF_INET: peer = f"127.0.0.1:{{name[1]}}"
        case socket.AF_INET6: peer = f"[::1]:{{name[1]}}"
        case _: peer = f"unix:{{name}}" if isinstance(name, str) else f"unix:@{{name[1:].decode()}}"
    return f"fd {{client.fileno()}} to {{peer}}"
found = list(map(str, guard.connections({{meant.fileno()}})))
assert found == [*(expected(*pair) for pair in ends), f"fd {{other.fileno()}} to an unnamed unix socket"], found
for sock in [sock for pair in ends for sock in pair] + [meant, other, *others[0], *others[1], *others[4:]]:
    sock.close()
assert not guard.connections()
print("fine")
"""
    standard, peer = socket.socketpair()
    with standard, peer:
        assert lines(program, stdin=standard.fileno()) == ["fine"]


def test_looking_at_a_socket_does_not_change_it() -> None:
    program = """
socket.setdefaulttimeout(5)
ours.setblocking(True)
assert len(guard.connections()) == 2
print(os.get_blocking(ours.fileno()), ours.send(b"still open"), heard())
"""
    assert lines(program) == ["True 10 b'still open'"]


def test_threads_are_named_those_that_python_does_not_know_too() -> None:
    program = """
name = ctypes.create_string_buffer(b"engine")
libc = ctypes.CDLL(None)
thread = ctypes.c_ulong()
assert libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.pause, ctypes.c_void_p), None) == 0
assert libc.pthread_setname_np(thread, name) == 0
go = threading.Event()
known = threading.Thread(target=go.wait, name="fetcher")
known.start()
found = guard.threads()
native = next(int(t) for t in os.listdir("/proc/self/task") if int(t) not in (os.getpid(), known.native_id))
print(sorted(found) == sorted(["'fetcher'", f"'engine', thread {native}, not Python's"]) or found)
seen = []
other = threading.Thread(target=lambda: seen.extend(guard.threads()), name="looker")
other.start(); other.join()
print("'MainThread'" in seen, "'looker'" in seen)
go.set(); known.join()
sys.stdout.flush(); os._exit(0)
"""
    assert lines(program) == ["True", "True False"]


def test_a_thread_that_has_been_joined_is_not_named() -> None:
    program = """
for _ in range(300):
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()
    assert guard.threads() == (), guard.threads()
print("fine")
"""
    assert lines(program) == ["fine"]


def test_refuse_names_all_and_forks_nothing() -> None:
    program = """
go = threading.Event()
thread = threading.Thread(target=go.wait, name="fetcher"); thread.start()
try:
    Guard().fork()
except ForkRefused as error:
    fds = ours.fileno(), server.fileno()
    assert error.threads == ("'fetcher'",)
    assert error.connections == tuple(f"fd {fd} to an unnamed unix socket" for fd in fds)
    assert isinstance(error, RuntimeError)
    print(str(error).replace(f"fd {fds[0]} ", "fd A ").replace(f"fd {fds[1]} ", "fd B "))
go.set(); thread.join()
print(waitid.has_children())
"""
    refusal, has_children = lines(program)
    assert refusal.startswith(
        "fork: refused, the child would share the locks of 1 thread ('fetcher') and 2 connections "
        "(fd A to an unnamed unix socket, fd B to an unnamed unix socket): "
    )
    assert has_children == "False"


def test_a_process_that_shares_nothing_but_what_is_meant_may_fork() -> None:
    program = """
pid = Guard("refuse", keep=[ours, server.fileno()]).fork()
if pid == 0:
    ours.send(b"hello")
    child.leave(7)
print(ended(pid), heard())
"""
    assert lines(program) == ["7 b'hello'"]


def test_warn_says_each_set_once_and_the_child_shares_it() -> None:
    program = """
guarded = Guard("warn", keep=[server])
for text in b"one", b"two", b"three":
    if text == b"three":
        more = socket.socketpair()
        atexit.register(lambda: [end.close() for end in more])
    pid = guarded.fork()
    if pid == 0:
        ours.send(text)
        child.leave(0)
    print(ended(pid), heard())
"""
    found = lines(program)
    assert [line for line in found if "fork" not in line] == ["0 b'one'", "0 b'two'", "0 b'three'"]
    assert [line.partition(" (")[0] for line in found if "fork" in line] == [
        "fork: the child shares 1 connection",
        "fork: the child shares 3 connections",
    ]


def test_under_close_a_child_finds_the_connection_hung_up_and_its_parent_keeps_it() -> None:
    program = """
def use_and_close():
    print("child reads", ours.recv(1))
    try:
        ours.send(b"from the child")
    except OSError as error:
        print("child writes", error.strerror)
    print("child shares", guard.shared(), [os.get_inheritable(sock.fileno()) for sock in (ours, server)])
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()
session = Session()
pid = fork()
if pid == 0:
    del session
    gc.collect()
    if not plain:
        use_and_close()
    child.leave(0)
print(ended(pid), heard(), ours.send(b"from the parent"), heard())
server.setblocking(True); server.send(b"reply"); print(ours.recv(5))
"""
    assert lines(program) == [
        "child reads b''",
        "child writes Broken pipe",
        "child shares  [False, False]",
        "0 None 15 b'from the parent'",
        "b'reply'",
    ]
    assert lines(program, "plain") == ["0 b'QUIT' 15 b'from the parent'", "b'reply'"]


OWNERS = {
    "thread-local variable": "local = threading.local()\ndef own(): local.session = Session(); wait()",
    "context variable": "var = contextvars.ContextVar('s')\ndef own(): var.set(Session()); wait()",
    "exception": """
def own():
    try:
        raise ValueError(Session())
    except ValueError:
        wait()""",
    "local variable": "def own(): session = Session(); wait()",
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_a_session_of_another_thread_is_not_finalized_in_the_child_before_it_is_hung_up(owner: str) -> None:
    program = f"""
there, go = threading.Event(), threading.Event()
def wait(): there.set(); go.wait()
{owner}
thread = threading.Thread(target=own, name="owner")
thread.start(); there.wait()
pid = fork()
if pid == 0:
    child.leave(0)
print(ended(pid), heard())
go.set(); thread.join()
"""
    told, outcome = lines(program)[:2]
    assert (told, outcome) == ("fork: the child shares the locks of 1 thread ('owner')", "0 None")
    if "var.set" in owner or "local." in owner:
        assert "b'QUIT'" in run(program, "plain").stdout  # Python itself does it


def test_garbage_is_not_collected_in_the_child_before_the_session_is_hung_up() -> None:
    program = """
def make_garbage():
    session = Session()
    session.cycle = session
os.register_at_fork(before=make_garbage, after_in_child=lambda: [[] for _ in range(100_000)])
pid = fork()
if pid == 0:
    print(gc.isenabled())
    child.leave(0)
print(ended(pid), heard(), gc.isenabled())
"""
    assert lines(program) == ["True", "0 None True"]
    assert "b'QUIT'" in run(program, "plain").stdout


def test_hooks_close_before_the_guard_looks_and_open_again_on_both_sides() -> None:
    program = """
hooks = ForkHooks()
def hook(text): return lambda: print(text)
for name in "first", "second":
    before, parent, child_ = (hook(f"{when} {name}") for when in ("before", "parent", "child"))
    hooks.add(before=before, after_in_parent=parent, after_in_child=child_)
hooks.add(before=lambda: (ours.close(), server.close()))
pid = Guard("refuse", hooks=hooks).fork()
if pid == 0:
    child.leave(0)
assert ended(pid) == 0
"""
    found = lines(program)
    assert found[:2] == ["before second", "before first"]
    assert [line for line in found if "parent" in line] == ["parent first", "parent second"]
    assert [line for line in found if "child" in line] == ["child first", "child second"]


def test_a_hook_that_fails_before_the_fork_prevents_it_and_what_was_closed_is_opened_again() -> None:
    program = """
hooks = ForkHooks()
hooks.add(before=lambda: print("never"), after_in_parent=lambda: print("never"))
hooks.add(before=lambda: 1 / 0, after_in_parent=lambda: print("never"))
hooks.add(before=lambda: print("closed"), after_in_parent=lambda: print("open again"))
try:
    Guard("close", hooks=hooks).fork()
except ZeroDivisionError as error:
    print(error, waitid.has_children())
"""
    assert lines(program) == ["closed", "open again", "division by zero False"]


def test_a_refused_fork_opens_again_what_the_hooks_have_closed() -> None:
    program = """
hooks = ForkHooks()
hooks.add(before=lambda: print("closed"), after_in_parent=lambda: print("open again"))
try:
    Guard("refuse", hooks=hooks).fork()
except ForkRefused:
    print("refused")
"""
    assert lines(program) == ["closed", "open again", "refused"]


def test_a_fork_for_which_there_is_no_room_opens_again_and_says_so() -> None:
    program = """
hooks = ForkHooks()
hooks.add(after_in_parent=lambda: print("open again"))
if os.geteuid() == 0:
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    Guard("close", hooks=hooks).fork()
except BlockingIOError as error:
    print(error.strerror, gc.isenabled())
"""
    assert lines(program) == ["open again", "Resource temporarily unavailable True"]


def test_a_hook_that_fails_in_the_parent_is_logged_and_one_that_fails_in_the_child_ends_it() -> None:
    program = """
hooks = ForkHooks()
hooks.add(after_in_parent=lambda: 1 / 0, after_in_child=lambda: [][1])
pid = Guard("close", hooks=hooks).fork()
if pid == 0:
    print("never")
    child.leave(0)
print(ended(pid))
"""
    done = run(program)
    assert done.stdout.startswith("fork: a hook after it has failed in the parent\nTraceback")
    assert done.stdout.splitlines()[-2:] == ["ZeroDivisionError: division by zero", "1"]
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("IndexError: list index out of range\n")


def test_what_stands_in_a_buffer_at_the_fork_is_written_once() -> None:
    program = """
print("buffered", end=" ")
pid = fork()
if pid == 0:
    child.leave(0)
print(ended(pid))
"""
    assert lines(program) == ["buffered 0"]
    assert lines(program, "plain") == ["buffered buffered 0"]


def test_threads_that_fork_at_once_all_get_children_without_their_connection() -> None:
    program = """
codes = []
def work():
    for _ in range(5):
        pid = guarded.fork()
        if pid == 0:
            child.leave(len(guard.connections()) + gc.isenabled())
        codes.append(ended(pid))
logging.disable()
guarded = Guard("close")
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(set(codes), len(codes), gc.isenabled(), heard())
"""
    assert lines(program) == ["{1} 20 True None"]


def test_an_unknown_policy_is_a_usage_error() -> None:
    program = """
try:
    Guard("clsoe")
except UsageError as error:
    print(error)
"""
    assert lines(program) == ["fork_guard='clsoe': it is one of refuse, warn, close"]
