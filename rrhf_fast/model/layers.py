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
# Graphs of one function. A kind of layer takes one with gradients and one without, and others for
# packs of one block; PyTorch's 8 are few for two kinds.
RECOMPILE_LIMIT = 64
PRIMES = (7, 11, 13, 17, 19, 23)
# What selective checkpointing keeps: results of matrix products and attention.
CHECKPOINT_KEEPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


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
    attention is called. PyTorch bounds their number, which this raises to `RECOMPILE_LIMIT`, and
    runs a function beyond it as it is: `count_given_up`.
    """
    for layer in decoder_layers(lm):
        compiled = torch.compile(layer.forward, dynamic=True, backend=COMPILER)
        layer.forward = partial(_with_more_graphs, compiled)


def _with_more_graphs(compiled: Callable, *args, **kwargs):
    """Each call sets the limit for itself, since such settings belong to a thread, and a GPU's
    backward, which runs checkpointed layers again, has one of its own."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return compiled(*args, **kwargs)


def uncompile_layers(lm: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(lm):
        del layer.forward  # the class has another


def count_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_given_up() -> int:
    """How often in this process torch.compile found a function to have too many graphs, and ran it
    uncompiled from then on."""
    reasons = torch._dynamo.utils.counters["unimplemented"]
    return sum(n for reason, n in reasons.items() if "recompile limit exceeded" in reason)


def trial_length(lm: PreTrainedModel, multiple: int) -> int:
    """Tokens for a trial of compiled layers, a multiple of `multiple`. Compilers take sizes that
    are equal at first for equal always, so it is a prime times that, and no size of a weight."""
    sizes = {size for parameter in lm.parameters() for size in parameter.shape}
    return next(prime * multiple for prime in PRIMES if prime * multiple not in sizes)


def checkpoint_layers(lm: PreTrainedModel, mode: str) -> None:
    """Run each layer's forward again in the backward pass, and keep its input only ("full"), or the
    results of `CHECKPOINT_KEEPS` too ("selective")."""
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, CHECKPOINT_KEEPS)
    for layer in decoder_layers(lm):
        layer.forward = partial(checkpoint, layer.forward, **options)
