"""Load a model that no process ever holds whole: it is created empty, sharded, then filled from
safetensors, each rank reading its own rows of each tensor.

This requires files that store tensors under the model's own names. Checkpoints that transformers
converts while loading (experts fused into one tensor, old names) are loaded whole instead.
"""

import copy

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from rrhf_fast.model.pretrained import (
    FLOATS,
    Stored,
    check_generation_config,
    loading,
    make_empty,
    read_config,
    refuse_adapters,
    stored_tensors,
)


def empty_model(
    name_or_path: str, *, trust_remote_code: bool = False, option: str = "model_name_or_path"
) -> PreTrainedModel:
    """The model on the meta device: shapes, no weights. Raises ValueError if it cannot be made."""
    with loading(name_or_path, option):
        refuse_adapters(name_or_path, option)
        config = read_config(name_or_path, trust_remote_code=trust_remote_code)
        lm = make_empty(AutoModelForCausalLM, config, trust_remote_code=trust_remote_code)
        if (settings := check_generation_config(name_or_path)) is not None:
            lm.generation_config = settings
    return lm.eval()


def locate_weights(lm: PreTrainedModel, name_or_path: str) -> dict[str, Stored] | None:
    """Where each tensor of `lm.state_dict()` is stored, by name; tied names once. None if a tensor
    is missing or has another shape: then transformers must load the model."""
    with loading(name_or_path, "model_name_or_path"):
        stored = stored_tensors(name_or_path, lm.config)
    locations = {}
    for name, tensor in named_tensors(lm).items():
        prefixed = (name, name.removeprefix(f"{lm.base_model_prefix}."))
        key = next((key for key in prefixed if key in stored), None)
        if key is None or stored[key].shape != tuple(tensor.shape):
            return None
        if tensor.is_floating_point() != (stored[key].dtype in FLOATS):
            return None
        locations[name] = stored[key]
    return locations


@torch.no_grad()
def fill_weights(lm: PreTrainedModel, locations: dict[str, Stored]) -> None:
    """Read the weights of a sharded model whose memory is allocated but uninitialised (`to_empty`).
    Tensors not in `locations`, such as adapters, are left to the caller."""
    tensors = named_tensors(lm)
    by_file = {}
    for name, stored in locations.items():
        by_file.setdefault(stored.file, []).append((name, stored.key))
    for file, names in by_file.items():
        with safe_open(file, "pt") as stored:
            for name, key in names:
                if name not in tensors:  # an adapter wraps this layer
                    module, _, parameter = name.rpartition(".")
                    name = f"{module}.base_layer.{parameter}"
                target, rows = tensors[name], stored.get_slice(key)
                if isinstance(target, DTensor):
                    target.to_local().copy_(rows[rows_of_rank(target)])
                else:
                    target.copy_(rows[:] if target.dim() else stored.get_tensor(key))
    # Buffers that checkpoints lack, such as rotary frequencies, are initialised by transformers,
    # which skips marked tensors.
    for tensor in [*lm.parameters(), *tensors.values()]:
        tensor._is_hf_initialized = True
    lm.initialize_weights()


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once, sharing the module's memory."""
    names = dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


@torch.no_grad()
def small_twin(lm: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same architecture on `device`, with random weights and the fewest layers that include
    each kind of layer: stands in for an empty model in checks. No weight is left as it begins: at
    zeros and ones, what a layer does with them would not show."""
    config = copy.deepcopy(lm.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = 1
    if kinds:
        text.num_hidden_layers = max(kinds.index(kind) for kind in set(kinds)) + 1
        text.layer_types = kinds[: text.num_hidden_layers]
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        code = {"trust_remote_code": lm.is_remote_code()}
        twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **code)
        for weight in twin.parameters():
            spread = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
            weight.add_(torch.randn_like(weight), alpha=spread)
    return twin.eval()


def rows_of_rank(tensor: DTensor) -> slice:
    """The rows of this rank's shard: FSDP splits as torch.chunk does."""
    (dim,) = (i for i, place in enumerate(tensor.placements) if isinstance(place, Shard))
    rows_each = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
    start = min(rows_each * tensor.device_mesh.get_local_rank(dim), tensor.shape[0])
    return slice(start, start + len(tensor.to_local()))
