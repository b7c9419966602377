"""Processes that take one step each time they are told to, in interpreters that have what they
need. What runs inside them is in `benchmarks/peer_scripts`."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.cores import bound_environment

ROOT = Path(__file__).resolve().parent.parent
# What `make peers` makes; each has its own versions.
MADE = [ROOT / name / "bin" / "python" for name in (".venv-peers", ".venv-llamafactory")]
TAIL = 5  # lines of its log that a peer's problem ends with
TIMEOUT = 1800.0  # seconds for a step, or for a start with the search of the fastest batch
_PROBE = "import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, {})))"


def find(package: str | None, others: Sequence[str] = ()) -> str | None:
    """The first interpreter that has torch, transformers and this package: this one, the `others`,
    or one that `make peers` made; None if there is none. Peers start in another folder, so it is an
    absolute path."""
    if package is None:
        return sys.executable
    for python in (sys.executable, *map(_absolute, others), *map(str, MADE)):
        command = [python, "-c", _PROBE.format(["torch", "transformers", package])]
        with suppress(OSError):  # no such file
            if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
                return python
    return None


def _absolute(python: str) -> str:
    """What a shell would start: a path from this folder, or a name on PATH. A link stays one, since
    it is how an environment's interpreter knows its packages."""
    return os.path.abspath(python) if os.sep in python else python


def missing(package: str) -> str:
    """What to say of a package that no interpreter has."""
    made = MADE[package == "llamafactory"]
    if not made.exists():
        return f"not installed: {package} (make peers)"
    return f"not installed: {package} (nor in {made.parents[1].name}, which make peers made)"


class Peer:
    """A module of `peer_scripts`, running. Used in a `with` statement, which ends it.

    Its standard error, where everything that libraries print goes, is `folder`/`name`.log.
    """

    def __init__(self, python: str, module: str, job: Mapping, folder: Path, name: str):
        self._log = folder / f"{name}.log"
        file = folder / f"{name}.json"
        file.write_text(json.dumps(job))
        environment = (
            os.environ
            | bound_environment()
            | {
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(folder / "datasets"),
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", module, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment,
                text=True,
            )

    def answer(self, timeout: float = TIMEOUT) -> dict:
        """Wait until it waits, and return what it says of what it did.

        Raises:
            RuntimeError: it has ended, or takes too long, for which it is killed: otherwise it
                would work beside those that are timed. Says what it said last.
        """
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"no answer after {timeout:g} s: {self._last_lines()}")
        if not (line := self._process.stdout.readline()):
            code = self._process.wait()
            raise RuntimeError(f"exit code {code}: {self._last_lines()}")
        return json.loads(line)

    def _last_lines(self) -> str:
        """The last line of the log, which nearly always tells most, and those before it."""
        said = [line.strip() for line in self._log.read_text(errors="replace").split("\n")]
        *before, last = [line for line in said if line][-TAIL:] or ["it said nothing"]
        return f"{last} (before: {' | '.join(before)})" if before else last

    def step(self, timeout: float = TIMEOUT) -> dict:
        """Let it take one step, and return its figures."""
        with suppress(BrokenPipeError):  # `answer` says why it has ended
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self.answer(timeout)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the end of its input ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
