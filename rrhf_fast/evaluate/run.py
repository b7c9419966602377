"""The stage `evaluate`: sample a model, score and measure the samples, compare with a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from rrhf_fast.data.checks import check_score, one_line
from rrhf_fast.data.encode import encode_responses
from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.data.options import OWN_FORMAT
from rrhf_fast.data.rows import Draft, Row
from rrhf_fast.data.sources import read_records
from rrhf_fast.evaluate.about import about
from rrhf_fast.evaluate.caution import cautions, drawn_otherwise
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
from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.score.logprobs import LogProbs, generated
from rrhf_fast.score.run import check_scorer
from rrhf_fast.stages.files import read_json, to_json, write_text
from rrhf_fast.stages.identity import identity, refuse_pipes
from rrhf_fast.stages.journal import is_finished
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks, join_ranks, locked_once
from rrhf_fast.stages.run_folder import claim, pass_on

T = TypeVar("T")

# The two sides, as named in `sources`.
MODEL, BASELINE = "model", "baseline"
_OPTIONS = {MODEL: "model_name_or_path", BASELINE: "baseline"}
# Everything that an evaluation writes, complete or not, as patterns; in the order of its removal.
# The options go last: while there is anything else, they say whose it is.
FILES = ("report.html", "evaluation.png", "evaluation.json", "by_prompt.json", "scored.jsonl")
FILES += ("samples.jsonl", "scored.jsonl.journal.[0-9]*", "samples.jsonl.journal.[0-9]*")
FILES += ("scored.jsonl.journal", "samples.jsonl.journal")
FILES += ("samples.jsonl.server.log", "options.json")


@dataclass
class Side:
    """The scored samples of one model, by prompt."""

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
        """The samples of these prompts."""
        return Side([self.drafts[i] for i in keep], [self.rewards[i] for i in keep])


@dataclass
class Evaluation:
    """Measures, by name, of a model, of its baseline and of one against the other."""

    by_prompt: dict[str, ByPrompt]  # the model's
    model: dict[str, Estimate]
    baseline: dict[str, Estimate]
    comparison: dict[str, Estimate]
    best_of_n: dict[str, list[Estimate]]  # by side, for n = 1, 2, ...
    sides: dict[str, Side]
    prompts: int
    dropped: int  # prompts that lack a scored sample of some side
    about: dict  # what a report says of the run
    warnings: list[str]  # signs of harm, and of chance


def run(config: EvaluateConfig) -> Evaluation:
    """See `rrhf_fast.evaluate`."""
    config.validate()
    with join_ranks("evaluate", config) as ranks, locked_once(ranks, config.output_dir):
        return _evaluate(config, ranks)


def _evaluate(config: EvaluateConfig, ranks: Ranks) -> Evaluation:
    models = {MODEL: config.model_name_or_path}
    if config.baseline is not None and not config.baseline.endswith(".jsonl"):
        models[BASELINE] = config.baseline
    prompts, earlier, notes = _check_inputs(config, models)

    # Draw and score the samples, unless an interrupted run already has.
    replaces = FILES if config.overwrite else ()
    folder = ranks.once(lambda: claim(config.output_dir, identity(config), replaces=replaces))
    scored = _scored_samples(config, models, folder, ranks)
    sides = {name: read_side(scored, name) for name in models}
    if sides[MODEL].prompts != prompts:
        problem = f"{scored} has other prompts than data, so it was changed or cut"
        raise ValueError(f"output_dir: {problem} (remove it and samples.jsonl to draw again)")
    if earlier is not None:
        sides[BASELINE] = earlier
    total = len(sides[MODEL].prompts)
    keep = [i for i in range(total) if all(len(side.rewards[i]) for side in sides.values())]
    if not keep:
        raise ValueError(f"data: no prompt of {scored} has a scored sample of each model")
    sides = {name: side.pick(keep) for name, side in sides.items()}

    # Measure them, with intervals from the same draws of prompts for all measures.
    bootstrap = Bootstrap(len(keep), config.num_bootstrap, config.seed)
    measures = _measure_sides(config, sides, ranks)
    estimates = {
        name: {
            measure: bootstrap.ratio(*astuple(value)) if isinstance(value, ByPrompt) else value
            for measure, value in of_side.items()
        }
        for name, of_side in measures.items()
    }
    if config.ranking_data is not None:
        ranking = measures[MODEL]["ranking_accuracy"] = _ranking_accuracy(config, ranks)
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
        about=about(config, scored),
        warnings=[
            *notes,
            *cautions(
                estimates.get(BASELINE, {}), estimates[MODEL], "with the baseline", len(keep)
            ),
        ],
    )
    ranks.first(lambda: _write(evaluation, folder))
    return evaluation


def _check_inputs(
    config: EvaluateConfig, models: dict[str, str]
) -> tuple[list, Side | None, list[str]]:
    """Fail on unreadable data, functions or models before anything is written; returns the prompts,
    and if the baseline is an earlier evaluation, its samples and what to be careful of in them."""
    refuse_pipes(config)
    drafts, _ = load_drafts(config.data, **config.reading())  # `sample` says what it skips
    prompts, earlier, notes = [draft.prompt for draft in drafts], None, []
    if config.baseline is not None and BASELINE not in models:
        earlier = _earlier(config.baseline, prompts)
        options = Path(config.baseline).with_name("options.json")
        if options.is_file():
            notes = drawn_otherwise(config.baseline, read_json(options), config)
    if config.ranking_data is not None:
        _, report = load_rows(config.ranking_data, **config.reading())
        for line in report.lines("ranking_data"):
            say(line)
    check_scorer(config)
    options = ["model_name_or_path", "reference_model_name_or_path"]
    for option in options + ["baseline"] * (BASELINE in models):
        if (name := getattr(config, option)) is not None:
            load_tokenizer(name, trust_remote_code=config.trust_remote_code, option=option)
    return prompts, earlier, notes


def _scored_samples(
    config: EvaluateConfig, models: dict[str, str], folder: Path, ranks: Ranks
) -> Path:
    """Run the stages `sample` and `score` where their files are missing; returns scored.jsonl."""
    samples, scored = folder / "samples.jsonl", folder / "scored.jsonl"
    has_samples, has_scores = ranks.once(lambda: (is_finished(samples), is_finished(scored)))
    if has_scores:
        say(f"reusing {scored}")
        return scored
    if has_samples:
        say(f"reusing {samples}")
    else:
        policies = [config.sampling(model, name) for name, model in models.items()]
        # Empty and repeated samples count too.
        options = {"output": str(samples), "policies": policies, "keep_all": True}
        try:
            sample(pass_on(config, SampleConfig, **options))
        except ValueError as error:  # of options of `sample`, which nobody gave here
            for number, name in enumerate(models):
                option, mine = f"policies[{number}].model: ", f"{_OPTIONS[name]}: "
                if str(error).startswith(option):
                    raise ValueError(mine + str(error).removeprefix(option)) from error
            raise
    score(pass_on(config, ScoreConfig, data=str(samples), output=str(scored), **OWN_FORMAT))
    return scored


def read_side(path: str | Path, source: str) -> Side:
    """The scored samples of one source, by prompt. Raises ValueError if the file holds none."""
    drafts, _ = load_drafts(str(path))
    side = Side([], [])
    for draft, (where, record) in zip(drafts, read_records(str(path)), strict=True):
        sources, scores = draft.sources or [], record.get("scores")
        if not isinstance(scores, list) or len(scores) != len(draft.responses or []):
            raise ValueError(f"{where}: scores: expected one for each response (see score)")
        keep = [i for i, name in enumerate(sources) if name == source]
        rewards = [check_score(scores[i], f"scores[{i}]", where) for i in keep]
        side.drafts.append(draft.pick(keep))
        side.rewards.append(np.array(rewards, dtype=np.float64))
    if not any(side.responses):
        expected = "expected the scored.jsonl of an evaluation"
        raise ValueError(f"{path}: holds no scored samples of an evaluated model ({expected})")
    return side


def _earlier(path: str, prompts: list) -> Side:
    """The samples of the model of an earlier evaluation on the same prompts."""
    try:
        side = read_side(path, MODEL)
    except ValueError as error:
        raise ValueError(f"baseline: {error}") from error
    if side.prompts != prompts:
        raise ValueError(f"baseline: {path} has other prompts than data")
    return side


def _measure_sides(
    config: EvaluateConfig, sides: dict[str, Side], ranks: Ranks
) -> dict[str, dict[str, ByPrompt | Estimate]]:
    code = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model_name_or_path, **code)
    measures = {name: _measure(side, tokenizer) for name, side in sides.items()}
    if config.reference_model_name_or_path is not None:
        option = "reference_model_name_or_path"
        reference = LogProbs(config.reference_model_name_or_path, config, option)
        for name, side in sides.items():
            measures[name]["perplexity"] = _perplexity(side, reference, config, ranks)
    return measures


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


def _perplexity(side: Side, reference: LogProbs, config: EvaluateConfig, ranks: Ranks) -> ByPrompt:
    """exp(-mean log-prob) of the samples' tokens under the reference, given the prompt."""

    def sums(logps: np.ndarray, row: int, i: int) -> tuple[float, int]:
        own = generated(logps, side.finish_reasons[row][i])
        return float(own.sum()), len(own)

    by_row = _of_logps(reference, side.drafts, sums, config, ranks)
    _print_unread("reference_model_name_or_path", by_row)
    kept = [[pair for pair in row if not isinstance(pair, str)] for row in by_row]
    totals = [sum(total for total, _ in row) for row in kept]
    counts = [sum(count for _, count in row) for row in kept]
    return ByPrompt(totals, counts, lambda mean: np.exp(-mean))


def _ranking_accuracy(config: EvaluateConfig, ranks: Ranks) -> ByPrompt:
    rows, _ = load_rows(config.ranking_data, **config.reading())
    model = LogProbs(config.model_name_or_path, config)
    by_row = _of_logps(model, rows, lambda logps, row, i: logps.mean(), config, ranks)
    _print_unread("ranking_data", by_row)
    pairs = []
    for row, p in zip(rows, by_row, strict=True):
        keep = [i for i, value in enumerate(p) if not isinstance(value, str)]
        p, scores = [p[i] for i in keep], [row.rewards[i] for i in keep]
        pairs.append(pairs_in_order(np.array(p), np.array(scores)))
    return ByPrompt(*zip(*pairs, strict=True))


def _of_logps(
    model: LogProbs,
    rows: Sequence[Draft | Row],
    measure: Callable[[np.ndarray, int, int], T],
    config: EvaluateConfig,
    ranks: Ranks,
) -> list[list[T | str]]:
    """[row][response] -> `measure` of its log-probs, row and number; or the reason why it has none.
    Ranks take batches of rows in turn, the same batches whatever the number of ranks: log-probs
    depend a little on what they are computed with."""
    starts = range(0, len(rows), config.batch_size)
    mine = {}
    for start in ranks.share(starts):
        batch = model(rows[start : start + config.batch_size])
        mine[start] = [
            [x if isinstance(x, str) else measure(x, row, i) for i, x in enumerate(logps)]
            for row, logps in enumerate(batch, start)
        ]
    of_all = {start: batch for part in ranks.gather(mine) for start, batch in part.items()}
    return [row for start in starts for row in of_all[start]]


def _print_unread(option: str, by_row: list[list[object | str]]) -> None:
    """Say how many responses a model could not read, and why the first one."""
    if reasons := [found for row in by_row for found in row if isinstance(found, str)]:
        first = one_line(reasons[0])
        say(f"{option}: {len(reasons)} responses have no log-probs (first: {first})")


def _compare(sides: dict[str, Side], bootstrap: Bootstrap) -> dict[str, Estimate]:
    both = list(zip(sides[MODEL].rewards, sides[BASELINE].rewards, strict=True))
    shares = np.array([win_tie_lose(model, baseline) for model, baseline in both])
    names = ("win", "tie", "lose")
    gain = [model.mean() - baseline.mean() for model, baseline in both]
    return {"reward_gain": bootstrap.ratio(gain)} | {
        name: bootstrap.ratio(column) for name, column in zip(names, shares.T, strict=True)
    }


def _best_of_n(side: Side, bootstrap: Bootstrap) -> list[Estimate]:
    """The expected best reward of n samples, for n up to the fewest samples of any prompt."""
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
    write_text(folder / "by_prompt.json", to_json(by_prompt) + "\n")
    names = ("model", "baseline", "comparison", "best_of_n", "prompts", "dropped")
    names += ("about", "warnings")
    record = asdict(replace(evaluation, sides={}, by_prompt={}))
    text = to_json({name: record[name] for name in names}, indent=2)
    write_text(folder / "evaluation.json", text + "\n")
