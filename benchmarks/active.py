"""The active-set backward against the whole one, by the share of tokens that has a gradient, with
and without activation checkpointing, interleaved."""

import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.workloads import PAPER, build_model, draw
from rrhf_fast import TrainConfig
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.engine.backward import backward_active, backward_whole, is_worthwhile
from rrhf_fast.engine.distributed import World
from rrhf_fast.engine.evaluate import Totals
from rrhf_fast.model.rrhf import RRHFModel

# Of the queries, ranked backwards: all their responses have a gradient. Of the others the best one
# alone has.
SHARES = (0.0, 0.25, 0.5, 1.0)
SHAPES = {"smoke": "tiny", "paper": "SmolLM2-135M", "full": "SmolLM2-135M"}


def run(*, preset: str, num_queries: int, rounds: int, max_tokens_per_pack: int) -> dict:
    """Time both ways for queries of the paper's shape; returns the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = []
    for checkpointing in ("none", "full"):
        config = TrainConfig(
            activation_checkpointing=checkpointing, max_tokens_per_pack=max_tokens_per_pack
        )
        model = RRHFModel(
            build_model(SHAPES[preset], device=str(device)),
            config,
            max_length=4096,
            max_tokens=max_tokens_per_pack,
            compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            compile=None,
            activation_checkpointing=checkpointing,
        )
        queries = draw(PAPER, num_queries, model.lm.config.vocab_size)
        ranks = _ranks(model, queries)
        for share in SHARES:
            for i, query in enumerate(queries):
                query.rewards[:] = -ranks[i] if i < round(share * num_queries) else ranks[i]
            cases.append({"checkpointing": checkpointing} | _case(model, queries, config, rounds))
            print(cases[-1], flush=True)
    return {"model": SHAPES[preset], "workload": str(PAPER), "cases": cases}


def _ranks(model: RRHFModel, queries: Sequence[TokenisedQuery]) -> list:
    planner = _planner(model, queries, max_tokens=1)
    with torch.no_grad():
        scores = [model(planner.build([i]).to(model.device)).scores for i in range(len(queries))]
    return [score.argsort().argsort().float().cpu().numpy() for score in scores]


def _planner(model: RRHFModel, queries: Sequence[TokenisedQuery], max_tokens: int) -> PackPlanner:
    return PackPlanner(
        queries,
        packing="forest",
        max_tokens_per_pack=max_tokens,
        pad_to_multiple_of=model.pad_to_multiple_of,
        plan=model.plan,
    )


def _case(
    model: RRHFModel, queries: Sequence[TokenisedQuery], config: TrainConfig, rounds: int
) -> dict:
    planner = _planner(model, queries, config.max_tokens_per_pack)
    batch = planner.batch(range(len(queries)))
    ways = {"whole": backward_whole, "active": backward_active}
    gradients, seconds = {}, {name: [] for name in ways}
    for number in range(rounds + 1):  # the first is a check
        for name, backward in ways.items():
            model.zero_grad()
            totals = Totals(model.device)
            start = time.perf_counter()
            backward(model, batch, config, World(model.device), totals)
            fraction = totals.active_fraction  # waits for the device
            if number == 0:
                gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
            else:
                seconds[name].append(time.perf_counter() - start)
    whole, active = gradients["whole"], gradients["active"]
    ratios = [a / b for a, b in zip(seconds["whole"], seconds["active"], strict=True)]
    return {
        "active_fraction": fraction,
        "gradient_difference": ((whole - active).norm() / whole.norm()).item(),
        "speedup": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "auto": "active" if is_worthwhile(config, fraction) else "whole",
        "seconds": seconds,
    }
