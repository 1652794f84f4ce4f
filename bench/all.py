"""Run the bench scripts one after the other and write docs/figures.rst."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import peers
import queue_peers
from rig import as_a_user

HERE = Path(__file__).parent
SCRIPTS = (
    *("commands.py", "truth.py", "timer.py", "firing.py", "idle.py"),
    *("fork.py", "children.py", "pool.py", "small_box.py", "background.py", "ipc.py"),
    *("queues.py", "backlog.py", "queue_box.py", "cluster.py"),
)
LONG = ("hour.py", "soak.py")  # taken only when they are named
PACKAGES = (
    *("daemonkit", "python-daemon", "daemonocle", "supervisor", "APScheduler", "schedule", "click"),
    *("pebble", "loky", "sysv-ipc", "redis", "rq", "huey", "celery", "dramatiq", "kazoo"),
)
HEAD = """\
Figures
=======

Written by ``python bench/all.py``.  Each figure counts only beside the others of its table: they were taken in one run,
by turns, and the machine does other things, too.  ``make bench`` takes them anew.

:Machine: {machine}
:Python: {python}
:Packages: {packages}

``python bench/all.py --hour`` adds an hour of ticks; ``python bench/all.py pool.py`` takes one script's figures anew;
``python bench/all.py soak.py`` adds ten minutes of random kills; ``python bench/truth.py --rounds 20 --starts 200`` is
the long form of the many starts at once.
"""


def main() -> None:
    """Each script prints reStructuredText."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hour", action="store_true", help="let a daemon tick for an hour, too")
    parser.add_argument("scripts", nargs="*", help="those whose figures are taken anew; the others' stay  [all]")
    chosen = parser.parse_args()
    scripts = chosen.scripts or ([*SCRIPTS, "hour.py"] if chosen.hour else SCRIPTS)
    peers.require()
    queue_peers.require()
    as_a_user()
    file = HERE.parent / "docs" / "figures.rst"
    sections = _sections(file.read_text()) if chosen.scripts else {}
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    for script in scripts:
        print(f"{script} ...", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(HERE / script)], stdout=subprocess.PIPE, text=True, check=True)
        about = (HERE / script).read_text().split('"""')[1]
        title = _title(script)
        sections[title] = f"{title}\n{'-' * len(title)}\n\n{about}  ``python bench/{script}``, {today}\n{done.stdout}"
    known = [title for script in (*SCRIPTS, *LONG) if (title := _title(script)) in sections]
    file.write_text("\n\n".join([HEAD.format(**machine()), *(sections[title].rstrip("\n") for title in known)]) + "\n")


def _title(script: str) -> str:
    return script.removesuffix(".py").replace("_", " ").capitalize()


def _sections(text: str) -> dict[str, str]:
    """Those of an earlier run, by title."""
    starts = [match.start() for match in re.finditer(r"^.+\n-{3,}\n", text, re.MULTILINE)]
    parts = [text[start:end].strip("\n") for start, end in zip(starts, [*starts[1:], None], strict=True)]
    return {part.partition("\n")[0]: part for part in parts}


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "machine": f"{os.cpu_count()} x {', '.join(models) or platform.machine()}, {memory:.0f} GB, "
        f"Linux {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


if __name__ == "__main__":
    main()
