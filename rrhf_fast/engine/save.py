"""A trained model as a Hugging Face folder, which `from_pretrained` and vLLM read."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rrhf_fast.engine.distributed import World, whole
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.sharded import named_tensors

WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


class SaveFailed(RuntimeError):
    """A checkpoint or the model could not be written; what was saved before is whole."""


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by name: with adapters they alone, else all parameters and persistent
    buffers. They share memory with the model."""
    parameters = dict(model.named_parameters())
    adapters = {name for name, parameter in parameters.items() if parameter.requires_grad}
    tensors = named_tensors(model)
    if len(adapters) == len(parameters):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name in adapters}


def gather_weights(model: RRHFModel, world: World, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`trained_tensors` of `model.lm`, whole and in `dtype`, on the first rank's CPU; elsewhere {}.
    Gathers a tensor at a time. All ranks must call."""
    weights = {}
    for name, tensor in trained_tensors(model).items():
        tensor = whole(tensor.detach())
        if world.is_first:
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            weights[name.removeprefix("lm.")] = tensor.cpu()
    return weights


def write_model(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    dtype: torch.dtype,
    weights: dict[str, torch.Tensor],
) -> None:
    """Write model and tokenizer beside the target, then move each file into place: no file is ever
    half-written. A model with adapters leaves these alone.

    Raises:
        SaveFailed: the folder cannot be written; what it held is as it was.
    """
    staging = output_dir / ".saving"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        lm.save_pretrained(staging, state_dict=weights)
        if (staging / "config.json").exists():  # adapters come without
            write_config(lm, staging, dtype)
        tokenizer.save_pretrained(staging)
        umask = os.umask(0)
        os.umask(umask)
        names = {path.name for path in staging.iterdir()}
        for path in sorted(staging.iterdir()):
            path.chmod(0o666 & ~umask)  # safetensors keeps its files to their owner
            os.replace(path, output_dir / path.name)
        for pattern in WEIGHT_FILES:
            for path in output_dir.glob(pattern):
                if path.name not in names:  # of an earlier run, cut into other files
                    path.unlink()
        staging.rmdir()
    except Exception as error:  # safetensors has its own for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise SaveFailed(f"output_dir: {output_dir} could not be written ({reason})") from error


def write_config(lm: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """config.json, which names the dtype of the stored weights instead of the trained ones."""
    before, lm.config.dtype = lm.config.dtype, dtype
    lm.config.save_pretrained(folder)
    lm.config.dtype = before
