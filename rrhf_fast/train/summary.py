"""The summary printed before the first step: what the run will train on."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rrhf_fast.data.checks import listed
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.split import count_shared
from rrhf_fast.data.tokenise import TokenCounts, TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.config import TrainConfig


def describe(
    config: TrainConfig,
    model: RRHFModel,
    train: PackPlanner,
    held_out: Sequence[TokenisedQuery],
    report: RowReport,
    cut: TokenCounts,
    max_length: int,
    has_template: bool,
) -> str:
    """Model, rows, k, ties, duplicates, dropped and cut rows, packed versus padded tokens."""
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
    dropped = report.bad_responses.most_common()
    left_out = "".join(f", {count} left out: {kind}" for kind, count in dropped)
    ks = ", ".join(f"{k} ({count} rows)" for k, count in sorted(sizes.items()))
    lines = {
        "model": f"{config.model_name_or_path} ({kind}, {num_parameters} parameters)",
        "device": f"{model.device}, {config.dtype} arithmetic, packing {config.packing}, "
        f"packs of {config.max_tokens_per_pack} tokens",
        **_attention_lines(model),
        "rows": f"{report.read} read, {len(queries)} to train on, {len(held_out)} held out"
        + skipped,
        "responses": f"{num_responses}, k = {ks}{left_out}",
        "": f"{ties} rows with tied scores, {duplicates} with duplicate responses",
        "cut": f"{cut.cut['prompts']} prompts and {cut.cut['responses']} responses, "
        f"to fit {max_length} tokens",
        "tokens": f"{packed:,} per epoch; with padding {padded:,} "
        f"({padded / packed:.2f} times as many)",
    }
    if text := warn_of_text([query.row.prompt for query in queries], has_template):
        lines["prompts"] = text
    if report.unused:
        lines["unused"] = f"fields: {counted(report.unused)}"
    shared = count_shared([q.row for q in held_out], [q.row for q in queries])
    if shared:
        lines["leak"] = (
            f"warning: {shared} of {len(held_out)} held-out rows share a prompt with training rows"
        )
    if ties == len(queries) and all(len(np.unique(query.rewards)) == 1 for query in queries):
        lines["warning"] = "no row has two different scores, so there is nothing to rank"
    oversized = [size for size in train.sizes if size > config.max_tokens_per_pack]
    if oversized:
        lines["note"] = (
            f"{len(oversized)} rows exceed max_tokens_per_pack ({config.max_tokens_per_pack}) "
            f"and each get their own pack; the largest has {max(oversized):,} tokens"
        )
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _attention_lines(model: RRHFModel) -> dict[str, str]:
    choice = model.attention
    kind = "the model's own" if choice is None else f"{choice.name} ({choice.reason})"
    layers = "compiled" if model.compiled else "not compiled"
    lines = {"attention": f"{kind}; layers {layers}"}
    return lines | ({"fallback": f"warning: {'; '.join(model.warnings)}"} if model.warnings else {})


def warn_of_text(prompts: Sequence[str | list[dict]], has_template: bool) -> str | None:
    """A warning about prompts that bypass the tokenizer's chat template, if any."""
    texts = sum(isinstance(prompt, str) for prompt in prompts)
    if not texts or not has_template:
        return None
    which = "all" if texts == len(prompts) else f"{texts} of {len(prompts)}"
    return (
        f"warning: {which} are text, which bypasses the model's chat template; "
        "--apply_chat_template true turns them into messages"
    )


def counted(rows_with: Counter) -> str:
    """The 12 most frequent names, each with its number of rows."""
    shown = [f"{listed([name])} ({count} rows)" for name, count in rows_with.most_common(12)]
    more = len(rows_with) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
