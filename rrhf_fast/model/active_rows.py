"""The backward of linear layers on only the rows that have a gradient.

A correctly ranked response gets no gradient, and neither do its tokens at any layer: their rows of
each d_y are exactly 0. Leaving these rows out of a layer's two products is exact, and unlike the
second pass of `rrhf_fast.train.backward` needs no forward of its own. The rows are read off d_y, so
a layer has to know nothing of packs and losses. To do so waits for the device, and a graph cannot
branch on it: only for layers that run uncompiled on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

# Gathering rows pays where the share of those left out exceeds GATHER / inputs + GATHER / outputs
# of a layer (measured on two cores, for squares of 192 to 2,048). Where that is a large share, the
# layer stays as it is, since even a look at the gradient costs some of so little work.
GATHER = 35
LARGE_SHARE = 0.3


class ActiveLinear(nn.Linear):
    """A linear layer whose backward leaves out rows without a gradient. `use_active_rows` converts
    an `nn.Linear` to it in place."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):  # which is not on during the backward
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # A frozen weight needs no x.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        kept = active_rows(d_y, weight.shape[1])
        d_rows, d_x, d_weight, d_bias = rows_of(d_y, kept), None, None, None
        if ctx.needs_input_grad[0]:
            d_x = spread(d_rows @ weight, kept, ctx.shape)
        if ctx.needs_input_grad[1]:
            d_weight = d_rows.t() @ rows_of(x, kept)
        if ctx.needs_input_grad[2]:
            d_bias = d_rows.sum(0)
        return d_x, d_weight, d_bias


def active_rows(d_y: Tensor, num_inputs: int) -> Tensor | None:
    """[A] int64, the rows of d_y [..., O] that are not 0 throughout; None for all of them, or where
    a layer with so many inputs would gain nothing by leaving the others out."""
    rows = d_y.reshape(-1, d_y.shape[-1])
    fewest = _worthwhile_share(num_inputs, rows.shape[1]) * len(rows)
    # One number tells nearly always; where it is 0, all are read.
    zero = (rows[:, 0] == 0).nonzero().squeeze(1)
    if len(zero) <= fewest:
        return None
    zero = zero[rows.index_select(0, zero).abs().amax(1) == 0]
    if len(zero) <= fewest:
        return None
    is_kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return is_kept.index_fill_(0, zero, False).nonzero().squeeze(1)


def _worthwhile_share(num_inputs: int, num_outputs: int) -> float:
    return GATHER / num_inputs + GATHER / num_outputs


def rows_of(states: Tensor, kept: Tensor | None) -> Tensor:
    """[..., H] -> [A, H]"""
    rows = states.reshape(-1, states.shape[-1])
    return rows if kept is None else rows.index_select(0, kept)


def spread(rows: Tensor, kept: Tensor | None, shape: torch.Size) -> Tensor:
    """[A, H] -> [..., H] of this shape, with zeros in the other rows."""
    if kept is None:
        return rows.view(shape)
    states = rows.new_zeros(shape)
    states.view(-1, rows.shape[1]).index_copy_(0, kept, rows)
    return states


def use_active_rows(lm: PreTrainedModel) -> int:
    """Convert the decoder's linear layers that are large enough; the losses leave out rows of the
    head, and `CopiedLinear` its own. Returns how many weights the converted layers have."""
    head, count = lm.get_output_embeddings(), 0
    for module in lm.base_model.modules():
        # Subclasses may have their own forward.
        if type(module) is not nn.Linear or module is head:
            continue
        if pays(module):
            module.__class__ = ActiveLinear  # the layer, its hooks and its names stay
            count += module.in_features * module.out_features
    return count


def pays(layer: nn.Linear) -> bool:
    """Whether a layer is large enough to look for rows without a gradient."""
    return _worthwhile_share(layer.in_features, layer.out_features) < LARGE_SHARE


def use_all_rows(lm: PreTrainedModel) -> None:
    """Undo `use_active_rows`."""
    for module in lm.modules():
        if type(module) is ActiveLinear:
            module.__class__ = nn.Linear
