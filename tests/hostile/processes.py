"""Commands in processes of their own, which can be stopped and killed."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from rrhf_fast import demo

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, forks in an instant
CONTEXT.set_forkserver_preload(["rrhf_fast.iterate.run", "rrhf_fast.export.run"])
# What changes a folder, by the name of Python's audit event.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def head(folder: Path, count: int) -> Path:
    """The demo's first rows."""
    for source in (demo.TRAIN_FILE, demo.EVAL_FILE):
        lines = source.read_text().splitlines(keepends=True)[:count]
        (folder / source.name).write_text("".join(lines))
    return folder


def die_at(number: int, begin: str = "") -> None:
    """Kill this process before the n-th change of a folder, counted from the first one of a path
    that ends in `begin`."""
    counted = 0

    def hook(event, arguments):
        nonlocal counted
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in CHANGES or writes:
            begins = isinstance(arguments[0], str | Path) and str(arguments[0]).endswith(begin)
            counted += bool(counted or begins)
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _main(command, arguments, errors, dies):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main = import_module(f"rrhf_fast.{command}.__main__").main
    if dies is not None:
        die_at(*dies)
    os._exit(main(list(arguments)))


def holder(folder):
    """The process whose lock is in the folder."""
    try:
        return json.loads((folder / ".lock").read_text())["pid"]
    except (OSError, ValueError):
        return None


class Run:
    """A command that writes to `out`; `dies`: the arguments of `die_at`."""

    def __init__(self, tmp_path, command, *arguments, dies=None):
        self.errors, self.out = tmp_path / f"errors-{os.urandom(4).hex()}", tmp_path / "out"
        arguments = [str(a) for a in (*arguments, "--output_dir", self.out)]
        arguments = (command, arguments, self.errors, dies)
        self.process = CONTEXT.Process(target=_main, args=arguments)
        self.process.start()

    def stop(self):
        """Stop it (SIGSTOP) once it has the lock."""
        give_up = time.monotonic() + 60
        while holder(self.out) != self.process.pid:
            assert time.monotonic() < give_up and self.process.is_alive(), self.errors.read_text()
            time.sleep(0.001)
        os.kill(self.process.pid, signal.SIGSTOP)

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self):
        """Let it end; returns exit code and the last line of standard error."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.join(120)
        return self.process.exitcode, self.errors.read_text().strip().splitlines()[-1:]
