"""python -m daemonkit"""

from daemonkit.cli import run

run()
