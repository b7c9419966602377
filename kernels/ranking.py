"""The ranking loss of packed responses and its gradient, one program per query.

    p_s    = scales[s] * sum of logps along response s
    x_s    = p_s - reference[s]
    rank_g = sum of phi(beta * (x_better - x_worse)) over the pairs of different rewards
    c_s    = the slope of rank_g in beta * x_s
    sft_g  = - sft_scales[b] * (sum of logps along b), b the first response of the highest reward

For the hinge phi(d) = max(0, margin - d), c_s is a whole number: the better responses that s beats
or misses by less than the margin, minus the reverse; and rank_g = sum_s beta * c_s x_s + margin *
(number of such pairs).

Shapes: logps [E], path_edges [R], path_offsets [S+1], group_offsets [G+1], everything else one
number per response [S] or query [G]. Sums run in row order, so results repeat bit for bit.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:  # the kernels import nothing of what calls them
    from rrhf_fast.losses.parts import Layout, PairLoss, Scales

# Tokens of a response read at once, and the side of a square of pairs. Responses have tens to
# thousands of tokens and queries two to a thousand responses; a table of tiles would not pay off.
BLOCK_T = 256
BLOCK_K = 16
# Tensors that may be slices of a pack's: their alignment must not trigger a new compilation.
SLICES = [
    "logps", "rewards", "scales", "sft_scales", "reference", "d_rank", "d_sft", "slopes", "best",
]  # fmt: skip


@triton.jit
def smooth_loss(gap, margin, KIND: tl.constexpr):
    """phi(gap) of a smooth loss, and -phi'(gap)."""
    missing = margin - gap
    if KIND == "logistic":
        loss = tl.maximum(missing, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(missing)))
        return loss, 1.0 / (1.0 + tl.exp(-missing))
    else:
        tl.static_assert(KIND == "squared")
        return missing * missing, 2.0 * missing


@triton.jit(do_not_specialize_on_alignment=SLICES)
def forward_kernel(
    logps, path_edges, path_offsets, group_offsets, rewards, scales, sft_scales, reference,
    beta, margin,
    scores, slopes, rank_loss, sft_loss, best, num_pairs, num_correct, margins,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first, last = tl.load(group_offsets + g), tl.load(group_offsets + g + 1)
    best_reward, best_response, best_sum = float("-inf"), first, 0.0
    for s in range(first, last):
        begin, end = tl.load(path_offsets + s), tl.load(path_offsets + s + 1)
        parts = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for t in range(begin, end, BLOCK_T):
            place = t + tl.arange(0, BLOCK_T)
            edges = tl.load(path_edges + place, mask=place < end, other=0)
            parts += tl.load(logps + edges, mask=place < end, other=0.0)
        total = tl.sum(parts, 0)
        tl.store(scores + s, total * tl.load(scales + s))
        reward = tl.load(rewards + s)
        is_best = (reward > best_reward) | (s == first)
        best_reward = tl.where(is_best, reward, best_reward)
        best_response = tl.where(is_best, s, best_response)
        best_sum = tl.where(is_best, total, best_sum)
    tl.store(best + g, best_response)
    tl.store(sft_loss + g, -best_sum * tl.load(sft_scales + best_response))
    tl.debug_barrier()  # other threads read the scores just stored

    rank, gap_sum = 0.0, 0.0
    pairs, correct, violations = first * 0, first * 0, first * 0
    for i0 in range(first, last, BLOCK_K):
        i = i0 + tl.arange(0, BLOCK_K)
        x_i = tl.load(scores + i, mask=i < last, other=0.0)
        x_i = (x_i - tl.load(reference + i, mask=i < last, other=0.0))[:, None]
        r_i = tl.load(rewards + i, mask=i < last, other=0.0)[:, None]
        c = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for j0 in range(first, last, BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)
            x_j = tl.load(scores + j, mask=j < last, other=0.0)
            x_j = (x_j - tl.load(reference + j, mask=j < last, other=0.0))[None, :]
            r_j = tl.load(rewards + j, mask=j < last, other=0.0)[None, :]
            exists = (i < last)[:, None] & (j < last)[None, :]
            below, above = exists & (r_i < r_j), exists & (r_i > r_j)
            # Multiplied after the subtraction, so that no fused operation makes the gap of (j, i)
            # differ from that of (i, j).
            gap = beta * (x_j - x_i)
            if KIND == "hinge":
                violated = below & (gap < margin)
                beaten = above & (-gap < margin)
                c += tl.sum(violated.to(tl.float32), 1) - tl.sum(beaten.to(tl.float32), 1)
                violations += tl.sum(tl.sum(violated.to(tl.int32), 1), 0)
            else:
                loss, pull = smooth_loss(gap, margin, KIND)
                _, push = smooth_loss(-gap, margin, KIND)
                c += tl.sum(tl.where(below, pull, 0.0) - tl.where(above, push, 0.0), 1)
                rank += tl.sum(tl.sum(tl.where(below, loss, 0.0), 1), 0)
            pairs += tl.sum(tl.sum(below.to(tl.int32), 1), 0)
            correct += tl.sum(tl.sum((below & (gap > 0)).to(tl.int32), 1), 0)
            gap_sum += tl.sum(tl.sum(tl.where(below, gap, 0.0), 1), 0)
        tl.store(slopes + i, beta * c, mask=i < last)
        if KIND == "hinge":
            rank += tl.sum(tl.reshape(x_i, (BLOCK_K,)) * c, 0)
    if KIND == "hinge":
        rank = beta * rank + margin * violations.to(tl.float32)
    tl.store(rank_loss + g, rank)
    tl.store(num_pairs + g, pairs)
    tl.store(num_correct + g, correct)
    tl.store(margins + g, gap_sum)


@triton.jit(do_not_specialize_on_alignment=SLICES)
def backward_kernel(
    d_logps, d_rank, d_sft, path_edges, path_offsets, group_offsets, scales, sft_scales, slopes,
    best, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d_logps [E] must be zero. An edge belongs to one query, so no other program adds to it."""
    g = tl.program_id(0)
    first, last = tl.load(group_offsets + g), tl.load(group_offsets + g + 1)
    upstream_rank, upstream_sft = tl.load(d_rank + g), tl.load(d_sft + g)
    best_response = tl.load(best + g)
    for s in range(first, last):
        begin, end = tl.load(path_offsets + s), tl.load(path_offsets + s + 1)
        slope = upstream_rank * tl.load(slopes + s) * tl.load(scales + s)
        sft_slope = upstream_sft * tl.load(sft_scales + s)
        slope -= tl.where(s == best_response, sft_slope, 0.0)
        if slope != 0:
            for t in range(begin, end, BLOCK_T):
                place = t + tl.arange(0, BLOCK_T)
                edges = tl.load(path_edges + place, mask=place < end, other=0)
                before = tl.load(d_logps + edges, mask=place < end, other=0.0)
                tl.store(d_logps + edges, before + slope, mask=place < end)
        tl.debug_barrier()  # responses share edges: another thread may update them next


def forward(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    layout: "Layout",
    scales: "Scales",
    pair_loss: "PairLoss",
) -> tuple[torch.Tensor, ...]:
    """The tensors of a `Ranking`; logps and scales are float32, indices int64."""
    if rewards.dtype != torch.float32:
        # Only their order matters, and ranks preserve it where rounding would merge values.
        rewards = rewards.unique(return_inverse=True)[1].float()
    num_groups = len(layout.group_offsets) - 1
    scores = torch.empty_like(scales.score)
    slopes = torch.empty_like(scales.score)
    rank_loss = scales.score.new_empty(num_groups)
    sft_loss, margins = torch.empty_like(rank_loss), torch.empty_like(rank_loss)
    best = torch.empty_like(layout.group_offsets[1:])
    num_pairs, num_correct = torch.empty_like(best), torch.empty_like(best)
    forward_kernel[(num_groups,)](
        logps, *layout, rewards, *scales, pair_loss.beta, pair_loss.margin,
        scores, slopes, rank_loss, sft_loss, best, num_pairs, num_correct, margins,
        KIND=pair_loss.kind, BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return rank_loss, sft_loss, scores, slopes, best, num_pairs, num_correct, margins


def backward(
    num_edges: int,
    d_rank: torch.Tensor,
    d_sft: torch.Tensor,
    layout: "Layout",
    scales: "Scales",
    slopes: torch.Tensor,
    best: torch.Tensor,
) -> torch.Tensor:
    """d loss / d logps [E] from d loss / d rank_loss [G] and d loss / d sft_loss [G]."""
    d_logps = scales.score.new_zeros(num_edges)
    backward_kernel[(len(best),)](
        d_logps, d_rank, d_sft, *layout, scales.score, scales.sft, slopes, best, BLOCK_T=BLOCK_T
    )
    return d_logps
