"""The least time of loss and gradient: the matrix products that they need, at the best speed that
products reach here.

Needed are the forward of every token and prediction, and the backward of those that lead to a
prediction with a gradient, however an engine finds out which these are. A product whose gradient
nobody asks for (of a frozen weight) is none. Norms, activations, softmax, gathers and memory are
free in this limit. Every layer counts every token, the last one, too: an engine may leave out its
rows from which nothing is predicted, which are counted here, and for that little could be faster.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from benchmarks.tables import text_table
from benchmarks.timing import best_seconds, device_seconds
from rrhf_fast.data.active import active_part, kept_rows
from rrhf_fast.data.forest import PackedForest
from rrhf_fast.model.flops import Flops
from rrhf_fast.model.rrhf import RRHFModel

PARTS = Flops._fields
FORWARD, STATES, WEIGHT = "forward", "gradient of states", "gradient of weight"
# Side of a square product. It need not occur, but a limit without it might be too easy to reach.
SQUARE = {"cpu": 2048, "cuda": 8192}
LOGITS = 2**25  # in a product of the head that is timed, at most; an engine splits larger ones, too


def work_of(engine: RRHFModel, packs: Sequence[PackedForest]) -> dict:
    """What loss and gradient of these packs need.

    Returns:
        `flops`: operations by part, forward and backward; `tokens`, `edges`: numbers of forward
        and of backward.
    """
    flops = {"forward": Counter(), "backward": Counter()}
    tokens, edges = Counter(), Counter()
    for pack in packs:
        _, weights = engine.edge_weights(pack)
        part = active_part(pack, weights)
        forward = engine.costs.of_pack(pack, 0, has_backward=False)
        again = engine.costs.of_pack(part, 0, has_backward=False)
        both = engine.costs.of_pack(part, len(part.edge_rows))
        for name in PARTS:
            flops["forward"][name] += float(getattr(forward, name))
            flops["backward"][name] += float(getattr(both, name) - getattr(again, name))
        real = kept_rows(pack, torch.ones_like(weights, dtype=torch.bool))
        tokens.update(forward=int(real.sum()), backward=part.num_tokens)
        edges.update(forward=len(pack.edge_rows), backward=len(part.edge_rows))
    return {
        "flops": {way: dict(counts) for way, counts in flops.items()},
        "tokens": dict(tokens),
        "edges": dict(edges),
    }


def product_speeds(engine: RRHFModel, work: dict, rows: int) -> dict[str, float]:
    """Operations per second of each product that occurs, and of a large square one, in the compute
    dtype and with the threads of this process: the best of several calls.

    Args:
        rows: tokens of the largest pack; the backward takes the active share of them.
    """
    device, dtype = engine.device, engine.compute_dtype
    make = {"device": device, "dtype": dtype}
    share = work["tokens"]["backward"] / work["tokens"]["forward"]
    speeds = {}

    def time(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        out = torch.empty(len(a), b.shape[1], **make)

        def product() -> None:
            torch.mm(a, b, out=out)

        best = device_seconds(product) if device.type == "cuda" else best_seconds(product)
        speeds[name] = 2 * a.shape[0] * a.shape[1] * b.shape[1] / best

    for _, shape in _linears(engine):
        if _name(FORWARD, shape) in speeds:
            continue
        is_head = shape == tuple(engine.head.linear.weight.shape)
        num_rows = min(rows, max(1, LOGITS // shape[0])) if is_head else rows
        active = max(1, round(num_rows * share))
        weight, x = torch.randn(shape, **make), torch.randn(num_rows, shape[1], **make)
        grad = torch.randn(active, shape[0], **make)
        time(_name(FORWARD, shape), x, weight.T)
        time(_name(STATES, shape), grad, weight)
        time(_name(WEIGHT, shape), grad.T, x[:active])
    a, b = (torch.randn(SQUARE[device.type], SQUARE[device.type], **make) for _ in range(2))
    time(f"{SQUARE[device.type]} cubed", a, b)
    return speeds


def limit_of(engine: RRHFModel, work: dict, before: dict, after: dict) -> dict:
    """`work`, and its time at the best of all speeds, which were measured before and after the
    timed rounds.

    Returns:
        `seconds`: by part, and their sum `total_seconds`. `own_speed_seconds`: the same work with
        each product with a weight at the best speed of its own shape.
    """
    speeds = {name: max(before[name], after[name]) for name in before}
    best = max(speeds, key=speeds.__getitem__)
    peak = speeds[best]
    flops = {part: sum(work["flops"][way][part] for way in work["flops"]) for part in PARTS}
    seconds = {part: count / peak for part, count in flops.items()}
    own_flops = own_seconds = 0.0
    for count, name in _products(engine, work):
        own_flops += count
        own_seconds += count / speeds[name]
    return work | {
        "dtype": str(engine.compute_dtype).removeprefix("torch."),
        "peak_tflops": peak / 1e12,
        "peak_of": best,
        "peaks_before_and_after": [max(s.values()) / 1e12 for s in (before, after)],
        "tflops_by_product": {name: speed / 1e12 for name, speed in speeds.items()},
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        # Attention, and weights that are not of linear layers, at the peak.
        "own_speed_seconds": own_seconds + (sum(flops.values()) - own_flops) / peak,
    }


def table(limit: dict, shares: dict[str, float]) -> str:
    """The limit by part, and each contender's share of it."""
    rows = [
        [
            part,
            *(f"{limit['flops'][way][part] / 1e9:,.0f}" for way in ("forward", "backward")),
            f"{limit['seconds'][part]:.3f}",
        ]
        for part in PARTS
    ]
    rows.append(["all", "", "", f"{limit['total_seconds']:.3f}"])
    before, after = limit["peaks_before_and_after"]
    lines = [
        text_table(["products needed", "GFLOP forward", "backward", "s at the peak"], rows),
        f"peak {limit['peak_tflops'] * 1e3:,.0f} GFLOP/s in {limit['dtype']} ({limit['peak_of']}; "
        f"{before * 1e3:,.0f} before the rounds, {after * 1e3:,.0f} after); every product at its "
        f"own best speed: {limit['own_speed_seconds']:.3f} s",
        "limit / measured: " + ", ".join(f"{name} {one:.2f}" for name, one in shares.items()),
    ]
    return "\n".join(lines)


def _linears(engine: RRHFModel) -> Iterator[tuple[nn.Linear, tuple[int, int]]]:
    """Linear layers of decoder and head, and the shapes of their weights."""
    layers = [m for m in engine.lm.base_model.modules() if isinstance(m, nn.Linear)]
    for layer in [*layers, engine.head.linear]:
        yield layer, tuple(layer.weight.shape)


def _products(engine: RRHFModel, work: dict) -> Iterator[tuple[float, str]]:
    """Operations and name of each product of a linear layer."""
    for layer, shape in _linears(engine):
        of = work["edges" if layer is engine.head.linear else "tokens"]
        per_row = 2 * shape[0] * shape[1]
        yield per_row * of["forward"], _name(FORWARD, shape)
        yield per_row * of["backward"], _name(STATES, shape)
        if layer.weight.requires_grad:
            yield per_row * of["backward"], _name(WEIGHT, shape)


def _name(kind: str, shape: tuple[int, int]) -> str:
    return f"{kind}, {shape[0]} x {shape[1]}"
