"""Figures, without what matplotlib would do to the process that draws them."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf_fast.stages.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of all letters: at half the size of the picture they are still read.
_LETTERS = 14


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, to be drawn into a file. pyplot, which would choose
    how the whole process draws, is not involved, and while matplotlib is imported, which takes so
    long that only a figure is worth it, nothing is said of where it keeps its fonts."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    finally:
        logger.setLevel(before)
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: "Figure", axes: Sequence["Axes"], path: Path, note: str | None = None) -> None:
    """Make the letters of a figure large, hide what frames its panels in vain, put one legend below
    all of them, headed by a note, and write the file."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=_LETTERS - 1)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_fontsize(_LETTERS)
    if handles:
        options = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}
        options |= {"fontsize": _LETTERS, "title": note, "title_fontsize": _LETTERS}
        figure.legend(handles.values(), handles.keys(), **options)
    save_figure(figure, axes, path)


def save_figure(figure: "Figure", axes: Iterable["Axes"], path: Path) -> None:
    """Add grids and write the file."""
    for axis in axes:
        axis.grid(alpha=0.3)
    with replacing(path) as staging:
        figure.savefig(staging, dpi=110, format="png")
