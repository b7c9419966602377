"""`linear_logprob` on the Triton kernels, as operators for torch.compile and FSDP2.

The forward keeps one number per edge, the log of its softmax denominator. The backward leaves out
edges without a gradient and walks the vocabulary in slices: the kernel writes
D = d loss / d logits of the active edges, then

    d_states += D @ weight[slice]        float32
    d_weight[slice] = D.T @ states       each slice written once

All sums run in a fixed order, so results repeat bit for bit. The operators' schemas take tensors
and numbers only, hence their flat arguments.
"""

import torch
from torch import Tensor

from rrhf_fast.kernels import linear_logprob as kernels
from rrhf_fast.losses.matrix_sum import add_product, product
from rrhf_fast.losses.parts import LinearHead, Wants


def forward(
    hidden: Tensor, head: LinearHead, rows: Tensor, targets: Tensor, workspace_mb: float
) -> tuple[Tensor, Tensor]:
    """(logp [E], log of the softmax denominator [E]), float32; see `losses.linear_logprob`."""
    if len(rows) == 0:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    states = hidden.index_select(0, rows)
    weight, bias = _operands(head, states.dtype)
    targets = targets.contiguous()
    return kernels.forward(states, weight, bias, targets, head.softcap, head.logit_scale)[:2]


@torch.library.custom_op("rrhf_fast::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
    softcap: float | None, logit_scale: float, workspace_mb: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `forward`."""
    return forward(
        hidden, LinearHead(weight, bias, softcap, logit_scale), rows, targets, workspace_mb
    )


@linear_logprob_op.register_fake
def _(hidden, weight, bias, rows, targets, softcap, logit_scale, workspace_mb):
    logp = hidden.new_empty(rows.shape, dtype=torch.float32)
    return logp, torch.empty_like(logp)


def backward(
    grad: Tensor,
    lse: Tensor,
    hidden: Tensor,
    head: LinearHead,
    rows: Tensor,
    targets: Tensor,
    workspace_mb: float,
    wants: Wants,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted."""
    d_hidden = torch.zeros_like(hidden) if wants.hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(head.weight) if wants.weight else head.weight.new_empty(0)
    d_bias = torch.zeros_like(head.bias) if wants.bias else head.weight.new_empty(0)
    active = grad.nonzero().squeeze(1)  # waits for the device once: the products need the count
    if len(active) == 0:
        return d_hidden, d_weight, d_bias
    rows, targets, lse, grad = rows[active], targets[active], lse[active], grad[active].float()
    states = hidden.index_select(0, rows)
    weight, bias = _operands(head, states.dtype)
    tile = kernels.dlogits_tile(states)
    width = _slice_width(len(active), len(weight), states.itemsize, workspace_mb, tile.block_n)
    dlogits = states.new_empty(len(active), width)
    bias_sums = None
    if wants.bias:
        num_tiles = -(-len(active) // tile.block_m)
        bias_sums = states.new_empty(num_tiles, width, dtype=torch.float32)
    d_states = torch.zeros_like(states, dtype=torch.float32) if wants.hidden else None
    for first in range(0, len(weight), width):
        part = slice(first, min(first + width, len(weight)))
        kernels.dlogits(
            dlogits, bias_sums, states, weight, bias, targets, lse, grad, head.softcap,
            head.logit_scale, first,
        )  # fmt: skip
        d = dlogits[:, : part.stop - first]
        if wants.hidden:
            add_product(d_states, d, weight[part])
        if wants.weight:
            d_weight[part] = product(d.T, states, d_weight.dtype)
        if wants.bias:
            d_bias[part] = bias_sums[:, : part.stop - first].sum(0)
    if wants.hidden:
        # index_put_ sorts, so repeated rows are summed in a fixed order; index_add_ would use
        # atomics.
        total = torch.zeros_like(hidden, dtype=torch.float32)
        d_hidden = total.index_put_((rows,), d_states, accumulate=True).to(hidden.dtype)
    return d_hidden, d_weight, d_bias


@torch.library.custom_op("rrhf_fast::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor,
    targets: Tensor, softcap: float | None, logit_scale: float, workspace_mb: float,
    wants_hidden: bool, wants_weight: bool, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `backward`."""
    head = LinearHead(weight, bias, softcap, logit_scale)
    wants = Wants(wants_hidden, wants_weight, wants_bias)
    return backward(grad, lse, hidden, head, rows, targets, workspace_mb, wants)


@linear_logprob_backward_op.register_fake
def _(grad, lse, hidden, weight, bias, *rest):
    wants = Wants(*rest[-3:])
    return (
        torch.empty_like(hidden) if wants.hidden else hidden.new_empty(0),
        torch.empty_like(weight) if wants.weight else weight.new_empty(0),
        torch.empty_like(bias) if wants.bias else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, rows, targets, *ctx.options = inputs
    _, lse = output
    ctx.save_for_backward(lse, hidden, weight, bias, rows, targets)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    wants = ctx.needs_input_grad[:3]
    gradients = linear_logprob_backward_op(grad, *ctx.saved_tensors, *ctx.options, *wants)
    wanted = (d if wants_it else None for d, wants_it in zip(gradients, wants, strict=True))
    return (*wanted, *[None] * (2 + len(ctx.options)))


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)


def _operands(head: LinearHead, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the kernels take them."""
    bias = None if head.bias is None else head.bias.contiguous()
    return head.weight.to(dtype).contiguous(), bias


def _slice_width(
    num_edges: int, vocab_size: int, itemsize: int, workspace_mb: float, block_n: int
) -> int:
    """Tokens per slice: as many as the workspace holds, in whole tiles."""
    fitting = int(workspace_mb * 2**20 / (num_edges * itemsize)) // block_n
    return block_n * max(1, min(fitting, -(-vocab_size // block_n)))
