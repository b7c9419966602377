"""Gather the weights of a run from its ranks and write them."""

from pathlib import Path

import torch
from torch import nn

from rrhf_fast.model.lora import is_adapter
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.save import write_model
from rrhf_fast.model.sharded import named_tensors
from rrhf_fast.stages.lock import locked
from rrhf_fast.train.distributed import World, whole
from rrhf_fast.train.prepare import Run


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name: the adapters if there are any, else all
    parameters and persistent buffers. They share memory with the model."""
    tensors = named_tensors(model)
    adapters = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    return adapters or tensors


def gather_weights(model: RRHFModel, world: World, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`trained_tensors` of `model.lm`, whole and in `dtype`, on the first rank's CPU; {} on others.
    Gathers one tensor at a time. All ranks must call."""
    weights = {}
    for name, tensor in trained_tensors(model).items():
        tensor = whole(tensor.detach())
        if world.is_first:
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            weights[name.removeprefix("lm.")] = tensor.cpu()
    return weights


def save_model(run: Run, output_dir: Path | None = None) -> list[str]:
    """Write model (or adapters) and tokenizer, by default to the run's output_dir; returns the
    names of these files. All ranks must call. Raises ValueError if another process writes to that
    folder."""
    weights = gather_weights(run.model, run.world, run.save_dtype)
    folder = output_dir or run.output_dir

    def write() -> list[str]:
        # The saved config must name a standard attention.
        with locked(folder), run.model.generation():
            options = {"dtype": run.save_dtype, "weights": weights}
            options["in_4bit"] = run.config.load_in_4bit
            return write_model(run.model.lm, run.tokenizer, folder, **options)

    return run.world.once(write)
