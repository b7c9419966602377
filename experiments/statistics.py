"""Intervals and tests of measures over training seeds and prompts.

A measure is a ratio of sums, transform(sum of numerators / sum of denominators), over the cells of
a table [seeds, prompts]; a cell without data holds 0 / 0. Seeds and prompts are both samples: other
seeds would train other models, and a model will be used on other prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rrhf_fast.evaluate.measures import Estimate, unchanged


@dataclass(frozen=True)
class Table:
    """A measure of one arm."""

    numerators: np.ndarray  # [S, P]
    denominators: np.ndarray  # [S, P]
    transform: Callable[[np.ndarray], np.ndarray] = unchanged

    def value(self, seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """The measure under weights of seeds [..., S] and prompts [..., P]; [...]."""
        above = ((seeds @ self.numerators) * prompts).sum(-1)
        below = ((seeds @ self.denominators) * prompts).sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.transform(above / below)


def estimate(
    table: Table, baseline: Table | None = None, *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """The measure, or its difference to a baseline's, with a 95 % interval.

    The squared standard error is the sum of two bootstrap variances, one of drawing seeds and one
    of drawing prompts (each the same for both tables). Both contain the noise of single samples, so
    the interval is slightly too wide. A few seeds estimate their variance poorly, so its width is
    Student's quantile with Satterthwaite's degrees of freedom.
    """
    num_seeds, num_prompts = table.numerators.shape
    every_seed, every_prompt = np.ones(num_seeds), np.ones(num_prompts)

    def value(seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        own = table.value(seeds, prompts)
        return own if baseline is None else own - baseline.value(seeds, prompts)

    rng = np.random.default_rng(seed)
    variances, freedom = [], []
    for count, resample in (
        (num_seeds, lambda weights: value(weights, every_prompt)),
        (num_prompts, lambda weights: value(every_seed, weights)),
    ):
        if count < 2:
            continue
        values = resample(rng.multinomial(count, [1 / count] * count, size=draws))
        # A bootstrap variance divides by `count`, an unbiased one by `count - 1`.
        variances.append(np.nanvar(values) * count / (count - 1))
        freedom.append(count - 1)
    center, total = float(value(every_seed, every_prompt)), sum(variances)
    if not total > 0:
        return Estimate(center, center, center)
    shares = np.array(variances) / total
    width = float(stats.t.ppf(0.975, 1 / (shares**2 / freedom).sum()) * np.sqrt(total))
    return Estimate(center, center - width, center + width)


def swap_test(table: Table, baseline: Table, *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of the difference, if the arms of each prompt's results were exchangeable.

    A paired permutation test: each draw swaps about half of the prompts, with all their seeds. It
    tests whether these models differ on such prompts; the interval tells whether other seeds would.
    (All draws are one product of matrices; scipy.stats.permutation_test takes 20 times as long.)
    """
    sides = [
        np.stack([side.numerators.sum(0), side.denominators.sum(0)]) for side in (table, baseline)
    ]
    swapped = np.random.default_rng(seed).random((draws, sides[0].shape[1])) < 0.5
    change = swapped.astype(float) @ (sides[1] - sides[0]).T  # [draws, 2]

    def gap(change: np.ndarray) -> np.ndarray:
        a, b = sides[0].sum(1) + change, sides[1].sum(1) - change
        with np.errstate(invalid="ignore", divide="ignore"):
            values = [table.transform(x[..., 0] / x[..., 1]) for x in (a, b)]
        return np.abs(values[0] - values[1])

    observed = gap(np.zeros(2))
    # Rounding must not make a draw smaller than an equal observation; NaN, where a draw leaves a
    # side without data, is no evidence of a difference.
    smaller = gap(change) < observed * (1 - 1e-9) - 1e-12
    return float((1 + (~smaller).sum()) / (1 + draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that hold for any number of tests."""
    order = np.argsort(p_values)
    scaled = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()
