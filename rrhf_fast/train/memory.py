"""Estimate a GPU's memory use from shapes alone, for `--dry_run` and automatic pack sizes.

Weights, gradients and optimizer state are counted. Activations, the tensors that autograd saves for
one pack, are measured by running the decoder on the meta device, which computes only shapes. Not
counted: the head's gradient of hidden states and the residual stream under autocast, both in
float32; gradients of parameters outside layers, before FSDP reduces them; and fragmentation, NCCL's
buffers and the CUDA context (about 1 GiB together).
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedModel

from rrhf_fast.data.checks import one_line
from rrhf_fast.losses.linear_rrhf import MAX_WORKSPACE_MB
from rrhf_fast.model.decoder import attention
from rrhf_fast.model.four_bit import BITS, linear_weights
from rrhf_fast.model.layers import CHECKPOINT_KEEPS, decoder_layers
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train.config import TrainConfig

NUM_GPUS = tuple(2**n for n in range(11))  # to 1,024
# The range of `max_tokens_per_pack auto`, and the share of a GPU that the estimate may fill.
PACK_STEP, SMALLEST_PACK, LARGEST_PACK = 1024, 2048, 32768
SHARE_TO_FILL = 0.85
DRY_RUN_MEMORY = 80 * 2**30  # bytes of the GPU for which --dry_run chooses packs


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # weights in the compute dtype, and gradients before they are reduced
    activations: float
    head: float


def gpu_counts(config: TrainConfig) -> tuple[int, ...]:
    """The numbers of GPUs that a dry run tells of."""
    return NUM_GPUS[:1] if config.load_in_4bit else NUM_GPUS


def memory_table(config: TrainConfig) -> str:
    """The estimate for a config on 1 to 1,024 GPUs, in GiB. Raises the ValueErrors of loading."""
    options = {"trust_remote_code": config.trust_remote_code}
    lm = empty_model(config.model_name_or_path, **options)
    if config.use_peft:
        add_lora(lm, config)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    activations = activation_line(lm, config, dtype)
    numbers_of_gpus = gpu_counts(config)
    sizes = [config.max_tokens_per_pack] * len(numbers_of_gpus)
    packs = f"packs of {config.max_tokens_per_pack} tokens"
    if config.max_tokens_per_pack == "auto":
        sizes = [
            fitting_tokens(lm, config, dtype, num_gpus, activations, memory=DRY_RUN_MEMORY)
            for num_gpus in numbers_of_gpus
        ]
        chosen = sizes[:1] if len(set(sizes)) == 1 else sizes
        packs = f"packs of {', '.join(map(str, chosen))} tokens (auto, on GPUs of 80 GiB)"
    count = sum(parameter.numel() for parameter in lm.parameters())
    names = [field.name for field in fields(Memory)]
    lines = [
        f"GiB per GPU: {config.model_name_or_path}, {count / 1e9:.3g}B parameters, "
        f"{str(dtype).removeprefix('torch.')}, {packs}, "
        f"activation_checkpointing {config.activation_checkpointing}",
        f"{'GPUs':>6}" + "".join(f"{name:>13}" for name in [*names, "total"]),
    ]
    for num_gpus, size in zip(numbers_of_gpus, sizes, strict=True):
        parts = astuple(estimate(lm, config, dtype, num_gpus, activations(size)))
        numbers = "".join(f"{part / 2**30:13.2f}" for part in [*parts, sum(parts)])
        lines.append(f"{num_gpus:>6,}{numbers}")
    return "\n".join(lines)


def fitting_tokens(
    lm: PreTrainedModel,
    config: TrainConfig,
    dtype: torch.dtype,
    num_gpus: int,
    activations: Callable[[int], float],
    *,
    memory: float,
    largest_query: int = 0,
) -> int:
    """Tokens per pack that fit a GPU of `memory` bytes by the estimate, with weights sharded over
    `num_gpus` and `activations` from `activation_line`."""
    fixed = sum(astuple(estimate(lm, config, dtype, num_gpus)))
    room = SHARE_TO_FILL * memory
    return choose_tokens(lambda tokens: fixed + activations(tokens), room, largest_query)


def choose_tokens(total: Callable[[int], float], room: float, largest_query: int) -> int:
    """The largest multiple of 1024 up to 32768 whose `total` bytes fit `room`; at least 2048 and
    at least the largest query (which is never split), even if these do not fit."""
    smallest = max(SMALLEST_PACK, -(-largest_query // PACK_STEP) * PACK_STEP)
    sizes = range(smallest, LARGEST_PACK + 1, PACK_STEP)
    return max((tokens for tokens in sizes if total(tokens) <= room), default=smallest)


def estimate(
    lm: PreTrainedModel,
    config: TrainConfig,
    dtype: torch.dtype,
    num_gpus: int,
    activations: float = 0,
) -> Memory:
    """Estimate with weights sharded over `num_gpus`; 1 means a process without torchrun."""
    layers = [parameter_counts(layer) for layer in decoder_layers(lm)]
    count, trained = parameter_counts(lm)
    largest, rest = max(layers), count - sum(size for size, _ in layers)
    masters = 4 * count / num_gpus
    in_four_bits = 0
    if config.load_in_4bit:
        in_four_bits = sum(weight.numel() for weight in linear_weights(lm))
    if num_gpus == 1:
        # Each float32 weight has a copy: permanent in the decoder's layers, temporary in the head.
        # Frozen weights are in the compute dtype.
        gathered = 0 if dtype == torch.float32 else dtype.itemsize * trained
        masters = 4 * trained + dtype.itemsize * (count - trained - in_four_bits)
        masters += BITS / 8 * in_four_bits
    elif config.reshard_after_forward:
        # The current layer, the next one, the rest outside layers; one layer's gradients.
        gathered = dtype.itemsize * (2 * largest[0] + rest) + (dtype.itemsize + 4) * largest[1]
    else:
        gathered = dtype.itemsize * count + 4 * trained
    head = lm.get_output_embeddings().weight
    # Summed in float32; sharded weights and their gradients are in the compute dtype.
    rounded = 0 if num_gpus == 1 else dtype.itemsize
    d_weight = (4 + rounded) * head.numel() if head.requires_grad else 0
    on_gpu = 0 if config.cpu_offload else 1
    return Memory(
        weights=on_gpu * masters,
        gradients=on_gpu * 4 * trained / num_gpus,
        optimizer=on_gpu * 2 * _moment_bytes(config) * trained / num_gpus,
        gathered=gathered,
        activations=activations,
        head=MAX_WORKSPACE_MB * 2**20 + d_weight,
    )


def activation_line(
    lm: PreTrainedModel, config: TrainConfig, dtype: torch.dtype
) -> Callable[[int], float]:
    """`activation_bytes` as a linear function of the tokens, fitted to two sizes: all that is saved
    is linear in them, since fused attention saves no matrix of scores."""
    low, high = (activation_bytes(lm, config, dtype, n) for n in (PACK_STEP, SMALLEST_PACK))
    slope = (high - low) / (SMALLEST_PACK - PACK_STEP)
    return lambda tokens: low + slope * (tokens - PACK_STEP)


def activation_bytes(
    lm: PreTrainedModel, config: TrainConfig, dtype: torch.dtype, num_tokens: int
) -> int:
    """Bytes held between forward and backward of a pack of this many tokens; `lm` is on the meta
    device. Raises ValueError for a model whose shapes depend on its data."""
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    lm.to(dtype)
    kept = _Kept(lm)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor)
    try:
        with attention(lm, "rrhf_shapes"), hooks, kept:
            positions = torch.arange(num_tokens, device="meta")[None]
            hidden = lm.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    except RuntimeError as error:  # from the model's own code
        problem = f"the activations of {lm.config.model_type} in {dtype} cannot be estimated"
        raise ValueError(f"dry_run, max_tokens_per_pack: {problem} ({one_line(error)})") from error
    lm.to(torch.float32)
    logits = 0
    if config.packing == "none":
        # In float32: log-probs over the vocabulary, their gradient and that of the logits.
        logits = 3 * 4 * num_tokens * len(lm.get_output_embeddings().weight)
    if config.activation_checkpointing == "none":
        return kept.saved + logits
    layers = len(decoder_layers(lm))
    inputs = layers * hidden.numel() * dtype.itemsize
    # A layer's saved tensors exist again while its backward runs.
    one_layer = kept.saved // layers
    recomputed_from = kept.selective if config.activation_checkpointing == "selective" else 0
    return inputs + recomputed_from + one_layer + logits


class _Kept(TorchDispatchMode):
    """Sums the bytes that autograd saves, each storage once, without weights; and those that
    selective checkpointing would keep."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.saved = self.selective = 0
        self._seen = {p.untyped_storage()._cdata for p in lm.parameters()}
        self._alive = []  # addresses of freed storages would be reused

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.saved += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in CHECKPOINT_KEEPS:
            self.selective += out.numel() * out.element_size()
        return out


class _AttentionShapes(torch.autograd.Function):
    """Saves the same tensors as fused attention."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("shapes have no gradient")


def _attention_shapes(module: nn.Module, query, key, value, attention_mask=None, **_):
    return _AttentionShapes.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("rrhf_shapes", _attention_shapes)


def _moment_bytes(config: TrainConfig) -> int:
    """Bytes per parameter of each of AdamW's two moments."""
    if config.optim == "adamw_8bit":
        return 1
    return 2 if config.optimizer_state_dtype == "bfloat16" else 4


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """Numbers of all and of trained parameters."""
    parameters = list(module.parameters())
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )
