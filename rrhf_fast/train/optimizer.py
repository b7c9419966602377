"""Build AdamW, in the configured precision, and its learning-rate schedule."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from rrhf_fast.spans import span
from rrhf_fast.train.adamw_bf16 import AdamWBF16
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import whole
from rrhf_fast.train.schedule import build_schedule


def build_optimizer(
    model: nn.Module, config: TrainConfig, num_steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW over the trainable parameters, with weight decay on matrices only, and a schedule of
    `num_steps` steps.

    Raises:
        ValueError: unknown `lr_scheduler_type` or unsupported `lr_scheduler_kwargs`; `optim
            adamw_8bit` without torchao.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    optimizer = _adamw(config)(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    for group in optimizer.param_groups:
        # Needed to resume in the middle of a schedule. A copy: torchao updates "lr" in place.
        group["initial_lr"] = float(group["lr"])
    return optimizer, build_schedule(optimizer, config, num_steps)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The norm of all gradients together, over all ranks; all ranks must ask."""
    with span("optimizer"):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))


def clipped_step(optimizer: torch.optim.Optimizer, grad_norm: float, max_norm: float) -> None:
    """Take one step on gradients clipped to `max_norm` as by `torch.nn.utils.clip_grad_norm_`,
    given their norm.

    Clipping needs no extra pass over the gradients: the update divides by `grad_scale`, which
    torch.amp introduced for this. Gradients are undefined afterwards (torch's update leaves scaled
    ones behind).
    """
    scale = (grad_norm + 1e-6) / max_norm  # the epsilon of clip_grad_norm_
    if scale <= 1:
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Filled on the device, because a copy from the host would synchronise.
    on_device = partial(torch.full, (), dtype=torch.float32, device=parameters[0].device)
    if isinstance(optimizer, AdamWBF16 | torch.optim.AdamW):
        optimizer.grad_scale = on_device(scale)
        optimizer.step()
        del optimizer.grad_scale
    else:  # torchao's does not support grad_scale
        with span("optimizer"):
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, on_device(grad_norm))
        optimizer.step()


def _adamw(config: TrainConfig) -> Callable[..., torch.optim.Optimizer]:
    if config.optim == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            problem = f"adamw_8bit needs torchao ({error}); pip install torchao"
            raise ValueError(f"optim: {problem}") from error
        return AdamW8bit
    if config.optimizer_state_dtype == "bfloat16":
        return AdamWBF16
    return partial(torch.optim.AdamW, fused=True)
