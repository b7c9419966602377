"""Intervals and tests of measures over training seeds and prompts.

A measure is a ratio of sums, transform(sum of numerators / sum of denominators), over the cells of
a table [seeds, prompts]; a cell without data holds 0 / 0. Seeds and prompts are both samples of
what might have been: other seeds train other models, and a model will meet other prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

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
    of drawing prompts (each the same for both tables). Noise of single samples is in both, so that
    the interval is a little wide rather than narrow. A few seeds tell little of their variance:
    hence Student's quantile with Satterthwaite's degrees of freedom.
    """
    num_seeds, num_prompts = table.numerators.shape
    every_seed, every_prompt = np.ones(num_seeds), np.ones(num_prompts)

    def value(seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        found = table.value(seeds, prompts)
        return found if baseline is None else found - baseline.value(seeds, prompts)

    rng = np.random.default_rng(seed)
    variances, freedom = [], []
    for count, drawn in (
        (num_seeds, lambda weights: value(weights, every_prompt)),
        (num_prompts, lambda weights: value(every_seed, weights)),
    ):
        if count < 2:
            continue
        found = drawn(rng.multinomial(count, [1 / count] * count, size=draws))
        # A bootstrap's variance has `count` where an unbiased one has `count - 1`.
        variances.append(np.nanvar(found) * count / (count - 1))
        freedom.append(count - 1)
    center, total = float(value(every_seed, every_prompt)), sum(variances)
    if not total > 0:
        return Estimate(center, center, center)
    shares = np.array(variances) / total
    width = _student(1 / float((shares**2 / freedom).sum())) * float(np.sqrt(total))
    return Estimate(center, center - width, center + width)


def _student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal's."""
    if freedom < 3:  # where the expansion is of no use
        return float(np.interp(1 / freedom, [1 / 3, 1 / 2, 1], [3.182, 4.303, 12.706]))
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def swap_test(table: Table, baseline: Table, *, draws: int = 10_000, seed: int = 0) -> float:
    """p of the difference, two-sided, if which arm a prompt's results are of were chance.

    A paired permutation test: in each draw, half of the prompts change sides, with all seeds. It
    asks whether these models differ on prompts of this kind; that other seeds would, is for the
    interval to say.
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
    # Rounding must not make a draw that equals the observed one smaller; a draw that leaves a side
    # without data says nothing against chance.
    smaller = gap(change) < observed * (1 - 1e-9) - 1e-12
    return float((1 + (~smaller).sum()) / (1 + draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that hold however many tests were made."""
    order = np.argsort(p_values)
    scaled = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()
