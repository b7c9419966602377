"""Copies of a decoder's weights in its compute dtype, renewed when the weights change.

For every pack, autocast casts a float32 weight, computes its gradient in 16 bits, casts that to
float32 and adds it: 26 bytes moved per weight and pack. A copy that lasts until the next optimizer
step, and a product that accumulates into the gradient, move 8 and round no gradient to 16 bits
(except on CPUs, whose products of 16 bits are rounded once).

A copy is a plain attribute of its layer: neither parameter nor buffer, and in no checkpoint. Copies
help on one device; FSDP keeps its own.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from rrhf_fast.losses.matrix_sum import add_product
from rrhf_fast.model.active_rows import active_rows, rows_of, spread


class CopiedLinear(nn.Linear):
    """A linear layer that, under autocast, multiplies by a copy of its weight and accumulates into
    `weight.grad` itself, so that hooks on the weight see no gradient. `copy_weights` converts an
    `nn.Linear` to it in place."""

    weight_copy: Tensor
    copied: tuple[int, int] | None  # version and address of `weight` when it was copied
    skips_rows: bool = False  # see `rrhf_fast.model.active_rows`

    def update(self) -> None:
        """Copy the weight if it has changed; allocate its gradient if gradients are enabled."""
        weight = self.weight
        # Assigning to `.data` changes only the address; writing into `.data` changes neither.
        current = (weight._version, weight.data_ptr())
        if current != self.copied:
            _watch_optimizers()
            self.weight_copy = self.weight_copy.to(weight.device)
            self.weight_copy.copy_(weight.detach())
            self.copied = current
        if torch.is_grad_enabled() and weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if not torch.compiler.is_compiling():  # in a graph, the caller has to update copies
            self.update()
        if torch.is_grad_enabled() and self.weight.requires_grad:
            x = x.to(self.weight_copy.dtype)
            weights = (self.weight, self.weight_copy, self.bias, self.weight.grad)
            return _Product.apply(x, *weights, self.skips_rows)
        return F.linear(x, self.weight_copy, self.bias)


class _Product(torch.autograd.Function):
    """x @ copy.T + bias. The weight is an input so that backward runs even if x, such as frozen
    embeddings, needs no gradient; its gradient is added to `gradient`, not returned."""

    @staticmethod
    def forward(ctx, x, weight, copy, bias, gradient, skips_rows):
        ctx.save_for_backward(x, copy, gradient)
        ctx.skips_rows = skips_rows
        rows = x.reshape(-1, x.shape[-1])
        # These operators' results are kept by selective checkpointing.
        if bias is None:
            y = torch.mm(rows, copy.t())
        else:
            y = torch.addmm(bias.to(copy.dtype), rows, copy.t())
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, copy, gradient = ctx.saved_tensors
        kept = active_rows(d_y, copy.shape[1]) if ctx.skips_rows else None
        d_rows, d_x, d_bias = rows_of(d_y, kept), None, None
        torch.ops.rrhf_fast.add_product(gradient, d_rows.t(), rows_of(x, kept))
        if ctx.needs_input_grad[0]:
            d_x = spread(torch.mm(d_rows, copy), kept, x.shape)
        if ctx.needs_input_grad[3]:
            d_bias = d_rows.sum(0, dtype=gradient.dtype)
        return d_x, None, None, d_bias, None, None


torch.library.define("rrhf_fast::add_product", "(Tensor(a!) total, Tensor a, Tensor b) -> ()")


@torch.library.impl("rrhf_fast::add_product", ["cpu", "cuda"])
def _(total, a, b):
    # `.data` has its own version counter: a layer used twice saves its gradient twice, and the
    # first addition must not invalidate the second.
    add_product(total.data, a, b)


@torch.library.register_fake("rrhf_fast::add_product")
def _(total, a, b):
    assert a.shape[0] == total.shape[0] and b.shape[1] == total.shape[1]


def copy_weights(lm: PreTrainedModel, dtype: torch.dtype) -> list[CopiedLinear]:
    """Give copies in `dtype` to the decoder's linear layers whose weights are trained in float32,
    and return these layers. The losses handle the head, and adapters are small."""
    uses = Counter(id(p) for _, p in lm.named_parameters(remove_duplicate=False))
    head, copied = lm.get_output_embeddings(), []
    for name, module in lm.base_model.named_modules():
        # Subclasses may have their own forward.
        if type(module) is not nn.Linear or module is head or ".lora_" in name:
            continue
        weight = module.weight
        if weight.requires_grad and weight.dtype == torch.float32 and uses[id(weight)] == 1:
            module.weight_copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            module.copied = None
            module.__class__ = CopiedLinear  # the layer, its hooks and its names stay
            copied.append(module)
    return copied


def remove_copies(lm: PreTrainedModel) -> None:
    """Undo `copy_weights`."""
    for module in lm.modules():
        if type(module) is CopiedLinear:
            del module.weight_copy, module.copied
            vars(module).pop("skips_rows", None)
            module.__class__ = nn.Linear


def update_copies(layers: Sequence[CopiedLinear]) -> None:
    """Call `CopiedLinear.update` on each; required before they run in a compiled graph."""
    for layer in layers:
        layer.update()


def keep_gradients(layers: Sequence[CopiedLinear], hidden: Tensor) -> None:
    """Allow gradients to be cleared between the forward that ended in `hidden` and its backward,
    which accumulates into the gradient tensors of the forward."""
    if not hidden.requires_grad:
        return
    saved = [(layer.weight, layer.weight.grad) for layer in layers if layer.weight.requires_grad]

    def restore(_: Tensor) -> None:
        for weight, gradient in saved:
            if weight.grad is gradient:
                continue
            if weight.grad is None:
                gradient.data.zero_()  # `.data` for the same reason as in `add_product`
            else:
                gradient.data.copy_(weight.grad)
            weight.grad = gradient

    hidden.register_hook(restore)


@cache
def _watch_optimizers() -> None:
    """Count each optimizer step in its parameters' versions, from the first copy on: PyTorch's
    fused optimizers and our kernel write weights without doing so. Process-wide, since any loop's
    optimizer may own the weights, and copies it forgot to renew would silently be stale."""
    register_optimizer_step_post_hook(_increment_versions)


def _increment_versions(optimizer: torch.optim.Optimizer, *_) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(parameters)
