"""A room for one: five visitors, one at a time, on the whole machine; and one of them dies inside.

python etc/examples/ipc_room.py
"""

import os
import signal

from daemonkit import ipc


def visit(number: int) -> None:
    """Enter, and leave; the third visitor does not get that far."""
    with ipc.Semaphore("room for one"):
        print(f"visitor {number} is in", flush=True)
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # the kernel gives back what the dead hold
        print(f"visitor {number} leaves", flush=True)


def main() -> None:
    """Let them all come at once."""
    room = ipc.Semaphore("room for one", 1)
    visitors = []
    for number in range(1, 6):
        pid = os.fork()
        if pid == 0:
            visit(number)
            os._exit(0)
        visitors.append(pid)
    for pid in visitors:
        os.waitpid(pid, 0)
    print(f"all have gone, room for {room.value}")
    room.remove()


if __name__ == "__main__":
    main()
