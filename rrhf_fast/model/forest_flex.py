"""forest_flex: forest attention on CUDA with FlexAttention, which skips invisible blocks.

FlexAttention needs to know whether each block of B queries x B keys is fully, partly or not at all
visible. `create_block_mask` evaluates all N^2 pairs for that. A forest needs only the largest and
smallest `subtree_end` of each block of keys. For query block a, key block c:

    something is visible    a == c, or a > c and max end(c) > a * B
    everything is visible   a > c and min end(c) >= (a + 1) * B

The first is exact: a key whose subtree extends past the block's first row is seen by that row. A
sliding window also needs depths: a block pair lies outside the window if min depth(a) - max
depth(c) >= window, and inside if max depth(a) - min depth(c) < window. Some invisible pairs then
remain marked as partial, which costs time but does not change results.

Legend: N tokens in the pack, B rows per block, M = ceil(N / B) blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rrhf_fast.data.forest import Movable, PackedForest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.layers import RECOMPILE_LIMIT

# FlexAttention's default, a multiple of its kernels' tiles; `benchmarks/run.py attention` times
# others.
BLOCK_SIZE = 128
# The classification is M x M: at this many tokens, each of its four lists takes 64 MiB.
MAX_TOKENS = 2**19

# Consumer cards: 99 KB per program, where others have 163 and 227.
SMALL_SHARED_MEMORY = (86, 89, 120)
# Fewest columns of a tl.dot tile, and therefore of a head.
MIN_HEAD_SIZE = 16


@dataclass(frozen=True)
class Plan(Movable):
    """The forest itself; block masks are made from it on its device, one per window."""

    subtree_end: torch.Tensor  # [N] int32
    depths: torch.Tensor  # [N] int32
    block_size: int = BLOCK_SIZE
    # Not moved with the plan: they belong to one device.
    masks: dict[int | None, BlockMask] = field(default_factory=dict, init=False)

    def mask(self, window: int | None) -> BlockMask:
        """The block mask for this window, made once for all layers."""
        if window not in self.masks:
            self.masks[window] = block_mask(
                self.subtree_end, self.depths, window, block_size=self.block_size
            )
        return self.masks[window]


def compiled(*tensors: torch.Tensor, **options):
    """FlexAttention, compiled. Not at import, since that loads the compiler."""
    return _compile()(*tensors, **options)


@cache
def _compile() -> Callable:
    # Lengths are dynamic: one compilation per kind of layer, not per pack. fullgraph: a failure to
    # compile is an error, because PyTorch would compute all N x N scores instead.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def plan(pack: PackedForest) -> Plan:
    """Wrap the pack's tensors; nothing is computed on the host."""
    return Plan(pack.subtree_end, pack.position_ids.to(torch.int32))


def obstacle(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, max_tokens: int
) -> str | None:
    """Why FlexAttention is unsupported here, or None. Heads too large for a GPU fail the trial."""
    if device.type != "cuda":
        return f"has no backward on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        # In float32 on sm_90, head sizes 192/128 need 279,296 of 232,448 bytes of shared memory;
        # 80, 96 and 128 spill more than 15,000 instructions.
        return f"takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if min(spec.head_size, spec.value_size) < MIN_HEAD_SIZE:
        return f"takes heads of {MIN_HEAD_SIZE} numbers or more"
    if max_tokens > MAX_TOKENS:
        return f"packs of {max_tokens} tokens exceed its {MAX_TOKENS}"
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
    options = {
        "score_mod": None if softcap is None else _softcap_mod(softcap),
        "block_mask": plan.mask(window),
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": kernel_options(
            query.shape[2], max(query.shape[3], value.shape[3]), capability(query.device)
        ),
        "return_aux": None if sinks is None else AuxRequest(lse=True),
    }
    # Scale and cap are constants: inductor cannot generate code for dynamic floats here.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=RECOMPILE_LIMIT):
        try:
            out = compiled(query, key, value, **options)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            problem = f"the layers are of more than {RECOMPILE_LIMIT} kinds"
            others = "use forest_flash or forest_sdpa, which compile nothing"
            raise RuntimeError(f"attn_implementation: forest_flex: {problem}; {others}") from error
    if sinks is not None:
        out, aux = out
        # A sink adds exp(sink) to the softmax's denominator.
        share = torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse.dtype))
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2)


def kernel_options(num_tokens: int, head_size: int, capability: int) -> dict[str, Any]:
    """Kernel options for packs of N tokens on a device of this compute capability (90 for 9.0):
    facts that FlexAttention cannot infer, and tiles to replace its defaults where those spill
    registers or do not fit (see `rrhf_fast.kernels.report`)."""
    options = {
        # Below 128 tokens it would select a decoding kernel, which is made for other shapes than
        # packs have and supports only some numbers of heads.
        "BACKEND": "TRITON",
        # Packs are multiples of the block, so no load needs a mask. FlexAttention cannot infer
        # this, because lengths are dynamic.
        "IS_DIVISIBLE": num_tokens % BLOCK_SIZE == 0,
        # With fewer warps up to 17,443 instructions spill, with 8 at most 560.
        "bwd_num_warps": 8,
    }
    if capability >= 100:
        options["fwd_num_warps"] = 8
    if head_size > 128 and capability in SMALL_SHARED_MEMORY:
        options |= {"fwd_num_stages": 1, "bwd_num_stages": 1}
        options |= {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 16}
    return options


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; without a GPU, 80."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def block_mask(
    subtree_end: torch.Tensor,
    depths: torch.Tensor,
    window: int | None = None,
    *,
    block_size: int = BLOCK_SIZE,
) -> BlockMask:
    """The block mask of a forest, [N] and [N] -> M x M blocks; does not synchronise."""
    num_rows = len(subtree_end)
    max_end, min_end = _block_extremes(subtree_end, block_size)
    block = torch.arange(len(max_end), dtype=torch.int32, device=subtree_end.device)
    queries = block[:, None]
    is_below = queries > block
    live = (is_below & (max_end > queries * block_size)) | (queries == block)
    full = is_below & (min_end >= (queries + 1) * block_size)
    if window is not None:
        max_depth, min_depth = _block_extremes(depths, block_size)
        live &= min_depth[:, None] - max_depth < window
        full &= max_depth[:, None] - min_depth < window
    partial = live & ~full
    # The kernels assume unit stride for every list, so each must be contiguous.
    return BlockMask(
        (num_rows, num_rows),
        *_ordered(partial),
        *_ordered(full),
        *_ordered(partial.T),
        *_ordered(full.T),
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=_mask_mod(subtree_end, depths, window),
    )


def _block_extremes(values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and minimum of each block: [N] -> [M], [M]. The last block may be short."""
    # Repeating the last value changes neither.
    padding = values[-1:].expand(-len(values) % block_size)
    blocks = torch.cat([values, padding]).view(-1, block_size)
    return blocks.amax(1), blocks.amin(1)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, M] bool -> number of true columns per row [1, 1, M], and all columns [1, 1, M, M], the
    true ones first; int32."""
    column = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device)
    num_true = blocks.cumsum(-1, dtype=torch.int32)  # up to and including each column
    counts = num_true[:, -1].contiguous()
    place = torch.where(blocks, num_true - 1, counts[:, None] + column - num_true)
    # Not empty_like, which would copy the strides of a transposed `blocks`.
    columns = torch.empty(place.shape, dtype=place.dtype, device=place.device)
    columns.scatter_(1, place.long(), column.expand_as(place))
    return counts[None, None], columns[None, None]


def _mask_mod(subtree_end: torch.Tensor, depths: torch.Tensor, window: int | None):
    def forest(b, h, i, j):
        return (j <= i) & (i < subtree_end[j])

    def forest_in_window(b, h, i, j):
        return forest(b, h, i, j) & (depths[i] - depths[j] < window)

    return forest if window is None else forest_in_window


def _softcap_mod(softcap: float):
    def capped(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    return capped
