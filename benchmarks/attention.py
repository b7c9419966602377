"""Attention over packed forests against the same responses unpacked, forward and backward,
interleaved; and the tokens/s of a whole decoder on a forest against plain rows.

Every contender gets the same queries, keys, values and upstream gradient, and one tree of what it
computes is checked against float64 before it is timed. A contender that cannot serve here, fails
or is wrong is reported as such and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plots import grouped_bars
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, peak_extra_mb, ratio
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
TOKENS = {"smoke": 2_048, "paper": 16_384, "full": 65_536}  # of a pack, about
# Largest relative error of the output or a gradient, in the norm, against float64.
TOLERANCE = 0.02


def run(*, preset: str, device: str, rounds: int) -> dict:
    """Time all contenders on all shapes in packs of the preset's size; returns the figures."""
    on_gpu, tokens = device == "cuda", TOKENS[preset]
    spec = LLAMA_8B if on_gpu else SMALL
    cases = [
        _case(shape, spec, tokens, device, rounds) for shape in (SHAPES if on_gpu else SMALL_SHAPES)
    ]
    decoder = _decoder(SHAPES[1] if on_gpu else SMALL_SHAPES[0], tokens, device, rounds)
    return {"cases": cases, "decoder": decoder}


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


def _case(
    shape: tuple[int, int, int], spec: AttentionSpec, tokens: int, device_name: str, rounds: int
) -> dict:
    device = torch.device(device_name)
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
        _unpacked(*unpacked.shape, device_name), unpacked.flatten().to(device), tensors, upstream
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
    seconds = interleaved({name: c.step for name, c in runnable.items()}, rounds)
    for name, times in seconds.items():
        results[name]["ms"] = median(times) * 1e3
        if "unpacked" in seconds:
            results[name]["speedup"] = ratio(seconds["unpacked"], times)["median"]
        if device.type == "cuda":
            results[name]["peak_extra_mb"] = peak_extra_mb(runnable[name].step)
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


def _unpacked(num_rows: int, length: int, device: str) -> Callable:
    """Flash attention of the flash-attn package, else PyTorch's; rows laid end to end. Without a
    GPU, scaled_dot_product_attention on as many rows."""
    if device == "cpu":

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


def _decoder(shape: tuple[int, int, int], tokens: int, device: str, rounds: int) -> dict:
    """Tokens/s of a decoder's forward and backward: a forest, and as many tokens in plain rows of
    the same model, which its own attention computes."""
    on_gpu = device == "cuda"
    sizes = (
        {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 4}
        | {"num_attention_heads": 32, "num_key_value_heads": 8}
        if on_gpu
        else {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        | {"num_attention_heads": 8, "num_key_value_heads": 2}
    )
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
    for way in ways.values():  # compiles
        way()
    seconds = interleaved(ways, rounds, before=lm.zero_grad)
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


def table(figures: dict) -> str:
    """Milliseconds forward and backward, and times as fast as the same responses unpacked."""
    parts = []
    for case in figures["cases"]:
        rows = [
            [name, f"{r['ms']:.1f}", f"{r['speedup']:.2f}"]
            if "ms" in r
            else [name, "-", r["problem"][:60]]
            for name, r in case["contenders"].items()
        ]
        parts.append(text_table([_label(case), "ms", "times as fast as unpacked"], rows))
    speeds = figures["decoder"]["tokens_per_second"]
    rows = [[name, f"{speed:,.0f}"] for name, speed in speeds.items()]
    parts.append(text_table(["a decoder on", "tokens/s"], rows))
    return "\n\n".join(parts)


def plot(figures: dict, path: Path) -> None:
    """Milliseconds by shape."""
    cases = figures["cases"]
    names = dict.fromkeys(
        name for case in cases for name, r in case["contenders"].items() if "ms" in r
    )
    heights = {name: [c["contenders"].get(name, {}).get("ms") for c in cases] for name in names}
    panels = [("attention over a pack", list(map(_label, cases)), heights)]
    grouped_bars(panels, path, ylabel="ms, forward and backward")


def _label(case: dict) -> str:
    prompt, response, k = case["prompt/response/k"]
    return f"{prompt}/{response} tokens, k = {k}"
