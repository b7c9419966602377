"""Frozen weights in 4 bits under LoRA adapters: QLoRA's NF4 with double quantisation (Dettmers et
al., arXiv 2305.14314), by bitsandbytes. Embeddings, norms and the head keep their precision."""

import math
from collections.abc import Iterator
from importlib.util import find_spec

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from rrhf_fast.data.checks import listed, one_line
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.sharded import empty_model

KIND = "nf4"
# Of a weight: 8 for the scale of 64 weights, 32 for that of 256 scales (section 3 of the paper).
BITS = 4 + 8 / 64 + 32 / (64 * 256)
# bitsandbytes' settings, and the file beside adapters that says that they were trained with them.
SETTINGS = {"load_in_4bit": True, "bnb_4bit_quant_type": KIND, "bnb_4bit_use_double_quant": True}
IN_4BIT = "base_quantization.json"


def load_in_four_bits(
    name_or_path: str, device: torch.device, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM on the device, whose linear layers multiply in float32 for now.

    Raises:
        ValueError: as `load_model`, or bitsandbytes is not installed, or the layers of this model
            are of a kind that bitsandbytes leaves as it is, or that exports could not round.
    """
    _require_bitsandbytes()
    settings = transformers.BitsAndBytesConfig(**SETTINGS, bnb_4bit_compute_dtype=torch.float32)
    lm = load_model(
        name_or_path,
        trust_remote_code=trust_remote_code,
        device_map={"": device},
        quantization_config=settings,
    )
    _check_layers(lm, name_or_path, trust_remote_code)
    for module in lm.modules():
        # Else, on CPUs that multiply in bfloat16, layers in eval mode pack their weights anew, for
        # products that are rounded more and have no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm


def multiply_in(lm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the layers in 4 bits multiply in `dtype` from now on."""
    for module in lm.modules():
        if is_in_four_bits(module):
            module.compute_dtype = dtype


def is_in_four_bits(module: nn.Module) -> bool:
    """Whether this is a layer whose weight is in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _check_layers(lm: PreTrainedModel, name_or_path: str, trust_remote_code: bool) -> None:
    """Raise ValueError unless the layers in 4 bits are those that `linear_weights` finds, with
    finite weights."""
    empty = empty_model(name_or_path, trust_remote_code=trust_remote_code)
    expected = {id(weight) for weight in linear_weights(empty)}
    names = {name for name, p in empty.named_parameters() if id(p) in expected}
    layers = {f"{name}.weight": m for name, m in lm.named_modules() if is_in_four_bits(m)}
    if layers.keys() != names:
        kind = one_line(lm.config.model_type, 40)
        others = listed(sorted(layers.keys() ^ names), most=1, length=100)
        problem = f"{kind} has layers that cannot be kept in 4 bits and merged later ({others})"
        raise ValueError(f"load_in_4bit: {problem}")
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in layers.items():  # a weight that is not finite spoils its neighbours' scales
        if not dequantize_4bit(layer.weight.data, layer.weight.quant_state).isfinite().all():
            problem = f"its weights are damaged: {name} holds NaN or infinite values"
            raise ValueError(f"model_name_or_path: {name_or_path}: {problem}")


def _require_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is None:
        problem = "bitsandbytes is not installed (pip install bitsandbytes)"
        raise ValueError(f"load_in_4bit: {problem}")


def num_elements(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for: in 4 bits it stores two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def linear_weights(lm: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The weights that 4 bits would hold: of linear layers other than the head."""
    head = lm.get_output_embeddings()
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name:
            yield module.weight


@torch.no_grad()
def round_to_four_bits(lm: PreTrainedModel) -> None:
    """Replace these weights, in place, by what 4 bits keep of them: what adapters were trained
    on."""
    _require_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for weight in linear_weights(lm):
        packed, state = quantize_4bit(weight.data, quant_type=KIND, compress_statistics=True)
        weight.copy_(dequantize_4bit(packed, state))
