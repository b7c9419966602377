"""Frozen weights in 4 bits under LoRA adapters: QLoRA's NF4 with double quantisation (Dettmers et
al., arXiv 2305.14314), by bitsandbytes. Embeddings, norms and the head keep their precision."""

import math
from collections.abc import Iterator
from importlib.util import find_spec

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from rrhf_fast.model.decoder import load_model

# Of a weight: 8 for the scale of 64 weights, 32 for that of 256 scales (section 3 of the paper).
KIND, BITS = "nf4", 4 + 8 / 64 + 32 / (64 * 256)


def load_in_four_bits(
    name_or_path: str,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM on the device, whose linear layers multiply in `compute_dtype`. Raises the
    ValueErrors of `load_model`, and one if bitsandbytes is not installed."""
    _require_bitsandbytes()
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=KIND,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    lm = load_model(
        name_or_path,
        trust_remote_code=trust_remote_code,
        device_map={"": device},
        quantization_config=settings,
    )
    for module in lm.modules():
        # Else, on CPUs that multiply in bfloat16, layers in eval mode pack their weights anew, for
        # products that are rounded more and have no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm


def _require_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is None:
        problem = "bitsandbytes is not installed (pip install rrhf-fast[lowbit])"
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
