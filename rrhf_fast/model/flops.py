"""Floating-point operations of the matrix products that loss and gradient need, a multiply-add
counting as two.

As in "model FLOPs utilisation" (Chowdhery et al., arXiv 2204.02311, appendix B), the counts leave
out recomputation by activation checkpointing, padding, and scores that attention hides. A training
step on the active part alone counts its scoring pass. The backward of a product is two of its kind,
or one where a weight is frozen; predictions without a gradient have no backward.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrhf_fast.data.active import WeightedForest, kept_rows
from rrhf_fast.data.forest import PackedForest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.decoder import Head
from rrhf_fast.model.four_bit import num_elements


class Flops(NamedTuple):
    """Operations per part, as numbers or as float64 tensors on the pack's device."""

    decoder: float | Tensor
    attention: float | Tensor
    head: float | Tensor


@dataclass(frozen=True)
class Costs:
    """Operations of one model per token, per pair of tokens and per prediction."""

    decoder_forward: float  # per token
    decoder_backward: float
    attention: dict[int | None, int]  # forward per visible pair, in all layers with this window
    head_product: int  # per prediction
    head_products_back: int  # 1 or 2 of them

    @classmethod
    def of(cls, lm: PreTrainedModel, specs: Sequence[AttentionSpec], head: Head) -> "Costs":
        """The costs of a model from its shapes. `specs` are those of its layers, or of the first
        ones up to one of each kind."""
        config = lm.config.get_text_config()
        if len(specs) < config.num_hidden_layers:
            kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
            specs = [specs[kinds.index(kind)] for kind in kinds]
        attention = Counter()
        for spec in specs:
            attention[spec.window] += attention_flops(spec, 1)
        weight = head.linear.weight
        back = 1 + weight.requires_grad
        return cls(*decoder_flops(lm), dict(attention), 2 * weight.numel(), back)

    def of_pack(
        self,
        pack: PackedForest | WeightedForest,
        with_gradient: float | Tensor,
        *,
        has_backward: bool = True,
    ) -> Flops:
        """The work on a pack where `with_gradient` predictions have a gradient; `has_backward`
        False is a pass that only scores. Waits for no device."""
        is_real = kept_rows(pack, torch.ones_like(pack.edge_rows, dtype=torch.bool))
        # A token sees its path, which is as long as the token is deep.
        seen = (pack.position_ids + 1) * is_real
        scores = sum(
            per_pair * seen.clamp(max=window or pack.num_tokens).sum().double()
            for window, per_pair in self.attention.items()
        )
        backward = has_backward * self.decoder_backward
        products = len(pack.edge_rows) + self.head_products_back * with_gradient
        return Flops(
            decoder=is_real.sum().double() * (self.decoder_forward + backward),
            attention=(1 + 2 * has_backward) * scores,
            head=self.head_product * products,
        )


def decoder_flops(lm: PreTrainedModel) -> tuple[float, float]:
    """Operations of one token's forward and backward in products with the decoder's weights."""
    looked_up = {
        id(p)
        for m in lm.base_model.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters()
    }
    per_token = getattr(lm.config.get_text_config(), "num_experts_per_tok", None)
    forward = backward = 0
    for parameter in lm.base_model.parameters():
        if parameter.dim() < 2 or id(parameter) in looked_up:
            continue
        # Matrices of experts are stacked; a token goes through a few of them.
        used = per_token / len(parameter) if parameter.dim() == 3 and per_token else 1
        forward += 2 * num_elements(parameter) * used
        backward += 2 * num_elements(parameter) * used * (1 + parameter.requires_grad)
    return forward, backward


def attention_flops(spec: AttentionSpec, pairs: int) -> int:
    """Operations of one layer's forward, for this many visible pairs of a query and a key."""
    return 2 * pairs * spec.num_heads * (spec.head_size + spec.value_size)
