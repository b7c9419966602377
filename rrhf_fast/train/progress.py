"""How far a run has come, and what it has measured since its last record: what checkpoints hold of
a run besides tensors and options."""

import math
from dataclasses import dataclass, field

from rrhf_fast.train.evaluate import Sums, Totals


@dataclass
class Window:
    """Sums over the steps since the last record of metrics.jsonl, of which it gives the means."""

    sums: list[float] = field(default_factory=lambda: [0.0] * len(Sums._fields))
    grad_norms: float = 0.0
    seconds: float = 0.0
    num_steps: int = 0

    def add(self, totals: Totals, grad_norm: float, seconds: float) -> None:
        """Count a step."""
        self.sums = [a + b for a, b in zip(self.sums, totals.read(), strict=True)]
        self.grad_norms += grad_norm
        self.seconds += seconds
        self.num_steps += 1

    @property
    def totals(self) -> Totals:
        """Of all its steps."""
        return Totals.of(self.sums)

    @property
    def grad_norm(self) -> float:
        """The mean norm of the gradient."""
        return self.grad_norms / self.num_steps


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    num_tokens: int = 0
    skipped: int = 0  # consecutive skipped steps up to this one
    active_fraction: float = 1.0  # of tokens: the first step's, then a running mean
    window: Window = field(default_factory=Window)

    def add(self, totals: Totals, grad_norm: float, seconds: float, problem: str | None) -> None:
        """Count a step; `problem` is why its update was skipped."""
        self.step += 1
        self.num_tokens += totals.num_tokens
        self.skipped = self.skipped + 1 if problem else 0
        if not (problem and self.window.num_steps):  # else its NaN would hide the steps before
            self.window.add(totals, grad_norm, seconds)
        if not math.isnan(totals.active_fraction):  # NaN for padded packs
            weight = 1.0 if self.step == 1 else 0.2
            self.active_fraction += weight * (totals.active_fraction - self.active_fraction)
