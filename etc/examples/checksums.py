"""Checksums of files, each computed in a process of its own: a file that takes too long fails alone."""

from __future__ import annotations

import hashlib
import sys

from daemonkit import Pool, progress
from daemonkit.errors import WorkerLost

PART = 1 << 20  # bytes


def checksum(path: str) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    done = 0
    with open(path, "rb") as file:
        while part := file.read(PART):
            digest.update(part)
            done += len(part)
            progress((path, done))
    return digest.hexdigest()


def told(state: tuple[str, int]) -> None:
    """Say how far a file is."""
    path, done = state
    print(f"{path}: {done} bytes", file=sys.stderr)


def main(paths: list[str]) -> int:
    """Print a line for each file; 1 if one could not be read."""
    failed = 0
    with Pool(4, max_rss=500_000_000) as pool:
        limited = pool.options(timeout=60, on_progress=told)
        for path, call in [(path, limited.submit(checksum, path)) for path in paths]:
            try:
                print(call.result(), path)
            except (OSError, WorkerLost) as error:
                print(f"{path}: {error}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
