"""The RRHF loss on token log-probs, padded or packed, and other losses of ranked pairs.

Without ties and margin, dL_rank/dp_i = c_i = (rank of p_i) - (rank of r_i): an integer, and
L_rank = sum_i c_i p_i because the hinge is piecewise linear. With ties (equal rewards form no
pair), a margin or a reference, c_i is still an integer: the pairs that push response i down minus
those that pull it up. Counting pairs, instead of letting autograd sum over them, makes the gradient
of a correctly ranked response exactly 0, so the head's backward can skip it. Under the smooth
losses each pair pushes with its own strength, and every response of a pair has a gradient.

Legend: E edges, R response tokens, S responses, G queries (groups).
"""

import math
from dataclasses import dataclass

import torch

from rrhf_fast.losses.parts import Layout, PairLoss, Ranking, Scales
from rrhf_fast.losses.rrhf_torch import RRHFParts


@dataclass(frozen=True)
class RRHFLoss:
    """The loss and its parts. Only `loss`, `rank_loss`, `sft_loss` carry gradients."""

    loss: torch.Tensor  # scalar: rank_weight * rank + sft_weight * sft, mean over the queries
    rank_loss: torch.Tensor  # [G] phi, summed over each query's pairs, or their mean
    sft_loss: torch.Tensor  # [G] negative log-likelihood of each query's best response
    logp_scores: torch.Tensor  # [S] p, the length-normalised log-prob of each response
    slopes: torch.Tensor  # [S] d rank_loss / d logp_scores; whole numbers for the plain hinge
    best: torch.Tensor  # [G] int64, index in [S] of the first response of the highest reward
    num_pairs: torch.Tensor  # [G] int64, pairs of responses with different rewards
    num_correct: torch.Tensor  # [G] int64, those with d > 0: the better response scores higher
    margins: torch.Tensor  # [G] sum over pairs of d


def rrhf_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    path_edges: torch.Tensor | None = None,
    path_offsets: torch.Tensor | None = None,
    group_offsets: torch.Tensor | None = None,
    length_penalty: float = 1.0,
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
    sft_reduction: str = "sum",
    pair_loss: str = "hinge",
    margin: float = 0.0,
    beta: float = 1.0,
    rank_reduction: str = "sum",
    reference_logps: torch.Tensor | None = None,
    padded_widths: torch.Tensor | None = None,
    backend: str = "auto",
) -> RRHFLoss:
    """RRHF loss (arXiv 2304.05302, eq. 1-4) of responses grouped by query.

        p_i    = sum_t logp_{i,t} / |y_i|^length_penalty
        L_rank = sum over r_i < r_j of max(0, p_i - p_j + margin)
        L_sft  = - sum_t logp_{b,t}, b the first response of the highest reward (or the mean over t)
        L      = mean over queries of rank_weight * L_rank + sft_weight * L_sft

    Generalised, L_rank = sum over r_i < r_j of phi(d), d = beta * (x_j - x_i), where x_i is p_i
    or, given a reference model, p_i minus its value under that model:

        loss                               phi(d)                  length_penalty  reference
        RRHF (arXiv 2304.05302)            max(0, margin - d)      1               no
        SLiC-HF (arXiv 2305.10425)         max(0, margin - d)      0               no
        SimPO (arXiv 2405.14734)           log(1 + e^(margin - d)) 1               no
        DPO (arXiv 2305.18290)             log(1 + e^-d)           0               yes
        DPO, length-normalised             log(1 + e^-d)           1               yes
        IPO (arXiv 2310.12036)             (margin - d)^2          0               yes

    These are losses of a pair; more responses form all their pairs. IPO's margin is 1 / (2 tau).

    Padded: `logps` [G, k, T], `rewards` [G, k] and `mask` [G, k, T], true on response tokens, end
    token included; a response without any is absent, so k may differ between queries.

    Packed: `logps` [E], `rewards` [S] and the index tensors of `PackedForest`: response s owns the
    log-probs logps[path_edges[path_offsets[s]:path_offsets[s+1]]], query g the responses
    group_offsets[g]:group_offsets[g+1].

    Args:
        logps: token log-probs, float32 or float64; gradients flow into them.
        rewards: any real dtype; only their order within a query matters.
        mask, path_edges [R], path_offsets [S+1], group_offsets [G+1]: the layout, see above (int64,
        bool).
        length_penalty: exponent of the length; 1 is the mean, 0 the sum.
        rank_weight, sft_weight: of the two parts.
        sft_reduction: "sum" (the paper) or "mean" over the best response's tokens.
        pair_loss: phi: "hinge", "logistic" or "squared".
        margin, beta: of phi, see above; margin is in units of d.
        rank_reduction: "sum" (the paper) or "mean" over a query's pairs.
        reference_logps: [S], padded [G, k]: the sum of each response's log-probs under a reference
            model, for example the initial one. They carry no gradient.
        padded_widths: [G] tokens, replaces |y_i| in p and in the mean. The released code uses
            prompt + longest response, end token included (`--compat official`).
        backend: "triton" (float32 only), "torch", or "auto": the kernel for float32 CUDA tensors,
            torch for all others.

    Returns:
        `RRHFLoss`; its per-query parts are unweighted.

    Raises:
        ValueError: layout arguments missing, mixed or of the wrong shape; an unknown pair loss,
            reduction or backend; a beta that is not finite and above 0; a dtype other than float32
            for the kernel; on the CPU also NaN among the rewards, a query without responses or a
            response without tokens.

    Example:
        >>> logps = torch.tensor([[[-1.0, -1.0], [-0.5, -0.5]]])  # one query, k = 2, T = 2
        >>> mask = torch.ones(1, 2, 2, dtype=torch.bool)
        >>> out = rrhf_loss(logps, torch.tensor([[1.0, 0.0]]), mask=mask)
        >>> out.rank_loss.item(), out.sft_loss.item()  # the worse is likelier by 0.5 per token
        (0.5, 2.0)
    """
    check_backend(backend)
    if backend == "triton" and logps.dtype != torch.float32:
        raise ValueError(f"logps: the kernel expects float32, found {logps.dtype}")
    pairs = check_pair_loss(pair_loss, beta, margin, rank_reduction)
    layout = (path_edges, path_offsets, group_offsets)
    if mask is not None and all(x is None for x in layout):
        logps, rewards, reference_logps, layout = _pack(logps, rewards, mask, reference_logps)
    elif mask is not None or any(x is None for x in layout):
        raise ValueError(
            "expected either mask, or all of path_edges, path_offsets and group_offsets"
        )
    layout = Layout(*layout)
    check_layout(len(logps), rewards, layout)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    scales = loss_scales(
        layout, length_penalty, sft_reduction, padded_widths, reference_logps, dtype
    )
    ranking = rank(logps, rewards, layout, scales, pairs, backend)
    return assemble(ranking, layout, rank_weight, sft_weight, rank_reduction)


def rank(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    layout: Layout,
    scales: Scales,
    pair_loss: PairLoss,
    backend: str,
) -> Ranking:
    """The parts of the loss, differentiable in logps [E], computed by `backend` (see
    `rrhf_loss`)."""
    on_kernels = logps.device.type == "cuda" and logps.dtype == torch.float32
    if backend == "torch" or (backend == "auto" and not on_kernels):
        return Ranking(*RRHFParts.apply(logps, rewards, *layout, *scales, *pair_loss))
    # Imported late: triton exists on Linux only.
    from rrhf_fast.losses.rrhf_triton import rrhf_op

    return Ranking(*rrhf_op(logps, rewards, *layout, *scales, *pair_loss))


def assemble(
    ranking: Ranking, layout: Layout, rank_weight: float, sft_weight: float, rank_reduction: str
) -> RRHFLoss:
    """The public result: the parts and their weighted mean over the queries."""
    if rank_reduction == "mean":
        num_pairs = ranking.num_pairs.clamp(min=1)
        per_response = torch.repeat_interleave(
            num_pairs, layout.group_offsets.diff(), output_size=len(ranking.slopes)
        )
        ranking = ranking._replace(
            rank_loss=ranking.rank_loss / num_pairs, slopes=ranking.slopes / per_response
        )
    loss = (rank_weight * ranking.rank_loss + sft_weight * ranking.sft_loss).mean()
    return RRHFLoss(loss, *ranking)


def check_backend(backend: str) -> None:
    """Raise ValueError if it is unknown."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend: expected "auto", "triton" or "torch", found {backend!r}')


def check_pair_loss(kind: str, beta: float, margin: float, rank_reduction: str) -> PairLoss:
    """The loss of a pair. Raises ValueError for an unknown kind or reduction, or a bad beta."""
    if kind not in ("hinge", "logistic", "squared"):
        raise ValueError(f'pair_loss: expected "hinge", "logistic" or "squared", found {kind!r}')
    if rank_reduction not in ("sum", "mean"):
        raise ValueError(f'rank_reduction: expected "sum" or "mean", found {rank_reduction!r}')
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number above 0, found {beta}")
    return PairLoss(kind, float(beta), float(margin))


def check_layout(num_edges: int, rewards: torch.Tensor, layout: Layout) -> None:
    """Raise ValueError for shapes that disagree and, on the CPU, for NaN rewards or indices out of
    range."""
    path_edges, path_offsets, group_offsets = layout
    num_responses = len(path_offsets) - 1
    if rewards.shape != (num_responses,):
        expected = f"expected shape ({num_responses},), one per response"
        raise ValueError(f"rewards: {expected}, found {tuple(rewards.shape)}")
    # A compiled graph cannot branch on values, and on CUDA the check would wait for the device.
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling():
        if rewards.isnan().any():
            raise ValueError("rewards: expected numbers, found NaN")
        for name, spans, end in (
            ("path_offsets", path_offsets, len(path_edges)),
            ("group_offsets", group_offsets, num_responses),
        ):
            if len(spans) < 2 or spans[0] != 0 or (spans.diff() < 1).any():
                raise ValueError(f"{name}: expected offsets that rise from 0, no span empty")
            if spans[-1] != end:
                raise ValueError(f"{name}: expected to end at {end}, found {int(spans[-1])}")
        low, high = path_edges.aminmax()
        if low < 0 or high >= num_edges:
            found = f"found {int(low)} to {int(high)}"
            raise ValueError(f"path_edges: expected edges in [0, {num_edges}), {found}")


def loss_scales(
    layout: Layout,
    length_penalty: float,
    sft_reduction: str,
    padded_widths: torch.Tensor | None,
    reference_logps: torch.Tensor | None,
    dtype: torch.dtype,
) -> Scales:
    """Factors of each response's sum of log-probs, from its length, and its score under the
    reference model; options as for `rrhf_loss`."""
    if sft_reduction not in ("sum", "mean"):
        raise ValueError(f'sft_reduction: expected "sum" or "mean", found {sft_reduction!r}')
    num_queries = len(layout.group_offsets) - 1
    if padded_widths is not None and padded_widths.shape != (num_queries,):
        expected = f"expected ({num_queries},), one per query"
        raise ValueError(f"padded_widths: {expected}, found {tuple(padded_widths.shape)}")
    divisors = layout.path_offsets.diff()
    if reference_logps is not None and reference_logps.shape != divisors.shape:
        expected = f"expected {tuple(divisors.shape)}, one per response"
        raise ValueError(f"reference_logps: {expected}, found {tuple(reference_logps.shape)}")
    if padded_widths is not None:
        divisors = torch.repeat_interleave(
            padded_widths, layout.group_offsets.diff(), output_size=len(divisors)
        )
    divisors = divisors.to(dtype)
    score = divisors**-length_penalty
    sft = 1 / divisors if sft_reduction == "mean" else torch.ones_like(score)
    if reference_logps is None:
        return Scales(score, sft, torch.zeros_like(score))
    return Scales(score, sft, reference_logps.detach().to(dtype) * score)


def _pack(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    reference_logps: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Layout]:
    """Padded [G, k, T] to packed: log-probs [R], rewards and reference log-probs [S], and their
    layout."""
    if logps.dim() != 3 or mask.shape != logps.shape or rewards.shape != logps.shape[:2]:
        shapes = f"{tuple(logps.shape)}, {tuple(rewards.shape)}, {tuple(mask.shape)}"
        raise ValueError(
            f"expected logps [G, k, T], rewards [G, k] and mask [G, k, T], found {shapes}"
        )
    if reference_logps is not None and reference_logps.shape != rewards.shape:
        expected = f"expected {tuple(rewards.shape)}, as the rewards"
        raise ValueError(f"reference_logps: {expected}, found {tuple(reference_logps.shape)}")
    mask = mask.bool()
    lengths = mask.sum(-1)  # [G, k]
    present = lengths > 0
    if len(logps) == 0 or not present.any(-1).all():
        raise ValueError("mask: no query, or one that has no response token at all")
    edges = torch.arange(int(lengths.sum()), device=logps.device)
    starts = torch.zeros(1, dtype=torch.int64, device=logps.device)
    path_offsets = torch.cat([starts, lengths[present].cumsum(0)])
    group_offsets = torch.cat([starts, present.sum(-1).cumsum(0)])
    reference = None if reference_logps is None else reference_logps[present]
    return logps[mask], rewards[present], reference, Layout(edges, path_offsets, group_offsets)
