"""A counter in shared memory, under a semaphore: four processes count, and no step is lost.

python etc/examples/ipc_counter.py
"""

import os
import struct

from daemonkit import ipc

PROCESSES, STEPS = 4, 5000
NUMBER = struct.Struct("=Q")


def count(memory: ipc.SharedMemory, lock: ipc.Semaphore) -> None:
    """Read, add one, write: without the lock, others would do so in between."""
    for _ in range(STEPS):
        with lock:
            (value,) = NUMBER.unpack_from(memory.buf)
            NUMBER.pack_into(memory.buf, 0, value + 1)


def main() -> None:
    """Let them count, and compare."""
    lock = ipc.Semaphore()
    with ipc.SharedMemory(None, NUMBER.size) as memory:
        counters = []
        for _ in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                count(memory, lock)
                os._exit(0)
            counters.append(pid)
        for pid in counters:
            os.waitpid(pid, 0)
        print(f"counted to {NUMBER.unpack_from(memory.buf)[0]}, of {PROCESSES * STEPS}")
        memory.remove()
    lock.remove()


if __name__ == "__main__":
    main()
