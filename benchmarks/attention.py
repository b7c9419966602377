"""Attention over packed forests against the same responses unpacked, forward and backward,
interleaved; and the tokens/s of a whole decoder on a forest against plain rows.

Every contender gets the same queries, keys, values and upstream gradient, and its results for one
tree are checked against float64 before it is timed. A contender that is unsupported here, fails or
is wrong is reported as such and left out.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import compute_dtype
from benchmarks.plots import grouped_bars
from benchmarks.results import Save, judge, no_save, recorded
from benchmarks.tables import cell, text_table
from benchmarks.timing import interleaved, peak_extra_mb, ratio
from rrhf_fast import reference
from rrhf_fast.data.forest import Movable, PackedForest, build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import forest_flex
from rrhf_fast.model.attention import BACKENDS, Forest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.decoder import decode_forest
from rrhf_fast.model.rrhf import RRHFModel

# Tokens of the prompt, tokens per response, responses.
SHAPES = [(128, 64, 6), (512, 256, 6), (1024, 128, 8), (2048, 512, 8)]
SMALL_SHAPES = [(128, 64, 6), (256, 32, 8)]  # for machines without a GPU
LLAMA_8B = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, value_size=128)
SMALL = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=32, value_size=32)
# By name: the block size of a plan, and options that replace ours for FlexAttention's kernels.
FLEX = {
    "forest_flex": (128, {}),
    "forest_flex, blocks of 256": (256, {}),
    "forest_flex, lengths masked": (128, {"IS_DIVISIBLE": False}),
}
UNPACKED = "unpacked"
TOKENS = {"smoke": 2_048, "paper": 16_384, "full": 65_536}  # per pack, approximately
# Largest relative error (norm) of the output or a gradient, against float64.
TOLERANCE = 0.02


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    tokens: int | None = None,
    only: Sequence[str] | None = None,
    whole: bool = False,
    decoder: bool = True,
    save: Save = no_save,
) -> dict:
    """Time all contenders on all shapes in packs of the preset's size; return the figures.

    Args:
        rounds: of timing; 0 only checks.
        shapes, tokens: (prompt, response, k) and tokens per pack, instead of the preset's.
        only: names of contenders, instead of all.
        whole: check every row of the pack, not only the first tree. Needs N^2 scores in float64.
        decoder: also time a decoder.
    """
    on_gpu = device == "cuda"
    spec, default = (LLAMA_8B, SHAPES) if on_gpu else (SMALL, SMALL_SHAPES)
    tokens = tokens or TOKENS[preset]
    figures: dict = {"cases": []}
    for shape in shapes or default:
        case = {"prompt/response/k": shape, "contenders": {}}
        figures["cases"].append(case)
        with recorded(case):
            _measure(case, spec, tokens, device, rounds, only, whole, partial(save, figures))
        save(figures)
    if decoder:
        figures["decoder"] = {}
        with recorded(figures["decoder"]):
            figures["decoder"] |= _decoder(default[1 if on_gpu else 0], tokens, device, rounds)
        save(figures)
    return figures


@dataclass
class Contender:
    """One implementation, with its own copies of the inputs and their rows in the pack."""

    attend: Callable[..., torch.Tensor]  # [1, H, n, D] and keys, values -> [n, H, D]
    rows: torch.Tensor  # [n] int64
    tensors: list[torch.Tensor]  # query, key, value
    upstream: torch.Tensor  # [n, H, D]

    def step(self) -> list[torch.Tensor]:
        """Compute output and gradients."""
        out = self.attend(*self.tensors)
        return [out, *torch.autograd.grad(out, self.tensors, self.upstream)]


def _forest(shape: tuple[int, int, int], tokens: int) -> PackedForest:
    """Queries of this shape, about `tokens` tokens in total."""
    prompt, response, k = shape
    rng = np.random.default_rng(0)

    def query(i: int) -> TokenisedQuery:
        # The first tokens of a query's responses differ: only the prompt is shared.
        ids = rng.integers(k, 30_000, (k, response), dtype=np.int32)
        ids[:, 0] = np.arange(k)
        rewards = np.arange(k, dtype=np.float32)
        return TokenisedQuery(rng.integers(0, 30_000, prompt, dtype=np.int32), list(ids), rewards)

    size = prompt + k * (response - 1)
    return build_forest([query(i) for i in range(max(1, tokens // size))], pad_to_multiple_of=128)


def _response_rows(pack: PackedForest, prompt: int) -> torch.Tensor:
    """[S, P + R - 1] rows of the pack: each response after its own copy of the prompt."""
    rows = pack.edge_rows[pack.path_edges].view(len(pack.rewards), -1)
    return torch.cat([rows[:, :1] + torch.arange(1 - prompt, 0), rows], dim=1)


def _measure(
    case: dict,
    spec: AttentionSpec,
    tokens: int,
    device_name: str,
    rounds: int,
    only: Sequence[str] | None,
    whole: bool,
    save: Callable[[], None],
) -> None:
    """Check every contender, then time the correct ones; results are added to `case`."""
    device, dtype, results = (
        torch.device(device_name),
        compute_dtype(device_name),
        case["contenders"],
    )
    pack = _forest(case["prompt/response/k"], tokens)
    unpacked = _response_rows(pack, case["prompt/response/k"][0])
    case["tokens"] = {"packed": pack.num_tokens, "unpacked": unpacked.numel()}
    case["dtype"] = str(dtype)
    g = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        states = torch.randn(1, heads, pack.num_tokens, spec.head_size, generator=g)
        return states.to(device, dtype)

    tensors = [draw(spec.num_heads), draw(spec.num_kv_heads), draw(spec.num_kv_heads)]
    # Results for padding are ignored.
    upstream = draw(spec.num_heads)[0].transpose(0, 1).contiguous()
    upstream[unpacked.max() + 1 :] = 0
    exact = _exact(pack, tensors, upstream, pack.num_tokens if whole else int(pack.subtree_end[0]))
    every, runnable = torch.arange(pack.num_tokens, device=device), {}
    for name, make in _ways(pack, unpacked, spec, device, dtype).items():
        if only is not None and name not in only:
            continue
        results[name] = {"problem": make} if isinstance(make, str) else {}
        if "problem" not in results[name]:
            with recorded(results[name]):
                rows = unpacked.flatten().to(device) if name == UNPACKED else every
                contender = _contender(make(), rows, tensors, upstream)
                results[name]["errors"] = _errors(contender, exact, pack.num_tokens)
                judge(results[name], results[name]["errors"], TOLERANCE)
        if "problem" not in results[name]:
            runnable[name] = contender
        save()
    if rounds == 0:
        return
    steps = {name: contender.step for name, contender in runnable.items()}
    seconds = interleaved(steps, rounds, device=device.type, results=results, record=case)
    for name, times in seconds.items():
        results[name]["ms"] = median(times) * 1e3
        if UNPACKED in seconds:
            results[name]["speedup"] = ratio(seconds[UNPACKED], times)["median"]
        if device.type == "cuda":
            results[name]["peak_extra_mb"] = peak_extra_mb(runnable[name].step)


def _ways(
    pack: PackedForest,
    unpacked: torch.Tensor,
    spec: AttentionSpec,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Callable[[], Callable] | str]:
    """By name: a factory of a function ([1, H, n, D] and keys, values) -> [n, H, D], or why there
    is none."""
    ways: dict[str, Callable[[], Callable] | str] = {}
    for name, backend in BACKENDS.items():
        if problem := backend.obstacle(spec, device, dtype, pack.num_tokens):
            ways[name] = problem
        elif name == "forest_flex":
            for label, options in FLEX.items():
                ways[label] = partial(_flex, pack, device, *options)
        else:
            ways[name] = partial(_backend, backend, pack, device)
    return ways | {UNPACKED: partial(_unpacked, *unpacked.shape, device.type)}


def _backend(backend: ModuleType, pack: PackedForest, device: torch.device) -> Callable:
    return partial(_attend, backend, backend.plan(pack).to(device))


def _flex(pack: PackedForest, device: torch.device, block_size: int, options: dict) -> Callable:
    plan = replace(forest_flex.plan(pack), block_size=block_size).to(device)

    def attend(q, k, v):
        with _kernel_options(options):
            return _attend(forest_flex, plan, q, k, v)

    return attend if options else partial(_attend, forest_flex, plan)


@contextmanager
def _kernel_options(changes: dict) -> Iterator[None]:
    """Inside, forest_flex's options for FlexAttention are changed by these."""
    own = forest_flex.kernel_options
    forest_flex.kernel_options = lambda *arguments: own(*arguments) | changes
    try:
        yield
    finally:
        forest_flex.kernel_options = own


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
    """Flash attention from the flash-attn package, else PyTorch's, on rows laid end to end. Without
    a GPU, scaled_dot_product_attention on a batch of the rows."""
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

        options = {"window_size": (-1, 0), **gqa_option(varlen_attn)}

        def varlen(q, k, v):
            return varlen_attn(q, k, v, *lengths, **options)

    return lambda q, k, v: varlen(*(t[0].transpose(0, 1) for t in (q, k, v)))


def gqa_option(varlen_attn: Callable) -> dict[str, bool]:
    """PyTorch 2.13 must be told of fewer key heads; 2.11 detects them and has no such argument."""
    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if known else {}


def _exact(
    pack: PackedForest, tensors: list[torch.Tensor], upstream: torch.Tensor, n: int
) -> list[torch.Tensor]:
    """Output and gradients of the first n rows (whole trees) in float64, [n, heads, D] each. One
    key head at a time, so that the scores of many rows fit."""
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
    """Tokens/s of a decoder's forward and backward on a forest, and on as many tokens in plain rows
    with the model's own attention."""
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
    record: dict = {}
    seconds = interleaved(ways, rounds, device=device, before=lm.zero_grad, record=record)
    return record | {
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
    """Milliseconds forward and backward, and the speed relative to unpacked responses."""
    parts = []
    for case in figures["cases"]:
        rows = []
        for name, result in case["contenders"].items():
            text = cell({"problem": "right, not timed"} | result, "ms", ".1f")
            rows.append([name, text, cell({"problem": ""} | result, "speedup", ".2f")])
            if "problem" in result:
                rows[-1][1:] = ["-", result["problem"][:60]]
        if "problem" in case:
            rows.append(["", "-", case["problem"][:60]])
        parts.append(text_table([_label(case), "ms", "times as fast as unpacked"], rows))
    decoder = figures.get("decoder", {})
    rows = [[name, f"{s:,.0f}"] for name, s in decoder.get("tokens_per_second", {}).items()]
    if "problem" in decoder:
        rows = [["", decoder["problem"][:60]]]
    if rows:
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
