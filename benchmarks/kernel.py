"""Hidden states to loss and gradient: this project's heads against their peers', interleaved.

Every contender gets the same hidden states, weight, targets and queries of four responses, a
fraction of which is ranked wrongly and has a gradient. Contenders that return log-probs per token
are followed by `rrhf_loss`. Each is checked against float64 before it is timed; one that is not
installed, fails or is wrong is reported as such and left out. The matrix products that every head
needs are also timed alone: all time beyond theirs is overhead.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import compute_dtype as dtype_of
from benchmarks.machine import peak_flops
from benchmarks.plots import grouped_bars
from benchmarks.results import Save, describe, judge, no_save, recorded
from benchmarks.tables import cell, text_table
from benchmarks.timing import interleaved, peak_extra_mb, ratio
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
# Largest relative error (norm) of a gradient, against float64.
TOLERANCE = 0.03

Contender = Callable[[torch.Tensor, torch.Tensor, "Queries"], torch.Tensor]


@dataclass
class Queries:
    """Inputs of the loss other than hidden states [E, H] and weight [V, H]."""

    targets: torch.Tensor  # [E]
    rewards: torch.Tensor  # [S]
    layout: dict[str, torch.Tensor]
    softcap: float | None = None  # of the logits

    def loss(self, logps: torch.Tensor) -> torch.Tensor:
        """The ranking part alone, where correctly ranked responses have no gradient."""
        return rrhf_loss(logps, self.rewards, sft_weight=0.0, **self.layout).loss


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    softcaps: Sequence[float | None] = (None,),
    workspaces_mb: Sequence[float | None] = (None,),
    only: Sequence[str] | None = None,
    compute_dtype: str | None = None,
    save: Save = no_save,
) -> dict:
    """Time forward, and forward and backward, of all contenders on the preset's shapes.

    Args:
        rounds: of timing; 0 only checks.
        shapes: (E, H, V) instead of the preset's.
        fractions: shares of edges with a gradient.
        softcaps, workspaces_mb: values for `linear_rrhf_loss`; None is its default.
        only: names of contenders, instead of all.
        compute_dtype: of hidden states and weight, instead of the device's.
    """
    dtype = getattr(torch, compute_dtype) if compute_dtype else dtype_of(device)
    on_gpu = device == "cuda"
    if shapes is None:
        shapes = SMOKE_SHAPES if preset == "smoke" else SHAPES if on_gpu else CPU_SHAPES
    figures: dict = {"cases": [], "peak_tflops": peak_flops(device) / 1e12 if on_gpu else None}
    for shape, softcap, fraction in itertools.product(shapes, softcaps, fractions):
        case = {"shape": shape, "fraction": fraction, "contenders": {}}
        case |= {} if softcap is None else {"softcap": softcap}
        figures["cases"].append(case)
        ways = contenders(device, workspaces_mb) if softcap is None else own(device, workspaces_mb)
        ways = {name: way for name, way in ways.items() if only is None or name in only}
        with recorded(case):
            _measure(case, ways, device, dtype, rounds, partial(save, figures))
        save(figures)
    return figures


def own(device: str, workspaces_mb: Sequence[float | None] = (None,)) -> dict[str, Contender]:
    """This project's heads, and plain torch, by name: functions (hidden [E, H], weight [V, H],
    queries) -> loss."""
    heads: dict[str, Contender] = {"plain torch": _by(_plain)}
    for backend in ["torch", "triton"] if device == "cuda" else ["torch"]:
        heads[f"rrhf_fast {backend}, two steps"] = _ours(backend)
        for size in workspaces_mb:
            name = f"rrhf_fast {backend}, one sweep"
            name += "" if size is None else f", {size:g} MiB"
            heads[name] = _sweep(backend, size)
    return heads


def contenders(
    device: str, workspaces_mb: Sequence[float | None] = (None,)
) -> dict[str, Contender | str]:
    """`own` and the peers; a missing one is replaced by the reason."""
    heads: dict[str, Contender | str] = {**own(device, workspaces_mb)}
    peers = {"torch's linear_cross_entropy": _linear_cross_entropy, "TRL, chunked": _trl}
    if device == "cuda":
        heads["torch.compile"] = _by(torch.compile(_plain, dynamic=False))
        peers |= {
            "cut-cross-entropy, exact": _cut_cross_entropy,
            "Liger": _liger,
            "Liger, scaled (CuTe on Hopper)": _liger_scaled,
            SCALAR: _quack,
        }
    for name, load in peers.items():
        try:
            heads[name] = load()
        except ImportError as error:
            heads[name] = f"not installed ({error})"
        except Exception as error:  # from a package too old for this torch or triton
            heads[name] = describe(error)
    return heads


PRODUCTS = "the three products alone"
# Does not support weights per token, so it gets an easier task: the plain sum of tokens' losses.
SCALAR = "QuACK, sum only"


def _of_logps(logps: Callable[..., torch.Tensor]) -> Contender:
    return lambda hidden, weight, queries: queries.loss(logps(hidden, weight, queries.targets))


def _by(logps: Callable[..., torch.Tensor]) -> Contender:
    """As `_of_logps`, for a function that takes the softcap."""

    def loss(hidden, weight, queries):
        return queries.loss(logps(hidden, weight, queries.targets, queries.softcap))

    return loss


def _plain(hidden, weight, targets, softcap):
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _ours(backend: str) -> Contender:
    def logps(hidden, weight, targets, softcap):
        rows = torch.arange(len(targets), device=targets.device)
        return linear_logprob(hidden, weight, rows, targets, softcap=softcap, backend=backend)

    return _by(logps)


def _sweep(backend: str, workspace_mb: float | None) -> Contender:
    def loss(hidden, weight, queries):
        rows = torch.arange(len(queries.targets), device=hidden.device)
        edges = (rows, queries.targets, queries.rewards)
        options = {"softcap": queries.softcap, "workspace_mb": workspace_mb}
        options |= {"sft_weight": 0.0, "backend": backend, **queries.layout}
        return linear_rrhf_loss(hidden, weight, *edges, **options).loss

    return loss


def _linear_cross_entropy() -> Contender:
    from torch.nn import LinearCrossEntropyOptions  # since PyTorch 2.13
    from torch.nn.functional import linear_cross_entropy

    # In chunks; without options it is plain torch.
    options = {"reduction": "none", "options": LinearCrossEntropyOptions()}
    return _of_logps(lambda *arguments: -linear_cross_entropy(*arguments, **options))


def _trl() -> Contender:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    # No bias, temperature 1, no softcap, logits as they are, and nothing for its metrics.
    before, after = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE), (None, 1.0, ("log_probs",))
    return _of_logps(
        lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, *before, *after
        )[0]
    )


def _cut_cross_entropy() -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    # Without its filter, which drops small gradients.
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


def _measure(
    case: dict,
    ways: dict[str, Contender | str],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    save: Callable[[], None],
) -> None:
    """Check every contender, then time the correct ones; results are added to `case`."""
    shape, fraction, results = case["shape"], case["fraction"], case["contenders"]
    case["dtype"] = str(dtype)
    torch._dynamo.reset()  # otherwise later shapes would get dynamic graphs
    tensors, queries, exact = _inputs(shape, fraction, case.get("softcap"), device, dtype)

    def step(contender: Contender) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(contender(*tensors, queries), tensors)

    @torch.no_grad()
    def forward(contender: Contender) -> None:
        contender(*tensors, queries)

    for name, contender in ways.items():
        results[name] = {"problem": contender} if isinstance(contender, str) else {}
        if "problem" not in results[name]:
            with recorded(results[name]):
                gradients = zip(step(contender), exact[name == SCALAR], strict=True)
                errors = [((a.double() - b).norm() / b.norm()).item() for a, b in gradients]
                results[name]["gradient_errors"] = errors
                judge(results[name], errors, TOLERANCE)
        save()
    del exact
    if rounds == 0:
        return
    runnable = {name: way for name, way in ways.items() if "problem" not in results[name]}
    forwards = {name: partial(forward, way) for name, way in runnable.items()}
    forward_times = interleaved(forwards, rounds, device=device, results=results)
    steps = {name: partial(step, runnable[name]) for name in forward_times}
    alone: dict[str, dict] = {PRODUCTS: {}}
    products = {PRODUCTS: _products(tensors, fraction)}
    step_times = interleaved(
        products | steps, rounds, device=device, results=results | alone, record=case
    )
    bound = step_times.pop(PRODUCTS, [])
    case["products"] = alone[PRODUCTS] | ({"ms": median(bound) * 1e3} if bound else {})
    del products
    for name, times in step_times.items():
        forward_seconds = median(forward_times[name])
        results[name] |= _figures(shape, fraction, forward_seconds, times)
        if bound:
            results[name]["over_products"] = ratio(times, bound)
        if device == "cuda":
            results[name]["peak_extra_mb"] = peak_extra_mb(steps[name])
        save()


def _figures(
    shape: tuple[int, int, int], fraction: float, forward: float, times: list[float]
) -> dict:
    """A contender's figures, from its seconds of forward, and of forward and backward."""
    forward_ms, ms = forward * 1e3, median(times) * 1e3
    product = 2e-9 * shape[0] * shape[1] * shape[2]
    # Required work: one product, and two more for the edges with a gradient.
    return {
        "forward_ms": forward_ms,
        "forward_tflops": product / forward_ms,
        "ms": ms,
        "spread_ms": [min(times) * 1e3, max(times) * 1e3],
        "tflops": (1 + 2 * fraction) * product / ms,
    }


def _products(tensors: Sequence[torch.Tensor], fraction: float) -> Callable[[], None]:
    """Only the matrix products of a head: the logits of all edges, and two products for the edges
    with a gradient."""
    hidden, weight = (t.detach() for t in tensors)
    active = max(1, round(fraction * len(hidden)))
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden[:active]), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits[:active], weight, out=d_hidden)
        torch.mm(logits[:active].T, hidden[:active], out=d_weight)

    return run


def _inputs(
    shape: tuple[int, int, int],
    fraction: float,
    softcap: float | None,
    device: str,
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], Queries, dict[bool, list[torch.Tensor]]]:
    """hidden and weight; queries of which `fraction` is ranked in reverse and the rest correctly;
    and float64 gradients of the loss (False) and of the sum of log-probs (True)."""
    num_edges, hidden_size, vocab_size = shape
    g = torch.Generator(device).manual_seed(0)
    # Logits of standard deviation 4: peaked like a trained model's.
    hidden = torch.randn(num_edges, hidden_size, generator=g, device=device) * 4 / hidden_size**0.5
    weight = torch.randn(vocab_size, hidden_size, generator=g, device=device)
    targets = torch.randint(0, vocab_size, (num_edges,), generator=g, device=device)
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    logps = _exact(tensors, targets, softcap)
    num_responses = num_edges // RESPONSE_LENGTH
    layout = {
        "path_edges": torch.arange(num_edges, device=device),
        "path_offsets": torch.arange(num_responses + 1, device=device) * RESPONSE_LENGTH,
        "group_offsets": torch.arange(0, num_responses + 1, NUM_RESPONSES, device=device),
    }
    scores, order = logps.view(-1, NUM_RESPONSES, RESPONSE_LENGTH).mean(2).sort(1)
    # Scores that rounding could swap get equal rewards.
    ranks = torch.nn.functional.pad((scores.diff() > 0.05).cumsum(1), (1, 0)).float()
    ranks[: round(fraction * len(ranks))] *= -1
    rewards = torch.empty_like(ranks).scatter_(1, order, ranks).flatten()
    queries = Queries(targets, rewards, layout, softcap)
    leaf = logps.requires_grad_()
    upstream = torch.autograd.grad(queries.loss(leaf), leaf)[0]
    exact = {
        False: _exact(tensors, targets, softcap, upstream),
        True: _exact(tensors, targets, softcap, -torch.ones_like(upstream)),
    }
    return tensors, queries, exact


def _exact(
    tensors: list[torch.Tensor],
    targets: torch.Tensor,
    softcap: float | None,
    upstream: torch.Tensor | None = None,
    rows: int = 512,
) -> torch.Tensor | list[torch.Tensor]:
    """Log-probs [E], or their gradients, in float64, for a few rows at a time."""
    hidden, weight = (t.detach().double().requires_grad_() for t in tensors)
    logps, total = [], [torch.zeros_like(t) for t in (hidden, weight)]
    for part in torch.arange(len(targets), device=targets.device).split(rows):
        out = reference.linear_logprob(hidden, weight, part, targets[part], softcap=softcap)
        logps.append(out.detach())
        if upstream is not None:
            gradients = torch.autograd.grad(out, (hidden, weight), upstream[part].double())
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
    return torch.cat(logps) if upstream is None else total


def table(figures: dict) -> str:
    """Milliseconds forward and backward by the share of edges with a gradient; in brackets,
    relative to the matrix products alone."""
    parts = []
    for title, cases in _by_shape(figures).items():
        header = [title, *(f"{case['fraction']:.0%}" for case in cases)]
        rows = [[name, *_cells(name, cases)] for name in _names(cases)]
        rows.append([PRODUCTS, *(cell(_products_of(case), "ms", ",.1f") for case in cases)])
        parts.append(text_table(header, rows))
    return "\n\n".join(parts)


def plot(figures: dict, path: Path) -> None:
    """Milliseconds forward and backward, one panel per shape, one group of bars per fraction."""
    panels = []
    # The same names in every panel, so that colours match.
    names = [
        name
        for name in _names(figures["cases"])
        if any("ms" in case["contenders"].get(name, {}) for case in figures["cases"])
    ]
    for title, cases in _by_shape(figures).items():
        heights = {
            name: [case["contenders"].get(name, {}).get("ms") for case in cases] for name in names
        }
        panels.append((title, [f"{case['fraction']:.0%}" for case in cases], heights))
    label = "edges with a gradient"
    grouped_bars(panels, path, ylabel="ms, forward and backward", xlabel=label)


def _by_shape(figures: dict) -> dict[str, list[dict]]:
    by_shape: dict[str, list[dict]] = {}
    for case in figures["cases"]:
        title = "{:,} edges, hidden {:,}, vocabulary {:,}".format(*case["shape"])
        title += f", softcap {case['softcap']:g}" if "softcap" in case else ""
        by_shape.setdefault(title, []).append(case)
    return by_shape


def _names(cases: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["contenders"]))


def _cells(name: str, cases: list[dict]) -> list[str]:
    texts = []
    for case in cases:
        result = case["contenders"].get(name, {"problem": case.get("problem", "")})
        text = cell({"problem": "right, not timed"} | result, "ms", ",.1f")
        over = result.get("over_products")
        texts.append(f"{text} ({over['median']:.2f})" if over else text)
    return texts


def _products_of(case: dict) -> dict:
    return {"problem": case.get("problem", "")} | case.get("products", {})
