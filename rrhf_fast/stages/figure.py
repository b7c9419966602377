"""Figures, without what matplotlib would do to the process that draws them."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
