"""The RRHF loss on token log-probs, padded or packed.

With no ties and no margin, dL_rank/dp_i = c_i = (rank of p_i) - (rank of r_i): a whole number, and
L_rank = sum_i c_i p_i because the hinge is piecewise linear. With ties (equal rewards form no pair)
and a margin, c_i still is a whole number: the pairs that push response i down less those that pull
it up. Counting it explicitly, instead of letting autograd add up pairs, makes the gradient of a
response that is ranked right exactly 0, which the head's backward uses.

Legend: E edges, R response tokens, S responses, G queries (groups).
"""

from dataclasses import dataclass

import torch

from rrhf_fast.losses.rrhf_torch import RRHFParts


@dataclass(frozen=True)
class RRHFLoss:
    """The loss and its parts. Only `loss`, `rank_loss`, `sft_loss` carry gradients."""

    loss: torch.Tensor  # scalar: rank_weight * rank + sft_weight * sft, mean over the queries
    rank_loss: torch.Tensor  # [G] the hinge, summed over each query's pairs
    sft_loss: torch.Tensor  # [G] negative log-likelihood of each query's best response
    scores: torch.Tensor  # [S] p, the length-normalised log-prob of each response
    num_pairs: torch.Tensor  # [G] int64, pairs of responses with different rewards
    num_correct: torch.Tensor  # [G] int64, those in which the better response has the higher p
    margins: torch.Tensor  # [G] sum over pairs of p_better - p_worse


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
    margin: float = 0.0,
    padded_widths: torch.Tensor | None = None,
    backend: str = "auto",
) -> RRHFLoss:
    """RRHF loss (arXiv 2304.05302, eq. 1-4) of responses grouped by query.

        p_i    = sum_t logp_{i,t} / |y_i|^length_penalty
        L_rank = sum over r_i < r_j of max(0, p_i - p_j + margin)
        L_sft  = - sum_t logp_{b,t}, b the first response of the highest reward (or the mean over t)
        L      = mean over queries of rank_weight * L_rank + sft_weight * L_sft

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
        margin: added inside the hinge, in units of p.
        padded_widths: [G] tokens, stands in for |y_i| in p and in the mean. The released code has
            prompt + longest response there, end token included (`--compat official`).
        backend: "triton" (float32 only), "torch", or "auto": the kernel for float32 CUDA tensors,
            torch for all others.

    Returns:
        `RRHFLoss`; its per-query parts are unweighted.

    Raises:
        ValueError: layout arguments missing, mixed or of the wrong shape; an unknown reduction or
            backend; another dtype than float32 for the kernel; on the CPU also NaN among the
            rewards, a query without responses or a response without tokens.

    Example:
        >>> logps = torch.tensor([[[-1.0, -1.0], [-0.5, -0.5]]])  # one query, k = 2, T = 2
        >>> mask = torch.ones(1, 2, 2, dtype=torch.bool)
        >>> out = rrhf_loss(logps, torch.tensor([[1.0, 0.0]]), mask=mask)
        >>> out.rank_loss.item(), out.sft_loss.item()  # the worse one is likelier by 0.5 a token
        (0.5, 2.0)
    """
    if backend == "triton" and logps.dtype != torch.float32:
        raise ValueError(f"logps: the kernel expects float32, found {logps.dtype}")
    packed = (path_edges, path_offsets, group_offsets)
    if mask is not None and all(x is None for x in packed):
        logps, rewards, *packed = _pack(logps, rewards, mask)
    elif mask is not None or any(x is None for x in packed):
        raise ValueError(
            "expected either mask, or all of path_edges, path_offsets and group_offsets"
        )
    path_edges, path_offsets, group_offsets = packed
    check_backend(backend)
    check_layout(len(logps), rewards, path_edges, path_offsets, group_offsets)
    scales, sft_scales = loss_scales(
        path_offsets,
        group_offsets,
        length_penalty=length_penalty,
        sft_reduction=sft_reduction,
        padded_widths=padded_widths,
        dtype=torch.promote_types(logps.dtype, torch.float32),
    )
    layout = (path_edges, path_offsets, group_offsets)
    on_kernels = logps.device.type == "cuda" and logps.dtype == torch.float32
    if backend == "torch" or (backend == "auto" and not on_kernels):
        parts = RRHFParts.apply(logps, rewards, *layout, scales, sft_scales, margin)
    else:
        # Imported late: triton exists on Linux only.
        from rrhf_fast.losses.rrhf_triton import rrhf_op

        parts = rrhf_op(logps, rewards, *layout, scales, sft_scales, float(margin))
    return assemble(parts, rank_weight, sft_weight)


def assemble(parts: tuple[torch.Tensor, ...], rank_weight: float, sft_weight: float) -> RRHFLoss:
    """What `forward` of either backend returned, as the public result."""
    rank, sft, scores, _, _, num_pairs, num_correct, margins = parts
    return RRHFLoss(
        loss=(rank_weight * rank + sft_weight * sft).mean(),
        rank_loss=rank,
        sft_loss=sft,
        scores=scores,
        num_pairs=num_pairs,
        num_correct=num_correct,
        margins=margins,
    )


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown one."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend: expected "auto", "triton" or "torch", found {backend!r}')


def check_layout(
    num_edges: int,
    rewards: torch.Tensor,
    path_edges: torch.Tensor,
    path_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
) -> None:
    """Raise ValueError where shapes disagree and, on the CPU, for NaN rewards or indices that lie
    outside."""
    num_responses = len(path_offsets) - 1
    if rewards.shape != (num_responses,):
        expected = f"expected shape ({num_responses},), one a response"
        raise ValueError(f"rewards: {expected}, found {tuple(rewards.shape)}")
    # A compiled graph cannot branch on values, and on CUDA it would wait for the device.
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling():
        if rewards.isnan().any():
            raise ValueError("rewards: expected numbers, found NaN")
        for name, spans in (("path_offsets", path_offsets), ("group_offsets", group_offsets)):
            if len(spans) < 2 or spans[0] != 0 or (spans.diff() < 1).any():
                raise ValueError(f"{name}: expected offsets that rise from 0, no span empty")
        for name, spans, end in (
            ("path_offsets", path_offsets, len(path_edges)),
            ("group_offsets", group_offsets, num_responses),
        ):
            if spans[-1] != end:
                raise ValueError(f"{name}: expected to end at {end}, found {int(spans[-1])}")
        low, high = path_edges.aminmax()
        if low < 0 or high >= num_edges:
            found = f"found {int(low)} to {int(high)}"
            raise ValueError(f"path_edges: expected edges in [0, {num_edges}), {found}")


def loss_scales(
    path_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    length_penalty: float,
    sft_reduction: str,
    padded_widths: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[S], [S]: what turns a response's sum of log-probs into its score, and into its SFT loss."""
    if sft_reduction not in ("sum", "mean"):
        raise ValueError(f'sft_reduction: expected "sum" or "mean", found {sft_reduction!r}')
    if padded_widths is not None and padded_widths.shape != (len(group_offsets) - 1,):
        expected = f"expected ({len(group_offsets) - 1},), one a query"
        raise ValueError(f"padded_widths: {expected}, found {tuple(padded_widths.shape)}")
    divisors = path_offsets.diff()
    if padded_widths is not None:
        divisors = torch.repeat_interleave(
            padded_widths, group_offsets.diff(), output_size=len(divisors)
        )
    divisors = divisors.to(dtype)
    scales = divisors**-length_penalty
    return scales, 1 / divisors if sft_reduction == "mean" else torch.ones_like(scales)


def _pack(
    logps: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Padded [G, k, T] to packed: log-probs [R], rewards [S], path_edges, path_offsets,
    group_offsets."""
    if logps.dim() != 3 or mask.shape != logps.shape or rewards.shape != logps.shape[:2]:
        shapes = f"{tuple(logps.shape)}, {tuple(rewards.shape)}, {tuple(mask.shape)}"
        raise ValueError(
            f"expected logps [G, k, T], rewards [G, k] and mask [G, k, T], found {shapes}"
        )
    mask = mask.bool()
    lengths = mask.sum(-1)  # [G, k]
    present = lengths > 0
    if len(logps) == 0 or not present.any(-1).all():
        raise ValueError("mask: no query, or one that has no response token at all")
    edges = torch.arange(int(lengths.sum()), device=logps.device)
    starts = torch.zeros(1, dtype=torch.int64, device=logps.device)
    path_offsets = torch.cat([starts, lengths[present].cumsum(0)])
    group_offsets = torch.cat([starts, present.sum(-1).cumsum(0)])
    return logps[mask], rewards[present], edges, path_offsets, group_offsets
