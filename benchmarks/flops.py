"""Operations that loss and gradient need, in products with weights and in attention.

As in "model FLOPs utilisation" (Chowdhery et al., arXiv 2204.02311, appendix B): without those
repeated by activation checkpointing, padding, and masked scores of attention.
"""

from collections.abc import Sequence

import torch

from rrhf_fast.data.forest import PackedForest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.profile import decoder_flops


def flops_of_packs(
    engine: RRHFModel, packs: Sequence[PackedForest], active_fraction: float
) -> float:
    """Operations for packs, if this fraction of the predictions has a gradient."""
    # Padding follows the last row that predicts.
    depths = [pack.position_ids[: int(pack.edge_rows.max()) + 1] for pack in packs]
    edges = sum(len(pack.edge_rows) for pack in packs)
    return _flops(engine, torch.cat(depths), edges, active_fraction)


def flops_of_rows(
    engine: RRHFModel, queries: Sequence[TokenisedQuery], active_fraction: float
) -> float:
    """The same if every response carries its own prompt."""
    responses = [(len(q.prompt_ids), len(ids)) for q in queries for ids in q.response_ids]
    depths = [torch.arange(prompt + length - 1) for prompt, length in responses]
    edges = sum(length for _, length in responses)
    return _flops(engine, torch.cat(depths), edges, active_fraction)


def _flops(
    engine: RRHFModel, depths: torch.Tensor, num_edges: int, active_fraction: float
) -> float:
    config, head = engine.lm.config, engine.head.linear.weight
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Queries by keys and weights by values, 2 operations per multiply-add; backward twice as much.
    per_pair = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * size
    # A token sees its path, whose length is its depth.
    pairs = float((depths.double() + 1).sum())
    decoder = sum(decoder_flops(engine.lm)) * len(depths)
    return decoder + per_pair * pairs + 2 * head.numel() * num_edges * (1 + 2 * active_fraction)
