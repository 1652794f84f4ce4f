"""service.unit: the texts, judged by the tools that read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from daemonkit.config import defaults
from daemonkit.service.unit import Spec, initd_script, ready_made, systemd_unit

ETC = Path(__file__).parent.parent / "etc"
HARDENED = 2.5  # exposure, of 10


def spec(*target: str, flags: tuple[str, ...] = (), systemd: int = 252) -> Spec:
    return Spec("beat", ["/bin/true"], flags, target or ("/etc/beat.py",), defaults(0), systemd)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def written(tmp_path: Path, text: str, name: str = "beat.service") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_systemd_finds_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    done = run("systemd-analyze", "verify", written(tmp_path, systemd_unit(spec())))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_units_exposure_is_low(tmp_path: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", written(tmp_path, systemd_unit(spec())))
    line = next(line for line in done.stdout.splitlines() if "Overall exposure level" in line)
    assert float(line.split(":")[1].split()[0]) <= HARDENED


def test_words_with_blanks_quotes_dollars_and_per_cents_reach_the_script_as_they_are(tmp_path: Path) -> None:
    text = systemd_unit(spec("/srv/my script.py", "100%", "$HOME", 'say "x"', "a\\b"))
    assert 'ExecStart=/bin/true run "/srv/my script.py" 100%% $$HOME "say \\"x\\"" "a\\\\b"' in text
    done = run("systemd-analyze", "verify", written(tmp_path, text))
    assert done.stderr == ""


def test_a_new_systemd_is_given_notify_reload() -> None:
    assert "Type=notify-reload\n" in systemd_unit(spec(systemd=253))
    assert "ExecReload" not in systemd_unit(spec(systemd=253))
    assert "Type=notify\n" in systemd_unit(spec(systemd=252))
    assert "ExecReload=+/bin/true reload" in systemd_unit(spec(systemd=252))


def test_the_manager_waits_longer_than_the_daemon() -> None:
    text, options = systemd_unit(spec()), defaults(0)
    bounds = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert int(bounds["TimeoutStopSec"]) > options.graceful_timeout
    assert int(bounds["TimeoutStartSec"]) > options.ready_timeout


@pytest.mark.parametrize("checker", [["shellcheck"], ["checkbashisms", "-f"], ["sh", "-n"]], ids=lambda words: words[0])
@pytest.mark.parametrize("target", [("/etc/beat.py",), ("-m", "pack.age", "it's", "a b")], ids=["file", "module"])
def test_the_init_script_is_clean(tmp_path: Path, checker: list[str], target: tuple[str, ...]) -> None:
    done = run(*checker, written(tmp_path, initd_script(spec(*target)), "beat"))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", ready_made())
def test_the_ready_made_files_are_what_the_functions_give(path: str) -> None:
    assert (ETC / path).read_text() == ready_made()[path]


def test_logrotate_accepts_its_snippet(tmp_path: Path) -> None:
    snippet = written(tmp_path, (ETC / "logrotate.d" / "daemonkit").read_text(), "snippet")
    done = run("/usr/sbin/logrotate", "--debug", "--state", str(tmp_path / "state"), snippet)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


def test_tmpfiles_makes_the_directories(tmp_path: Path) -> None:
    done = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", str(ETC / "tmpfiles.d" / "daemonkit.conf"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/daemonkit").is_dir()
    assert (tmp_path / "var/log/daemonkit").is_dir()
