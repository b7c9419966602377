"""The parts of `rrhf_loss` on the Triton kernel, as operators for torch.compile.

A schema takes tensors and numbers only, hence the flat arguments.
"""

import torch
from torch import Tensor

from rrhf_fast.kernels import ranking as kernels
from rrhf_fast.losses.parts import Layout, PairLoss, Ranking, Scales


@torch.library.custom_op("rrhf_fast::rrhf", mutates_args=())
def rrhf_op(
    logps: Tensor, rewards: Tensor, path_edges: Tensor, path_offsets: Tensor,
    group_offsets: Tensor, score_scales: Tensor, sft_scales: Tensor, reference: Tensor,
    kind: str, beta: float, margin: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The tensors of a `Ranking`."""
    layout = Layout(path_edges.contiguous(), path_offsets.contiguous(), group_offsets.contiguous())
    scales = Scales(*(x.contiguous() for x in (score_scales, sft_scales, reference)))
    pair_loss = PairLoss(kind, beta, margin)
    return kernels.forward(logps.contiguous(), rewards.contiguous(), layout, scales, pair_loss)


@rrhf_op.register_fake
def _(logps, rewards, path_edges, path_offsets, group_offsets, score_scales, *rest):
    return tuple(Ranking.empty(score_scales, group_offsets.shape[0] - 1))


@torch.library.custom_op("rrhf_fast::rrhf_backward", mutates_args=())
def rrhf_backward_op(
    d_rank: Tensor, d_sft: Tensor, path_edges: Tensor, path_offsets: Tensor, group_offsets: Tensor,
    score_scales: Tensor, sft_scales: Tensor, reference: Tensor, slopes: Tensor, best: Tensor,
    num_edges: int,
) -> Tensor:  # fmt: skip
    """d loss / d logps [E]."""
    layout = Layout(path_edges.contiguous(), path_offsets.contiguous(), group_offsets.contiguous())
    scales = Scales(*(x.contiguous() for x in (score_scales, sft_scales, reference)))
    upstream = (d_rank.contiguous(), d_sft.contiguous())
    of_responses = (slopes.contiguous(), best.contiguous())
    return kernels.backward(num_edges, *upstream, layout, scales, *of_responses)


@rrhf_backward_op.register_fake
def _(d_rank, *tensors_and_number):
    *_, num_edges = tensors_and_number
    return d_rank.new_empty(num_edges)


def _setup_context(ctx, inputs, output):
    logps, _, *layout_and_scales = inputs[:8]
    ranking = Ranking(*output)
    ctx.num_edges = len(logps)
    ctx.save_for_backward(*layout_and_scales, ranking.slopes, ranking.best)
    ctx.mark_non_differentiable(*ranking[2:])


def _backward(ctx, d_rank, d_sft, *_):
    return rrhf_backward_op(d_rank, d_sft, *ctx.saved_tensors, ctx.num_edges), *[None] * 10


rrhf_op.register_autograd(_backward, setup_context=_setup_context)
