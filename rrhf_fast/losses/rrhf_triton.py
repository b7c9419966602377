"""The parts of `rrhf_loss` on the Triton kernel, as operators that torch.compile sees through."""

import torch
from torch import Tensor

from rrhf_fast.kernels import ranking as kernels


@torch.library.custom_op("rrhf_fast::rrhf", mutates_args=())
def rrhf_op(
    logps: Tensor,
    rewards: Tensor,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
    scales: Tensor,
    sft_scales: Tensor,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `rrhf_fast.kernels.ranking.forward`."""
    tensors = (logps, rewards, path_edges, path_offsets, group_offsets, scales, sft_scales)
    return kernels.forward(*(tensor.contiguous() for tensor in tensors), margin)


@rrhf_op.register_fake
def _(logps, rewards, path_edges, path_offsets, group_offsets, scales, sft_scales, margin):
    groups = scales.new_empty(group_offsets.shape[0] - 1)
    counts = torch.empty_like(groups, dtype=torch.int64)
    return (
        groups, torch.empty_like(groups), torch.empty_like(scales),
        torch.empty_like(scales, dtype=torch.int32), counts, torch.empty_like(counts),
        torch.empty_like(counts), torch.empty_like(groups),
    )  # fmt: skip


@torch.library.custom_op("rrhf_fast::rrhf_backward", mutates_args=())
def rrhf_backward_op(
    d_rank: Tensor,
    d_sft: Tensor,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
    scales: Tensor,
    sft_scales: Tensor,
    counts: Tensor,
    best: Tensor,
    num_edges: int,
) -> Tensor:
    """See `rrhf_fast.kernels.ranking.backward`."""
    tensors = (path_edges, path_offsets, group_offsets, scales, sft_scales, counts, best)
    upstream = (d_rank.contiguous(), d_sft.contiguous())
    return kernels.backward(num_edges, *upstream, *(tensor.contiguous() for tensor in tensors))


@rrhf_backward_op.register_fake
def _(
    d_rank, d_sft, path_edges, path_offsets, group_offsets, scales, sft_scales, counts, best,
    num_edges,
):  # fmt: skip
    return scales.new_empty(num_edges)


def _setup_context(ctx, inputs, output):
    logps, _, *layout_and_scales, _ = inputs
    _, _, scores, counts, best, *rest = output
    ctx.num_edges = len(logps)
    ctx.save_for_backward(*layout_and_scales, counts, best)
    ctx.mark_non_differentiable(scores, counts, best, *rest)


def _backward(ctx, d_rank, d_sft, *_):
    return rrhf_backward_op(d_rank, d_sft, *ctx.saved_tensors, ctx.num_edges), *[None] * 7


rrhf_op.register_autograd(_backward, setup_context=_setup_context)
