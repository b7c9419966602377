"""Operations that loss and gradient need (`rrhf_fast.model.flops`), if a given fraction of the
predictions has a gradient."""

from collections.abc import Sequence

import torch

from rrhf_fast.data.forest import PackedForest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel


def flops_of_packs(
    engine: RRHFModel, packs: Sequence[PackedForest], active_fraction: float
) -> float:
    """Operations for packs."""
    return sum(
        float(sum(engine.costs.of_pack(pack, active_fraction * len(pack.edge_rows))))
        for pack in packs
    )


def flops_of_rows(
    engine: RRHFModel, queries: Sequence[TokenisedQuery], active_fraction: float
) -> float:
    """The same if every response carries its own prompt."""
    responses = [(len(q.prompt_ids), len(ids)) for q in queries for ids in q.response_ids]
    depths = torch.cat([torch.arange(prompt + length - 1) for prompt, length in responses])
    edges = sum(length for _, length in responses)
    is_real = torch.ones_like(depths, dtype=torch.bool)
    return float(sum(engine.costs.of_tokens(depths, is_real, edges, active_fraction * edges)))
