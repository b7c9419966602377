"""AdamW, in the precision asked for, and its learning-rate schedule."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from rrhf_fast.config import TrainConfig
from rrhf_fast.engine.adamw_bf16 import AdamWBF16


def build_optimizer(
    model: nn.Module, config: TrainConfig, num_steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW over the trainable parameters, weight decay on matrices only, and a schedule of
    `num_steps` steps.

    Raises:
        ValueError: an unknown `lr_scheduler_type`, or one that needs options that this command does
            not have; `optim adamw_8bit` without torchao.
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
    warmup = (
        config.warmup_steps
        if config.warmup_steps >= 1
        else math.ceil(config.warmup_steps * num_steps)
    )
    for group in optimizer.param_groups:
        # What resuming at a later point of a schedule needs. A copy: torchao changes its in place.
        group["initial_lr"] = float(group["lr"])
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(warmup),
            # These schedules count from a point before the first step, where warm-up has rate 0.
            num_training_steps=num_steps + 1,
            scheduler_specific_kwargs={"last_epoch": 0},
        )
    except (ValueError, TypeError) as error:
        names = ", ".join(sorted(kind.value for kind in SchedulerType))
        problem = f"{config.lr_scheduler_type!r} is none that works by name ({error})"
        raise ValueError(f"lr_scheduler_type: {problem}; there are {names}") from error
    return optimizer, schedule


def clipped_step(optimizer: torch.optim.Optimizer, grad_norm: float, max_norm: float) -> None:
    """One step on gradients scaled down to `max_norm` as by `torch.nn.utils.clip_grad_norm_`, given
    their norm.

    Scaling takes no pass of its own over the gradients: the update divides by `grad_scale`, which
    torch.amp introduced for this. Gradients are of no use afterwards (torch's update leaves scaled
    ones behind).
    """
    scale = (grad_norm + 1e-6) / max_norm  # the small number is clip_grad_norm_'s
    if scale <= 1:
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Filled on the device: a copy from the host would wait for the device.
    on_device = partial(torch.full, (), dtype=torch.float32, device=parameters[0].device)
    if isinstance(optimizer, AdamWBF16 | torch.optim.AdamW):
        optimizer.grad_scale = on_device(scale)
        optimizer.step()
        del optimizer.grad_scale
    else:  # torchao's takes no scale
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, on_device(grad_norm))
        optimizer.step()


def _adamw(config: TrainConfig) -> Callable[..., torch.optim.Optimizer]:
    if config.optim == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            problem = f"adamw_8bit needs torchao ({error}); pip install rrhf-fast[lowbit]"
            raise ValueError(f"optim: {problem}") from error
        return AdamW8bit
    if config.optimizer_state_dtype == "bfloat16":
        return AdamWBF16
    return partial(torch.optim.AdamW, fused=True)
