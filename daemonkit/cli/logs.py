"""daemonkit logs"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import click

from daemonkit.cli.common import Place, name_argument
from daemonkit.errors import DaemonkitError, UsageError

_CHUNK = 65536


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, through rotations.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=20, show_default=True, metavar="N", help="So many last lines."
)
@click.option("--log", metavar="FILE", help="The log, where it is not the configured one.")
@name_argument
def command(place: Place, log: str | None, follow: bool, lines: int) -> None:
    """Show a daemon's log.

    \b
      daemonkit logs -f heartbeat
      daemonkit logs -n 100 heartbeat.py
    """
    path = os.path.abspath(log) if log else _path(place)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UsageError(f"read the log {path}: {error.strerror}; --log names another") from None
    _show_last(file, lines)
    if follow:
        try:
            _follow(path, file)
        except KeyboardInterrupt:
            return


def _path(place: Place) -> str:
    """Where the daemon itself says that it writes, else where the configuration says."""
    try:
        log = str(place.ask("status", 1.0)["log"])
    except DaemonkitError:
        return place.configuration().options.log
    if log == "journal":
        raise UsageError(f"{place.name} writes to the journal: see journalctl -u, with the name of its unit")
    if log == "stderr":
        raise UsageError(f"{place.name} runs in the foreground and writes to its terminal")
    return log


def _show_last(file: BinaryIO, lines: int) -> None:
    """Print the last ``lines`` lines, reading backwards from the end."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start > 0 and tail.count(b"\n") <= lines:
        step = min(_CHUNK, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    kept = tail.splitlines(keepends=True)[-lines:] if lines else []
    _put(b"".join(kept))
    file.seek(end)


def _follow(path: str, file: BinaryIO) -> None:
    """Print what is appended, and go over to the new file when the path names another."""
    from daemonkit.core.inotify import Watch

    with Watch(os.path.dirname(path)) as watch:
        while True:
            while data := file.read(_CHUNK):
                _put(data)
            try:
                there = os.stat(path)
            except FileNotFoundError:
                watch.wait()
                continue
            here = os.fstat(file.fileno())
            if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
                _put(file.read())
                file.close()
                file = open(path, "rb")
                continue
            if there.st_size < file.tell():
                file.seek(0)  # truncated in place
                continue
            watch.wait()


def _put(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
