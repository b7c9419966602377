"""Loss and gradient of real rows: the engine against the released method, interleaved."""

import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.baselines import released_loss
from rrhf_fast.config import LossConfig
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.rows import load_rows
from rrhf_fast.data.tokenise import tokenise_rows
from rrhf_fast.model.decoder import load_model, load_tokenizer
from rrhf_fast.model.rrhf import RRHFModel


def run(model: str, data: str, *, num_queries: int, rounds: int, max_tokens_per_pack: int) -> dict:
    """Time both on the same queries; returns the figures. Optimizer steps are left out of both."""
    rows, report = load_rows(data, on_bad_rows="skip")
    queries, _ = tokenise_rows(
        rows, load_tokenizer(model), report, max_length=2048, on_bad_rows="skip"
    )
    # Every n-th row, so that the sample follows the file whatever its order.
    queries = queries[:: max(1, len(queries) // num_queries)][:num_queries]
    plain = load_model(model)
    engine = RRHFModel(load_model(model), LossConfig(compat="official"), max_length=2048)
    planner = PackPlanner(queries, packing="forest", max_tokens_per_pack=max_tokens_per_pack)

    def released() -> float:
        total = 0.0
        for query in queries:
            loss = released_loss(plain, query) / len(queries)
            loss.backward()
            total += loss.item()
        return total

    def ours() -> float:
        total = 0.0
        for pack in planner.packs(range(len(queries))):
            loss = engine(pack).loss * (pack.num_queries / len(queries))
            loss.backward()
            total += loss.item()
        return total

    check = {"released_loss": released(), "engine_loss": ours()}
    gradients = [
        torch.cat([p.grad.flatten() for p in lm.parameters()]) for lm in (plain, engine.lm)
    ]
    check["gradient_difference"] = (
        (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    ).item()
    assert check["gradient_difference"] < 1e-3, check
    seconds: dict[str, list[float]] = {"released": [], "engine": []}
    for _ in range(rounds):
        for name, function in (("released", released), ("engine", ours)):
            plain.zero_grad()
            engine.zero_grad()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["released"], seconds["engine"], strict=True)]
    return {
        "data": Path(data).name,
        "queries": len(queries),
        "tokens": {
            "packed": sum(planner.sizes),
            "padded": sum(padded_tokens(query) for query in queries),
        },
        "check": check,
        "queries_per_second": {
            name: len(queries) / median(values) for name, values in seconds.items()
        },
        "speedup": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "seconds": seconds,
    }
