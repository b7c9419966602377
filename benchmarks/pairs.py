"""Losses of pairs, with and without a reference, against the paper's hinge: seconds of a step's
loss and gradient, without the active set, interleaved."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.active import SHAPES, TOLERANCES
from benchmarks.plots import grouped_bars
from benchmarks.results import Save, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, ratio
from benchmarks.workloads import PACK_TOKENS, PAPER, build_model, draw, fill, planner_for
from rrhf_fast import TrainConfig
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_active, backward_whole
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals

SUMS = {"reference": "initial", "length_penalty": 0.0, "rank_reduction": "mean"}
LOSSES = {
    "hinge": {},
    "hinge, reference": {"reference": "initial", "margin": 0.5},
    "logistic": {"pair_loss": "logistic"},
    "logistic, reference (DPO)": {"pair_loss": "logistic", "beta": 0.1} | SUMS,
    "squared, reference (IPO)": {"pair_loss": "squared", "margin": 5.0} | SUMS,
}


def run(*, preset: str, device: str, rounds: int, save: Save = no_save) -> dict:
    """Time a step of each loss on queries of the paper's lengths; return the figures."""
    max_tokens = PACK_TOKENS[device]
    num_queries = fill(PAPER, max_tokens) if device == "cuda" else 4
    config = TrainConfig(max_tokens_per_pack=max_tokens, active_set="off")
    model = RRHFModel(
        build_model(SHAPES[preset], device=device),
        config,
        max_length=4096,
        max_tokens=max_tokens,
        compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        compile=None,
    )
    queries = draw(PAPER, num_queries, model.lm.config.vocab_size)
    batch = planner_for(model, queries, max_tokens).batch(range(num_queries))
    with torch.no_grad():
        # Shifted, so that pairs differ, as after some steps.
        shifts = torch.arange(sum(len(pack.rewards) for pack in batch.packs)) % 3
        before = [model.response_logps(pack.to(model.device)).cpu() for pack in batch.packs]
    shifted = zip(batch.packs, before, shifts.split([len(x) for x in before]), strict=True)
    packs = [replace(pack, reference_logps=old - shift) for pack, old, shift in shifted]
    with_reference = replace(batch, packs=packs)

    def step(name: str, backward: Callable = backward_whole) -> None:
        own = replace(config, **LOSSES[name])
        model.loss_config = own
        which = batch if own.reference == "none" else with_reference
        backward(model, which, own, World(model.device), Totals(model.device))

    case: dict = {"queries": num_queries, "max_tokens_per_pack": max_tokens}
    figures = {"model": SHAPES[preset], "workload": str(PAPER), "cases": [case]}
    with recorded(case):
        case["gradient_differences"] = {name: _difference(model, step, name) for name in LOSSES}
        tolerance = TOLERANCES[model.compute_dtype]
        if not all(found < tolerance for found in case["gradient_differences"].values()):
            case["problem"] = "two gradients differ"
            save(figures)
            return figures
        ways = {name: partial(step, name) for name in LOSSES}
        options = {"device": model.device.type, "before": model.zero_grad, "record": case}
        seconds = interleaved(ways, rounds, **options)
        case["seconds"] = seconds
        case["times_hinge"] = {
            name: ratio(of_loss, seconds["hinge"]) for name, of_loss in seconds.items()
        }
    save(figures)
    return figures


def _difference(model: RRHFModel, step: Callable, name: str) -> float:
    """Between the gradient of the loss in one sweep, and of log-probs and loss one by one."""
    gradients = []
    for backward in (backward_whole, backward_active):
        model.zero_grad()
        step(name, backward)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def table(figures: dict) -> str:
    """Seconds of each loss relative to the hinge."""
    (case,) = figures["cases"]
    rows = [
        [name, "{median:.3f} ({min:.3f} to {max:.3f})".format(**times)]
        for name, times in case.get("times_hinge", {}).items()
    ]
    rows += [["problem", case["problem"]]] if "problem" in case else []
    return text_table([f"{figures['model']}, {figures['workload']}", "time, hinge = 1"], rows)


def plot(figures: dict, path: Path) -> None:
    """One bar per loss."""
    (case,) = figures["cases"]
    if "seconds" not in case:
        return
    heights = {"median": [median(seconds) for seconds in case["seconds"].values()]}
    panels = [(figures["model"], list(case["seconds"]), heights)]
    grouped_bars(panels, path, ylabel="seconds per step", xlabel="loss of a pair")
