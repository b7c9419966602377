"""The report of an evaluation: a table for the terminal, a plot, and a self-contained HTML page."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.evaluate.run import BASELINE, MODEL, Evaluation, Side
from rrhf_fast.score.reward_model import plain_text
from rrhf_fast.stages.figure import new_figure
from rrhf_fast.stages.files import replacing, write_text

TITLES = {
    "reward": "mean reward of a sample",
    "best_of_n": "reward of the best sample",
    "perplexity": "perplexity under the reference",
    "ranking_accuracy": "ranking accuracy of p",
    "distinct": "share of distinct samples",
    "tokens": "tokens per sample, mean",
    "tokens_median": "tokens per sample, median",
    "tokens_p95": "tokens per sample, 95th percentile",
    "cut_off": "share cut off by the limit",
    "length_reward_correlation": "correlation of length and reward",
    "reward_gain": "gain in reward",
    "win": "samples that win",
    "tie": "samples that tie",
    "lose": "samples that lose",
}
# Prompts shown with their samples.
SHOWN = 12

Table = tuple[list[str], list[list[str]]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3em .8em; border-bottom: 1px solid #ddd }
td { white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100% }
"""


def is_reported(folder: Path) -> bool:
    """Whether `evaluate` and `write_report` have written all their files, the last of which is the
    report: a kill may come between any two."""
    names = ("by_prompt.json", "evaluation.json", "evaluation.png", "report.html")
    return all((folder / name).exists() for name in names)


def write_report(evaluation: Evaluation, folder: Path) -> str:
    """Write evaluation.png and report.html; returns the tables for the terminal."""
    plot_evaluation(evaluation, folder / "evaluation.png")
    tables = evaluation_tables(evaluation)
    samples = side_by_side(evaluation.sides)
    write_page(folder / "report.html", "Evaluation", folder / "evaluation.png", tables, samples)
    return "\n\n".join(as_text(table) for table in tables)


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """The measures of each side, and those of the model against its baseline."""
    sides = [evaluation.model, *([evaluation.baseline] if evaluation.baseline else [])]
    dropped = f" ({evaluation.dropped} unscored)" if evaluation.dropped else ""
    head = [f"{evaluation.prompts} prompts{dropped}", MODEL, BASELINE][: len(sides) + 1]
    names = [name for name in TITLES if any(name in side for side in sides)]
    rows = [
        [TITLES[name], *(str_of(side[name]) if name in side else "" for side in sides)]
        for name in names
    ]
    tables = [(head, rows)]
    if evaluation.comparison:
        rows = [[TITLES[name], str_of(value)] for name, value in evaluation.comparison.items()]
        tables.append(([f"{MODEL} against {BASELINE}", "value [95 % interval]"], rows))
    return tables


def str_of(estimate: Estimate) -> str:
    """The value, with its interval if there is one."""
    return f"{estimate.value:.3f}" if np.isnan(estimate.low) else str(estimate)


def as_text(table: Table) -> str:
    """Align the columns for the terminal."""
    lines = [table[0], *table[1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table[0]))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def side_by_side(sides: dict[str, Side]) -> Table:
    """The first sample of each side for the same prompts, the baseline's first."""
    names = [name for name in (BASELINE, MODEL) if name in sides]
    rows = [
        [plain_text(sides[MODEL].prompts[i])]
        + [f"{sides[name].responses[i][0]}\n({sides[name].rewards[i][0]:.3f})" for name in names]
        for i in range(min(SHOWN, len(sides[MODEL].prompts)))
    ]
    return ["prompt", *(f"{name} (reward)" for name in names)], rows


def write_page(
    path: Path,
    title: str,
    picture: Path,
    tables: Sequence[Table],
    samples: Table,
    warnings: Sequence[str] = (),
) -> None:
    """Write one self-contained page: it embeds the picture and loads nothing."""
    data = base64.b64encode(picture.read_bytes()).decode()
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        *(f"<p><strong>{escape(warning)}</strong></p>" for warning in warnings),
        f'<img alt="{escape(title)}: curves" src="data:image/png;base64,{data}">',
        *(_html(table) for table in tables),
        "<h2>Samples</h2>",
        _html(samples),
        "</body></html>",
    ]
    write_text(path, "\n".join(parts))


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table[0])
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table[1])
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Plot rewards, best of n, lengths, and reward against length; one colour per side."""
    figure = new_figure(11, 7)
    axes = figure.subplots(2, 2)
    rewards, best, lengths, both = axes.flat
    sides = evaluation.sides
    words = {
        name: np.array([len(text.split()) for texts in side.responses for text in texts])
        for name, side in sides.items()
    }
    values = {name: np.concatenate(side.rewards) for name, side in sides.items()}
    for axis, samples in ((rewards, values), (lengths, words)):
        every = np.concatenate(list(samples.values()))
        bins = np.linspace(every.min(), max(every.max(), every.min() + 1e-9), 31)
        for number, (name, numbers) in enumerate(samples.items()):
            axis.hist(numbers, bins=bins, alpha=0.55, label=name, color=f"C{number}", density=True)
            axis.axvline(numbers.mean(), color=f"C{number}", linestyle="--", linewidth=1.2)
    rewards.set(title="Reward of a sample (dashed: mean)", xlabel="reward", ylabel="density")
    lengths.set(title="Length of a sample (dashed: mean)", xlabel="words", ylabel="density")
    for number, (name, curve) in enumerate(evaluation.best_of_n.items()):
        n = np.arange(1, len(curve) + 1)
        best.plot(n, [point.value for point in curve], "o-", label=name, color=f"C{number}")
        low, high = [point.low for point in curve], [point.high for point in curve]
        best.fill_between(n, low, high, alpha=0.2, color=f"C{number}", linewidth=0)
        both.scatter(words[name], values[name], s=8, alpha=0.4, label=name, color=f"C{number}")
    best.set(title="Best of n samples, 95 % interval", xlabel="n", ylabel="expected reward")
    best.locator_params(axis="x", integer=True)
    both.set(title="Reward against length", xlabel="words", ylabel="reward")
    save_figure(figure, axes.flat, path)


def save_figure(figure, axes, path: Path) -> None:
    """Add grids, and legends where there are labels; write the file."""
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    with replacing(path) as staging:
        figure.savefig(staging, dpi=110, format="png")
