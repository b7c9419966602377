"""Bar charts in one style for all cases."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Title, names of groups, and contender -> one height per group (None: missing).
Panel = tuple[str, Sequence[str], Mapping[str, Sequence[float | None]]]


def grouped_bars(
    panels: Sequence[Panel], path: Path, *, ylabel: str, xlabel: str = "", log: bool = False
) -> None:
    """Panels of grouped bars, two per row; one colour per contender."""
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    size = (6.5 * columns, 3.4 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, groups, heights) in zip(axes.flat, panels, strict=False):
        width = 0.8 / len(heights)
        for i, (name, values) in enumerate(heights.items()):
            places = [j + (i - (len(heights) - 1) / 2) * width for j in range(len(groups))]
            axis.bar(places, [value or 0 for value in values], width, label=name, color=f"C{i}")
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(ylabel)
        axis.set_xlabel(xlabel)
        axis.spines[["top", "right"]].set_visible(False)
        if log:
            axis.set_yscale("log")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ranked_bars(panels: Sequence[tuple[str, Mapping[str, float]]], path: Path, *, xlabel: str):
    """Panels below each other; one horizontal bar per contender, in order, with its value at the
    end. Names that start with "rrhf_fast" are highlighted."""
    if not panels:  # all have failed
        return
    counts = [len(values) for _, values in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8, 0.34 * sum(counts) + 0.9 * len(panels)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        names = list(values)
        colours = ["C1" if name.startswith("rrhf_fast") else "C0" for name in names]
        bars = axis.barh(names, list(values.values()), color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].set_xlabel(xlabel)
    figure.savefig(path, dpi=120)
    plt.close(figure)
