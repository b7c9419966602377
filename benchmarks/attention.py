"""Attention over packed forests against the same responses unpacked, forward and backward,
interleaved; and the tokens/s of a whole decoder on a forest against plain rows.

Every contender gets the same queries, keys, values and upstream gradient, and one tree of what it
computes is checked against float64 before it is timed. A contender that cannot serve here, fails
or is wrong is reported as such and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.head import _peak_extra_mb, _seconds
from rrhf_fast import reference
from rrhf_fast.config import LossConfig
from rrhf_fast.data.forest import Movable, PackedForest, build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.attention import BACKENDS, Forest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.decoder import decode_forest
from rrhf_fast.model.rrhf import RRHFModel

# Tokens of the prompt, tokens of a response, responses.
SHAPES = [(128, 64, 6), (512, 256, 6), (1024, 128, 8), (2048, 512, 8)]
SMALL_SHAPES = [(128, 64, 6), (256, 32, 8)]  # for machines without a GPU
LLAMA_8B = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, value_size=128)
SMALL = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=32, value_size=32)
FLEX_BLOCKS = (128, 256)
# Largest relative error of the output or a gradient, in the norm, against float64.
TOLERANCE = 0.02


def run(*, tokens: int, rounds: int) -> dict:
    """Time all contenders on all shapes in packs of about `tokens`; returns the figures."""
    on_gpu = torch.cuda.is_available()
    cases = []
    for shape in SHAPES if on_gpu else SMALL_SHAPES:
        cases.append(_case(shape, LLAMA_8B if on_gpu else SMALL, tokens, rounds))
        print(cases[-1], flush=True)
    return {
        "cases": cases,
        "decoder": _decoder(SHAPES[1] if on_gpu else SMALL_SHAPES[0], tokens, rounds),
    }


@dataclass
class Contender:
    """One way to compute: its own copies of the inputs, and which rows of the pack they are."""

    attend: Callable[..., torch.Tensor]  # [1, H, n, D] and keys, values -> [n, H, D]
    rows: torch.Tensor  # [n] int64
    tensors: list[torch.Tensor]  # query, key, value
    upstream: torch.Tensor  # [n, H, D]

    def step(self) -> list[torch.Tensor]:
        """Output and gradients."""
        out = self.attend(*self.tensors)
        return [out, *torch.autograd.grad(out, self.tensors, self.upstream)]


def _forest(shape: tuple[int, int, int], tokens: int) -> PackedForest:
    """As many queries of this shape as make about `tokens`."""
    prompt, response, k = shape
    rng = np.random.default_rng(0)

    def query(i: int) -> TokenisedQuery:
        # The first tokens of a query's responses differ: nothing but the prompt is shared.
        ids = rng.integers(k, 30_000, (k, response), dtype=np.int32)
        ids[:, 0] = np.arange(k)
        rewards = np.arange(k, dtype=np.float32)
        return TokenisedQuery(rng.integers(0, 30_000, prompt, dtype=np.int32), list(ids), rewards)

    size = prompt + k * (response - 1)
    return build_forest([query(i) for i in range(max(1, tokens // size))], pad_to_multiple_of=128)


def _response_rows(pack: PackedForest, prompt: int) -> torch.Tensor:
    """[S, P + R - 1] rows of the pack: each response behind its own copy of the prompt."""
    rows = pack.edge_rows[pack.path_edges].view(len(pack.rewards), -1)
    return torch.cat([rows[:, :1] + torch.arange(1 - prompt, 0), rows], dim=1)


def _case(shape: tuple[int, int, int], spec: AttentionSpec, tokens: int, rounds: int) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pack = _forest(shape, tokens)
    unpacked = _response_rows(pack, shape[0])
    g = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        states = torch.randn(1, heads, pack.num_tokens, spec.head_size, generator=g)
        return states.to(device, dtype)

    tensors = [draw(spec.num_heads), draw(spec.num_kv_heads), draw(spec.num_kv_heads)]
    # What padding computes is nobody's business.
    upstream = draw(spec.num_heads)[0].transpose(0, 1).contiguous()
    upstream[unpacked.max() + 1 :] = 0
    exact = _exact_tree(pack, tensors, upstream)

    contenders, results = {}, {}
    for name, backend in BACKENDS.items():
        if problem := backend.obstacle(spec, device, dtype, pack.num_tokens):
            results[name] = {"problem": problem}
            continue
        plan = backend.plan(pack).to(device)
        plans = {name: plan}
        if name == "forest_flex":
            plans = {f"{name}, blocks of {b}": replace(plan, block_size=b) for b in FLEX_BLOCKS}
        every = torch.arange(pack.num_tokens, device=device)
        for label, each in plans.items():
            attend = partial(_attend, backend, each)
            contenders[label] = _contender(attend, every, tensors, upstream)
    contenders["unpacked"] = _contender(
        _unpacked(*unpacked.shape), unpacked.flatten().to(device), tensors, upstream
    )
    runnable = {}
    for name, contender in contenders.items():
        try:
            errors = _errors(contender, exact, pack.num_tokens)
        except Exception as error:  # out of memory, no compiler, an interface that has moved on
            results[name] = {"problem": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        results[name] = {"errors": errors}
        if max(errors) < TOLERANCE:
            runnable[name] = contender
        else:
            results[name]["problem"] = "too far from float64"
    seconds = {name: [] for name in runnable}
    for _ in range(rounds):
        for name, contender in runnable.items():
            seconds[name].append(_seconds(contender.step))
    for name, times in seconds.items():
        results[name]["ms"] = median(times) * 1e3
        if "unpacked" in seconds:
            ratios = [a / b for a, b in zip(seconds["unpacked"], times, strict=True)]
            results[name]["speedup"] = median(ratios)
        if device.type == "cuda":
            results[name]["peak_extra_mb"] = _peak_extra_mb(runnable[name].step)
    return {
        "prompt/response/k": shape,
        "tokens": {"packed": pack.num_tokens, "unpacked": unpacked.numel()},
        "dtype": str(dtype),
        "contenders": results,
    }


def _attend(backend: ModuleType, plan: Movable, q, k, v) -> torch.Tensor:
    return backend.attend(q, k, v, plan)[0]


def _contender(
    attend: Callable, rows: torch.Tensor, tensors: list[torch.Tensor], upstream: torch.Tensor
) -> Contender:
    copies = torch.bincount(rows, minlength=len(upstream)).clamp(min=1)
    share = (upstream / copies[:, None, None]).to(upstream.dtype)
    inputs = [t.index_select(2, rows).requires_grad_() for t in tensors]
    return Contender(attend, rows, inputs, share.index_select(0, rows))


def _unpacked(num_rows: int, length: int) -> Callable:
    """Flash attention of the flash-attn package, else PyTorch's; rows laid end to end. Without a
    GPU, scaled_dot_product_attention on as many rows."""
    if not torch.cuda.is_available():

        def batched(q, k, v):
            q, k, v = (t[0].unflatten(1, (num_rows, length)).transpose(0, 1) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        return batched
    offsets = torch.arange(0, (num_rows + 1) * length, length, dtype=torch.int32, device="cuda")
    lengths = (offsets, offsets, length, length)
    try:
        from flash_attn import flash_attn_varlen_func

        def varlen(q, k, v):
            return flash_attn_varlen_func(q, k, v, *lengths, causal=True)

    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q, k, v):
            return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), enable_gqa=True)

    return lambda q, k, v: varlen(*(t[0].transpose(0, 1) for t in (q, k, v)))


def _exact_tree(
    pack: PackedForest, tensors: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients of the first tree in float64, [n, heads, D] each. A key head at a
    time, so that the scores of a long tree fit."""
    n = int(pack.subtree_end[0])
    end, depths = pack.subtree_end[:n].to(upstream.device), pack.position_ids[:n]
    query, key, value = (t[0, :, :n].double() for t in tensors)
    groups, parts = len(query) // len(key), []
    for head in range(len(key)):
        heads = slice(head * groups, (head + 1) * groups)
        inputs = [query[heads], key[head : head + 1], value[head : head + 1]]
        inputs = [t.clone().requires_grad_() for t in inputs]
        out = reference.forest_attention(*inputs, end, depths.to(upstream.device))
        gradients = torch.autograd.grad(out, inputs, upstream[:n, heads].double())
        parts.append([out.detach(), *(gradient.transpose(0, 1) for gradient in gradients)])
    return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]


def _errors(contender: Contender, exact: list[torch.Tensor], num_rows: int) -> list[float]:
    """Relative errors of the output and the gradients of query, key and value."""
    out, *gradients = contender.step()
    n = len(exact[0])
    first = contender.rows < n
    expected = exact[0].index_select(0, contender.rows[first])
    errors = [_error(out[first], expected)]
    for gradient, expected in zip(gradients, exact[1:], strict=True):
        by_row = gradient[0].transpose(0, 1).double()
        total = by_row.new_zeros(num_rows, *by_row.shape[1:])
        errors.append(_error(total.index_add_(0, contender.rows, by_row)[:n], expected))
    return errors


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def _decoder(shape: tuple[int, int, int], tokens: int, rounds: int) -> dict:
    """Tokens/s of a decoder's forward and backward: a forest, and as many tokens in plain rows of
    the same model, which its own attention computes."""
    on_gpu = torch.cuda.is_available()
    sizes = (
        {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 4}
        | {"num_attention_heads": 32, "num_key_value_heads": 8}
        if on_gpu
        else {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        | {"num_attention_heads": 8, "num_key_value_heads": 2}
    )
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes)).to(device).eval()
    length = shape[0] + shape[1] - 1
    pack = _forest(shape, tokens)
    model = RRHFModel(
        lm,
        LossConfig(),
        max_length=length,
        compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        compile=None,
    )
    pack = replace(pack, plan=model.plan(pack)).to(device)
    rows = torch.randint(0, 30_000, (pack.num_tokens // length, length), device=device)

    def forest() -> None:
        with model.autocast():
            hidden = decode_forest(lm, pack, Forest(model.attention.backend, pack.plan))
        hidden.sum().backward()

    def plain() -> None:
        lm.set_attn_implementation(model.plain_attention)
        with model.autocast():
            hidden = lm.base_model(input_ids=rows, use_cache=False).last_hidden_state
        hidden.sum().backward()
        lm.set_attn_implementation("forest")

    counts = {"forest": pack.num_tokens, "plain rows": rows.numel()}
    ways = {"forest": forest, "plain rows": plain}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # compiles
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            lm.zero_grad()
            seconds[name].append(_seconds(way))
    return {
        "model": sizes,
        "attention": model.attention.name,
        "plain attention": model.plain_attention,
        "compiled": model.compiled,
        "tokens": counts,
        "tokens_per_second": {
            name: counts[name] / median(times) for name, times in seconds.items()
        },
    }
