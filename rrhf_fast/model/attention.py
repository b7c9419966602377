"""Forest attention inside Hugging Face decoders: the function they call, and the choice of the
backend that computes it.

`choose_backend` decides once, at start-up, from what the decoder's layers requested in the
self-check. Backends are tried on the device first, so that none fails in mid-run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from rrhf_fast import reference
from rrhf_fast.data.checks import one_line
from rrhf_fast.data.forest import Movable, build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import forest_flash, forest_flex, forest_sdpa
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.spans import span

# In the order in which "auto" tries them. FlexAttention first: it reads keys in place and sums
# their gradients in float32.
BACKENDS: dict[str, ModuleType] = {
    "forest_flex": forest_flex,
    "forest_flash": forest_flash,
    "forest_sdpa": forest_sdpa,
}
# The name registered with transformers. It must not contain "sdpa" or "flash": transformers takes
# such names for its own and checks that the model supports them.
FOREST = "forest"
# Largest relative error (norm) of a trial, by dtype: about ten times the rounding error.
TRIAL_TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass
class Forest:
    """Passed to every layer as the keyword argument `forest`, for one forward pass."""

    backend: ModuleType
    plan: Movable
    # What each attention call so far requested; read by the self-check.
    specs: list[AttentionSpec] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """The chosen backend, and why."""

    name: str
    reason: str
    warning: str | None = None  # preferred backends that failed

    @property
    def backend(self) -> ModuleType:
        """The backend's module."""
        return BACKENDS[self.name]


def choose_backend(
    requested: str,
    specs: Sequence[AttentionSpec],
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int = 0,
) -> Choice:
    """The requested backend, or for "auto" the first that supports every layer and passes a trial.

    Args:
        requested: a name in `BACKENDS`, or "auto".
        specs: what the decoder's layers request.
        device: where they run.
        dtype: what they compute in.
        max_tokens: tokens in the largest pack, 0 if unknown.

    Raises:
        ValueError: the requested backend lacks support or fails its trial; the message says why.
    """
    distinct = list(dict.fromkeys(specs))
    skipped, failed = [], []
    for name in BACKENDS if requested == "auto" else [requested]:
        obstacles = (BACKENDS[name].obstacle(spec, device, dtype, max_tokens) for spec in distinct)
        problem = next((text for text in obstacles if text is not None), None)
        if problem is None:
            try:
                # The self-check has already tried forest_sdpa.
                for spec in distinct if name != "forest_sdpa" else []:
                    try_backend(BACKENDS[name], spec, device, dtype)
            except Exception as error:  # compilers and drivers raise any type
                problem = f"failed at start-up ({type(error).__name__}: {one_line(error)})"
                failed.append(f"{name} {problem}")
        if problem is None:
            reason = "; ".join(skipped) or "first choice"
            warning = "; ".join(failed) or None
            return Choice(name, "as asked" if requested != "auto" else reason, warning)
        if name == requested:
            raise ValueError(f"attn_implementation: {name} {problem}; auto finds one that works")
        skipped.append(f"{name} {problem}")
    raise AssertionError(f"no backend is left: {skipped}")  # forest_sdpa supports everything


def try_backend(
    backend: ModuleType, spec: AttentionSpec, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare forward and backward of a small forest with a float64 reference.

    Raises:
        ArithmeticError: they differ by more than rounding.
    """
    pack = _trial_pack()
    plan = backend.plan(pack).to(device)
    pack = pack.to(device)
    if spec.window is not None:  # the trial's rows are shorter than a real window
        spec = replace(spec, window=min(spec.window, 50))
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype).requires_grad_()

    def heads(count: int, size: int) -> torch.Tensor:
        # The memory layout of a decoder's projections, so that training reuses the trial's graph.
        return draw(1, n, count, size).transpose(1, 2).detach().requires_grad_()

    n = pack.num_tokens
    tensors = [
        heads(spec.num_heads, spec.head_size),
        heads(spec.num_kv_heads, spec.head_size),
        heads(spec.num_kv_heads, spec.value_size),
    ]
    upstream = torch.randn(1, n, spec.num_heads, spec.value_size, generator=g).to(device)
    options = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
    if spec.has_sinks:
        tensors.append(draw(spec.num_heads))
    sinks = tensors[3] if spec.has_sinks else None
    with torch.enable_grad():
        out = backend.attend(*tensors[:3], plan, sinks=sinks, **options)
        results = [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]
        exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
        q, k, v = (t[0] for t in exact_tensors[:3])
        sinks = exact_tensors[3] if spec.has_sinks else None
        out = reference.forest_attention(
            q, k, v, pack.subtree_end, pack.position_ids, sinks=sinks, **options
        )
        exact = [out[None], *torch.autograd.grad(out, exact_tensors, upstream[0].double())]
    for a, b in zip(results, exact, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        if not error <= TRIAL_TOLERANCES.get(dtype, 1e-3):
            raise ArithmeticError(f"a trial is {error:.2g} away from float64")


def _trial_pack():
    """A forest of 7 blocks: compilers specialise on coinciding sizes, and no decoder has 7 heads.
    Below 128 tokens FlexAttention would select another kernel."""
    rng = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return rng.integers(0, 100, length, dtype=np.int32)

    begin = draw(50)
    shared = [np.append(begin, draw(n)) for n in (130, 7, 161)]
    cases = [(140, [*shared, draw(65)]), (9, [draw(150), draw(3)]), (90, [draw(2)])]
    return build_forest(
        [TokenisedQuery(draw(p), ids, np.zeros(len(ids), np.float32)) for p, ids in cases],
        pad_to_multiple_of=128,
    )


class NoForest(RuntimeError):
    """Forest attention was called without a forest: by a decoder that drops the argument, which the
    self-check refuses, or by a plain forward of a model that `RRHFModel` has set up."""


# A graph break: plans are Python objects that differ from pack to pack.
@torch.compiler.disable
def _forest_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    forest: Forest | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Called by transformers in every layer: [1, H, N, D] -> [1, N, H, D_v]."""
    if forest is None:
        raise NoForest(
            "the attention of this model is set to packed forests, which only RRHFModel runs "
            "(model.set_attn_implementation('sdpa') makes it a plain model again)"
        )
    forest.specs.append(
        AttentionSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_size=query.shape[3],
            value_size=value.shape[3],
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            has_sinks=s_aux is not None,
        )
    )
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # RoPE returns float32 queries and keys, and autocast has no rule for our kernels.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # torch.compile keeps graphs per autocast state; trials run without autocast.
    with torch.autocast(device_type, enabled=False), span("attention"):
        out = forest.backend.attend(
            query,
            key,
            value,
            forest.plan,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
    return out, None


# Without a mask function of this name transformers builds no mask; the forest itself is ours.
AttentionInterface.register(FOREST, _forest_attention)
