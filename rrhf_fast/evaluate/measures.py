"""Measures of samples by prompt, each with a 95 % bootstrap interval over prompts.

Every measure is a ratio of two sums over prompts (a mean, an accuracy, a rate), or a function of
one (a perplexity). The bootstrap resamples prompts, because samples of one prompt resemble each
other and a model will be used on other prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; NaN if there is nothing to measure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def unchanged(ratio: np.ndarray) -> np.ndarray:
    """The transform of a plain ratio."""
    return ratio


@dataclass(frozen=True)
class ByPrompt:
    """The terms of a measure: transform(sum of numerators / sum of denominators)."""

    numerators: Sequence[float]  # [P]
    denominators: Sequence[float] | None = None  # [P], default ones
    transform: Callable[[np.ndarray], np.ndarray] = unchanged


class Bootstrap:
    """Intervals from one set of `draws` of prompts, so that measures of a run are comparable."""

    def __init__(self, num_prompts: int, draws: int, seed: int):
        rng = np.random.default_rng(seed)
        # [draws, P]: the count of each prompt in each draw.
        self._counts = rng.multinomial(num_prompts, [1 / num_prompts] * num_prompts, size=draws)

    def ratio(
        self,
        numerators: Sequence[float],
        denominators: Sequence[float] | None = None,
        transform: Callable[[np.ndarray], np.ndarray] = unchanged,
    ) -> Estimate:
        """Estimate transform(sum of numerators / sum of denominators); [P], [P] (default: ones)."""
        above = np.asarray(numerators, dtype=np.float64)
        below = np.ones_like(above) if denominators is None else np.asarray(denominators, float)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = transform(above.sum() / below.sum())
            drawn = transform((self._counts @ above) / (self._counts @ below))
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        return Estimate(float(value), float(low), float(high))


def best_of(rewards: np.ndarray, n: int) -> float:
    """The expected best of n of these rewards [N], drawn without replacement (n <= N)."""
    ordered = np.sort(rewards)
    total = comb(len(ordered), n)
    # The i-th smallest (from 0) is the best if the other n - 1 are among the i smaller ones.
    return float(sum(comb(i, n - 1) / total * value for i, value in enumerate(ordered)))


def win_tie_lose(rewards: np.ndarray, baseline: np.ndarray) -> tuple[float, float, float]:
    """Shares of pairs (one sample of each side, [N] and [M]) that the first wins, ties, loses."""
    differences = np.sign(rewards[:, None] - baseline[None, :])
    return tuple(float((differences == sign).mean()) for sign in (1, 0, -1))


def pairs_in_order(p: np.ndarray, scores: np.ndarray) -> tuple[int, int]:
    """(correct, pairs): p orders `correct` of the pairs with different scores alike; [k], [k]."""
    better = scores[:, None] > scores[None, :]
    return int((better & (p[:, None] > p[None, :])).sum()), int(better.sum())


def within_correlation(lengths: Sequence[np.ndarray], rewards: Sequence[np.ndarray]) -> float:
    """Correlation of length and reward within prompts, pooled over all prompts."""
    x = np.concatenate([values - values.mean() for values in lengths])
    y = np.concatenate([values - values.mean() for values in rewards])
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")
