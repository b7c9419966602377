"""Log-probs off the head with gradients: this project's kernels against its peers', interleaved.

Every contender gets the same hidden states, weight, targets and upstream gradient [E], a fraction
of which is nonzero, and is checked against float64 before it is timed. A contender that is not
installed, fails or is wrong is reported as such and left out.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from rrhf_fast import linear_logprob, reference

# (E, H, V): Llama 3 at three lengths, Gemma 2, Qwen 2.5, Llama 2, Qwen 2.5 0.5B.
SHAPES = [
    (2048, 4096, 128_256), (8192, 4096, 128_256), (16384, 4096, 128_256),
    (8192, 2304, 256_000), (8192, 3584, 152_064), (8192, 4096, 32_000), (8192, 896, 151_936),
]  # fmt: skip
SMALL_SHAPES = [(64, 64, 1000)]  # for machines without a GPU: shows that the script works
FRACTIONS = (1.0, 0.5, 0.25)
# Largest relative error of a gradient, in the norm, against float64.
TOLERANCE = 0.03

Contender = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run(*, rounds: int) -> dict:
    """Time forward and backward of all contenders on all shapes; returns the figures."""
    on_gpu = torch.cuda.is_available()
    cases = []
    for shape in SHAPES if on_gpu else SMALL_SHAPES:
        for fraction in FRACTIONS:
            cases.append(_case(shape, fraction, rounds))
            print(cases[-1], flush=True)
    return {"cases": cases, "peak_tflops": _peak_tflops() if on_gpu else None}


def contenders() -> dict[str, Contender | str]:
    """By name: a function (hidden [E, H], weight [V, H], targets [E]) -> log-probs [E], or why it
    is missing."""

    def ours(backend: str) -> Contender:
        def logp(hidden, weight, targets):
            rows = torch.arange(len(targets), device=targets.device)
            return linear_logprob(hidden, weight, rows, targets, backend=backend)

        return logp

    def plain(hidden, weight, targets):
        logits = (hidden @ weight.T).float()
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    found: dict[str, Contender | str] = {"rrhf_fast torch": ours("torch"), "plain torch": plain}
    if torch.cuda.is_available():
        found["rrhf_fast triton"] = ours("triton")
        found["torch.compile"] = torch.compile(plain)
        for name, load in (("cut-cross-entropy, exact", _cut_cross_entropy), ("Liger", _liger)):
            try:
                found[name] = load()
            except ImportError as error:
                found[name] = f"not installed ({error})"
    return found


def _cut_cross_entropy() -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce_exact")
    )


def _liger() -> Contender:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, targets: -loss(weight, hidden, targets)


def _case(shape: tuple[int, int, int], fraction: float, rounds: int) -> dict:
    num_edges, hidden_size, vocab_size = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)
    # Logits of standard deviation 4: peaked as a trained model's are.
    hidden = torch.randn(num_edges, hidden_size, generator=g, device=device) * 4 / hidden_size**0.5
    weight = torch.randn(vocab_size, hidden_size, generator=g, device=device)
    targets = torch.randint(0, vocab_size, (num_edges,), generator=g, device=device)
    upstream = torch.randn(num_edges, generator=g, device=device)
    # Whole spans, as responses are.
    upstream[int(fraction * num_edges) :] = 0
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight)]

    def step(contender: Contender) -> tuple[torch.Tensor, ...]:
        out = contender(*tensors, targets)
        return torch.autograd.grad(out, tensors, upstream.to(out.dtype))

    exact = _exact_gradients(tensors, targets, upstream)
    results, runnable = {}, {}
    for name, contender in contenders().items():
        if isinstance(contender, str):
            results[name] = {"problem": contender}
            continue
        try:
            errors = [
                ((a.double() - b).norm() / b.norm()).item()
                for a, b in zip(step(contender), exact, strict=True)
            ]
        except Exception as error:  # out of memory, or an interface that has moved on
            results[name] = {"problem": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        results[name] = {"gradient_errors": errors}
        if max(errors) < TOLERANCE:
            runnable[name] = contender
        else:
            results[name]["problem"] = "too far from float64"
    del exact
    seconds = {name: [] for name in runnable}
    for _ in range(rounds):
        for name, contender in runnable.items():
            seconds[name].append(_seconds(lambda contender=contender: step(contender)))
    # Forward one product; backward recomputes active rows and makes two more of them.
    flops = (2 + 6 * fraction) * num_edges * hidden_size * vocab_size
    for name, times in seconds.items():
        ms = median(times) * 1e3
        results[name] |= {"ms": ms, "tflops": flops / ms / 1e9}
        if device == "cuda":
            results[name]["peak_extra_mb"] = _peak_extra_mb(lambda name=name: step(runnable[name]))
    return {"shape": shape, "fraction": fraction, "dtype": str(dtype), "contenders": results}


def _exact_gradients(
    tensors: list[torch.Tensor], targets: torch.Tensor, upstream: torch.Tensor, rows: int = 512
) -> list[torch.Tensor]:
    """In float64, a few rows at a time, so that the logits of real vocabularies fit."""
    total = [torch.zeros_like(t, dtype=torch.float64) for t in tensors]
    hidden, weight = (t.detach().double().requires_grad_() for t in tensors)
    for start in range(0, len(targets), rows):
        part = torch.arange(start, min(start + rows, len(targets)), device=targets.device)
        out = reference.linear_logprob(hidden, weight, part, targets[part])
        gradients = torch.autograd.grad(out, (hidden, weight), upstream[part].double())
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient
    return total


def _seconds(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_extra_mb(function: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_tflops(size: int = 8192) -> float:
    """What cuBLAS reaches in bfloat16 on a square product: the ceiling of everything above."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [_seconds(lambda: a @ b) for _ in range(20)]
    return 2 * size**3 / median(times[5:]) / 1e12
