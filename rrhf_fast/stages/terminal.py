"""Tables for people: rich draws them on a terminal; pipes and logs get plain lines."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rrhf_fast.data.checks import visible_lines
from rrhf_fast.stages.launcher import is_first
from rrhf_fast.stages.outlet import say

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

# A head, and rows of as many cells.
Table = tuple[list[str], list[list[str]]]


def draws() -> bool:
    """Whether this process prints, and to a terminal."""
    try:
        # What a user put in the place of stdout may not know.
        return is_first() and getattr(sys.stdout, "isatty", bool)()
    except ValueError:  # it was closed
        return False


def say_pairs(pairs: Mapping[str, str]) -> None:
    """Print what each name stands for, a line each."""
    if not draws():
        say("\n".join(f"{name:<10} {text}" for name, text in pairs.items()))
        return
    from rich.table import Table as Grid  # late: it is of use on terminals alone

    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in pairs.items():
        grid.add_row(_text(name), _text(text, is_warning="warning" in (name, text.split(":")[0])))
    _draw(grid)


def say_tables(tables: Sequence[Table], notes: Sequence[str] = ()) -> None:
    """Print tables, and what is to be noted of them."""
    if not draws():
        say("\n\n".join([*map(as_text, tables), *notes]))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn

    parts = []
    for head, rows in tables:
        drawn = Drawn(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in head:
            drawn.add_column(_text(name), overflow="fold")
        for row in rows:
            drawn.add_row(*map(_text, row))
        parts += [drawn, ""]
    for note in notes:
        parts += [_text(note, is_warning=note.startswith("warning")), ""]
    _draw(*parts[:-1])


def as_text(table: Table) -> str:
    """The table as plain lines, its columns aligned."""
    lines = [table[0], *table[1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table[0]))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _text(text: str, *, is_warning: bool = False) -> "Text":
    """A text that is no markup, in which nothing commands the terminal."""
    from rich.text import Text

    return Text(visible_lines(text), style="yellow" if is_warning else "")


def _draw(*parts: "RenderableType") -> None:
    """Print to stdout; rich itself heeds NO_COLOR and what the terminal is."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    for part in parts:
        console.print(part)
