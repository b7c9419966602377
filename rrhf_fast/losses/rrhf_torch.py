"""The parts of `rrhf_loss` in PyTorch: the CPU path, and what the kernel is compared with.

Legend: E edges, R response tokens, S responses, G queries (groups), P ordered pairs within the
queries.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RRHFParts(torch.autograd.Function):
    """apply(logps, rewards, path_edges, path_offsets, group_offsets, scales, sft_scales, margin) ->
    what `forward` returns."""

    @staticmethod
    def forward(ctx, logps, *arguments):
        outputs = forward(logps, *arguments)
        _, _, scores, counts, best, *rest = outputs
        ctx.num_edges = len(logps)
        ctx.save_for_backward(*arguments[1:-1], counts, best)
        ctx.mark_non_differentiable(scores, counts, best, *rest)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rank, d_sft, *_):
        return backward(ctx.num_edges, d_rank, d_sft, *ctx.saved_tensors), *[None] * 7


def forward(
    logps: Tensor,
    rewards: Tensor,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
    scales: Tensor,
    sft_scales: Tensor,
    margin: float,
) -> tuple[Tensor, ...]:
    """(rank_loss [G], sft_loss [G], scores [S], counts [S] int64, best [G], num_pairs [G],
    num_correct [G], margins [G]), as `rrhf_fast.kernels.ranking.forward`."""
    num_responses, num_groups = len(path_offsets) - 1, len(group_offsets) - 1
    group_sizes = group_offsets.diff()
    group_of = torch.repeat_interleave(torch.arange(num_groups, device=logps.device), group_sizes)
    sums = torch.segment_reduce(logps[path_edges], "sum", lengths=path_offsets.diff())  # [S]
    scores = sums * scales

    low, high = _ordered_pairs(rewards, group_sizes, group_offsets, group_of)
    gaps = scores[high] - scores[low]  # [P]
    violated = gaps < margin
    # c counts in whole numbers, so a response whose violated pairs cancel out gets exactly 0.
    c = torch.zeros(num_responses, dtype=torch.int64, device=logps.device)
    c.index_add_(0, low, violated.long()).index_add_(0, high, -violated.long())

    def count(pairs: Tensor) -> Tensor:
        return torch.zeros_like(group_sizes).index_add_(0, group_of[low], pairs.long())

    rank = torch.segment_reduce(c * scores, "sum", lengths=group_sizes) + margin * count(violated)
    best = _first_argmax(rewards, group_sizes, group_offsets, group_of)
    sft = -sums[best] * sft_scales[best]
    margins = torch.zeros_like(rank).index_add_(0, group_of[low], gaps)
    num_pairs, num_correct = count(torch.ones_like(violated)), count(gaps > 0)
    return rank, sft, scores, c, best, num_pairs, num_correct, margins


def backward(
    num_edges: int,
    d_rank: Tensor,
    d_sft: Tensor,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
    scales: Tensor,
    sft_scales: Tensor,
    counts: Tensor,
    best: Tensor,
) -> Tensor:
    """d loss / d logps [E] from d loss / d rank_loss [G] and d loss / d sft_loss [G]."""
    num_responses = len(path_offsets) - 1
    slopes = torch.repeat_interleave(d_rank, group_offsets.diff(), output_size=num_responses)
    slopes = slopes * counts * scales
    slopes[best] -= d_sft * sft_scales[best]
    along_paths = torch.repeat_interleave(slopes, path_offsets.diff(), output_size=len(path_edges))
    # index_put_ sorts where index_add_ would use atomics: shared edges are summed in fixed order.
    return scales.new_zeros(num_edges).index_put_((path_edges,), along_paths, accumulate=True)


def _ordered_pairs(
    rewards: Tensor,
    group_sizes: Tensor,
    group_offsets: Tensor,
    group_of: Tensor,
) -> tuple[Tensor, Tensor]:
    """All pairs (low, high) within a query with rewards[low] < rewards[high], as indices into
    [S]."""
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
    """[G] the first response of the highest reward in each query."""
    top = torch.full_like(group_sizes, -1, dtype=rewards.dtype).scatter_reduce_(
        0, group_of, rewards, "amax", include_self=False
    )
    index = torch.arange(len(rewards), device=rewards.device)
    candidates = torch.where(rewards == top[group_of], index, len(rewards))
    return torch.full_like(group_sizes, len(rewards)).scatter_reduce_(
        0, group_of, candidates, "amin"
    )
