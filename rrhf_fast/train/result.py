"""What a run left behind, and its last lines."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.terminal import draws, say_tables

# What held-out metrics are called where people read them.
TITLES = {
    "rewards/accuracies": "held-out ranking accuracy",
    "reward": "held-out reward at temperature 1",
    "response_length": "tokens of a fresh sample",
    "loss": "held-out loss",
}


@dataclass
class TrainResult:
    """What a run left behind. `before` and `after` hold the held-out metrics (empty without
    held-out rows)."""

    output_dir: Path | None  # None after a dry run
    metrics: list[dict]  # the records of metrics.jsonl
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None  # whose model is kept, with load_best_model_at_end
    stalled: bool = False  # early_stopping_patience ended it
    interrupted: bool = False  # by Ctrl-C, or a signal to adamw_8bit; the model is saved
    preempted: bool = False  # by SIGTERM or SIGUSR1; a checkpoint is saved
    peak_memory_gib: float | None = None  # of the first GPU, or of the process on a CPU


def compared(result: TrainResult) -> list[tuple[str, float, float]]:
    """Title, and value before and after training, of the held-out metrics that people read."""
    before, after = result.before, result.after
    names = [name for name in TITLES if name in before and name in after]
    return [(TITLES[name], before[name], after[name]) for name in names]


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory in use at any time so far: tensors on a GPU, or all of this process where
    there is none; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        from resource import RUSAGE_SELF, getrusage  # not on Windows
    except ImportError:
        return None
    # In bytes on macOS, in KiB elsewhere.
    return getrusage(RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def say_result(result: TrainResult) -> None:
    """Print what training changed, and where the model is."""
    changes = compared(result)
    if changes and draws():
        rows = [[title, f"{old:.3f}", f"{new:.3f}"] for title, old, new in changes]
        say_tables([(["", "before", "after"], rows)])
        lines = [""]
    else:
        lines = [f"{title:<34} {old:8.3f} -> {new:8.3f}" for title, old, new in changes]
    if result.peak_memory_gib is not None:
        lines.append(f"{'peak memory':<34} {result.peak_memory_gib:8.2f} GiB")
    state = "stopped early" if result.interrupted else "done"
    if result.stalled:
        state = "no evaluation was better for as long as early_stopping_patience says: done"
    saved = "model and metrics are in" if result.steps else "nothing was trained, no model is in"
    if result.best_step is not None:
        saved = f"the model of step {result.best_step}, the best, and metrics are in"
    if result.preempted:
        state, saved = "stopped by a signal", f"checkpoint-{result.steps} to resume from is in"
    say("\n".join([*lines, f"{state} after {result.steps} steps; {saved} {result.output_dir}"]))
