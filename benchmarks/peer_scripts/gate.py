"""What every contender of `benchmarks/peers.py` runs in its own process, whatever its environment:
it takes one optimizer step each time the parent says so, and reports when it waits again, so that
only one process computes at a time.

Only torch is needed here. The parent writes "go" to standard input; each line of standard output is
one answer in JSON, and everything that libraries print goes to standard error.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

# No clipping, but the norm is computed, as by default in all trainers.
NO_CLIPPING = 1e9


class Gate:
    """Times the steps of one contender. A step begins with `wait`, has its gradients at
    `gradients`, and ends with `end`; the answer is sent at the next `wait`, after whatever the
    trainer does between steps."""

    def __init__(self, job: Mapping):
        self.job = job
        # Libraries print, too.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._answer: dict = {}
        self._loss = 0.0
        self._apart: dict[str, float] = {}  # seconds inside the step that a figure names apart
        self._tokens = 0
        self._is_first = True

    def describe(self, **facts: object) -> None:
        """What the contender does; sent before the first step."""
        self._answer = facts | {"threads": torch.get_num_threads()}

    def wait(self) -> None:
        """Send the last answer; block until the parent allows a step, or leave with it."""
        print(json.dumps(self._answer), file=self._answers, flush=True)
        if sys.stdin.readline().strip() != "go":
            sys.stderr.flush()
            os._exit(0)  # a trainer's loop has no other way out that prints nothing
        self._loss, self._tokens, self._apart = 0.0, 0, {}
        self._began = self._now()

    def count(self, loss: torch.Tensor | float, tokens: int) -> None:
        """Add a part of the step's loss, and the tokens that the decoder encoded, padding
        included."""
        self._loss += float(loss)
        self._tokens += tokens

    def apart(self, name: str, function: Callable, *arguments, **options):
        """Call, and report the time of it by itself, as well as in the step's."""
        result, seconds = self.timed(function, *arguments, **options)
        self._apart[name] = self._apart.get(name, 0.0) + seconds
        return result

    def timed(self, function: Callable, *arguments, **options) -> tuple:
        """What a call returns, and its seconds."""
        start = self._now()[0]
        result = function(*arguments, **options)
        return result, self._now()[0] - start

    def gradients(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """The gradient is complete; that of the first step is written for the parent to compare."""
        self._have = self._now()
        if self._is_first:  # its time does not count
            self._is_first = False
            tensors = {name: p.grad.detach().float().cpu() for name, p in named}
            torch.save(tensors, self.job["gradient"])

    def end(self) -> None:
        """The step is done: weights are updated and gradients forgotten."""
        done = self._now()
        self._answer = {
            "loss": self._loss,
            "tokens": self._tokens,
            "gradient_seconds": self._have[0] - self._began[0],
            "seconds": done[0] - self._began[0],
            "cpu_seconds": done[1] - self._began[1],
            "peak_mib": _peak_mib(),
            **self._apart,
        }

    @staticmethod
    def _now() -> list[float]:
        """Seconds on the clock, and of this process on all processors."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [time.perf_counter(), time.process_time()]


def _peak_mib() -> float:
    """Of the whole process; on a GPU, of what PyTorch has allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(run: Callable[[Gate], None]) -> None:
    """Run a contender on the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    run(Gate(job))
