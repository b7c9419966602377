"""`linear_logprob` in chunked PyTorch: the CPU path, and what the kernels are compared with.

The vocabulary is walked in chunks. Forward keeps a running maximum and sum, so that only [E, chunk]
numbers are alive; backward computes each chunk's logits again, turns them into their gradient in
place and uses that at once. Rows whose upstream gradient is exactly 0 (responses that are ranked
right) are left out of the backward.

Legend: N tokens, E edges, H hidden size, V vocabulary, C chunk of it.
"""

import torch
from torch.autograd.function import once_differentiable


class ChunkedLinearLogprob(torch.autograd.Function):
    """apply(hidden, weight, bias, rows, targets, softcap, logit_scale, workspace_mb) -> [E]."""

    @staticmethod
    # Log-probs are float32 also where the decoder around them runs in bfloat16.
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, hidden, weight, bias, rows, targets, softcap, logit_scale, workspace_mb):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        states = hidden.index_select(0, rows).to(dtype)  # [E, H]
        top = torch.full((len(rows),), float("-inf"), dtype=dtype, device=hidden.device)
        total, target = torch.zeros_like(top), torch.full_like(top, float("nan"))
        for chunk in _chunks(weight, len(rows), dtype, workspace_mb):
            z = _chunk_logits(states, weight, bias, chunk, softcap, logit_scale)
            inside = (targets >= chunk.start) & (targets < chunk.stop)
            target[inside] = z[inside, targets[inside] - chunk.start]
            new_top = torch.maximum(top, z.amax(1))
            total = total * (top - new_top).exp() + z.sub_(new_top[:, None]).exp_().sum(1)
            top = new_top
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, bias, rows, targets, top + log_total)
        ctx.head = (softcap, logit_scale)
        ctx.workspace_mb = workspace_mb
        return (target - top) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, rows, targets, lse = ctx.saved_tensors
        softcap, logit_scale = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        active = grad.nonzero().squeeze(1)
        rows, targets, lse, grad = rows[active], targets[active], lse[active], grad[active]
        states = hidden.index_select(0, rows).to(lse.dtype)  # [A, H]
        d_states = torch.zeros_like(states) if wants_hidden else None
        d_weight = None
        if wants_weight:  # every slice of it is written below, if there are any rows at all
            d_weight = torch.empty_like(weight) if len(rows) else torch.zeros_like(weight)
        d_bias = torch.zeros_like(bias) if wants_bias else None
        for chunk in _chunks(weight, len(rows), lse.dtype, ctx.workspace_mb) if len(rows) else ():
            z = _chunk_logits(states, weight, bias, chunk, softcap, logit_scale)
            slope = None if softcap is None else 1 - (z / softcap) ** 2
            # grad * (onehot - softmax), built in place of the logits.
            upstream = grad * logit_scale
            d_z = z.sub_(lse[:, None]).exp_().mul_(-upstream[:, None])
            inside = ((targets >= chunk.start) & (targets < chunk.stop)).nonzero().squeeze(1)
            d_z[inside, targets[inside] - chunk.start] += upstream[inside]
            if slope is not None:
                d_z *= slope
            if wants_hidden:
                d_states.addmm_(d_z, weight[chunk].to(d_z.dtype))
            if wants_weight:
                if weight.dtype == d_z.dtype:
                    torch.mm(d_z.T, states, out=d_weight[chunk])
                else:
                    d_weight[chunk] = d_z.T @ states
            if wants_bias:
                d_bias[chunk] = d_z.sum(0)
        d_hidden = None
        if wants_hidden:
            d_hidden = (
                torch.zeros_like(hidden, dtype=lse.dtype)
                .index_add_(0, rows, d_states)
                .to(hidden.dtype)
            )
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _chunks(
    weight: torch.Tensor, num_edges: int, dtype: torch.dtype, workspace_mb: float
) -> list[slice]:
    """Slices of the vocabulary such that [num_edges, chunk] logits fit the workspace."""
    size = max(1, int(workspace_mb * 2**20 / (max(1, num_edges) * dtype.itemsize)))
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def _chunk_logits(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    chunk: slice,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """[E, H] states -> [E, C] logits."""
    z = states @ weight[chunk].to(states.dtype).T
    if bias is not None:
        z += bias[chunk]
    if logit_scale != 1:
        z *= logit_scale
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z
