"""Parts of a long measurement, each in its own process with a time limit, so that even a crash of
one does not affect the figures of the others."""

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
TAIL = 40  # lines of output kept in the record of a failed part
OK, FAILED, KILLED, TIMED_OUT = "ok", "failed", "killed", "timed out"
INTERRUPTED, NOT_RUN = "interrupted", "not run"


@dataclass(frozen=True)
class Part:
    """A function that takes options, and `save`, to be called with all its figures so far."""

    name: str
    function: str  # "module:name"
    seconds: float  # after which it is killed
    options: Mapping = field(default_factory=dict)
    toy: Mapping = field(default_factory=dict)  # replaces some options without a GPU
    stops: bool = False  # if it fails, later parts are not run
    instead: Mapping = field(default_factory=dict)  # engine options for later parts if it fails


def run_part(part: Part, options: Mapping, folder: Path, env: Mapping[str, str]) -> dict:
    """Run a part and wait; its output is appended to `folder`/output.log.

    Returns:
        `status`: one of the words above; `detail`; `seconds`; `figures`: those saved last; `tail`:
        the end of the output, unless the part was ok.
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
    """Kill the part and its children: a compiler's workers outlive a killed part."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(figures: Path) -> dict | None:
    return json.loads(figures.read_text()) if figures.exists() else None


def main() -> None:
    """Run a part; called in its process."""
    from benchmarks.results import write_json

    function, options, file, seconds = sys.argv[1:]
    faulthandler.enable()
    # Shortly before the limit, print where the part hangs, and exit even if no parent kills it.
    faulthandler.dump_traceback_later(0.9 * float(seconds))
    signal.alarm(int(float(seconds)) + 10)
    module, _, name = function.partition(":")
    call = getattr(import_module(module), name)
    call(**json.loads(options), save=lambda figures: write_json(Path(file), figures))


if __name__ == "__main__":
    main()
