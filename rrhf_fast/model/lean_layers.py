"""Gated MLPs and RMSNorms that keep fewer activations for the backward, with the same formulas.

Of a gated MLP, autograd keeps four tensors of the intermediate size: gate, act(gate), up and their
product, the input of the last projection. Here gate and up are kept, and the others computed again:
an elementwise pass. Of an RMSNorm it keeps the normalised states beside the input; here one number
per row. Compilers do as much, and activation checkpointing more: only for layers that run
uncompiled and without it, on a CPU.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Activations, and how their gradient follows from that of the result and their input.
ACTIVATIONS = (
    (F.silu, torch.ops.aten.silu_backward),
    (F.gelu, torch.ops.aten.gelu_backward),
    (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
)


Lean = list[tuple[nn.Module, Callable]]


def find_lean_layers(lm: PreTrainedModel) -> Lean:
    """The decoder's modules that have a lean forward, by a trial, and that forward."""
    return [
        (module, lean)
        for module in lm.base_model.modules()
        for lean in (_gated_mlp, _rms_norm)
        if _is_of_kind(module, lean) and _agrees(module, lean)
    ]


def use_lean_layers(layers: Lean) -> None:
    """Give these modules their lean forwards."""
    for module, lean in layers:
        module.forward = partial(lean, module)


def use_own_layers(lm: PreTrainedModel) -> None:
    """Undo `use_lean_layers`."""
    for module in lm.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in (_gated_mlp, _rms_norm):
            del module.forward  # the class has another


def _is_of_kind(module: nn.Module, lean: Callable) -> bool:
    """Whether the module has the parts of that kind, and no parameters beside them."""
    names = [name for name, _ in module.named_parameters()]
    if lean is _gated_mlp:
        has_parts = all(hasattr(module, name) for name in (*PROJECTIONS, "act_fn"))
        return has_parts and all(name.partition(".")[0] in PROJECTIONS for name in names)
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"]


@torch.no_grad()
def _agrees(module: nn.Module, lean: Callable) -> bool:
    """Whether both forwards of a module give the same for random states, small and large: some
    classes clamp what large ones give."""
    own_generator = torch.Generator().manual_seed(0)
    try:
        weight = module.weight if lean is _rms_norm else module.gate_proj.weight
        dtype = torch.float32 if lean is _rms_norm else weight.dtype
        states = torch.rand(1, 2, weight.shape[-1], generator=own_generator).sub_(0.3)
        states = states.to(weight.device, dtype)
        for scale in (1.0, 1e4):
            with torch.enable_grad():
                ours = lean(module, scale * states)
            own = module(scale * states)
            if not (ours - own).abs().max() <= 1e-5 * own.abs().max():
                return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _gated_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x))"""
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if not torch.is_grad_enabled():
        return mlp.down_proj(mlp.act_fn(gate) * up)
    product = _Gated.apply(gate, up, mlp.act_fn, _derivative(mlp.act_fn))
    # In the backward, when gate and up are kept for `_Gated` anyway.
    factors, place = (gate.detach(), up.detach()), product.data_ptr()

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == place and saved.shape == product.shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        return mlp.act_fn(factors[0]) * factors[1] if saved is None else saved

    with saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(product)


@cache
def _derivative(act: Callable) -> Callable:
    """The gradient of one of `ACTIVATIONS`. Raises TypeError for another."""
    x = torch.linspace(-4, 4, 9)
    for known, derivative in ACTIVATIONS:
        # GELU and its approximation differ by up to 5e-4.
        if torch.allclose(act(x), known(x), atol=1e-6):
            return derivative
    raise TypeError(f"{act}: an activation without a known derivative")


class _Gated(torch.autograd.Function):
    """act(gate) * up"""

    @staticmethod
    def forward(ctx, gate, up, act, derivative):
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.derivative = act, derivative
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, d_product):
        gate, up = ctx.saved_tensors
        return ctx.derivative(d_product * up, gate), d_product * ctx.act(gate), None, None


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight"""
    # The classes compute in float32, whatever the dtype.
    if not torch.is_grad_enabled() or x.dtype != torch.float32:
        return type(norm).forward(norm, x)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return _RMSNorm.apply(x, norm.weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_y * normed).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            d_normed = d_y * weight
            along = (d_normed * normed).mean(-1, keepdim=True)
            d_x = d_normed.sub_(normed.mul_(along)).mul_(scale)
        return d_x, d_weight, None
