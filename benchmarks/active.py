"""The backward of the tokens that have a gradient against that of all, by their share, with and
without activation checkpointing, interleaved. In two ways: within linear layers, or by a second
pass on these tokens alone."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.plots import grouped_bars
from benchmarks.results import Save, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, ratio
from benchmarks.workloads import PACK_TOKENS, PAPER, build_model, draw, fill, planner_for
from rrhf_fast import TrainConfig
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.active_rows import use_active_rows, use_all_rows
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_active, backward_whole, is_worthwhile
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals

# Shares of queries ranked in reverse, where all responses have a gradient; of the other queries
# only the best response has one.
SHARES = (0.0, 0.25, 0.5, 1.0)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative error (norm)
SHAPES = {"smoke": "tiny", "paper": "SmolLM2-135M", "full": "SmolLM2-135M"}


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    max_tokens_per_pack: int | None = None,
    num_queries: int | None = None,
    save: Save = no_save,
) -> dict:
    """Time both ways on queries of the paper's lengths; return the figures."""
    max_tokens = max_tokens_per_pack or PACK_TOKENS[device]
    num_queries = num_queries or (fill(PAPER, max_tokens) if device == "cuda" else 4)
    figures = {"model": SHAPES[preset], "workload": str(PAPER), "max_tokens_per_pack": max_tokens}
    figures["cases"] = cases = []
    for checkpointing in ("none", "full"):
        config = TrainConfig(activation_checkpointing=checkpointing, max_tokens_per_pack=max_tokens)
        model = RRHFModel(
            build_model(SHAPES[preset], device=device),
            config,
            max_length=4096,
            max_tokens=max_tokens,
            compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            compile=None,
            activation_checkpointing=checkpointing,
        )
        queries = draw(PAPER, num_queries, model.lm.config.vocab_size)
        ranks = _ranks(model, queries)
        for backwards in sorted({round(share * num_queries) for share in SHARES}):
            for i, query in enumerate(queries):
                query.rewards[:] = -ranks[i] if i < backwards else ranks[i]
            case = {
                "activation_checkpointing": checkpointing,
                "queries_ranked_backwards": backwards / num_queries,
            }
            cases.append(case)
            with recorded(case):
                case |= _case(model, queries, config, rounds)
            save(figures)
    return figures


def _ranks(model: RRHFModel, queries: Sequence[TokenisedQuery]) -> list:
    planner = planner_for(model, queries, 1)
    with torch.no_grad():
        scores = [
            model(planner.build([i]).to(model.device)).logp_scores for i in range(len(queries))
        ]
    return [score.argsort().argsort().float().cpu().numpy() for score in scores]


def _case(
    model: RRHFModel, queries: Sequence[TokenisedQuery], config: TrainConfig, rounds: int
) -> dict:
    planner = planner_for(model, queries, config.max_tokens_per_pack)
    batch = planner.batch(range(len(queries)))

    def step(backward: Callable, use_rows: Callable) -> Totals:
        use_rows(model.lm)
        totals = Totals(model.device)
        backward(model, batch, config, World(model.device), totals)
        return totals

    ways = {
        "whole": partial(step, backward_whole, use_all_rows),
        "within layers": partial(step, backward_whole, use_active_rows),
        "second pass": partial(step, backward_active, use_all_rows),
    }
    if not model.row_skipping:
        del ways["within layers"]
    gradients = []
    for way in ways.values():
        model.zero_grad()
        fraction = way().active_fraction
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    first, *others = gradients
    difference = max(((other - first).norm() / first.norm()).item() for other in others)
    del gradients, first, others
    case = {"active_fraction": fraction, "gradient_difference": difference}
    if not difference < TOLERANCES[model.compute_dtype]:
        return case | {"problem": "the gradients differ"}
    options = {"device": model.device.type, "before": model.zero_grad, "record": case}
    seconds = interleaved(ways, rounds, **options)
    takes_second = is_worthwhile(config, fraction, model.row_skipping)
    otherwise = "within layers" if model.row_skipping else "whole"
    return case | {
        "speedups": {name: ratio(seconds["whole"], times) for name, times in seconds.items()},
        "auto": "second pass" if takes_second else otherwise,
        "seconds": seconds,
    }


def table(figures: dict) -> str:
    """Speed relative to the whole backward, by the share of tokens with a gradient."""
    cases = figures["cases"]
    ways = list(dict.fromkeys(way for case in cases for way in case.get("speedups", {})))
    rows = []
    for case in cases:
        speedups = case.get("speedups", {})
        cells = [
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**speedups[way])
            if way in speedups
            else case.get("problem", "")[:40]
            for way in ways
        ]
        mode, share = case["activation_checkpointing"], case.get("active_fraction", math.nan)
        rows.append([f"checkpointing {mode}", f"{share:.0%}", *cells, case.get("auto", "")])
    title = f"{figures['model']}, {figures['workload']}: times as fast as whole"
    return text_table([title, "active", *ways, "auto takes"], rows)


def plot(figures: dict, path: Path) -> None:
    """One group of bars per share of active tokens, one panel per checkpointing mode."""
    panels = []
    measured = [case for case in figures["cases"] if "seconds" in case]
    for mode in dict.fromkeys(case["activation_checkpointing"] for case in measured):
        cases = [case for case in measured if case["activation_checkpointing"] == mode]
        heights = {
            way: [median(case["seconds"][way]) for case in cases] for way in cases[0]["seconds"]
        }
        groups = [f"{case['active_fraction']:.0%}" for case in cases]
        panels.append((f"{figures['model']}, checkpointing {mode}", groups, heights))
    grouped_bars(panels, path, ylabel="seconds per step", xlabel="tokens with a gradient")
