"""The parts of `rrhf_loss` in PyTorch: the CPU path, and the reference for the kernel.

Legend: E edges, R response tokens, S responses, G queries (groups), P ordered pairs within the
queries.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rrhf_fast.losses.parts import Layout, Ranking, Scales


class RRHFParts(torch.autograd.Function):
    """apply(logps, rewards, *layout, *scales, margin) -> the tensors of a `Ranking`."""

    @staticmethod
    def forward(ctx, logps, rewards, *arguments):
        *tensors, margin = arguments
        ranking = forward(logps, rewards, Layout(*tensors[:3]), Scales(*tensors[3:]), margin)
        ctx.num_edges = len(logps)
        ctx.save_for_backward(*tensors, ranking.pair_counts, ranking.best)
        ctx.mark_non_differentiable(*ranking[2:])
        return tuple(ranking)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rank, d_sft, *_):
        *tensors, pair_counts, best = ctx.saved_tensors
        layout, scales = Layout(*tensors[:3]), Scales(*tensors[3:])
        d_logps = backward(ctx.num_edges, d_rank, d_sft, layout, scales, pair_counts, best)
        return d_logps, *[None] * 7


def forward(
    logps: Tensor, rewards: Tensor, layout: Layout, scales: Scales, margin: float
) -> Ranking:
    """The parts of the loss of log-probs [E] and rewards [S]."""
    path_edges, path_offsets, group_offsets = layout
    num_responses, num_groups = len(path_offsets) - 1, len(group_offsets) - 1
    group_sizes = group_offsets.diff()
    group_of = torch.repeat_interleave(torch.arange(num_groups, device=logps.device), group_sizes)
    sums = torch.segment_reduce(logps[path_edges], "sum", lengths=path_offsets.diff())  # [S]
    p = sums * scales.score

    low, high = _ordered_pairs(rewards, group_sizes, group_offsets, group_of)
    gaps = p[high] - p[low]  # [P]
    violated = gaps < margin
    # Integers, so a response whose violated pairs cancel out gets exactly 0.
    c = torch.zeros(num_responses, dtype=torch.int32, device=logps.device)
    c.index_add_(0, low, violated.int()).index_add_(0, high, -violated.int())

    def count(pairs: Tensor) -> Tensor:
        return torch.zeros_like(group_sizes).index_add_(0, group_of[low], pairs.long())

    rank = torch.segment_reduce(c * p, "sum", lengths=group_sizes) + margin * count(violated)
    best = _first_argmax(rewards, group_sizes, group_offsets, group_of)
    return Ranking(
        rank_loss=rank,
        sft_loss=-sums[best] * scales.sft[best],
        logp_scores=p,
        pair_counts=c,
        best=best,
        num_pairs=count(torch.ones_like(violated)),
        num_correct=count(gaps > 0),
        margins=torch.zeros_like(rank).index_add_(0, group_of[low], gaps),
    )


def backward(
    num_edges: int,
    d_rank: Tensor,
    d_sft: Tensor,
    layout: Layout,
    scales: Scales,
    pair_counts: Tensor,
    best: Tensor,
) -> Tensor:
    """d loss / d logps [E] from d loss / d rank_loss [G] and d loss / d sft_loss [G]."""
    path_edges, path_offsets, group_offsets = layout
    num_responses = len(path_offsets) - 1
    slopes = torch.repeat_interleave(d_rank, group_offsets.diff(), output_size=num_responses)
    slopes = slopes * pair_counts * scales.score
    slopes[best] -= d_sft * scales.sft[best]
    along_paths = torch.repeat_interleave(slopes, path_offsets.diff(), output_size=len(path_edges))
    # index_put_ sorts where index_add_ would use atomics: shared edges are summed in fixed order.
    d_logps = scales.score.new_zeros(num_edges)
    return d_logps.index_put_((path_edges,), along_paths, accumulate=True)


def _ordered_pairs(
    rewards: Tensor,
    group_sizes: Tensor,
    group_offsets: Tensor,
    group_of: Tensor,
) -> tuple[Tensor, Tensor]:
    """All pairs (low, high) of responses to one query with rewards[low] < rewards[high], as indices
    into [S]."""
    partners = group_sizes[group_of]  # [S] each response meets all k of its query
    low = torch.repeat_interleave(partners)
    place = torch.arange(len(low), device=low.device) - (partners.cumsum(0) - partners)[low]
    high = group_offsets[group_of[low]] + place
    keep = rewards[low] < rewards[high]
    return low[keep], high[keep]


def _first_argmax(
    rewards: Tensor,
    group_sizes: Tensor,
    group_offsets: Tensor,
    group_of: Tensor,
) -> Tensor:
    """[G] the first response of the highest reward, per query."""
    top = torch.full_like(group_sizes, -1, dtype=rewards.dtype).scatter_reduce_(
        0, group_of, rewards, "amax", include_self=False
    )
    index = torch.arange(len(rewards), device=rewards.device)
    candidates = torch.where(rewards == top[group_of], index, len(rewards))
    return torch.full_like(group_sizes, len(rewards)).scatter_reduce_(
        0, group_of, candidates, "amin"
    )
