"""L_rank alone, from token log-probs to their gradient: one call for all queries against common
implementations."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.plots import grouped_bars
from benchmarks.results import Save, judge, no_save, recorded
from benchmarks.tables import cell, text_table
from benchmarks.timing import interleaved
from rrhf_fast import reference, rrhf_loss

# Queries, responses per query, tokens per response.
SHAPES = {
    "smoke": [(64, 6, 64)],
    "paper": [(64, 6, 64), (64, 64, 64), (1024, 6, 64)],
    "full": [(64, 6, 64), (64, 64, 64), (1024, 6, 64), (64, 512, 64)],
}
# Relative error (norm) against float64: rounding may swap two almost equal scores.
TOLERANCE = 1e-2


def run(*, preset: str, device: str, rounds: int, save: Save = no_save) -> dict:
    """Time every way on the preset's shapes; return the figures."""
    figures: dict = {"cases": []}
    for shape in SHAPES[preset]:
        figures["cases"].append(_case(shape, device, rounds))
        save(figures)
    return figures


def _case(shape: tuple[int, int, int], device: str, rounds: int) -> dict:
    g = torch.Generator().manual_seed(0)
    logps = -torch.rand(shape, generator=g).to(device)
    rewards = torch.rand(shape[:2], generator=g).to(device)
    exact = _gradient(_exact, logps.double(), rewards)
    ways, results = {}, {}
    for name, way in _ways(shape, device).items():
        results[name] = {}
        with recorded(results[name]):
            gradient = _gradient(way, logps, rewards)
            error = ((gradient.double() - exact).norm() / exact.norm()).item()
            results[name]["gradient_error"] = error
            judge(results[name], [error], TOLERANCE)
        if "problem" not in results[name]:
            ways[name] = partial(_gradient, way, logps, rewards)
    case = {"queries/k/tokens": shape, "contenders": results}
    times = interleaved(ways, rounds, device=device, results=results, record=case)
    for name, seconds in times.items():
        results[name] |= {"ms": median(seconds) * 1e3, "seconds": seconds}
    return case


def _gradient(way: Callable, logps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    leaf = logps.detach().requires_grad_()
    return torch.autograd.grad(way(leaf, rewards), leaf)[0]


def _ways(shape: tuple[int, int, int], device: str) -> dict[str, Callable]:
    """By name: a function (logps [G, k, T], rewards [G, k]) -> mean loss over the queries."""
    queries, k, tokens = shape
    layout = {
        "path_edges": torch.arange(queries * k * tokens, device=device),
        "path_offsets": torch.arange(0, queries * k * tokens + 1, tokens, device=device),
        "group_offsets": torch.arange(0, queries * k + 1, k, device=device),
    }

    def ours(backend: str) -> Callable:
        def loss(logps, rewards):
            options = layout | {"backend": backend, "sft_weight": 0.0}
            return rrhf_loss(logps.flatten(), rewards.flatten(), **options).loss

        return loss

    backends = ["torch", "triton"] if device == "cuda" else ["torch"]
    usual = {"a loop over queries": _query_by_query, "all pairs, [G, k, k]": _all_pairs}
    return usual | {f"rrhf_fast {backend}": ours(backend) for backend in backends}


def _exact(logps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    losses = [
        reference.rrhf_loss(list(responses), scores, sft_weight=0.0)[0]
        for responses, scores in zip(logps, rewards, strict=True)
    ]
    return torch.stack(losses).mean()


def _query_by_query(logps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    pairs = zip(logps, rewards, strict=True)
    return torch.stack([_all_pairs(each[None], scores[None]) for each, scores in pairs]).mean()


def _all_pairs(logps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    scores = logps.mean(-1)
    gaps = scores.unsqueeze(2) - scores.unsqueeze(1)  # [G, i, j] = p_i - p_j
    wrong = rewards.unsqueeze(2) < rewards.unsqueeze(1)
    return (gaps.clamp(min=0) * wrong).sum((1, 2)).mean()


def table(figures: dict) -> str:
    """Milliseconds forward and backward."""
    cases = figures["cases"]
    rows = [
        [name, *(cell(case["contenders"][name], "ms", ".2f") for case in cases)]
        for name in cases[0]["contenders"]
    ]
    return text_table(
        ["ms, forward and backward", *(_label(c).replace("\n", ", ") for c in cases)], rows
    )


def plot(figures: dict, path: Path) -> None:
    """Bars on a logarithmic scale."""
    cases = figures["cases"]
    heights = {
        name: [case["contenders"][name].get("ms") for case in cases]
        for name in cases[0]["contenders"]
    }
    panels = [("ranking loss", list(map(_label, cases)), heights)]
    grouped_bars(panels, path, ylabel="ms, forward and backward", log=True)


def _label(case: dict) -> str:
    queries, k, tokens = case["queries/k/tokens"]
    return f"{queries} queries, k = {k}\n{tokens} tokens"
