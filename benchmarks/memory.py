"""Peak memory of loss and gradient of the same queries, each way in a process of its own.

Weights and their gradients are the same for all and are there before; what a way needs beyond them
is told apart from the whole. Optimizer state is left out of all.
"""

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
from benchmarks.workloads import LONG_PROMPTS, PAPER

WAYS = (RELEASED, PADDED, REPEATED, ENGINE, ALONE, CHECKPOINTED, LEAN, PLAIN_HEAD)
# Model shape and lengths of each preset, without and with a GPU.
PRESETS = {
    "smoke": [("tiny", PAPER)],
    "paper": [("SmolLM2-135M", PAPER)],
    "full": [("SmolLM2-135M", PAPER), ("SmolLM2-135M", LONG_PROMPTS)],
}
# Relative, between the ways: they compute the same, the GPU in bfloat16.
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
    num_queries: int = 2,
    max_tokens_per_pack: int = 2048,
) -> dict:
    """Peaks of all ways, each measured `rounds` times; medians count."""
    presets = PRESETS | (GPU_PRESETS if device == "cuda" else {})
    cases = []
    for shape, lengths in presets[preset]:
        options = {"num_queries": num_queries, "max_tokens": max_tokens_per_pack}
        points = {way: Point(way, shape, lengths, device, **options) for way in WAYS}
        found = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, point in points.items():
                found[way].append(measure(point))
        ways = {way: _summary(measured) for way, measured in found.items()}
        released = ways[RELEASED]
        for name, way in ways.items():
            error = abs(way["loss"] / released["loss"] - 1)
            assert error < LOSS_TOLERANCES[device], (name, error)
        for way in ways.values():
            way["of_released"] = way["total_bytes"] / released["total_bytes"]
            way["extra_of_released"] = way["extra_bytes"] / released["extra_bytes"]
        cases.append(
            {
                "model": shape,
                "workload": str(lengths),
                "queries": num_queries,
                "model_bytes": found[RELEASED][0]["model_bytes"],
                "ways": ways,
            }
        )
    return {"cases": cases}


def _summary(measured: list[dict]) -> dict:
    extra = median(one["extra_bytes"] for one in measured)
    return {
        "tokens": measured[0]["tokens"],
        "loss": measured[0]["loss"],
        "extra_bytes": extra,
        "total_bytes": measured[0]["model_bytes"] + extra,
        "peak_bytes": [one["peak_bytes"] for one in measured],
    }


def table(figures: dict) -> str:
    """MiB beyond weights and gradients, with them, and both as shares of the released method's."""
    lines = []
    for case in figures["cases"]:
        lines += [
            f"{case['model']}, {case['queries']} queries of {case['workload']}: weights and "
            f"gradients {_mib(case['model_bytes'])} MiB",
            f"{'peak memory, MiB':30} {'tokens':>8} {'beyond':>8} {'':>5} {'with them':>10}",
        ]
        lines += [
            f"{name:30} {way['tokens']:8,} {_mib(way['extra_bytes']):>8} "
            f"{way['extra_of_released']:5.2f} {_mib(way['total_bytes']):>10} "
            f"{way['of_released']:5.2f}"
            for name, way in case["ways"].items()
        ]
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """A panel a case: a bar a way, weights and gradients first, then what comes on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = figures["cases"]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 3.4 * len(cases) + 0.3), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes.flat, cases, strict=True):
        ways, model = case["ways"], case["model_bytes"] / 2**20
        extra = [way["extra_bytes"] / 2**20 for way in ways.values()]
        axis.barh(list(ways), model, color="0.8", label="weights and gradients")
        bars = axis.barh(list(ways), extra, left=model, label="needed beyond")
        shares = [way["extra_of_released"] for way in ways.values()]
        labels = [f"{size:,.0f} ({share:.0%})" for size, share in zip(extra, shares, strict=True)]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.axvline(
            model + extra[0] / 3, color="C3", linestyle="--", linewidth=1,
            label="a third of what the released method needs beyond",
        )  # fmt: skip
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


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"
