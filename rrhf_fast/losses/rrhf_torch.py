"""The parts of `rrhf_loss` in PyTorch: the CPU path, and the reference for the kernel.

Legend: E edges, R response tokens, S responses, G queries (groups), P ordered pairs within the
queries.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from rrhf_fast.losses.parts import Layout, PairLoss, Ranking, Scales


class RRHFParts(torch.autograd.Function):
    """apply(logps, rewards, *layout, *scales, *pair_loss) -> the tensors of a `Ranking`."""

    @staticmethod
    def forward(ctx, logps, rewards, *arguments):
        tensors, pair_loss = arguments[:6], PairLoss(*arguments[6:])
        ranking = forward(logps, rewards, Layout(*tensors[:3]), Scales(*tensors[3:]), pair_loss)
        ctx.num_edges = len(logps)
        ctx.save_for_backward(*tensors, ranking.slopes, ranking.best)
        ctx.mark_non_differentiable(*ranking[2:])
        return tuple(ranking)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rank, d_sft, *_):
        *tensors, slopes, best = ctx.saved_tensors
        layout, scales = Layout(*tensors[:3]), Scales(*tensors[3:])
        d_logps = backward(ctx.num_edges, d_rank, d_sft, layout, scales, slopes, best)
        return d_logps, *[None] * 10


def forward(
    logps: Tensor, rewards: Tensor, layout: Layout, scales: Scales, pair_loss: PairLoss
) -> Ranking:
    """The parts of the loss of log-probs [E] and rewards [S]."""
    path_edges, path_offsets, group_offsets = layout
    num_groups, group_sizes = len(group_offsets) - 1, group_offsets.diff()
    group_of = torch.repeat_interleave(torch.arange(num_groups, device=logps.device), group_sizes)
    sums = torch.segment_reduce(logps[path_edges], "sum", lengths=path_offsets.diff())  # [S]
    p = sums * scales.score
    x, beta = p - scales.reference, pair_loss.beta

    low, high = _ordered_pairs(rewards, group_sizes, group_offsets, group_of)
    gaps = beta * (x[high] - x[low])  # [P]
    pulls = _pulls(gaps, pair_loss)
    # index_put_ sorts where index_add_ would use atomics. Pulls of a hinge are whole numbers, so a
    # response whose violated pairs cancel out gets exactly 0.
    c = torch.zeros_like(p).index_put_((low,), pulls, accumulate=True)
    c.index_put_((high,), -pulls, accumulate=True)

    def count(pairs: Tensor) -> Tensor:
        return torch.zeros_like(group_sizes).index_add_(0, group_of[low], pairs.long())

    if pair_loss.kind == "hinge":
        rank = beta * torch.segment_reduce(c * x, "sum", lengths=group_sizes)
        rank = rank + pair_loss.margin * count(gaps < pair_loss.margin).to(p.dtype)
    else:
        of_pairs = _pair_losses(gaps, pair_loss)
        rank = p.new_zeros(num_groups).index_put_((group_of[low],), of_pairs, accumulate=True)
    best = _first_argmax(rewards, group_sizes, group_offsets, group_of)
    return Ranking(
        rank_loss=rank,
        sft_loss=-sums[best] * scales.sft[best],
        logp_scores=p,
        slopes=beta * c,
        best=best,
        num_pairs=count(torch.ones_like(low)),
        num_correct=count(gaps > 0),
        margins=torch.zeros_like(rank).index_add_(0, group_of[low], gaps),
    )


def backward(
    num_edges: int,
    d_rank: Tensor,
    d_sft: Tensor,
    layout: Layout,
    scales: Scales,
    slopes: Tensor,
    best: Tensor,
) -> Tensor:
    """d loss / d logps [E] from d loss / d rank_loss [G] and d loss / d sft_loss [G]."""
    path_edges, path_offsets, group_offsets = layout
    num_responses = len(path_offsets) - 1
    d_sums = torch.repeat_interleave(d_rank, group_offsets.diff(), output_size=num_responses)
    d_sums = d_sums * slopes * scales.score
    d_sums[best] -= d_sft * scales.sft[best]
    along_paths = torch.repeat_interleave(d_sums, path_offsets.diff(), output_size=len(path_edges))
    # index_put_ sorts where index_add_ would use atomics: shared edges are summed in fixed order.
    d_logps = scales.score.new_zeros(num_edges)
    return d_logps.index_put_((path_edges,), along_paths, accumulate=True)


def _pulls(gaps: Tensor, pair_loss: PairLoss) -> Tensor:
    """[P] -phi'(d): how strongly each pair pulls its better response up."""
    if pair_loss.kind == "hinge":
        return (gaps < pair_loss.margin).to(gaps.dtype)
    missing = pair_loss.margin - gaps
    return torch.sigmoid(missing) if pair_loss.kind == "logistic" else 2 * missing


def _pair_losses(gaps: Tensor, pair_loss: PairLoss) -> Tensor:
    """[P] phi(d) of the smooth losses."""
    missing = pair_loss.margin - gaps
    return -logsigmoid(-missing) if pair_loss.kind == "logistic" else missing.square()


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
