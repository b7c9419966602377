"""forest_flash: forest attention on CUDA with flash attention over gathered keys.

Varlen flash attention computes chains (see `rrhf_fast.model.chains`): sequences of queries laid end
to end, each with its own keys, causal from the end. A pack's queries are already laid out so; the
keys on a chain's path are gathered. The kernels come from the flash-attn package if installed,
else from PyTorch.

Memory. Gathered keys and values are as long as the unpacked responses. At most `MAX_KEY_ROWS` rows
are gathered at a time (a longer path gets its own call), and again in the backward pass instead of
being kept, so at any time they cost no more than

    forward     rows * H_kv * 2 D * bytes per number
    backward    twice that, and 4 bytes per number to sum one of the gradients in float32

256 MiB and 768 MiB for Llama 3 8B in bfloat16, whatever the pack.

Backward is deterministic under `torch.use_deterministic_algorithms(True)`.

Legend: N tokens in the pack, C chains and K key rows in one call, H heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rrhf_fast.data.forest import Movable, PackedForest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.chains import add_rows, cut_chains, zero_total

MAX_KEY_ROWS = 2**16
MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class Call(Movable):
    """One varlen call: consecutive chains of the pack."""

    start: int  # its queries are rows start ...
    stop: int  # ... to stop of the pack
    max_queries: int  # largest of any chain
    max_keys: int
    query_offsets: torch.Tensor  # [C+1] int32
    key_offsets: torch.Tensor  # [C+1] int32
    key_rows: torch.Tensor  # [K] int64, rows of the pack

    @property
    def layout(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Offsets and lengths, in the order that the kernels take them."""
        return self.query_offsets, self.key_offsets, self.max_queries, self.max_keys


@dataclass(frozen=True)
class Plan(Movable):
    """The calls that cover one pack."""

    calls: tuple[Call, ...]


class Options(NamedTuple):
    """Attention options of one layer."""

    scale: float
    window: int | None
    softcap: float | None


class Kernel(NamedTuple):
    """Varlen attention and its gradient. Queries are [n, H, D], keys and values [K, H_kv, D].

    forward(q, k, v, call, options) -> out [n, H, D], lse [H, n]
    backward(d_out, q, k, v, out, lse, call, options) -> d_q, d_k, d_v
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def plan(pack: PackedForest) -> Plan:
    """Cut a pack into chains and split them, in order, into calls of at most `MAX_KEY_ROWS`."""
    chains = cut_chains(pack)
    num_queries = chains.stops - chains.starts
    num_keys = np.array([len(path) for path in chains.paths])
    calls, first = [], 0
    while first < len(num_keys):
        fitting = int(np.searchsorted(num_keys[first:].cumsum(), MAX_KEY_ROWS, side="right"))
        last = first + max(1, fitting)
        part = slice(first, last)
        calls.append(
            Call(
                start=int(chains.starts[first]),
                stop=int(chains.stops[last - 1]),
                max_queries=int(num_queries[part].max()),
                max_keys=int(num_keys[part].max()),
                query_offsets=_offsets(num_queries[part]),
                key_offsets=_offsets(num_keys[part]),
                key_rows=torch.from_numpy(np.concatenate(chains.paths[part])),
            ).to(pack.input_ids.device)
        )
        first = last
    return Plan(tuple(calls))


def obstacle(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, max_tokens: int
) -> str | None:
    """Why flash attention is unsupported here, or None."""
    if device.type != "cuda":
        return "needs CUDA"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if spec.head_size != spec.value_size:
        return f"needs keys ({spec.head_size}) and values ({spec.value_size}) of equal size"
    if spec.head_size % 8 or spec.head_size > MAX_HEAD_SIZE:
        return f"needs heads of a multiple of 8 up to {MAX_HEAD_SIZE}, not {spec.head_size}"
    if spec.softcap is not None and _flash_attn() is None:
        return "caps scores only with the flash-attn package, 2.7 or newer"
    return None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a packed forest; see `rrhf_fast.model.backend`."""
    options = Options(query.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    rows_first = (states[0].transpose(0, 1) for states in (query, key, value))
    return _ChainAttention.apply(*rows_first, sinks, plan, kernel(), options).unsqueeze(0)


class _ChainAttention(torch.autograd.Function):
    """Gathers keys and calls the kernel, in the forward and again in the backward pass.

    A sink is a softmax column whose value is 0. Given an output and log-sum-exp that include that
    column, the kernel's backward needs no change.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, plan: Plan, kernel: Kernel, options: Options):
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        lse = q.new_empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
        for call in plan.calls:
            rows = slice(call.start, call.stop)
            keys, values = (states.index_select(0, call.key_rows) for states in (k, v))
            out[rows], lse[:, rows] = kernel.forward(q[rows], keys, values, call, options)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
            out *= torch.exp(lse - total).T.unsqueeze(-1).to(out.dtype)
            lse = total
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.kernel, ctx.options = plan, kernel, options
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        d_q = torch.empty_like(q)
        d_k, d_v = zero_total(len(k), k), zero_total(len(v), v)
        for call in ctx.plan.calls:
            rows = slice(call.start, call.stop)
            keys, values = (states.index_select(0, call.key_rows) for states in (k, v))
            saved = out[rows], lse[:, rows].contiguous()
            d_q[rows], d_keys, d_values = ctx.kernel.backward(
                d_out[rows], q[rows], keys, values, *saved, call, ctx.options
            )
            add_rows(d_k, call.key_rows, d_keys)
            add_rows(d_v, call.key_rows, d_values)
        d_sinks = None
        if sinks is not None:
            delta = (d_out.to(lse.dtype) * out).sum(-1).T  # [H, N]
            share = torch.exp(sinks[:, None].to(lse.dtype) - lse)
            d_sinks = -(share * delta).sum(1).to(sinks.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None, None


def kernel() -> Kernel:
    """The flash-attn package's, else PyTorch's."""
    return _TORCH if _flash_attn() is None else _FLASH_ATTN


def _window_left(options: Options) -> int:
    """Number of keys before its own that a query sees; -1 is all."""
    return -1 if options.window is None else options.window - 1


def _torch_forward(q, k, v, call: Call, options: Options):
    assert options.softcap is None
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *call.layout,
        0.0,  # dropout
        True,  # causal
        False,  # no debug mask
        scale=options.scale,
        window_size_left=_window_left(options),
        window_size_right=0,
    )
    return out, lse


def _torch_backward(d_out, q, k, v, out, lse, call: Call, options: Options):
    # State of the dropout generator, unused here.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        d_out.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        *call.layout,
        0.0,  # dropout
        True,  # causal
        rng_state,
        torch.empty(0, device=q.device),
        scale=options.scale,
        window_size_left=_window_left(options),
        window_size_right=0,
    )


_TORCH = Kernel(_torch_forward, _torch_backward)


def _flash_attn():
    """The interface module of flash-attn 2.7 or newer, or None. Older versions do not name the
    window's two sides as arguments."""
    try:
        from flash_attn import __version__, flash_attn_interface
    except ImportError:
        return None
    return flash_attn_interface if tuple(map(int, __version__.split(".")[:2])) >= (2, 7) else None


def _flash_attn_options(options: Options) -> dict:
    return {
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": True,
        "window_size_left": _window_left(options),
        "window_size_right": 0,
        "softcap": options.softcap or 0.0,
        "alibi_slopes": None,
    }


def _flash_attn_forward(q, k, v, call: Call, options: Options):
    out, lse, *_ = _flash_attn()._flash_attn_varlen_forward(
        q, k, v, *call.layout, **_flash_attn_options(options)
    )
    return out, lse


def _flash_attn_backward(d_out, q, k, v, out, lse, call: Call, options: Options):
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn()._flash_attn_varlen_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        *call.layout,
        **_flash_attn_options(options),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return gradients


_FLASH_ATTN = Kernel(_flash_attn_forward, _flash_attn_backward)


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32))
