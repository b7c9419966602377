"""Peak memory of loss and gradient of the same queries, each way alone (`benchmarks.points`).

Weights and their gradients are equal for all ways and allocated beforehand; memory beyond them is
reported separately from the total. Optimizer state is excluded.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.points import (
    ALONE,
    CHECKPOINTED,
    ENGINE,
    LEAN,
    PADDED,
    PLAIN_HEAD,
    RELEASED,
    REPEATED,
    Point,
    measure,
)
from benchmarks.results import Save, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.workloads import LONG_PROMPTS, PACK_TOKENS, PAPER, fill

WAYS = (RELEASED, PADDED, REPEATED, ENGINE, ALONE, CHECKPOINTED, LEAN, PLAIN_HEAD)
# Model shape and lengths of each preset, without and with a GPU.
PRESETS = {
    "smoke": [("tiny", PAPER)],
    "paper": [("SmolLM2-135M", PAPER)],
    "full": [("SmolLM2-135M", PAPER), ("SmolLM2-135M", LONG_PROMPTS)],
}
# Largest relative difference between ways, which compute the same loss; the GPU uses bfloat16.
LOSS_TOLERANCES = {"cpu": 1e-4, "cuda": 0.05}
GPU_PRESETS = {
    "paper": [("Llama-3.2-1B", PAPER)],
    "full": [("Llama-3.2-1B", PAPER), ("Llama-3.2-1B", LONG_PROMPTS)],
}


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    num_queries: int | None = None,
    max_tokens_per_pack: int | None = None,
    ways: Sequence[str] | None = None,
    save: Save = no_save,
) -> dict:
    """Median peaks of `ways` (default: all), each measured `rounds` times."""
    presets = PRESETS | (GPU_PRESETS if device == "cuda" else {})
    max_tokens = max_tokens_per_pack or PACK_TOKENS[device]
    figures: dict = {"max_tokens_per_pack": max_tokens, "cases": []}
    for shape, lengths in presets[preset]:
        count = num_queries or (fill(lengths, max_tokens) if device == "cuda" else 2)
        case = {"model": shape, "workload": str(lengths), "queries": count}
        points = {
            way: Point(way, shape, lengths, device, num_queries=count, max_tokens=max_tokens)
            for way in ways or WAYS
        }
        case["ways"] = results = {way: {} for way in points}
        figures["cases"].append(case)
        measured = {way: [] for way in points}
        for _ in range(rounds):
            for way, point in points.items():
                with recorded(results[way]):
                    measured[way].append(measure(point))
                    case["model_bytes"] = measured[way][0]["model_bytes"]
                    results[way] |= _summary(measured[way])
                _compare(results, LOSS_TOLERANCES[device])
                save(figures)
    return figures


def _summary(measured: list[dict]) -> dict:
    extra = median(one["extra_bytes"] for one in measured)
    return {
        "tokens": measured[0]["tokens"],
        "loss": measured[0]["loss"],
        "extra_bytes": extra,
        "total_bytes": measured[0]["model_bytes"] + extra,
        "peak_bytes": [one["peak_bytes"] for one in measured],
    }


def _compare(results: dict[str, dict], tolerance: float) -> None:
    """Add every measured way's ratio to the released method, and check its loss."""
    released = results.get(RELEASED, {})
    if "total_bytes" not in released:
        return
    for way in results.values():
        if "total_bytes" in way:
            way["of_released"] = way["total_bytes"] / released["total_bytes"]
            way["extra_of_released"] = way["extra_bytes"] / released["extra_bytes"]
            if not abs(way["loss"] / released["loss"] - 1) < tolerance:
                way["problem"] = f"a loss of {way['loss']:.4g}, {released['loss']:.4g} expected"


def table(figures: dict) -> str:
    """MiB beyond weights and gradients and in total, and both relative to the released method."""
    parts = []
    for case in figures["cases"]:
        title = f"{case['model']}, {case['queries']} queries of {case['workload']}"
        header = [title, "tokens", "MiB beyond weights and gradients", "", "with them", ""]
        rows = []
        for name, way in case["ways"].items():
            label = f"{name}: {way['problem'][:60]}" if "problem" in way else name
            rows.append([label, *(_cells(way) if "total_bytes" in way else [""] * 5)])
        parts.append(text_table(header, rows))
    return "\n\n".join(parts)


def _cells(way: dict) -> list[str]:
    shares = [
        f"{way[name]:.2f}" if name in way else "" for name in ("extra_of_released", "of_released")
    ]
    sizes = [f"{way[name] / 2**20:,.0f}" for name in ("extra_bytes", "total_bytes")]
    return [f"{way['tokens']:,}", sizes[0], shares[0], sizes[1], shares[1]]


def plot(figures: dict, path: Path) -> None:
    """One panel per case, one bar per way: weights and gradients first, then memory beyond."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in figures["cases"] if "model_bytes" in case]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 3.4 * len(cases) + 0.3), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes.flat, cases, strict=True):
        ways = {name: way for name, way in case["ways"].items() if "total_bytes" in way}
        model = case["model_bytes"] / 2**20
        extra = [way["extra_bytes"] / 2**20 for way in ways.values()]
        axis.barh(list(ways), model, color="0.8", label="weights and gradients")
        bars = axis.barh(list(ways), extra, left=model, label="needed beyond")
        shares = [way.get("extra_of_released", math.nan) for way in ways.values()]
        labels = [f"{size:,.0f} ({share:.0%})" for size, share in zip(extra, shares, strict=True)]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        if RELEASED in ways:
            third = ways[RELEASED]["extra_bytes"] / 2**20 / 3
            label = "a third of what the released method needs beyond"
            axis.axvline(model + third, color="C3", linestyle="--", linewidth=1, label=label)
        axis.invert_yaxis()
        axis.set(xlabel="MiB at the peak", xlim=(0, 1.2 * (model + max(extra))))
        axis.set_title(
            f"{case['model']}, {case['queries']} queries of {case['workload']}", fontsize=10
        )
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
