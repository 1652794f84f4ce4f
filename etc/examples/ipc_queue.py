"""Five children write into one queue; their parent reads, what is urgent first.

python etc/examples/ipc_queue.py
"""

import os

from daemonkit import ipc

CHILDREN, MESSAGES = 5, 100
URGENT, USUAL = 1, 2


def write(queue: ipc.MessageQueue, child: int) -> None:
    """Every tenth message is urgent."""
    for number in range(MESSAGES):
        queue.send(f"{child} {number}".encode(), URGENT if number % 10 == 0 else USUAL)


def main() -> None:
    """Count what comes from whom."""
    queue = ipc.MessageQueue()
    children = []
    for child in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            write(queue, child)
            os._exit(0)
        children.append(pid)
    counts = [0] * CHILDREN
    urgent = 0
    for _ in range(CHILDREN * MESSAGES):
        body, kind = queue.receive(ipc.LOWEST_FIRST, timeout=10)
        counts[int(body.split()[0])] += 1
        urgent += kind == URGENT
    for child, pid in enumerate(children):
        os.waitpid(pid, 0)
        print(f"child {child} wrote {counts[child]} messages")
    print(f"{urgent} were urgent, {queue.statistics().messages} are left")
    queue.remove()


if __name__ == "__main__":
    main()
