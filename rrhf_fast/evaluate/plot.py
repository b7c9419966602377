"""evaluation.png: what changed from the baseline to the model, and how samples are spread."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.run import BASELINE, MODEL, Evaluation
from rrhf_fast.stages.figure import finish, new_figure

# The measures that are plotted, where they exist: title and unit.
MEASURES = {
    "reward": ("Mean reward of a sample", "reward"),
    "perplexity": ("Perplexity under the reference", "perplexity"),
    "distinct": ("Share of distinct samples", "share of samples"),
    "tokens": ("Length of a sample", "tokens, mean"),
    "cut_off": ("Cut off by the limit", "share of samples"),
    "ranking_accuracy": ("Ranking accuracy of p", "share of pairs"),
}
SHARES = ("distinct", "cut_off", "ranking_accuracy")
_COLORS = {BASELINE: "C1", MODEL: "C0"}


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Plot four measures of each side with their intervals; below them the spread of rewards and
    lengths, best of n, and reward against length. One colour per side."""
    sides = {name: evaluation.sides[name] for name in _COLORS if name in evaluation.sides}
    measured = {BASELINE: evaluation.baseline, MODEL: evaluation.model}
    figure = new_figure(18, 8.5)
    axes = list(figure.subplots(2, 4).flat)
    shown = [name for name in MEASURES if name in evaluation.model][:4]
    for axis, name in zip(axes, shown, strict=False):
        title, unit = MEASURES[name]
        for place, side in enumerate(sides):
            value = measured[side][name]
            style = {"fmt": "o", "markersize": 9, "capsize": 6, "color": _COLORS[side]}
            axis.errorbar([place], [value.value], spread([value]), **style)
        axis.set(title=title, ylabel=unit, xlim=(-0.6, len(sides) - 0.4))
        axis.set_xticks(range(len(sides)), list(sides))
        if name in SHARES:
            axis.set_ylim(-0.02, 1.02)

    rewards, lengths, best, both = axes[4:]
    words = {
        name: np.array([len(text.split()) for texts in side.responses for text in texts])
        for name, side in sides.items()
    }
    values = {name: np.concatenate(side.rewards) for name, side in sides.items()}
    for axis, samples in ((rewards, values), (lengths, words)):
        bins = _bins(np.concatenate(list(samples.values())))
        for name, numbers in samples.items():
            weights = np.full(len(numbers), 1 / len(numbers))
            style = {"label": name, "color": _COLORS[name]}
            axis.hist(numbers, bins=bins, weights=weights, alpha=0.5, **style)
            axis.axvline(numbers.mean(), color=_COLORS[name], linestyle="--", linewidth=1.5)
    rewards.set(title="Rewards (dashed: mean)", xlabel="reward", ylabel="share of samples")
    lengths.set(title="Lengths (dashed: mean)", xlabel="words", ylabel="share of samples")
    for name in sides:
        curve, color = evaluation.best_of_n[name], _COLORS[name]
        n = np.arange(1, len(curve) + 1)
        best.plot(n, [point.value for point in curve], "o-", color=color)
        low, high = [point.low for point in curve], [point.high for point in curve]
        best.fill_between(n, low, high, alpha=0.2, color=color, linewidth=0)
        both.scatter(words[name], values[name], s=12, alpha=0.4, color=color)
    best.set(title="Best of n samples", xlabel="n samples", ylabel="expected reward")
    best.locator_params(axis="x", integer=True)
    both.set(title="Reward against length", xlabel="words", ylabel="reward")
    finish(figure, axes, path, note="bars and bands: 95 % intervals over prompts")


def _bins(numbers: np.ndarray) -> np.ndarray:
    """Edges of some thirty bins; of whole numbers each bin holds as many."""
    low, high = numbers.min(), numbers.max()
    if numbers.dtype.kind == "f":
        return np.linspace(low, max(high, low + 1e-9), 31)
    step = -(-(high - low + 1) // 30)
    return np.arange(low, high + step + 1, step) - 0.5


def spread(estimates: Sequence[Estimate]) -> np.ndarray:
    """Distances below and above the values, as matplotlib expects; [2, estimates]."""
    below = [estimate.value - estimate.low for estimate in estimates]
    above = [estimate.high - estimate.value for estimate in estimates]
    return np.maximum([below, above], 0)  # a value may be outside its interval by rounding
