"""A script whose one worker is a program: what ``daemonkit start --exec -- PROGRAM ARG...`` runs."""

from __future__ import annotations

import os
import sys

from daemonkit.api import default

if __name__ == "__main__":
    # The daemon ends, with exit code 1, when the program cannot be kept alive: there is nothing else for it to do.
    default.program(os.path.basename(sys.argv[1]), sys.argv[1:], essential=True)
