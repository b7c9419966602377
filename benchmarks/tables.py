"""Format figures as aligned text for the terminal."""

from collections.abc import Mapping, Sequence


def cell(result: Mapping, name: str, spec: str) -> str:
    """A figure, or the beginning of the problem that prevented its measurement."""
    return format(result[name], spec) if name in result else result["problem"][:40]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align the first column left, all others right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
