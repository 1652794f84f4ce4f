"""core.logs: whatever happens to the log, the writer lives and what was lost is counted."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from daemonkit.core.logs import Handler, Sink, Stream


def test_every_line_of_a_file_has_time_name_and_pid(tmp_path: Path) -> None:
    sink = Sink("beat", str(tmp_path / "log"), journal=False)
    sink.write(logging.INFO, "one\ntwo\n")
    lines = (tmp_path / "log").read_text().splitlines()
    stamp = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}} beat\[{os.getpid()}\] INFO "
    assert [re.fullmatch(stamp + word, line) is not None for word, line in zip(("one", "two"), lines, strict=True)]


def test_what_a_terminal_would_obey_is_written_in_printable_words(tmp_path: Path) -> None:
    sink = Sink("beat", str(tmp_path / "log"), journal=False)
    sink.write(logging.ERROR, "nul \0, clear \x1b[2J, over\rwritten, \x9b, \ud800, \té\nnext")
    first, second = (tmp_path / "log").read_bytes().decode().splitlines()
    assert first.endswith("nul \\x00, clear \\x1b[2J, over\\rwritten, \\x9b, \\ud800, \té")
    assert second.endswith(" ERROR next")


def test_a_full_disk_costs_lines_that_are_counted_and_then_told(tmp_path: Path) -> None:
    sink = Sink("beat", "/dev/full", journal=False)
    for _ in range(3):
        sink.write(logging.INFO, "lost")
    assert sink.lost == 3
    sink.path = str(tmp_path / "log")
    sink.reopen()
    sink.write(logging.INFO, "found")
    text = (tmp_path / "log").read_text()
    assert "3 lines were lost" in text
    assert "found" in text
    assert sink.lost == 0


def test_a_rotated_log_is_left_when_reopened(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sink = Sink("beat", str(log), journal=False)
    sink.write(logging.INFO, "old")
    log.rename(tmp_path / "log.1")
    sink.write(logging.INFO, "still old")
    sink.reopen()
    sink.write(logging.INFO, "new")
    assert "still old" in (tmp_path / "log.1").read_text()
    assert "new" in log.read_text()
    assert "old" not in log.read_text()


def test_a_log_that_cannot_be_reopened_stays(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    sink = Sink("beat", str(directory / "log"), journal=False)
    directory.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="No such file"):
        sink.reopen()
    sink.write(logging.INFO, "kept")
    assert "kept" in (tmp_path / "moved" / "log").read_text()


def test_a_symlink_in_the_logs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        Sink("beat", str(tmp_path / "log"), journal=False)


def test_prints_become_whole_lines(tmp_path: Path) -> None:
    sink = Sink("beat", str(tmp_path / "log"), journal=False)
    stream = Stream(sink, logging.INFO, 1)
    print("half", end="", file=stream)
    assert (tmp_path / "log").read_text() == ""
    print(" and whole", file=stream)
    print("rest", end="", file=stream)
    stream.flush()
    words = [line.split(" INFO ")[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert words == ["half and whole", "rest"]


def test_a_record_that_cannot_be_formatted_is_reported_not_raised(tmp_path: Path) -> None:
    sink = Sink("beat", str(tmp_path / "log"), journal=False)
    record = logging.LogRecord("app", logging.INFO, "", 0, "%d apples", ("no number",), None)
    Handler(sink).emit(record)
    assert "'%d apples' with ('no number',) cannot be formatted" in (tmp_path / "log").read_text()


def test_text_that_is_no_utf_8_is_escaped(tmp_path: Path) -> None:
    sink = Sink("beat", str(tmp_path / "log"), journal=False)
    sink.write(logging.INFO, "name \udcff")
    assert "name \\udcff" in (tmp_path / "log").read_text()
