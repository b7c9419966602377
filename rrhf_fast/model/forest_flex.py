"""forest_flex: forest attention on CUDA with FlexAttention, which skips blocks that nothing sees.

FlexAttention wants to know of every block of B queries x B keys whether nothing, everything or a
part of it is visible. `create_block_mask` finds out by evaluating all N^2 pairs. A forest needs
only the largest and smallest `subtree_end` of each block of keys. For query block a, key block c:

    something is visible    a == c, or a > c and max end(c) > a * B
    everything is visible   a > c and min end(c) >= (a + 1) * B

The first is exact: a key whose subtree reaches past the block's first row is seen by that row. A
sliding window needs depths, too: the whole block pair is out of the window where
min depth(a) - max depth(c) >= window, and in it where max depth(a) - min depth(c) < window. Some
pairs that no row sees then remain as partial ones, which costs time and changes nothing.

Legend: N tokens in the pack, B rows of a block, M = ceil(N / B) blocks.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rrhf_fast.data.forest import Movable, PackedForest
from rrhf_fast.model.backend import AttentionSpec

# FlexAttention's own default, and a multiple of the tiles of its kernels; `benchmarks/run.py
# attention` times others.
BLOCK_SIZE = 128
# The classification is M x M: at this many tokens, each of its four lists takes 64 MiB.
MAX_TOKENS = 2**19

# Lengths are dynamic, so there is one compilation for each kind of layer, not one a pack.
compiled = torch.compile(flex_attention, dynamic=True)


@dataclass(frozen=True)
class Plan(Movable):
    """The forest itself; block masks are made from it on its device, one a window."""

    subtree_end: torch.Tensor  # [N] int32
    depths: torch.Tensor  # [N] int32
    block_size: int = BLOCK_SIZE
    # Not part of what moves: they belong to one device.
    masks: dict[int | None, BlockMask] = field(default_factory=dict, init=False)

    def mask(self, window: int | None) -> BlockMask:
        """The block mask of layers with this window, made once for all of them."""
        if window not in self.masks:
            self.masks[window] = block_mask(
                self.subtree_end, self.depths, window, block_size=self.block_size
            )
        return self.masks[window]


def plan(pack: PackedForest) -> Plan:
    """Nothing to compute on the host."""
    return Plan(pack.subtree_end, pack.position_ids.to(torch.int32))


def obstacle(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, max_tokens: int
) -> str | None:
    """Why FlexAttention cannot serve, or None. Heads too large for a GPU show in a trial."""
    if device.type != "cuda":
        return f"has no backward on {device.type}"
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
    # Scale and cap are constants: no code can be generated for floats that may change.
    with torch._dynamo.config.patch(specialize_float=True):
        out = compiled(
            query,
            key,
            value,
            score_mod=None if softcap is None else _softcap_mod(softcap),
            block_mask=plan.mask(window),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
    if sinks is not None:
        out, aux = out
        # A sink adds exp(sink) to what the softmax divides by.
        share = torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse.dtype))
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2)


def block_mask(
    subtree_end: torch.Tensor,
    depths: torch.Tensor,
    window: int | None = None,
    *,
    block_size: int = BLOCK_SIZE,
) -> BlockMask:
    """The block mask of a forest, [N] and [N] -> M x M blocks; waits for no device."""
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
    """Largest and smallest of each block: [N] -> [M], [M]. The last block may be short."""
    # Repeating the last value leaves both as they are.
    padding = values[-1:].expand(-len(values) % block_size)
    blocks = torch.cat([values, padding]).view(-1, block_size)
    return blocks.amax(1), blocks.amin(1)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, M] bool -> how many of each row are true [1, 1, M], and all columns, those first [1, 1,
    M, M]; int32."""
    column = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device)
    num_true = blocks.cumsum(-1, dtype=torch.int32)  # up to each column, it included
    counts = num_true[:, -1].contiguous()
    place = torch.where(blocks, num_true - 1, counts[:, None] + column - num_true)
    columns = torch.empty_like(place).scatter_(1, place.long(), column.expand_as(place))
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
