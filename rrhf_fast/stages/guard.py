"""Run a command until standard input ends, then end it with everything that it started.

A script for serve.py, which holds the other end of the pipe: the system closes that end even if
its process is killed, so no server outlives the run that started it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

# Seconds in which the command may end by itself after SIGTERM.
_GRACE = 20


def main() -> int:
    """Returns the exit code of the command."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Handled, not ignored: the command would inherit that.
        signal.signal(name, lambda *_: None)
    command = sys.argv[1:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    code = process.wait()
    _signal(process, signal.SIGKILL)  # what it left behind
    return code


def _end_with_input(process: subprocess.Popen) -> None:
    os.read(0, 1)  # not by sys.stdin, which Python would wait for at its end
    _signal(process, signal.SIGTERM)
    time.sleep(_GRACE)
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, name: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, name)


if __name__ == "__main__":
    sys.exit(main())
