"""Receipts of real processes."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from daemonkit.processes.receipt import MemoryKills, Receipt, is_clean, never_begun, reap, unpack


def start(text: str) -> int:
    """A Python process that is reaped by nobody else."""
    return os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", text], os.environ)


def receipt_of(text: str) -> Receipt:
    """The receipt of a Python process."""
    began = time.monotonic()
    pid = start(text)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    packed = reap(pid, began, time.monotonic(), MemoryKills())
    assert packed is not None
    receipt = unpack(packed)
    assert receipt.pid == pid
    assert is_clean(packed) == receipt.is_clean
    return receipt


@pytest.mark.parametrize(
    ("text", "code", "number", "reason"),
    [
        ("", 0, None, "exited with status 0"),
        ("raise SystemExit(255)", 255, None, "exited with status 255"),
        ("import os; os.kill(os.getpid(), 9)", None, signal.SIGKILL, "killed by SIGKILL"),
        ("import os; os.abort()", None, signal.SIGABRT, "killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 40)", None, 40, "killed by signal 40"),
    ],
)
def test_a_receipt_says_how_a_process_ended(text: str, code: int | None, number: int | None, reason: str) -> None:
    receipt = receipt_of(text)
    assert (receipt.exit_code, receipt.signal, receipt.reason) == (code, number, reason)
    assert receipt.is_clean == (code == 0)
    assert not receipt.out_of_memory
    assert str(receipt).startswith(f"pid {receipt.pid} {reason} after ")


def test_a_receipt_says_what_a_process_has_used() -> None:
    receipt = receipt_of("import time\nwhile time.process_time() < 0.3: pass")
    assert 30 > receipt.wall >= receipt.cpu * 0.9 >= 0.27


def test_a_process_that_lives_has_no_receipt() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    pid = start(f"import os; os.read({reader}, 1)")
    try:
        assert reap(pid, 0.0, 0.0, MemoryKills()) is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    with pytest.raises(ChildProcessError):
        reap(pid, 0.0, 0.0, MemoryKills())


def test_a_child_that_was_never_forked_has_a_receipt_that_says_so() -> None:
    killed, failed = unpack(never_begun(signal.SIGKILL)), unpack(never_begun(1 << 8))
    assert (killed.pid, killed.signal, killed.exit_code) == (0, signal.SIGKILL, None)
    assert (failed.pid, failed.signal, failed.exit_code) == (0, None, 1)
    assert killed.reason == failed.reason == "never begun"
    assert not killed.is_clean


def test_the_count_of_the_kernel_is_found() -> None:
    kills = MemoryKills()
    assert not kills.explain_one(time.monotonic())
    assert os.path.exists(kills._path)
    with open(kills._path) as file:
        assert "oom_kill " in file.read()
