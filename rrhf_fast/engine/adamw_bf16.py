"""AdamW whose two moments are bfloat16: 4 bytes a parameter where float32 takes 8.

A moment moves by a small share of itself each step, the second by 0.001 with the default beta,
which is less than half the distance between two bfloat16 numbers. Rounded to the nearest, it would
never move again. So moments are rounded up or down at random, in proportion to what is nearer:
right on average.
"""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Numbers that are updated at once.
PART = 2**24


class AdamWBF16(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with bfloat16 moments; parameters keep their
    dtype, and arithmetic is float32. Options are those of `torch.optim.AdamW`."""

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
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for parts in _parts(*(_local(tensor) for tensor in tensors)):
                    _update(*parts, state["step"].item(), group)

    def load_state_dict(self, state_dict: dict) -> None:
        """As `Optimizer.load_state_dict`, which casts moments to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def _update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: float,
    group: dict,
) -> None:
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    first = exp_avg.float().lerp_(gradient, 1 - beta1)
    second = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    exp_avg.copy_(round_at_random(first))
    exp_avg_sq.copy_(round_at_random(second))
    denominator = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(first.div_(denominator).mul_(group["lr"] / (1 - beta1**step)))


def round_at_random(x: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, up or down in proportion to what is nearer. Expects finite numbers."""
    # bfloat16 is the upper half of a float32's bits. Noise below it carries over into it as often
    # as the lower half is large.
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _parts(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Rows of tensors of one shape, as many at a time as keep the copies in float32 small."""
    tensors = [torch.atleast_1d(tensor) for tensor in tensors]
    row = max(1, tensors[0][:1].numel())
    return zip(*(tensor.split(max(1, PART // row)) for tensor in tensors), strict=True)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    # All of it is elementwise, so a shard needs nothing of the others.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
