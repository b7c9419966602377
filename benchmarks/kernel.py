"""Hidden states to loss and gradient: this project's heads against their peers', interleaved.

Every contender gets the same hidden states, weight, targets and queries of four responses, a
fraction of which is ranked wrong and has a gradient. Contenders that give log-probs a token are
followed by `rrhf_loss`. Each is checked against float64 before it is timed; one that is not
installed, fails or is wrong is reported as such and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.plots import grouped_bars
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, peak_extra_mb, seconds
from rrhf_fast import linear_logprob, linear_rrhf_loss, reference, rrhf_loss

# (E, H, V): Llama 3 at four lengths, Gemma 2, Qwen 2.5, Llama 2, Qwen 2.5 0.5B.
SHAPES = [
    (2048, 4096, 128_256), (4096, 4096, 128_256), (8192, 4096, 128_256), (16384, 4096, 128_256),
    (8192, 2304, 256_000), (8192, 3584, 152_064), (8192, 4096, 32_000), (8192, 896, 151_936),
]  # fmt: skip
CPU_SHAPES = [(1024, 576, 49_152)]  # SmolLM2 135M
SMOKE_SHAPES = [(512, 192, 8_192)]
FRACTIONS = (1.0, 0.5, 0.25)
NUM_RESPONSES, RESPONSE_LENGTH = 4, 32
# Largest relative error of a gradient, in the norm, against float64.
TOLERANCE = 0.03

Contender = Callable[[torch.Tensor, torch.Tensor, "Queries"], torch.Tensor]


@dataclass
class Queries:
    """What the loss needs beside hidden states [E, H] and weight [V, H]."""

    targets: torch.Tensor  # [E]
    rewards: torch.Tensor  # [S]
    layout: dict[str, torch.Tensor]

    def loss(self, logps: torch.Tensor) -> torch.Tensor:
        """The ranking part alone: responses that are ranked right have no gradient then."""
        return rrhf_loss(logps, self.rewards, sft_weight=0.0, **self.layout).loss


def run(*, preset: str, device: str, rounds: int) -> dict:
    """Time forward, and forward and backward, of all contenders on the preset's shapes."""
    on_gpu = device == "cuda"
    shapes = SMOKE_SHAPES if preset == "smoke" else SHAPES if on_gpu else CPU_SHAPES
    cases = [_case(shape, fraction, device, rounds) for shape in shapes for fraction in FRACTIONS]
    return {"cases": cases, "peak_tflops": _peak_tflops() if on_gpu else None}


def contenders(device: str) -> dict[str, Contender | str]:
    """By name: a function (hidden [E, H], weight [V, H], queries) -> loss, or why it is missing."""
    found: dict[str, Contender | str] = {
        "plain torch": _of_logps(_plain),
        "rrhf_fast torch, two steps": _ours("torch"),
        "rrhf_fast torch, one sweep": _sweep("torch"),
    }
    if device == "cuda":
        found["rrhf_fast triton, two steps"] = _ours("triton")
        found["rrhf_fast triton, one sweep"] = _sweep("triton")
        found["torch.compile"] = _of_logps(torch.compile(_plain, dynamic=False))
        peers = {
            "cut-cross-entropy, exact": _cut_cross_entropy,
            "Liger": _liger,
            "Liger, scaled (CuTe on Hopper)": _liger_scaled,
            SCALAR: _quack,
        }
        for name, load in peers.items():
            try:
                found[name] = load()
            except ImportError as error:
                found[name] = f"not installed ({error})"
    return found


# Knows no weights a token: it is given an easier task, the plain sum of the tokens' losses.
SCALAR = "QuACK, sum only"


def _of_logps(logps: Callable[..., torch.Tensor]) -> Contender:
    return lambda hidden, weight, queries: queries.loss(logps(hidden, weight, queries.targets))


def _plain(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _ours(backend: str) -> Contender:
    def logps(hidden, weight, targets):
        rows = torch.arange(len(targets), device=targets.device)
        return linear_logprob(hidden, weight, rows, targets, backend=backend)

    return _of_logps(logps)


def _sweep(backend: str) -> Contender:
    def loss(hidden, weight, queries):
        rows = torch.arange(len(queries.targets), device=hidden.device)
        edges = (rows, queries.targets, queries.rewards)
        options = {"sft_weight": 0.0, "backend": backend}
        return linear_rrhf_loss(hidden, weight, *edges, **queries.layout, **options).loss

    return loss


def _cut_cross_entropy() -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    # Without its filter, which leaves small gradients out.
    options = {"reduction": "none", "impl": "cce", "filter_eps": None}
    return _of_logps(lambda *arguments: -linear_cross_entropy(*arguments, **options))


def _liger() -> Contender:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return _of_logps(lambda hidden, weight, targets: -loss(weight, hidden, targets))


def _liger_scaled() -> Contender:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def logps(hidden, weight, targets):
        nll = Function.apply(hidden, weight, targets)
        return -(nll[0] if isinstance(nll, tuple) else nll)

    return _of_logps(logps)


def _quack() -> Contender:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, queries: chunked_linear_cross_entropy(
        hidden, weight, queries.targets, reduction="sum"
    )


def _case(shape: tuple[int, int, int], fraction: float, device: str, rounds: int) -> dict:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.reset()  # else later shapes would be given graphs of any shape
    tensors, queries, exact = _inputs(shape, fraction, device, dtype)

    def step(contender: Contender) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(contender(*tensors, queries), tensors)

    @torch.no_grad()
    def forward(contender: Contender) -> None:
        contender(*tensors, queries)

    results, runnable = {}, {}
    for name, contender in contenders(device).items():
        if isinstance(contender, str):
            results[name] = {"problem": contender}
            continue
        try:
            gradients = zip(step(contender), exact[name == SCALAR], strict=True)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in gradients]
        except Exception as error:  # out of memory, or an interface that has moved on
            results[name] = {"problem": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        results[name] = {"gradient_errors": errors}
        if max(errors) < TOLERANCE:
            runnable[name] = contender
        else:
            results[name]["problem"] = "too far from float64"
    del exact
    forwards = {name: partial(forward, way) for name, way in runnable.items()}
    steps = {name: partial(step, way) for name, way in runnable.items()}
    forward_times, step_times = (interleaved(ways, rounds) for ways in (forwards, steps))
    product = 2e-9 * shape[0] * shape[1] * shape[2]
    for name, times in step_times.items():
        forward_ms, ms = median(forward_times[name]) * 1e3, median(times) * 1e3
        # What has to be done: one product, and two more of the edges with a gradient.
        results[name] |= {
            "forward_ms": forward_ms,
            "forward_tflops": product / forward_ms,
            "ms": ms,
            "spread_ms": [min(times) * 1e3, max(times) * 1e3],
            "tflops": (1 + 2 * fraction) * product / ms,
        }
        if device == "cuda":
            results[name]["peak_extra_mb"] = peak_extra_mb(steps[name])
    return {"shape": shape, "fraction": fraction, "dtype": str(dtype), "contenders": results}


def _inputs(
    shape: tuple[int, int, int], fraction: float, device: str, dtype: torch.dtype
) -> tuple[list[torch.Tensor], Queries, dict[bool, list[torch.Tensor]]]:
    """hidden and weight; queries of which `fraction` is ranked backwards and the rest right; and
    the gradients in float64, of the loss (False) and of the sum of the log-probs (True)."""
    num_edges, hidden_size, vocab_size = shape
    g = torch.Generator(device).manual_seed(0)
    # Logits of standard deviation 4: peaked as a trained model's are.
    hidden = torch.randn(num_edges, hidden_size, generator=g, device=device) * 4 / hidden_size**0.5
    weight = torch.randn(vocab_size, hidden_size, generator=g, device=device)
    targets = torch.randint(0, vocab_size, (num_edges,), generator=g, device=device)
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    logps = _exact(tensors, targets)
    num_responses = num_edges // RESPONSE_LENGTH
    layout = {
        "path_edges": torch.arange(num_edges, device=device),
        "path_offsets": torch.arange(num_responses + 1, device=device) * RESPONSE_LENGTH,
        "group_offsets": torch.arange(0, num_responses + 1, NUM_RESPONSES, device=device),
    }
    scores, order = logps.view(-1, NUM_RESPONSES, RESPONSE_LENGTH).mean(2).sort(1)
    # Scores that rounding could exchange are given the same reward.
    ranks = torch.nn.functional.pad((scores.diff() > 0.05).cumsum(1), (1, 0)).float()
    ranks[: round(fraction * len(ranks))] *= -1
    queries = Queries(targets, torch.empty_like(ranks).scatter_(1, order, ranks).flatten(), layout)
    leaf = logps.requires_grad_()
    upstream = torch.autograd.grad(queries.loss(leaf), leaf)[0]
    exact = {
        False: _exact(tensors, targets, upstream),
        True: _exact(tensors, targets, -torch.ones_like(upstream)),
    }
    return tensors, queries, exact


def _exact(
    tensors: list[torch.Tensor],
    targets: torch.Tensor,
    upstream: torch.Tensor | None = None,
    rows: int = 512,
) -> torch.Tensor | list[torch.Tensor]:
    """Log-probs [E], or their gradients, in float64, for a few rows at a time."""
    hidden, weight = (t.detach().double().requires_grad_() for t in tensors)
    logps, total = [], [torch.zeros_like(t) for t in (hidden, weight)]
    for part in torch.arange(len(targets), device=targets.device).split(rows):
        out = reference.linear_logprob(hidden, weight, part, targets[part])
        logps.append(out.detach())
        if upstream is not None:
            gradients = torch.autograd.grad(out, (hidden, weight), upstream[part].double())
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
    return torch.cat(logps) if upstream is None else total


def table(figures: dict) -> str:
    """Milliseconds forward and backward by the share of edges with a gradient."""
    parts = []
    for title, cases in _by_shape(figures).items():
        names = list(cases[0]["contenders"])
        header = [title, *(f"{case['fraction']:.0%}" for case in cases)]
        parts.append(text_table(header, [[name, *_cells(name, cases)] for name in names]))
    return "\n\n".join(parts)


def plot(figures: dict, path: Path) -> None:
    """Milliseconds of forward and backward, a panel a shape, a group of bars a fraction."""
    panels = []
    # The same names in every panel, so that colours mean the same.
    names = dict.fromkeys(
        name
        for case in figures["cases"]
        for name, result in case["contenders"].items()
        if "ms" in result
    )
    for title, cases in _by_shape(figures).items():
        heights = {name: [case["contenders"][name].get("ms") for case in cases] for name in names}
        panels.append((title, [f"{case['fraction']:.0%}" for case in cases], heights))
    label = "edges with a gradient"
    grouped_bars(panels, path, ylabel="ms, forward and backward", xlabel=label)


def _by_shape(figures: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for case in figures["cases"]:
        title = "{:,} edges, hidden {:,}, vocabulary {:,}".format(*case["shape"])
        found.setdefault(title, []).append(case)
    return found


def _cells(name: str, cases: list[dict]) -> list[str]:
    results = [case["contenders"][name] for case in cases]
    return [f"{r['ms']:,.1f}" if "ms" in r else r["problem"][:24] for r in results]


def _peak_tflops(size: int = 8192) -> float:
    """What cuBLAS reaches in bfloat16 on a square product: the ceiling of everything above."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: a @ b) for _ in range(20)]
    return 2 * size**3 / median(times[5:]) / 1e12
