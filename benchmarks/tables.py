"""Figures as aligned text, for the terminal."""

from collections.abc import Mapping, Sequence


def cell(result: Mapping, name: str, spec: str) -> str:
    """A figure, or the beginning of what kept it from being measured."""
    return format(result[name], spec) if name in result else result["problem"][:40]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, all others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
