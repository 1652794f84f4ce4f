"""keys: ftok as the C library and PHP have it, names as CRC-32."""

from __future__ import annotations

import ctypes
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemonkit import ipc
from daemonkit.errors import UsageError
from daemonkit.ipc.keys import in_hex, key_of, random_key

libc = ctypes.CDLL(None)


@given(project=st.integers(1, 255))
@settings(max_examples=255)
@pytest.mark.parametrize("path", ["/", "/proc", "/usr/bin/env", __file__])
def test_ftok_gives_the_key_of_the_c_library(path: str, project: int) -> None:
    assert ipc.ftok(path, project) == libc.ftok(path.encode(), project)


def test_a_character_is_a_project_as_in_php(tmp_path: Path) -> None:
    assert ipc.ftok(tmp_path, "a") == ipc.ftok(str(tmp_path), 97) == libc.ftok(os.fsencode(tmp_path), 97)


def test_a_link_gives_the_key_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert ipc.ftok(tmp_path / "link", 1) == ipc.ftok(tmp_path / "file", 1)


@pytest.mark.parametrize("project", [0, 256, "", "ab", "é", None, 1.5])
def test_a_project_that_cannot_be_meant_is_refused(project: object) -> None:
    with pytest.raises(UsageError, match="one ASCII character or 1 to 255"):
        ipc.ftok("/", project)  # type: ignore[arg-type]


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ipc.ftok(tmp_path / "missing", 1)


def test_a_name_is_its_crc32_without_the_sign() -> None:
    assert key_of("123456789") == 0xCBF43926 & 0x7FFFFFFF  # the check value of CRC-32


def test_the_name_of_a_file_is_a_key_also_where_it_is_no_text() -> None:
    assert key_of(os.fsdecode(b"/tmp/\xff")) == zlib.crc32(b"/tmp/\xff") & 0x7FFFFFFF


@pytest.mark.parametrize(("key", "same"), [(1, 1), (-1, -1), (0xFFFFFFFF, -1), (0x80000000, -(2**31)), (255, 255)])
def test_a_key_is_a_c_int_however_it_is_written(key: int, same: int) -> None:
    assert key_of(key) == same


@pytest.mark.parametrize("key", [0, "", True, 2**32, -(2**31) - 1, 1.0, b"x", "\ud800"])
def test_what_is_no_key_is_refused(key: object) -> None:
    with pytest.raises(UsageError, match="as key"):
        key_of(key)  # type: ignore[arg-type]


def test_a_key_is_shown_as_ipcs_shows_it() -> None:
    assert in_hex(-1) == "0xffffffff"
    assert in_hex(255) == "0x000000ff"


def test_new_keys_are_keys() -> None:
    assert all(key_of(key) == key for key in (random_key() for _ in range(100)))
