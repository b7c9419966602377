"""Parts of a long measurement, each in a process of its own with a time limit: what one of them
does, be it to crash, costs no other its figures."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAIL = 40  # lines of its output that a part which failed leaves in its record
OK, FAILED, KILLED, TIMED_OUT = "ok", "failed", "killed", "timed out"
INTERRUPTED, NOT_RUN = "interrupted", "not run"


@dataclass(frozen=True)
class Part:
    """A function that takes options, and `save`, which it calls with all its figures so far."""

    name: str
    function: str  # "module:name"
    seconds: float  # it is killed after these
    options: Mapping = field(default_factory=dict)
    toy: Mapping = field(default_factory=dict)  # in the place of some options, without a GPU
    stops: bool = False  # if it fails, nothing after it is worth its time
    instead: Mapping = field(default_factory=dict)  # engine options for later parts if it fails


def run_part(part: Part, options: Mapping, folder: Path, env: Mapping[str, str]) -> dict:
    """Run it and wait; its output is added to `folder`/output.log.

    Returns:
        `status`: one of the words above; `detail`, `seconds`, `figures`: what it saved last, and
        `tail`: the end of its output unless it was ok.
    """
    figures, log = folder / "part.json", folder / "output.log"
    figures.unlink(missing_ok=True)
    arguments = [part.function, json.dumps(options), str(figures), str(part.seconds)]
    command = [sys.executable, "-m", "benchmarks.isolated", *arguments]
    start, status, detail = time.monotonic(), OK, ""
    with log.open("a+b") as output:
        output.write(f"== {part.name}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            code = process.wait(part.seconds)
            if code != 0:
                status = FAILED if code > 0 else KILLED
                detail = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            status, detail = TIMED_OUT, f"after {part.seconds:g} s"
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            _kill_group(process)
        output.seek(begin)
        tail = output.read().decode(errors="replace").splitlines()[-TAIL:]
    record = {"status": status, "detail": detail, "seconds": time.monotonic() - start}
    record |= {"options": dict(options), "figures": _read(figures)}
    figures.unlink(missing_ok=True)
    return record if status == OK else record | {"tail": tail}


def _kill_group(process: subprocess.Popen) -> None:
    """The part and what it started; a compiler's workers outlive a part that was killed."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(figures: Path) -> dict | None:
    return json.loads(figures.read_text()) if figures.exists() else None


def main() -> None:
    """In the part's process."""
    from benchmarks.results import write_json

    function, options, file, seconds = sys.argv[1:]
    faulthandler.enable()
    # Shortly before it is killed, say where it hangs; and end without a parent that would kill it.
    faulthandler.dump_traceback_later(0.9 * float(seconds))
    signal.alarm(int(float(seconds)) + 10)
    module, _, name = function.partition(":")
    call = getattr(import_module(module), name)
    call(**json.loads(options), save=lambda figures: write_json(Path(file), figures))


if __name__ == "__main__":
    main()
