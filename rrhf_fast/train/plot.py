"""training.png: the curves of one run."""

from pathlib import Path

from rrhf_fast.stages.figure import new_figure
from rrhf_fast.stages.files import replacing


def plot_training(records: list[dict], path: Path) -> None:
    """Draw loss, ranking accuracy, held-out reward (or margin) and speed from metrics records."""
    train = [record for record in records if "loss" in record]
    held_out = [record for record in records if "eval/loss" in record]
    figure = new_figure(11, 7)
    axes = figure.subplots(2, 2)
    loss, accuracy, reward, speed = axes.flat

    _line(loss, train, "rank_loss", "ranking", "C0")
    _line(loss, train, "sft_loss", "best response (SFT)", "C1")
    _dots(loss, held_out, "eval/rank_loss", "ranking, held out", "C0")
    _dots(loss, held_out, "eval/sft_loss", "best response, held out", "C1")
    loss.set(title="Loss per query", yscale="log")

    _line(accuracy, train, "rewards/accuracies", "training", "C2")
    _dots(accuracy, held_out, "eval/rewards/accuracies", "held out", "C2")
    accuracy.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    accuracy.set(title="Ranking accuracy (share of pairs in the right order)")

    if any(record.get("eval/reward") is not None for record in held_out):
        _dots(
            reward, held_out, "eval/reward", "mean, 95 % interval", "C3", error="eval/reward_ci95"
        )
        reward.set(title="Reward of fresh samples, held-out prompts")
    else:
        _line(reward, train, "rewards/margins", "training", "C3")
        _dots(reward, held_out, "eval/rewards/margins", "held out", "C3")
        reward.set(title="Margin: mean p(better) - p(worse)")

    _line(speed, train, "tokens_per_second", "tokens/s", "C4")
    speed.set(title="Speed", ylim=(0, None))
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    with replacing(path) as staging:
        figure.savefig(staging, dpi=110, format="png")


def _line(axis, records: list[dict], key: str, label: str, color: str) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, color=color, alpha=0.75, linewidth=1.2)


def _dots(
    axis, records: list[dict], key: str, label: str, color: str, error: str | None = None
) -> None:
    points = [
        (record["step"], record[key], record.get(error) or 0)
        for record in records
        if record.get(key) is not None
    ]
    if points:
        steps, values, errors = zip(*points, strict=True)
        axis.errorbar(
            steps, values, errors if error else None, fmt="o--", label=label, color=color, capsize=3
        )
