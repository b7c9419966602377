"""AdamW with bfloat16 moments: 4 bytes per parameter for both, where float32 takes 8.

A moment changes by a small share of itself per step, the second by 0.001 with the default beta:
less than half the spacing of bfloat16 numbers. Rounding to nearest would freeze it, so moments are
rounded stochastically, which is unbiased. On a GPU one kernel does the whole update
(`rrhf_fast.kernels.adamw_bf16`).
"""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Elements updated at once without the kernel.
PART = 2**24
HAS_TRITON = find_spec("triton") is not None


class AdamWBF16(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with bfloat16 moments; parameters keep their
    dtype, and arithmetic is float32. Options are those of `torch.optim.AdamW`, as is `grad_scale`,
    a float32 scalar on the parameters' device by which gradients are divided."""

    grad_scale: torch.Tensor | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        grad_scale, one = self.grad_scale, None
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (group, parameter) in enumerate(parameters):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["step"] += 1
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            local = [_local(tensor) for tensor in tensors]
            step = int(state["step"].item())
            if _kernel_takes(*local):
                if grad_scale is None and one is None:
                    one = local[0].new_ones((), dtype=torch.float32)
                scale = one if grad_scale is None else grad_scale
                _update_by_kernel(*local, scale, step, index, group)
            else:
                for parts in _parts(*local):
                    _update(*parts, grad_scale, step, group)

    def load_state_dict(self, state_dict: dict) -> None:
        """As `Optimizer.load_state_dict`, but keeps moments in bfloat16 instead of casting them to
        the parameter's dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def _update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor | None,
    step: int,
    group: dict,
) -> None:
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    if grad_scale is not None:
        gradient = gradient * grad_scale.reciprocal()
    first = exp_avg.float().lerp_(gradient, 1 - beta1)
    second = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    exp_avg.copy_(round_at_random(first))
    exp_avg_sq.copy_(round_at_random(second))
    denominator = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(first.div_(denominator).mul_(group["lr"] / (1 - beta1**step)))


def _kernel_takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernel supports this parameter, given with its gradient and moments."""
    return HAS_TRITON and all(
        # It computes in float32, which is too imprecise for float64.
        tensor.device.type == "cuda" and tensor.is_contiguous() and tensor.dtype.itemsize <= 4
        for tensor in tensors
    )


def _update_by_kernel(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor | None,
    step: int,
    index: int,
    group: dict,
) -> None:
    # Imported late: triton exists on Linux only.
    from rrhf_fast.kernels import adamw_bf16 as kernel

    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    # The seed of torch's CPU generator is stored in checkpoints, needs no synchronisation, and is
    # equal on ranks that hold copies of the same parameters.
    seed = torch.initial_seed()
    tensors = (parameter, gradient, exp_avg, exp_avg_sq)
    kernel.update(*tensors, grad_scale, step=step, index=index, seed=seed, **options)


def round_at_random(x: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16 with stochastic rounding. Expects finite numbers."""
    # bfloat16 is the upper half of a float32's bits. Noise added to the lower half carries with a
    # probability proportional to it.
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _parts(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Split tensors of equal shape by rows, so that float32 copies of the parts are small."""
    tensors = [torch.atleast_1d(tensor) for tensor in tensors]
    row = max(1, tensors[0][:1].numel())
    return zip(*(tensor.split(max(1, PART // row)) for tensor in tensors), strict=True)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    # The update is elementwise, so shards are independent.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
