"""The summary printed before the first step: what the run will train on."""

from collections import Counter

import numpy as np

from rrhf_fast.data.checks import listed
from rrhf_fast.data.load import RowReport
from rrhf_fast.model.four_bit import num_elements
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.stages.cards import short
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.corpora import Corpora

# Between the 1e-6 that preference losses bear on chat models and the 1e-5 that ruins their answers:
# README of princeton-nlp/SimPO, "Hyperparameter tuning".
HIGH_RATE = 5e-6


def describe(
    config: TrainConfig, model: RRHFModel, data: Corpora, max_length: int
) -> dict[str, str]:
    """Lines by name: model, rows, k, ties, duplicates, dropped and cut rows, packed versus padded
    tokens."""
    train, held_out, report, cut = (
        data.train,
        data.held_out,
        data.findings.report,
        data.findings.counts,
    )
    index = train.index
    ks, num_rows = np.unique(index["num_responses"], return_counts=True)
    num_responses = int((ks * num_rows).sum())
    ties = int((index["distinct_rewards"] < index["num_responses"]).sum())
    duplicates = int((index["distinct_responses"] < index["num_responses"]).sum())
    packed, padded = int(index["forest_tokens"].sum(dtype=np.int64)), int(train.padded_tokens.sum())
    sizes = [(num_elements(weight), weight.requires_grad) for weight in model.parameters()]
    num_parameters = f"{short(sum(size for size, _ in sizes))} parameters"
    if config.use_peft:
        trained = short(sum(size for size, learns in sizes if learns))
        num_parameters += f", of which LoRA's {trained} are trained"
    kind = model.lm.config.model_type
    skipped = "".join(f", {count} skipped: {kind}" for kind, count in report.bad.most_common())
    dropped = report.bad_responses.most_common()
    left_out = "".join(f", {count} left out: {kind}" for kind, count in dropped)
    by_k = ", ".join(f"{k} ({count} rows)" for k, count in zip(ks, num_rows, strict=True))
    num_held_out = 0 if held_out is None else len(held_out)
    lines = {
        "model": f"{config.model_name_or_path} ({kind}, {num_parameters})",
        "device": f"{model.device}, {config.dtype} arithmetic, "
        f"{'base weights in 4 bits, ' if config.load_in_4bit else ''}packing {config.packing}, "
        f"packs of {config.max_tokens_per_pack} tokens",
        **_attention_lines(model),
        "rows": f"{report.read} read, {len(train)} to train on, {num_held_out} held out" + skipped,
        "responses": f"{num_responses}, k = {by_k}{left_out}",
        "": f"{ties} rows with tied scores, {duplicates} with duplicate responses",
        "cut": f"{cut.cut['prompts']} prompts and {cut.cut['responses']} responses, "
        f"to fit {max_length} tokens",
        "tokens": f"{packed:,} per epoch; with padding {padded:,} "
        f"({padded / packed:.2f} times as many)",
    }
    when = "found in the cache" if data.seconds is None else f"tokenised in {data.seconds:.1f} s"
    lines["cut"] += f"; rows {when}"
    lines |= warnings(report)
    if report.unused:
        lines["unused"] = f"fields: {counted(report.unused)}"
    if held_out is not None:
        shared = int(np.isin(held_out.index["prompt_key"], index["prompt_key"]).sum())
        if shared:
            lines["leak"] = (
                f"warning: {shared} of {num_held_out} held-out rows share a prompt with training "
                "rows"
            )
    if (index["distinct_rewards"] == 1).all():
        lines["warning"] = "no row has two different scores, so there is nothing to rank"
    elif (index["distinct_responses"] == 1).all():
        lines["warning"] = "no row has two different responses, so there is nothing to rank"
    sizes = index["forest_tokens"] if config.packing == "forest" else train.padded_tokens
    oversized = sizes[sizes > config.max_tokens_per_pack]
    if len(oversized):
        lines["note"] = (
            f"{len(oversized)} rows exceed max_tokens_per_pack ({config.max_tokens_per_pack}) "
            f"and each get their own pack; the largest has {oversized.max():,} tokens"
        )
    return lines


def _attention_lines(model: RRHFModel) -> dict[str, str]:
    choice = model.attention
    kind = "the model's own" if choice is None else f"{choice.name} ({choice.reason})"
    layers = "compiled" if model.compiled else "not compiled"
    lines = {"attention": f"{kind}; layers {layers}"}
    return lines | ({"fallback": f"warning: {'; '.join(model.warnings)}"} if model.warnings else {})


def warnings(report: RowReport) -> dict[str, str]:
    """Lines by name about rows that can be used, though hardly as they are meant."""
    noted, lines = report.noted, report.warnings()
    if cut := noted["cut off"]:
        lines["unfinished"] = (
            f"warning: {cut} responses were cut off by a limit of length, and the model learns to "
            "stop there (sample with --finished_only true, or a larger max_new_tokens)"
        )
    if contradicted := noted["contradicted"]:
        lines["pairs"] = (
            f"warning: {contradicted} pairs have scores that prefer the rejected response, and the "
            "scores decide"
        )
    return lines


def warn_of_rate(config: TrainConfig, model: RRHFModel, has_template: bool) -> str | None:
    """A warning about a learning rate that may ruin a chat model if all weights are trained.

    Models of any size get it: what a small one bears depends on more than its size (one of 135M
    gained at 1e-4 in experiments/), so the text names this model's and those of the advice.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    is_full = not config.use_peft and 2 * trained > total  # a loaded model may be mostly frozen
    if not (has_template and is_full and config.learning_rate > HIGH_RATE):
        return None
    return (
        f"warning: learning_rate {config.learning_rate:g} is high for all weights of a chat model: "
        f"5e-7 to 1e-6 is advised for 1B to 8B parameters, and this one has {short(total)} "
        "(SimPO's authors, with 7B to 9B, saw incoherent or repetitive answers at 1e-5; the RRHF "
        "paper's 2e-5 was for Alpaca-7B)"
    )


def counted(rows_with: Counter) -> str:
    """The 12 most frequent names, each with its number of rows."""
    shown = [f"{listed([name])} ({count} rows)" for name, count in rows_with.most_common(12)]
    more = len(rows_with) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
