"""Growth of time and memory of one loss and gradient with the number of responses, the vocabulary,
the lengths, and the quality of the model's ranking; and the slopes, by least squares.

Every point is measured alone (`benchmarks.points`). Bytes are those beyond weights and gradients.
Points too slow for a baseline are left out.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.points import ACTIVE, ENGINE, RELEASED, REPEATED, Point, measure
from benchmarks.results import Save, no_save, recorded
from benchmarks.workloads import SHAPES as MODEL_SHAPES
from benchmarks.workloads import Lengths

# The unit of each axis. Correlation is fitted over the quantity it controls: the share of tokens
# with a gradient.
UNITS = {
    "k": "response",
    "vocab_size": "vocabulary entry",
    "prompt": "prompt token",
    "response": "response token",
    "correlation": "of the tokens with a gradient",
}
# Most tokens that a baseline may encode per point.
AFFORDABLE = {"cpu": 16_384, "cuda": 131_072}


@dataclass(frozen=True)
class Sweep:
    """Points along one axis."""

    axis: str
    values: tuple
    lengths: Lengths  # the axis may replace one of these
    ways: tuple[str, ...] = (ENGINE, REPEATED, RELEASED)
    num_queries: int = 1

    def points(self, way: str, shape: str, device: str, rounds: int) -> dict[float, Point]:
        """The affordable points, by value."""
        base = Point(
            way, shape, self.lengths, device, num_queries=self.num_queries, rounds=rounds,
            max_tokens=8192,
        )  # fmt: skip
        points = {}
        for value in self.values:
            change = {self.axis: value}
            if hasattr(self.lengths, self.axis):
                change = {"lengths": replace(self.lengths, **change)}
            point = replace(base, **change)
            if way in (ENGINE, ACTIVE) or point.num_tokens <= AFFORDABLE[device]:
                points[value] = point
        return points


SHORT = Lengths(64, 32, 4)
# At 1 the model's ranks explain the rewards fully.
RANKED = {"ways": (ENGINE, ACTIVE), "num_queries": 8}
SMOKE = (
    Sweep("k", (2, 12), Lengths(32, 16, 0)),
    Sweep("k", (2, 12), Lengths(128, 16, 0)),
    Sweep("vocab_size", (65_536, 131_072), Lengths(64, 32, 6), (ENGINE, RELEASED)),
    Sweep("prompt", (32, 128), SHORT, (ENGINE, REPEATED)),
    Sweep("response", (16, 64), SHORT, (ENGINE, REPEATED)),
    Sweep("correlation", (0.0, 1.0), SHORT, **RANKED),
)
PAPER = (
    Sweep("k", (2, 8, 16, 32, 64), Lengths(128, 32, 0)),
    Sweep("k", (2, 8, 16, 32, 64), Lengths(512, 32, 0)),
    Sweep("vocab_size", (32_768, 65_536, 131_072, 262_144), SHORT),
    Sweep("prompt", (64, 256, 512, 1024), Lengths(0, 64, 6)),
    Sweep("response", (32, 64, 128, 256), Lengths(128, 0, 6)),
    Sweep("correlation", (0.0, 0.5, 0.8, 0.95, 1.0), Lengths(128, 64, 6), **RANKED),
)
PRESETS = {"smoke": SMOKE, "paper": PAPER, "full": PAPER}
# Model shapes without a GPU; with a GPU, always the last.
SHAPES = {"smoke": "tiny", "paper": "tiny", "full": "SmolLM2-135M"}


def run(*, preset: str, device: str, rounds: int, save: Save = no_save) -> dict:
    """Measure every sweep of the preset and fit its slopes."""
    shape = SHAPES["full" if device == "cuda" else preset]
    figures = {"model": shape, "hidden_size": MODEL_SHAPES[shape][0], "sweeps": []}
    for sweep in PRESETS[preset]:
        figures["sweeps"].append(_sweep(sweep, shape, device, rounds))
        save(figures)
    return figures


def _sweep(sweep: Sweep, shape: str, device: str, rounds: int) -> dict:
    points = {way: sweep.points(way, shape, device, rounds) for way in sweep.ways}
    measured = {way: {} for way in sweep.ways}
    for value in sweep.values:
        for way in sweep.ways:  # side by side, so that a busy machine disturbs all of them
            if value in points[way]:
                measured[way][value] = {}
                with recorded(measured[way][value]):
                    measured[way][value] |= measure(points[way][value])
    kept = ("seconds", "extra_bytes", "tokens", "active_fraction", "problem")
    series = {}
    for way, by_value in measured.items():
        rows = [
            {"value": value} | {key: one[key] for key in kept if key in one}
            for value, one in by_value.items()
        ]
        if sweep.axis == "correlation":
            for row in rows:
                row["active_fraction"] = measured[ACTIVE][row["value"]].get("active_fraction")
        series[way] = {"points": rows, "slopes": _slopes(rows, sweep.axis)}
    return {
        "axis": sweep.axis,
        "lengths": vars(sweep.lengths) | {sweep.axis: None},
        "queries": sweep.num_queries,
        "series": series,
    }


def _slopes(rows: list[dict], axis: str) -> dict | None:
    """Seconds and bytes per unit of the axis; None with fewer than two affordable points."""
    key = "active_fraction" if axis == "correlation" else "value"
    rows = [row for row in rows if "seconds" in row and row[key] is not None]
    if len({row[key] for row in rows}) < 2:
        return None
    x = [row[key] for row in rows]
    return {
        name: float(np.polyfit(x, [row[name] for row in rows], 1)[0])
        for name in ("seconds", "extra_bytes")
    }


def table(figures: dict) -> str:
    """Milliseconds and MiB of every point, and below each sweep the cost of one more unit."""
    lines = [f"{figures['model']}, one loss and gradient: ms / MiB beyond weights and gradients"]
    for sweep in figures["sweeps"]:
        series, axis = sweep["series"], sweep["axis"]
        values = [row["value"] for row in series[ENGINE]["points"]]
        lines += ["", f"{_title(sweep):32}" + "".join(f"{value:>16,}" for value in values)]
        for way, one in series.items():
            cells = {row["value"]: _cell(row) for row in one["points"]}
            lines.append(f"{way:32}" + "".join(f"{cells.get(v, ''):>16}" for v in values))
        if axis == "correlation":
            shares = [
                "" if row["active_fraction"] is None else f"{row['active_fraction']:.0%}"
                for row in series[ENGINE]["points"]
            ]
            lines.append(f"{'tokens with a gradient':32}" + "".join(f"{s:>16}" for s in shares))
        for way, one in series.items():
            if one["slopes"] is not None:
                lines.append(f"  {way}: {_meaning(one['slopes'], axis)}")
        if axis == "vocab_size":
            # In float32: a gradient of the head's weight, and the logits of all tokens.
            for way, one in series.items():
                if one["slopes"] is None:
                    continue
                size = one["slopes"]["extra_bytes"] / 4
                tokens = next(row["tokens"] for row in one["points"] if "tokens" in row)
                lines.append(
                    f"  {way}: as much as {size / figures['hidden_size']:.1f} gradients of the "
                    f"head, or {size / tokens:.1f} copies of its tokens' logits"
                )
    return "\n".join(lines)


def _cell(row: dict) -> str:
    if "problem" in row:
        return row["problem"][:15]
    return f"{row['seconds'] * 1e3:,.0f} / {row['extra_bytes'] / 2**20:,.0f}"


def _title(sweep: dict) -> str:
    fixed = [f"{name} {value}" for name, value in sweep["lengths"].items() if value is not None]
    return f"{sweep['axis']} ({', '.join(fixed)})"


def _meaning(slopes: dict, axis: str) -> str:
    if axis == "correlation":
        ms, mib = slopes["seconds"] * 10, slopes["extra_bytes"] / 2**20 / 100
        return f"{ms:.2f} ms and {mib:.2f} MiB for 1% {UNITS[axis]}"
    microseconds, kib = slopes["seconds"] * 1e6, slopes["extra_bytes"] / 2**10
    return f"{microseconds:,.1f} µs and {kib:,.1f} KiB per {UNITS[axis]}"


def plot(figures: dict, path: Path) -> None:
    """One column per sweep: milliseconds above, MiB below, with the fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sweeps = figures["sweeps"]
    figure, axes = plt.subplots(
        2, len(sweeps), figsize=(3 * len(sweeps), 6), squeeze=False, layout="constrained"
    )
    colors = {ENGINE: "C0", REPEATED: "C1", RELEASED: "C3", ACTIVE: "C2"}
    for sweep, column in zip(sweeps, axes.T, strict=True):
        key = "active_fraction" if sweep["axis"] == "correlation" else "value"
        for way, one in sweep["series"].items():
            rows = [row for row in one["points"] if "seconds" in row and row[key] is not None]
            x = [row[key] for row in rows]
            for axis, name, scale in zip(
                column, ("seconds", "extra_bytes"), (1e3, 2**-20), strict=True
            ):
                y = np.array([row[name] for row in rows]) * scale
                axis.plot(x, y, "o", color=colors[way], label=way, markersize=4)
                if one["slopes"] is not None:
                    axis.plot(x, np.poly1d(np.polyfit(x, y, 1))(x), color=colors[way], alpha=0.6)
        fixed = _title(sweep).partition("(")[2].rstrip(")")
        column[0].set_title(fixed, fontsize=9)
        label = "tokens with a gradient" if key == "active_fraction" else sweep["axis"]
        column[1].set_xlabel(label)
        for axis in column:
            axis.set_ylim(0)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("MiB beyond weights and gradients")
    unique = {}
    for axis in axes.flat:
        unique |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(unique.values(), unique, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
