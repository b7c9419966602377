"""`linear_logprob` in chunked PyTorch: the CPU path, and the reference for the kernels.

It walks the vocabulary in chunks. The forward keeps a running maximum and sum, so only [E, chunk]
numbers are alive; the backward recomputes each chunk's logits, turns them into their gradient in
place and uses it at once. The backward skips edges whose upstream gradient is exactly 0 (correctly
ranked responses).

Legend: N tokens, E edges, A edges with a gradient, H hidden size, V vocabulary, C chunk of it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rrhf_fast.losses.parts import LinearHead, Wants


class ChunkedLinearLogprob(torch.autograd.Function):
    """apply(hidden, weight, bias, rows, targets, softcap, logit_scale, workspace_mb) -> [E]."""

    @staticmethod
    # Log-probs stay float32 where the decoder around them runs in bfloat16.
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, hidden, weight, bias, rows, targets, softcap, logit_scale, workspace_mb):
        head = LinearHead(weight, bias, softcap, logit_scale)
        logp, lse = forward(hidden, head, rows, targets, workspace_mb)
        ctx.save_for_backward(lse, hidden, weight, bias, rows, targets)
        ctx.options = softcap, logit_scale, workspace_mb
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        lse, hidden, weight, bias, rows, targets = ctx.saved_tensors
        softcap, logit_scale, workspace_mb = ctx.options
        head, wants = (
            LinearHead(weight, bias, softcap, logit_scale),
            Wants(*ctx.needs_input_grad[:3]),
        )
        gradients = backward(grad, lse, hidden, head, rows, targets, workspace_mb, wants)
        return *gradients, *[None] * 5


def forward(
    hidden: Tensor, head: LinearHead, rows: Tensor, targets: Tensor, workspace_mb: float
) -> tuple[Tensor, Tensor]:
    """(logp [E], log of the softmax denominator [E]), at least float32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    states = hidden.index_select(0, rows).to(dtype)  # [E, H]
    top = torch.full((len(rows),), float("-inf"), dtype=dtype, device=hidden.device)
    total, target = torch.zeros_like(top), torch.full_like(top, float("nan"))
    for chunk in _chunks(head.weight, len(rows), dtype, workspace_mb):
        z = chunk_logits(states, head, chunk)
        inside = (targets >= chunk.start) & (targets < chunk.stop)
        target[inside] = z[inside, targets[inside] - chunk.start]
        new_top = torch.maximum(top, z.amax(1))
        # A bias may be -inf, and so may be all of a chunk.
        shift = new_top.masked_fill(new_top == float("-inf"), 0.0)
        total = total * (top - shift).exp() + z.sub_(shift[:, None]).exp_().sum(1)
        top = new_top
    log_total = total.log()
    return (target - top) - log_total, top + log_total


def backward(
    grad: Tensor,
    lse: Tensor,
    hidden: Tensor,
    head: LinearHead,
    rows: Tensor,
    targets: Tensor,
    workspace_mb: float,
    wants: Wants,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None where not wanted."""
    weight = head.weight
    active = grad.nonzero().squeeze(1)
    rows, targets, lse, grad = rows[active], targets[active], lse[active], grad[active]
    states = hidden.index_select(0, rows).to(lse.dtype)  # [A, H]
    d_states = torch.zeros_like(states) if wants.hidden else None
    d_weight = None
    if wants.weight:  # the loop below writes every slice of it, if there are any rows
        d_weight = torch.empty_like(weight) if len(rows) else torch.zeros_like(weight)
    d_bias = torch.zeros_like(head.bias) if wants.bias else None
    for chunk in _chunks(weight, len(rows), lse.dtype, workspace_mb) if len(rows) else ():
        z = chunk_logits(states, head, chunk)
        slope = None if head.softcap is None else 1 - (z / head.softcap) ** 2
        # grad * (onehot - softmax), built in place of the logits.
        upstream = grad * head.logit_scale
        d_z = z.sub_(lse[:, None]).exp_().mul_(-upstream[:, None])
        inside = ((targets >= chunk.start) & (targets < chunk.stop)).nonzero().squeeze(1)
        d_z[inside, targets[inside] - chunk.start] += upstream[inside]
        if slope is not None:
            d_z *= slope
        if wants.hidden:
            d_states.addmm_(d_z, weight[chunk].to(d_z.dtype))
        if wants.weight:
            if weight.dtype == d_z.dtype:
                torch.mm(d_z.T, states, out=d_weight[chunk])
            else:
                d_weight[chunk] = d_z.T @ states
        if wants.bias:
            d_bias[chunk] = d_z.sum(0)
    d_hidden = None
    if wants.hidden:
        total = torch.zeros_like(hidden, dtype=lse.dtype)
        d_hidden = total.index_add_(0, rows, d_states).to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def _chunks(weight: Tensor, num_edges: int, dtype: torch.dtype, workspace_mb: float) -> list[slice]:
    """Slices of the vocabulary such that [num_edges, chunk] logits fit the workspace."""
    size = max(1, int(workspace_mb * 2**20 / (max(1, num_edges) * dtype.itemsize)))
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def chunk_logits(
    states: Tensor, head: LinearHead, chunk: slice, out: Tensor | None = None
) -> Tensor:
    """[E, H] states -> [E, C] logits of a chunk of the vocabulary."""
    z = torch.mm(states, head.weight[chunk].to(states.dtype).T, out=out)
    if head.bias is not None:
        z += head.bias[chunk]
    if head.logit_scale != 1:
        z *= head.logit_scale
    if head.softcap is not None:
        z = z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z
