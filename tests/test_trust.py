"""Who is obeyed: files and directories that somebody else may change are refused (FAULTS, rows 12 and 35)."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemonkit.config.trust import check_trusted, prepare_run_dir
from daemonkit.errors import RunDirectoryError, UntrustedFile

NOBODY = 65534
STRANGER = 54321

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A directory that every user may pass, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="trust-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def file(path: Path, mode: int = 0o644, uid: int = 0) -> str:
    path.write_text("x")
    os.chown(path, uid, uid)
    path.chmod(mode)
    return str(path)


def directory(path: Path, mode: int = 0o755, uid: int = 0, gid: int | None = None) -> Path:
    path.mkdir()
    os.chown(path, uid, uid if gid is None else gid)
    path.chmod(mode)
    return path


def as_user(uid: int, act: Callable[[], None]) -> str:
    """What ``act`` raised in a child that is ``uid`` for good; empty if nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            act()
        except (UntrustedFile, RunDirectoryError) as error:
            os.write(writer, str(error).encode())
        except BaseException:  # noqa: BLE001 - told to the parent, which fails
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert "Traceback" not in said, said
    return said


def fault(path: str | Path, uid: int | None = None) -> str:
    with pytest.raises(UntrustedFile) as caught:
        check_trusted(str(path), uid=uid)
    said = str(caught.value)
    assert said.startswith(f"trust {path}: ")
    assert said.endswith("; chown and chmod it")
    return said


@needs_root
class TestRootObeys:
    def test_its_own_file_below_a_sticky_directory(self, open_tmp: Path) -> None:
        check_trusted(file(open_tmp / "x"))
        sticky = directory(open_tmp / "sticky", 0o1777)
        check_trusted(file(sticky / "x"))

    def test_the_system_and_a_relative_path(self, open_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check_trusted("/usr/bin/env")
        directory(open_tmp / "a")
        file(open_tmp / "x")
        monkeypatch.chdir(open_tmp / "a")
        check_trusted("../x")

    def test_what_its_own_group_may_write(self, open_tmp: Path) -> None:
        check_trusted(file(directory(open_tmp / "d", 0o775) / "x", 0o664))

    def test_the_user_that_it_is_told_to_trust(self, open_tmp: Path) -> None:
        path = file(directory(open_tmp / "d", uid=STRANGER) / "x", uid=STRANGER)
        check_trusted(path, uid=STRANGER)
        assert "belongs to" in fault(path, uid=NOBODY)

    @pytest.mark.parametrize(
        ("mode", "who"), [(0o666, "everybody"), (0o646, "everybody"), (0o664, f"group {STRANGER}")]
    )
    def test_no_file_that_others_may_write(self, open_tmp: Path, mode: int, who: str) -> None:
        path = file(open_tmp / "x")
        os.chown(path, 0, STRANGER)
        os.chmod(path, mode)
        assert f"{who} may write {path}" in fault(path)

    def test_no_file_of_another_user(self, open_tmp: Path) -> None:
        path = file(open_tmp / "x", uid=STRANGER)
        assert f"{path} belongs to uid {STRANGER}" in fault(path)

    @pytest.mark.parametrize(("mode", "uid"), [(0o777, 0), (0o775, STRANGER), (0o755, STRANGER)])
    def test_no_file_below_a_directory_that_others_may_write(self, open_tmp: Path, mode: int, uid: int) -> None:
        above = directory(open_tmp / "above", mode, uid)
        path = file(directory(above / "d") / "x")
        assert str(above) in fault(path)

    def test_nothing_that_a_stranger_put_into_a_sticky_directory(self, open_tmp: Path) -> None:
        sticky = directory(open_tmp / "sticky", 0o1777)
        path = file(directory(sticky / "planted", uid=STRANGER) / "x")
        assert f"{sticky}/planted belongs to uid {STRANGER}" in fault(path)

    def test_no_sticky_directory_itself(self, open_tmp: Path) -> None:
        assert "everybody may write" in fault(directory(open_tmp / "sticky", 0o1777))

    def test_a_link_only_if_both_its_ends_are_safe(self, open_tmp: Path) -> None:
        good = file(open_tmp / "good")
        loose = directory(open_tmp / "loose", 0o777)
        (open_tmp / "fine").symlink_to("./good")
        check_trusted(str(open_tmp / "fine"))
        (loose / "link").symlink_to(good)
        assert f"everybody may write {loose}" in fault(loose / "link")
        file(loose / "target")
        (open_tmp / "out").symlink_to(loose / "target")
        assert f"everybody may write {loose}" in fault(open_tmp / "out")
        (open_tmp / "dots").symlink_to("loose/../good")
        assert f"everybody may write {loose}" in fault(open_tmp / "dots")

    def test_no_link_that_a_stranger_put_into_a_sticky_directory(self, open_tmp: Path) -> None:
        sticky = directory(open_tmp / "sticky", 0o1777)
        (sticky / "link").symlink_to(file(open_tmp / "good"))
        os.chown(sticky / "link", STRANGER, STRANGER, follow_symlinks=False)
        assert f"{sticky}/link belongs to uid {STRANGER}" in fault(sticky / "link")

    def test_the_whole_way_of_a_directory_link(self, open_tmp: Path) -> None:
        real = directory(open_tmp / "real")
        file(real / "x", uid=STRANGER)
        (open_tmp / "d").symlink_to(real)
        assert f"{real}/x belongs to" in fault(open_tmp / "d" / "x")


def test_a_missing_file_or_a_ring_of_links_is_the_kernels_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_trusted(str(tmp_path / "absent"))
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OSError, match="symbolic links"):
        check_trusted(str(tmp_path / "ring"))


@needs_root
class TestAnotherUserObeys:
    def test_a_named_file_that_a_deployer_owns(self, open_tmp: Path) -> None:
        path = file(directory(open_tmp / "app", 0o775, STRANGER) / "x", 0o664, STRANGER)
        assert as_user(NOBODY, lambda: check_trusted(path)) == ""

    def test_no_file_that_everybody_may_write_or_replace(self, open_tmp: Path) -> None:
        path = file(open_tmp / "x", 0o666, NOBODY)
        assert f"everybody may write {path}" in as_user(NOBODY, lambda: check_trusted(path))
        below = file(directory(open_tmp / "d", 0o777, NOBODY) / "x", 0o644, NOBODY)
        assert f"everybody may write {open_tmp}/d" in as_user(NOBODY, lambda: check_trusted(below))

    def test_no_named_file_that_a_stranger_put_into_a_sticky_directory(self, open_tmp: Path) -> None:
        path = file(directory(open_tmp / "tmp", 0o1777) / "x", uid=STRANGER)
        assert f"{path} belongs to" in as_user(NOBODY, lambda: check_trusted(path))

    def test_a_found_file_only_if_it_is_his_own_or_roots(self, open_tmp: Path) -> None:
        os.chown(open_tmp, NOBODY, NOBODY)
        theirs, own, roots = (file(open_tmp / str(uid), uid=uid) for uid in (STRANGER, NOBODY, 0))
        said = as_user(NOBODY, lambda: check_trusted(theirs, named=False))
        assert said.endswith("; chown it, or name the file with --config if you trust it")
        assert as_user(NOBODY, lambda: check_trusted(own, named=False)) == ""
        assert as_user(NOBODY, lambda: check_trusted(roots, named=False)) == ""


def refused(path: Path, owner: str | None = None) -> str:
    before = os.lstat(path) if os.path.lexists(path) else None
    with pytest.raises(RunDirectoryError) as caught:
        prepare_run_dir(str(path), owner=owner)
    assert before is None or os.lstat(path).st_mode == before.st_mode
    said = str(caught.value)
    assert str(path) in said
    assert said.endswith("choose another --run-dir")
    assert "\n" not in said
    return said


class TestRunDirectory:
    @pytest.mark.parametrize("umask", [0, 0o022, 0o077])
    def test_is_made_whatever_the_umask_and_kept(self, tmp_path: Path, umask: int) -> None:
        old = os.umask(umask)
        try:
            prepare_run_dir(str(tmp_path / "run"))
            prepare_run_dir(str(tmp_path / "run"))
        finally:
            os.umask(old)
        wanted = 0o755 if os.geteuid() == 0 else 0o700
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == wanted

    def test_without_its_parent_is_not_made(self, tmp_path: Path) -> None:
        assert f"{tmp_path}/a does not exist; create it" in refused(tmp_path / "a" / "run")
        assert not (tmp_path / "a").exists()

    def test_below_a_file_is_not_made(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        assert "not a directory" in refused(tmp_path / "a" / "run")

    def test_that_is_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "it is a file, not a directory" in refused(tmp_path / "file")
        os.mkfifo(tmp_path / "fifo")
        assert "it is a FIFO, not a directory" in refused(tmp_path / "fifo")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(tmp_path / "socket"))
            assert "it is a socket, not a directory" in refused(tmp_path / "socket")
        (tmp_path / "link").symlink_to("nothing")
        assert "it is a symbolic link to nothing" in refused(tmp_path / "link")
        assert not (tmp_path / "nothing").exists()

    @pytest.mark.parametrize("mode", [0o777, 0o1777])
    def test_that_everybody_may_write_is_refused(self, tmp_path: Path, mode: int) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run").chmod(mode)
        assert "everybody may write it; chmod o-w" in refused(tmp_path / "run")

    def test_behind_our_own_link_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(0o700)
        (tmp_path / "run").symlink_to("real")
        prepare_run_dir(str(tmp_path / "run"))

    @needs_root
    def test_of_another_user_is_refused_unless_the_daemon_becomes_that_user(self, tmp_path: Path) -> None:
        run = directory(tmp_path / "run", uid=NOBODY)
        assert "not to user root; chown it" in refused(run)
        assert "not to user root; chown it" in refused(run, owner=str(STRANGER))
        assert "not to user root; chown it" in refused(run, owner="no-such-user")
        prepare_run_dir(str(run), owner=str(NOBODY))

    @needs_root
    def test_behind_a_strangers_link_is_refused(self, tmp_path: Path) -> None:
        directory(tmp_path / "real")
        (tmp_path / "run").symlink_to("real")
        os.chown(tmp_path / "run", STRANGER, STRANGER, follow_symlinks=False)
        assert f"it is a symbolic link that belongs to uid {STRANGER}" in refused(tmp_path / "run")

    @needs_root
    def test_that_a_stranger_may_replace_or_fill_is_refused_to_root(self, tmp_path: Path) -> None:
        above = directory(tmp_path / "above", uid=STRANGER)
        assert f"{above} belongs to uid {STRANGER}" in refused(directory(above / "run"))
        shared = directory(tmp_path / "shared", 0o3775, gid=STRANGER)
        assert f"group {STRANGER} may write {shared}" in refused(shared)

    @needs_root
    def test_of_a_user_is_private_and_his(self, open_tmp: Path) -> None:
        os.chown(open_tmp, NOBODY, NOBODY)
        path = open_tmp / "run"
        assert as_user(NOBODY, lambda: prepare_run_dir(str(path))) == ""
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (NOBODY, 0o700)
        assert "belongs to" in as_user(STRANGER, lambda: prepare_run_dir(str(path)))

    @needs_root
    def test_that_a_user_may_not_write_or_make_is_refused(self, open_tmp: Path) -> None:
        run = directory(open_tmp / "run")
        assert "may not write it" in as_user(NOBODY, lambda: prepare_run_dir(str(run)))
        said = as_user(NOBODY, lambda: prepare_run_dir(str(open_tmp / "new")))
        assert said == f"create run directory {open_tmp}/new: permission denied; choose another --run-dir"

    @needs_root
    def test_on_a_read_only_file_system_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        with mounted(tmp_path / "disk") as disk:
            assert "its file system is read-only; remount it" in refused(disk / "run")
            assert "read-only file system" in refused(disk / "new")


class mounted:  # noqa: N801 - a context manager, read as a verb
    """A tmpfs with a directory ``run`` in it, then made read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Path:
        if self.libc.mount(b"tmpfs", bytes(self.path), b"tmpfs", 0, b"size=64k,mode=755"):
            pytest.skip(f"mount: {os.strerror(ctypes.get_errno())}")
        (self.path / "run").mkdir()
        assert self.libc.mount(b"tmpfs", bytes(self.path), b"tmpfs", 0x21, None) == 0  # MS_REMOUNT | MS_RDONLY
        return self.path

    def __exit__(self, *error: object) -> None:
        self.libc.umount2(bytes(self.path), 0)
