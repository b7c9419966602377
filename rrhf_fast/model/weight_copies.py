"""Copies of a decoder's weights in the dtype of its arithmetic, made anew once they have changed.

Autocast casts a float32 weight for every pack, makes its gradient in 16 bits, casts that to float32
and adds it: 26 bytes moved for a weight and pack. A copy that lasts from one optimizer step to the
next, and a product that adds to the gradient by itself, move 8, and round no gradient to 16 bits.

A copy is an attribute of its layer and no part of the model's state: neither a parameter nor a
buffer, in no checkpoint. Of use on one device; FSDP has copies of its own.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from rrhf_fast.losses.matrix_sum import add_product


class CopiedLinear(nn.Linear):
    """A linear layer that, under autocast, multiplies by a copy of its weight and adds to
    `weight.grad` itself, so that a hook on the weight sees no gradient. `copy_weights` makes it of
    an `nn.Linear`, in place."""

    weight_copy: Tensor
    copied: tuple[int, int] | None  # what `weight` was when it was copied

    def update(self) -> None:
        """Make the copy equal to the weight and, where gradients are wanted, have one to add to."""
        weight = self.weight
        # An assignment to `.data` changes the address alone. A write into `.data` shows in neither.
        found = (weight._version, weight.data_ptr())
        if found != self.copied:
            self.weight_copy = self.weight_copy.to(weight.device)
            self.weight_copy.copy_(weight.detach())
            self.copied = found
        if torch.is_grad_enabled() and weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if not torch.compiler.is_compiling():  # a graph cannot tell, and counts on its caller
            self.update()
        if torch.is_grad_enabled() and self.weight.requires_grad:
            x = x.to(self.weight_copy.dtype)
            return _Product.apply(x, self.weight, self.weight_copy, self.bias, self.weight.grad)
        return F.linear(x, self.weight_copy, self.bias)


class _Product(torch.autograd.Function):
    """x @ copy.T + bias. The weight takes part so that there is a backward also where x, such as
    frozen embeddings, has no gradient; its own is added to `gradient`, and none is returned."""

    @staticmethod
    def forward(ctx, x, weight, copy, bias, gradient):
        ctx.save_for_backward(x, copy, gradient)
        rows = x.reshape(-1, x.shape[-1])
        # The operators that selective checkpointing keeps.
        if bias is None:
            y = torch.mm(rows, copy.t())
        else:
            y = torch.addmm(bias.to(copy.dtype), rows, copy.t())
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, copy, gradient = ctx.saved_tensors
        d_rows, d_x, d_bias = d_y.reshape(-1, d_y.shape[-1]), None, None
        torch.ops.rrhf_fast.add_product(gradient, d_rows.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(d_rows, copy).view(x.shape)
        if ctx.needs_input_grad[3]:
            d_bias = d_rows.sum(0, dtype=gradient.dtype)
        return d_x, None, None, d_bias, None


torch.library.define("rrhf_fast::add_product", "(Tensor(a!) total, Tensor a, Tensor b) -> ()")


@torch.library.impl("rrhf_fast::add_product", ["cpu", "cuda"])
def _(total, a, b):
    # Data has a version of its own: a layer that is used twice saves its gradient's place twice,
    # and the first addition must not void the second.
    add_product(total.data, a, b)


@torch.library.register_fake("rrhf_fast::add_product")
def _(total, a, b):
    assert a.shape[0] == total.shape[0] and b.shape[1] == total.shape[1]


def copy_weights(lm: PreTrainedModel, dtype: torch.dtype) -> list[CopiedLinear]:
    """Give copies in `dtype` to the linear layers of the decoder whose weights are trained in
    float32; returns these layers. The head is left to the losses, adapters are small."""
    uses = Counter(id(p) for _, p in lm.named_parameters(remove_duplicate=False))
    head, copied = lm.get_output_embeddings(), []
    for name, module in lm.base_model.named_modules():
        # Subclasses may have a forward of their own.
        if type(module) is not nn.Linear or module is head or ".lora_" in name:
            continue
        weight = module.weight
        if weight.requires_grad and weight.dtype == torch.float32 and uses[id(weight)] == 1:
            module.weight_copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            module.copied = None
            module.__class__ = CopiedLinear  # the layer, its hooks and its names stay
            copied.append(module)
    return copied


def update_copies(layers: Sequence[CopiedLinear]) -> None:
    """`CopiedLinear.update` of each: due before they are used in a graph."""
    for layer in layers:
        layer.update()


def keep_gradients(layers: Sequence[CopiedLinear], hidden: Tensor) -> None:
    """Let gradients be cleared between the forward that ended in `hidden` and its backward: the
    latter adds to those that the former saw."""
    if not hidden.requires_grad:
        return
    seen = [(layer.weight, layer.weight.grad) for layer in layers if layer.weight.requires_grad]

    def restore(_: Tensor) -> None:
        for weight, gradient in seen:
            if weight.grad is gradient:
                continue
            if weight.grad is None:
                gradient.data.zero_()  # as `add_product` does
            else:
                gradient.data.copy_(weight.grad)
            weight.grad = gradient

    hidden.register_hook(restore)


def _note_update(optimizer: torch.optim.Optimizer, *_) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(parameters)


# PyTorch's fused optimizers and kernels of our own write weights without telling their version.
register_optimizer_step_post_hook(_note_update)
