"""The part of a packed forest that has a gradient.

A correctly ranked response gets no gradient, and neither do its tokens at any layer of the decoder,
because only its own later tokens attend to them. Once the scores are known, forward and backward
need only the paths that lead to a prediction with a gradient:

    kept(row j)  <=>  an edge with a weight is predicted by a row of j's subtree, j included

A subtree is a contiguous range of rows, so differences of running counts give both the rows to keep
and their new places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rrhf_fast.data.forest import Movable, PackedForest


@dataclass(frozen=True)
class WeightedForest(Movable):
    """Tokens in depth-first order, as in `PackedForest`, with the loss sum_e weight_e logp_e."""

    input_ids: torch.Tensor  # [N] int64
    position_ids: torch.Tensor  # [N] int64
    subtree_end: torch.Tensor  # [N] int32
    edge_rows: torch.Tensor  # [E] int64
    edge_targets: torch.Tensor  # [E] int64
    edge_weights: torch.Tensor  # [E] float32 or better, d loss / d logp
    plan: Movable | None = None  # as in `PackedForest`

    @property
    def num_tokens(self) -> int:
        """N, padding included."""
        return len(self.input_ids)


def kept_rows(pack: PackedForest, is_active: torch.Tensor) -> torch.Tensor:
    """[N] bool, the rows on a path to an edge in `is_active` [E]. Waits for no device."""
    before = is_active.new_zeros(len(pack.input_ids) + 1, dtype=torch.int64)
    before.index_add_(0, pack.edge_rows + 1, is_active.long())
    before = before.cumsum(0)  # active edges predicted by rows before row j
    return before[pack.subtree_end.long()] > before[:-1]


def active_part(pack: PackedForest, weights: torch.Tensor) -> WeightedForest:
    """The rows of `pack` that lead to an edge whose weight [E] (d loss / d logp) is not 0."""
    active = weights.nonzero().squeeze(1)
    kept = kept_rows(pack, weights != 0)
    place = torch.nn.functional.pad(kept.cumsum(0), (1, 0))  # kept rows before row j
    return WeightedForest(
        input_ids=pack.input_ids[kept],
        position_ids=pack.position_ids[kept],
        subtree_end=place[pack.subtree_end[kept].long()].int(),
        edge_rows=place[pack.edge_rows[active]],
        edge_targets=pack.edge_targets[active],
        edge_weights=weights[active],
    )


def without_weight(pack: PackedForest) -> WeightedForest:
    """One token of `pack` with a gradient of 0, for a rank that has nothing to do."""
    one = torch.zeros(1, dtype=torch.int64, device=pack.input_ids.device)
    return WeightedForest(
        input_ids=pack.input_ids[:1],
        position_ids=one,
        subtree_end=one.int() + 1,
        edge_rows=one,
        edge_targets=one,
        edge_weights=one.float(),
    )


def join(
    parts: Sequence[WeightedForest],
    *,
    max_tokens: int,
    pad_to_multiple_of: int = 1,
    plan: Callable[[WeightedForest], Movable] | None = None,
) -> list[WeightedForest]:
    """Concatenate the forests into as few packs of `max_tokens` as their order allows. A larger one
    gets a pack of its own, one without tokens is dropped. Padding and plan as in `build_forest`."""
    packs: list[list[WeightedForest]] = []
    room = 0
    for part in parts:
        if part.num_tokens == 0:
            continue
        if not packs or part.num_tokens > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(part)
        room -= part.num_tokens
    joined = (_concatenate(pack, pad_to_multiple_of) for pack in packs)
    return [pack if plan is None else replace(pack, plan=plan(pack)) for pack in joined]


def _concatenate(parts: Sequence[WeightedForest], pad_to_multiple_of: int) -> WeightedForest:
    first, starts = 0, []
    for part in parts:
        starts.append(first)
        first += part.num_tokens
    padding = -first % pad_to_multiple_of
    # Padding rows attend only to themselves and predict nothing.
    own = torch.arange(first + 1, first + padding + 1, device=parts[0].input_ids.device)

    def cat(name: str, shift: bool = False, pad: torch.Tensor | None = None) -> torch.Tensor:
        tensors = [
            getattr(part, name) + (start if shift else 0)
            for part, start in zip(parts, starts, strict=True)
        ]
        return torch.cat(tensors if pad is None else [*tensors, pad.to(tensors[0].dtype)])

    return WeightedForest(
        input_ids=cat("input_ids", pad=torch.zeros_like(own)),
        position_ids=cat("position_ids", pad=torch.zeros_like(own)),
        subtree_end=cat("subtree_end", shift=True, pad=own),
        edge_rows=cat("edge_rows", shift=True),
        edge_targets=cat("edge_targets"),
        edge_weights=cat("edge_weights"),
    )
