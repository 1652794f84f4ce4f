"""python -m daemonkit, and the command itself"""

import gc
import signal

# Collections while modules are loaded find nothing and cost a tenth of a short command's time.
gc.disable()
# Nor is a traceback of the import system what ^C asks for.
is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_ours:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from daemonkit.cli import run  # noqa: E402

if is_ours:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    run()
