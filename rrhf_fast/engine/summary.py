"""What a run is about to train on, in a few lines: read before the first step is paid for."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rrhf_fast.config import TrainConfig
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.rows import RowReport
from rrhf_fast.data.tokenise import TokenCounts, TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel


def describe(
    config: TrainConfig,
    model: RRHFModel,
    train: PackPlanner,
    held_out: Sequence[TokenisedQuery],
    report: RowReport,
    cut: TokenCounts,
    max_length: int,
) -> str:
    """Model, rows, k, ties, duplicates, what was dropped or cut, tokens packed against padded."""
    queries = train.queries
    sizes = Counter(len(query.response_ids) for query in queries)
    num_responses = sum(k * count for k, count in sizes.items())
    ties = sum(len(np.unique(query.rewards)) < len(query.rewards) for query in queries)
    duplicates = sum(
        len({ids.tobytes() for ids in query.response_ids}) < len(query.response_ids)
        for query in queries
    )
    packed, padded = sum(train.sizes), sum(padded_tokens(query) for query in queries)
    num_parameters = _short(sum(p.numel() for p in model.parameters()))
    kind = model.lm.config.model_type
    skipped = "".join(f", {count} skipped: {kind}" for kind, count in report.bad.most_common())
    ks = ", ".join(f"{k} ({count} rows)" for k, count in sorted(sizes.items()))
    lines = {
        "model": f"{config.model_name_or_path} ({kind}, {num_parameters} parameters)",
        "device": f"{model.device}, {config.dtype} arithmetic, packing {config.packing}, "
        f"packs of {config.max_tokens_per_pack} tokens",
        **_attention_lines(model),
        "rows": f"{report.read} read, {len(queries)} to train on, {len(held_out)} held out"
        + skipped,
        "responses": f"{num_responses}, k = {ks}",
        "": f"{ties} rows with tied scores, {duplicates} with duplicate responses",
        "cut": f"{cut.cut['prompts']} prompts and {cut.cut['responses']} responses, "
        f"to fit {max_length} tokens",
        "tokens": f"{packed:,} an epoch; padded it would be {padded:,} "
        f"({padded / packed:.2f} times as many)",
    }
    if ties == len(queries) and all(len(np.unique(query.rewards)) == 1 for query in queries):
        lines["warning"] = "no row has two different scores, so there is nothing to rank"
    oversized = [size for size in train.sizes if size > config.max_tokens_per_pack]
    if oversized:
        lines["note"] = (
            f"{len(oversized)} rows exceed max_tokens_per_pack ({config.max_tokens_per_pack}) and "
            f"get a pack each, the largest {max(oversized):,} tokens"
        )
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _attention_lines(model: RRHFModel) -> dict[str, str]:
    choice = model.attention
    kind = "the model's own" if choice is None else f"{choice.name} ({choice.reason})"
    layers = "compiled" if model.compiled else "not compiled"
    lines = {"attention": f"{kind}; layers {layers}"}
    return lines | ({"fallback": f"warning: {'; '.join(model.warnings)}"} if model.warnings else {})


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
