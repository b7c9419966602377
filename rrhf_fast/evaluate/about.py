"""What a report says of its run: models, rows, options, date, versions. Of what lies on this
machine it gives the last part of the name alone."""

import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

from rrhf_fast.stages.cards import NOT_SHOWN, versions, without_paths
from rrhf_fast.stages.help import default_of

# Options that name models and rows, and what a report calls these.
_NAMED = {
    "model_name_or_path": "model",
    "baseline": "baseline",
    "reference_model_name_or_path": "reference",
    "reward_model_name_or_path": "reward",
    "reward_fn": "reward",
    "judge_model": "reward",
    "data": "data",
    "eval_data": "eval_data",
    "ranking_data": "ranking_data",
}
# Options that are named elsewhere in a report, decide no result, or are nobody else's business.
_LEFT_OUT = NOT_SHOWN | set(_NAMED) | {
    "overwrite", "timeout", "max_retries", "max_concurrency", "base_url", "api_key_env",
    "serve_command", "serve_timeout", "engine_kwargs", "extra_body", "judge_extra_body",
    "tokenizer", "source",
}  # fmt: skip


def about(config: object, scored: Path) -> dict:
    """What to say of the run of `config`, whose samples are in `scored`, as plain data. The date is
    that of the samples."""
    named = {}
    for option, title in _NAMED.items():
        if value := getattr(config, option, None):
            named[title] = shown_names(value)
    return named | {
        "num_samples": config.num_samples,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "date": time.strftime("%Y-%m-%d", time.localtime(scored.stat().st_mtime)),
        "options": changed_options(config),
        "versions": versions(),
    }


def shown_names(names: str | list[str]) -> str:
    """The names of models or rows, without the folders that local ones are in."""
    names = [names] if isinstance(names, str) else names
    return ", ".join(map(_shown_name, names))


def _shown_name(name: str) -> str:
    if name.endswith("scored.jsonl"):
        return "samples of an earlier evaluation"
    is_local = without_paths(name) != name
    return f"{Path(name).name or 'a folder'} (local)" if is_local else name


def changed_options(config: object) -> dict:
    """The options that differ from their defaults, those within options too."""
    changed = {}
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name in _LEFT_OUT:
            continue
        if is_dataclass(value):
            if inner := changed_options(value):
                changed[option.name] = inner
        elif isinstance(value, list) and all(map(is_dataclass, value)):  # of policies
            if list(map(asdict, value)) != default_of(option):
                changed[option.name] = [
                    {"method": item.method} | changed_options(item) for item in value
                ]
        elif value != default_of(option):
            changed[option.name] = without_paths(value)
    return changed
