"""Operations that loss and gradient need (`rrhf_fast.model.flops`), if a given fraction of the
predictions has a gradient."""

from collections.abc import Sequence

from rrhf_fast.data.forest import PackedForest, build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel


def flops_of_packs(
    engine: RRHFModel, packs: Sequence[PackedForest], active_fraction: float
) -> float:
    """Operations for packs."""
    work = (engine.costs.of_pack(pack, active_fraction * len(pack.edge_rows)) for pack in packs)
    return sum(float(sum(flops)) for flops in work)


def flops_of_rows(
    engine: RRHFModel, queries: Sequence[TokenisedQuery], active_fraction: float
) -> float:
    """The same if every response carries its own prompt."""
    rows = [
        TokenisedQuery(q.prompt_ids, [ids], q.rewards[:1])
        for q in queries
        for ids in q.response_ids
    ]
    return flops_of_packs(engine, [build_forest(rows)], active_fraction)
