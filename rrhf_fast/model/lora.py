"""LoRA adapters by peft, added to the model in place: it stays a Hugging Face decoder, and its
`save_pretrained` writes only the adapters, in peft's format."""

from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rrhf_fast.model.sharded import rows_of_rank

MAGNITUDE = ".lora_magnitude_vector."  # DoRA's lengths of rows


class LoraOptions(Protocol):
    """Rank, scale, layers and kind of the adapters, as the trainer's options name them."""

    lora_r: int
    lora_alpha: int
    lora_target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to adapters."""
    return any(part in name for part in (".lora_A.", ".lora_B.", MAGNITUDE))


def add_lora(lm: PreTrainedModel, config: LoraOptions) -> None:
    """Freeze the model and add uninitialised adapters; `init_lora` sets their values.

    Raises:
        ValueError: peft is not installed, or lora_target_modules names no linear layer.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        problem = f"peft is not installed ({error}); pip install peft"
        raise ValueError(f"use_peft: {problem}") from error
    targets = config.lora_target_modules
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        lm.add_adapter(settings)
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {error}") from error
    if config.use_dora:
        _check_dora(lm)
    adapters = [name for name, p in lm.named_parameters() if p.requires_grad]
    head = type(lm.get_output_embeddings()).__module__.startswith("peft.")
    if head or not all(map(is_adapter, adapters)):
        raise ValueError(
            f"lora_target_modules: expected linear layers below the head, found {targets!r}"
        )
    lm.eval()


def _check_dora(lm: PreTrainedModel) -> None:
    """Raise ValueError for layers that store their weights by columns."""
    for name, module in lm.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and not isinstance(base, nn.Linear):
            kind = type(base).__name__
            raise ValueError(f"use_dora: expected nn.Linear layers, found {kind} ({name})")


@torch.no_grad()
def init_lora(lm: PreTrainedModel, seed: int) -> None:
    """Initialise as peft does, A uniform within 1 / sqrt(fan in), B zero and magnitudes the lengths
    of the weights' rows, but independently of how the model is sharded."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(lm.named_parameters())
    for name, parameter in parameters.items():
        if ".lora_A." in name:
            value = torch.rand(parameter.shape, generator=generator)
            _assign(parameter, (2 * value - 1) / parameter.shape[1] ** 0.5)
        elif ".lora_B." in name:
            parameter.zero_()
        elif MAGNITUDE in name:  # both are sharded by rows
            weight = parameters[f"{name.partition(MAGNITUDE)[0]}.base_layer.weight"]
            _local(parameter).copy_(_local(weight).float().norm(dim=1))


def _assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full value into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        value = value[rows_of_rank(parameter)]
    _local(parameter).copy_(value)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
