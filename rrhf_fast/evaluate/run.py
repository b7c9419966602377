"""The stage `evaluate`: fresh samples of a model, scored, measured, compared with a baseline's."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np

from rrhf_fast.data.encode import encode_responses
from rrhf_fast.data.load import RowReport, load_drafts, load_rows
from rrhf_fast.data.options import OWN_FORMAT
from rrhf_fast.data.rows import Draft
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.measures import (
    Bootstrap,
    ByPrompt,
    Estimate,
    best_of,
    pairs_in_order,
    win_tie_lose,
    within_correlation,
)
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig, ScorerConfig
from rrhf_fast.score.logprobs import LogProbs, generated
from rrhf_fast.score.run import check_scorer
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.journal import read_json
from rrhf_fast.stages.options import without_removed

# What `sources` calls the two sides.
MODEL, BASELINE = "model", "baseline"
# What an evaluation leaves, finished or not.
ROWS = ("samples.jsonl", "scored.jsonl")
FILES = ("options.json", "options.saving", "evaluation.json", "evaluation.saving")
FILES += ("by_prompt.json", "by_prompt.saving", "evaluation.png", "report.html", *ROWS)
FILES += tuple(f"{name}.{kind}" for name in ROWS for kind in ("journal", "saving"))


@dataclass
class Side:
    """The scored samples of a model, prompt by prompt."""

    drafts: list[Draft]
    rewards: list[np.ndarray]

    @property
    def prompts(self) -> list:
        return [draft.prompt for draft in self.drafts]

    @property
    def responses(self) -> list[list[str]]:
        return [draft.responses for draft in self.drafts]

    @property
    def finish_reasons(self) -> list[list[str | None]]:
        return [draft.finish_reasons or [None] * len(draft.responses) for draft in self.drafts]

    def pick(self, keep: Sequence[int]) -> "Side":
        """The same for these prompts."""
        return Side([self.drafts[i] for i in keep], [self.rewards[i] for i in keep])


@dataclass
class Evaluation:
    """Measures of a model, of its baseline, and of the two against each other, by name."""

    by_prompt: dict[str, ByPrompt]  # the model's
    model: dict[str, Estimate]
    baseline: dict[str, Estimate]
    comparison: dict[str, Estimate]
    best_of_n: dict[str, list[Estimate]]  # by side, for n = 1, 2, ...
    sides: dict[str, Side]
    prompts: int
    dropped: int  # prompts without a scored sample of every side


def run(config: EvaluateConfig) -> Evaluation:
    """See `rrhf_fast.evaluate`."""
    config.validate()
    against_model = config.baseline is not None and not config.baseline.endswith(".jsonl")
    # All that can be wrong is looked at before anything is written.
    drafts, report = load_drafts(config.data, **config.reading())
    _say_left_out("data", report)
    prompts = [draft.prompt for draft in drafts]
    earlier = None
    if config.baseline is not None and not against_model:
        earlier = _earlier(config.baseline, prompts)
    if config.ranking_data is not None:
        _, report = load_rows(config.ranking_data, **config.reading())
        _say_left_out("ranking_data", report)
    check_scorer(config)
    options = ["model_name_or_path", "reference_model_name_or_path"]
    for option in options + ["baseline"] * against_model:
        if (name := getattr(config, option)) is not None:
            load_tokenizer(name, trust_remote_code=config.trust_remote_code, option=option)
    folder = claim(config.output_dir, identity(config), overwrite=config.overwrite)
    samples, scored = folder / "samples.jsonl", folder / "scored.jsonl"
    if scored.exists():
        print(f"reusing {scored}", flush=True)
    else:
        if samples.exists():
            print(f"reusing {samples}", flush=True)
        else:
            sides = {MODEL: config.model_name_or_path}
            sides |= {BASELINE: config.baseline} if against_model else {}
            sample(_sample_config(config, sides, samples))
        score(pass_on(config, ScoreConfig, data=str(samples), output=str(scored), **OWN_FORMAT))

    sides = {MODEL: read_side(scored, MODEL)}
    if against_model:
        sides[BASELINE] = read_side(scored, BASELINE)
    elif earlier is not None:
        sides[BASELINE] = earlier
    total = len(sides[MODEL].prompts)
    keep = [i for i in range(total) if all(len(side.rewards[i]) for side in sides.values())]
    if not keep:
        raise ValueError(f"data: no prompt of {scored} has a scored sample of each model")
    sides = {name: side.pick(keep) for name, side in sides.items()}

    tokenizer = load_tokenizer(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    measures = {name: _measure(side, tokenizer) for name, side in sides.items()}
    if config.reference_model_name_or_path is not None:
        option = "reference_model_name_or_path"
        reference = LogProbs(config.reference_model_name_or_path, config, option)
        for name, side in sides.items():
            measures[name]["perplexity"] = _perplexity(side, reference)
        del reference  # before the next model is loaded
    bootstrap = Bootstrap(len(keep), config.num_bootstrap, config.seed)
    estimates = {
        name: {
            measure: bootstrap.ratio(*astuple(value)) if isinstance(value, ByPrompt) else value
            for measure, value in found.items()
        }
        for name, found in measures.items()
    }
    if config.ranking_data is not None:
        ranking = measures[MODEL]["ranking_accuracy"] = _ranking_accuracy(config)
        rows = Bootstrap(len(ranking.numerators), config.num_bootstrap, config.seed)
        estimates[MODEL]["ranking_accuracy"] = rows.ratio(*astuple(ranking))
    evaluation = Evaluation(
        by_prompt={
            name: value for name, value in measures[MODEL].items() if isinstance(value, ByPrompt)
        },
        model=estimates[MODEL],
        baseline=estimates.get(BASELINE, {}),
        comparison=_compare(sides, bootstrap) if BASELINE in sides else {},
        best_of_n={name: _best_of_n(side, bootstrap) for name, side in sides.items()},
        sides=sides,
        prompts=len(keep),
        dropped=total - len(keep),
    )
    _write(evaluation, folder)
    return evaluation


def _say_left_out(option: str, report: RowReport) -> None:
    if counts := report.left_out():
        parts = (f"{count} {name}" for name, count in counts.items())
        print(f"{option}: {', '.join(parts)}", flush=True)


def claim(output_dir: str, options: dict, *, overwrite: bool = False) -> Path:
    """Make the folder of a run, or find it as the run with these very options left it. What a run
    left that came to nothing counts for nothing.

    Args:
        overwrite: remove the files of an earlier evaluation.

    Raises:
        ValueError: it cannot be written, or holds a run with other options, or something else.
    """
    folder, file = Path(output_dir), Path(output_dir, "options.json")
    text = json.dumps(options, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (held := _held(folder)) is not None:
            if not file.exists():
                problem = f"holds other files, {held} for one (choose another folder)"
                raise ValueError(f"output_dir: {output_dir} {problem}")
            before, now = without_removed(read_json(file)), json.loads(text)
            if overwrite:
                _empty(folder)
            elif changed := sorted(
                name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
            ):
                raise ValueError(
                    f"output_dir: {output_dir} holds a run with another {', '.join(changed)} "
                    "(choose another folder)"
                )
        staging = file.with_suffix(".saving")
        staging.write_text(text)
        os.replace(staging, file)
    except OSError as error:
        raise ValueError(
            f"output_dir: {output_dir} cannot be written ({error.strerror})"
        ) from error
    return folder


def _held(folder: Path) -> str | None:
    """A file that says that some work was done here."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.stem != "options")
    return next((str(path.relative_to(folder)) for path in files if path.stat().st_size), None)


def _empty(folder: Path) -> None:
    """Remove an evaluation, and nothing else."""
    if strange := [path.name for path in folder.iterdir() if path.name not in FILES]:
        problem = f"holds more than an evaluation, {strange[0]} for one (choose another folder)"
        raise ValueError(f"output_dir: {folder} {problem}")
    for name in FILES:
        folder.joinpath(name).unlink(missing_ok=True)


def pass_on(config: ScorerConfig, target: type, **options):
    """A `target` config with the options that it shares with `config`, and these."""
    names = {f.name for f in fields(target)} & {f.name for f in fields(config)} - set(options)
    return target(**{name: getattr(config, name) for name in names}, **options)


def _sample_config(config: EvaluateConfig, sides: dict[str, str], output: Path) -> SampleConfig:
    policies = [
        Policy(
            model=model,
            source=name,
            num_responses=config.num_samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        for name, model in sides.items()
    ]
    # What is empty or said twice counts too.
    return pass_on(config, SampleConfig, output=str(output), policies=policies, keep_all=True)


def read_side(path: str | Path, source: str) -> Side:
    """The scored samples of one source, prompt by prompt. Raises ValueError where they are none."""
    drafts, _ = load_drafts(str(path))
    side = Side([], [])
    for draft, record in zip(drafts, _records(path), strict=True):
        sources, scores = draft.sources or [], record.get("scores")
        if not isinstance(scores, list) or len(scores) != len(draft.responses or []):
            raise ValueError(f"{draft.where}: scores: expected one for each response (see score)")
        keep = [i for i, name in enumerate(sources) if name == source]
        side.drafts.append(draft.pick(keep))
        side.rewards.append(np.array([scores[i] for i in keep], dtype=np.float64))
    if not any(side.responses):
        expected = "expected the scored.jsonl of an evaluation"
        raise ValueError(f"{path}: holds no scored samples of an evaluated model ({expected})")
    return side


def _records(path: str | Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _earlier(path: str, prompts: list) -> Side:
    """The samples of the model that an earlier evaluation was about; it must have had the same
    prompts."""
    try:
        side = read_side(path, MODEL)
    except ValueError as error:
        raise ValueError(f"baseline: {error}") from error
    if side.prompts != prompts:
        raise ValueError(f"baseline: {path} is about other prompts than data")
    return side


def _measure(side: Side, tokenizer) -> dict[str, ByPrompt | Estimate]:
    tokens = [
        np.array([len(ids) for ids in encode_responses(tokenizer, texts)])
        for texts in side.responses
    ]
    counts = [len(texts) for texts in side.responses]
    cut = [sum(reason == "length" for reason in reasons) for reasons in side.finish_reasons]
    distinct = [len(set(texts)) for texts in side.responses]
    every = np.concatenate(tokens)
    return {
        "reward": ByPrompt([rewards.mean() for rewards in side.rewards]),
        "best_of_n": ByPrompt([rewards.max() for rewards in side.rewards]),
        "distinct": ByPrompt(distinct, counts),
        "tokens": ByPrompt([lengths.sum() for lengths in tokens], counts),
        "tokens_median": _plain(np.median(every)),
        "tokens_p95": _plain(np.quantile(every, 0.95)),
        "cut_off": ByPrompt(cut, counts),
        "length_reward_correlation": _plain(within_correlation(tokens, side.rewards)),
    }


def _plain(value: float) -> Estimate:
    """A value without an interval."""
    return Estimate(float(value), float("nan"), float("nan"))


def _perplexity(side: Side, reference: LogProbs) -> ByPrompt:
    """exp of minus the mean log-prob of the samples' tokens under the reference, given the
    prompt."""
    kept = [
        [
            generated(logps, reason)
            for logps, reason in zip(row, reasons, strict=True)
            if not isinstance(logps, str)
        ]
        for row, reasons in zip(reference(side.drafts), side.finish_reasons, strict=True)
    ]
    sums = [sum(float(logps.sum()) for logps in row) for row in kept]
    counts = [sum(len(logps) for logps in row) for row in kept]
    return ByPrompt(sums, counts, lambda mean: np.exp(-mean))


def _ranking_accuracy(config: EvaluateConfig) -> ByPrompt:
    rows, _ = load_rows(config.ranking_data, **config.reading())
    model = LogProbs(config.model_name_or_path, config)
    pairs = []
    for row, found in zip(rows, model(rows), strict=True):
        keep = [i for i, logps in enumerate(found) if not isinstance(logps, str)]
        p, scores = [found[i].mean() for i in keep], [row.rewards[i] for i in keep]
        pairs.append(pairs_in_order(np.array(p), np.array(scores)))
    return ByPrompt(*zip(*pairs, strict=True))


def _compare(sides: dict[str, Side], bootstrap: Bootstrap) -> dict[str, Estimate]:
    both = list(zip(sides[MODEL].rewards, sides[BASELINE].rewards, strict=True))
    shares = np.array([win_tie_lose(model, baseline) for model, baseline in both])
    names = ("win", "tie", "lose")
    gain = [model.mean() - baseline.mean() for model, baseline in both]
    return {"reward_gain": bootstrap.ratio(gain)} | {
        name: bootstrap.ratio(column) for name, column in zip(names, shares.T, strict=True)
    }


def _best_of_n(side: Side, bootstrap: Bootstrap) -> list[Estimate]:
    """For n up to the fewest samples that a prompt has."""
    fewest = min(len(rewards) for rewards in side.rewards)
    return [
        bootstrap.ratio([best_of(rewards, n) for rewards in side.rewards])
        for n in range(1, fewest + 1)
    ]


def _write(evaluation: Evaluation, folder: Path) -> None:
    by_prompt = {
        name: {
            "numerators": np.asarray(value.numerators, dtype=float).tolist(),
            "denominators": np.broadcast_to(
                1.0 if value.denominators is None else value.denominators, len(value.numerators)
            ).tolist(),
        }
        for name, value in evaluation.by_prompt.items()
    }
    _save(folder / "by_prompt.json", by_prompt)
    names = ("model", "baseline", "comparison", "best_of_n", "prompts", "dropped")
    record = asdict(replace(evaluation, sides={}, by_prompt={}))
    # The last file: with it, the evaluation is done.
    _save(folder / "evaluation.json", {name: _finite(record[name]) for name in names}, indent=2)


def _save(path: Path, found: dict, indent: int | None = None) -> None:
    staging = path.with_suffix(".saving")
    staging.write_text(json.dumps(found, indent=indent) + "\n")
    os.replace(staging, path)


def _finite(value):
    """JSON has no nan: null stands for it."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
