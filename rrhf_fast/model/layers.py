"""Per-layer changes to a decoder: activation checkpointing and compilation.

Both replace a layer's `forward`, not the layer, so that parameter names (and the saved model) do
not change, and hooks on the layer run outside.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

COMPILER = "inductor"
# Graphs per function. Each kind of layer needs one with gradients, one without, and more for packs
# of one block; PyTorch's limit of 8 is too low for two kinds.
RECOMPILE_LIMIT = 64
PRIMES = (7, 11, 13, 17, 19, 23)
# Selective checkpointing keeps the results of matrix products and attention.
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
    """The decoder's layers: its outermost ModuleList with as many modules as the config has layers.

    Raises:
        ValueError: there is no such list.
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
    """Whether layers on this device are compiled by default: GPUs gain most, since uncompiled
    layers launch many small operations."""
    return device.type == "cuda"


def compile_layers(lm: PreTrainedModel) -> None:
    """Compile each layer's forward for any number of tokens.

    Layers of one kind share graphs, so this costs as much as one layer. Graphs break where
    attention is called. PyTorch limits their number, here raised to `RECOMPILE_LIMIT`, and runs a
    function uncompiled beyond it: `count_given_up`.
    """
    for layer in decoder_layers(lm):
        compiled = torch.compile(layer.forward, dynamic=True, backend=COMPILER)
        layer.forward = partial(_with_more_graphs, compiled)


def _with_more_graphs(compiled: Callable, *args, **kwargs):
    """Call with the raised limit. Set per call, since the setting is per thread and a GPU's
    backward, which reruns checkpointed layers, has its own thread."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return compiled(*args, **kwargs)


def uncompile_layers(lm: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(lm):
        del layer.forward  # uncovers the class's method


def restore_layers(lm: PreTrainedModel) -> None:
    """Undo what an earlier `RRHFModel` of the same decoder did to its layers."""
    for module in lm.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in (_with_more_graphs, checkpoint):
            del module.forward  # the class has another


def count_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_given_up() -> int:
    """How many functions in this process exceeded torch.compile's limit on graphs and have run
    uncompiled since."""
    reasons = torch._dynamo.utils.counters["unimplemented"]
    return sum(n for reason, n in reasons.items() if "recompile limit exceeded" in reason)


def trial_length(lm: PreTrainedModel, multiple: int) -> int:
    """Tokens for a trial of compiled layers: `multiple` times a prime, different from every size
    of a weight, because compilers specialise on coinciding sizes."""
    sizes = {size for parameter in lm.parameters() for size in parameter.shape}
    return next(prime * multiple for prime in PRIMES if prime * multiple not in sizes)


def checkpoint_layers(lm: PreTrainedModel, mode: str) -> None:
    """Rerun each layer's forward in the backward pass, keeping only its input ("full") or also the
    results of `CHECKPOINT_KEEPS` ("selective")."""
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, CHECKPOINT_KEEPS)
    for layer in decoder_layers(lm):
        layer.forward = partial(checkpoint, layer.forward, **options)
