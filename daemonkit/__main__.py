"""python -m daemonkit, and the command itself"""

import gc

# Collections while modules are loaded find nothing and cost a tenth of a short command's time.
gc.disable()

from daemonkit.cli import run  # noqa: E402

if __name__ == "__main__":
    run()
