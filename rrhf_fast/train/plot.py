"""training.png: the curves of one run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf_fast.stages.figure import finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where the largest value is so many times the smallest, the scale of a panel that may be wide is
# logarithmic.
_WIDE = 20


@dataclass(frozen=True)
class Panel:
    """A measure by step: metrics of training, of held-out rows, and half of their interval."""

    title: str
    unit: str
    training: str | None = None
    held_out: str | None = None
    interval: str | None = None
    may_be_wide: bool = False  # over orders of magnitude


_ALWAYS = (
    Panel("Ranking loss", "loss per query", "rank_loss", "eval/rank_loss", may_be_wide=True),
    Panel(
        "Loss of the best response", "loss per query", "sft_loss", "eval/sft_loss", may_be_wide=True
    ),
    Panel("Ranking accuracy", "share of pairs", "rewards/accuracies", "eval/rewards/accuracies"),
)
_WITH_REWARD = (
    Panel(
        "Reward of fresh samples", "mean, 95 % interval", None, "eval/reward", "eval/reward_ci95"
    ),
    Panel("Length of fresh samples", "tokens", None, "eval/response_length"),
)
_WITHOUT = (
    Panel("Margin", "mean p(better) - p(worse)", "rewards/margins", "eval/rewards/margins"),
    Panel("Gradient", "norm", "grad_norm", may_be_wide=True),
)
_SPEED = (Panel("Speed", "tokens per second", "tokens_per_second"),)


def plot_training(records: list[dict], path: Path) -> None:
    """Draw losses, ranking accuracy, the reward and length of fresh samples (or margin and
    gradient) and speed from metrics records."""
    has_reward = any(record.get("eval/reward") is not None for record in records)
    panels = _ALWAYS + (_WITH_REWARD if has_reward else _WITHOUT) + _SPEED
    figure = new_figure(15, 8)
    axes = list(figure.subplots(2, 3).flat)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, records)
    # Chance; and a speed that hardly changes shall not look as if it did.
    axes[2].axhline(0.5, color="grey", linewidth=1, linestyle=":", label="chance")
    axes[-1].set_ylim(bottom=0)
    finish(figure, axes, path)


def _draw(axis: "Axes", panel: Panel, records: list[dict]) -> None:
    training, held_out = (_points(records, key) for key in (panel.training, panel.held_out))
    if training:
        steps, values, _ = zip(*training, strict=True)
        axis.plot(steps, values, label="training", color="C0", alpha=0.75, linewidth=1.5)
    if held_out:
        steps, values, found = zip(*held_out, strict=True)
        errors = [record.get(panel.interval) or 0 for record in found] if panel.interval else None
        axis.errorbar(steps, values, errors, fmt="o--", label="held out", color="C1", capsize=4)
    every = [value for _, value, _ in training + held_out]
    is_wide = panel.may_be_wide and every and min(every) > 0 and max(every) > _WIDE * min(every)
    axis.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axis.set_yscale("log" if is_wide else "linear")
    axis.locator_params(axis="x", integer=True, nbins=6)


def _points(records: list[dict], key: str | None) -> list[tuple[int, float, dict]]:
    """Step, value and record wherever this was measured."""
    found = [record for record in records if record.get(key) is not None]
    return [(record["step"], record[key], record) for record in found]
