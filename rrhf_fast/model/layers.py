"""What is done to a decoder layer by layer: activation checkpointing and compilation.

Both replace a layer's `forward`, not the layer, so that names of parameters (and the saved model)
stay as they are, and hooks on the layer run outside.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

COMPILER = "inductor"


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: its longest ModuleList at the outermost level that has one.

    Raises:
        ValueError: there is no list of as many modules as the config names layers.
    """
    lists = [module for module in lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    count = lm.config.get_text_config().num_hidden_layers
    layers = next((module for module in lists if len(module) == count), None)
    if layers is None:
        kind = lm.config.model_type
        raise ValueError(
            f"activation_checkpointing, compile: no list of {count} layers found in {kind}"
        )
    return layers


def compiles_by_default(device: torch.device) -> bool:
    """Whether layers on this device are compiled unless asked otherwise: GPUs gain the most, having
    to wait for each of a layer's small operations otherwise."""
    return device.type == "cuda"


def compile_layers(lm: PreTrainedModel) -> None:
    """Compile each layer's forward for any number of tokens.

    Layers of one kind share their graphs, so this costs what one layer costs. The graphs end where
    attention is called. PyTorch bounds them: beyond torch._dynamo.config.recompile_limit (8) of a
    function it runs that function as it is.
    """
    for layer in decoder_layers(lm):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=COMPILER)


def uncompile_layers(lm: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(lm):
        del layer.forward  # the class has another


def count_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# What selective checkpointing keeps: results of matrix products and attention.
CHECKPOINT_KEEPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_layers(lm: PreTrainedModel, mode: str) -> None:
    """Keep each layer's input, in mode "selective" also `CHECKPOINT_KEEPS`, and run the rest of its
    forward again in the backward pass."""
    for layer in decoder_layers(lm):
        layer.forward = _checkpointed(layer.forward, mode)


def _checkpointed(forward: Callable, mode: str) -> Callable:
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, CHECKPOINT_KEEPS)

    def run(*args, **kwargs):
        return checkpoint(forward, *args, **options, **kwargs)

    return run
