"""The stage `score`: add scores to the responses of rows."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from rrhf_fast.data.checks import one_line
from rrhf_fast.data.load import load_drafts
from rrhf_fast.data.rows import Draft
from rrhf_fast.model.decoder import load_tokenizer, max_positions
from rrhf_fast.model.generate import batches_by_length
from rrhf_fast.model.pretrained import loading, read_config
from rrhf_fast.score.config import ScoreConfig, ScorerConfig
from rrhf_fast.score.judge import Judge
from rrhf_fast.score.logprobs import DEFAULT_WINDOW, LogProbs, generated
from rrhf_fast.score.reward_model import Prompt, RewardModel
from rrhf_fast.stages.cards import without_paths
from rrhf_fast.stages.dataset_card import push_rows
from rrhf_fast.stages.endpoint import ask_all
from rrhf_fast.stages.hub import public_name
from rrhf_fast.stages.identity import depends_on, refuse_pipes
from rrhf_fast.stages.journal import Journal, is_usage
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks, join_ranks
from rrhf_fast.stages.reward_fn import call_reward_fn, load_reward_fn

# How the journal's keys of log-probs begin.
_LOGPS = "log-probs of "
# Responses whose tokens are counted at once: enough to keep all cores busy, few enough to need
# little memory.
_ENCODED_AT_ONCE = 1024

T = TypeVar("T")
# Each way to score does this rank's share of the work and returns a function that reads all results
# from the journal, for the first rank to call after `Journal.share`.
Read = Callable[[], T]


def run(config: ScoreConfig) -> Counter:
    """See `rrhf_fast.score`."""
    config.validate()
    with join_ranks("score", config) as ranks:
        return _run(config, ranks)


def _run(config: ScoreConfig, ranks: Ranks) -> Counter:
    if ranks.size > 1:
        refuse_pipes(config)
    drafts, report = load_drafts(config.data, needs_responses=True, **config.reading())
    for line in report.lines("data"):
        say(line)
    check_scorer(config)  # fail early on a bad model name
    for option in ("model_name_or_path", "reference_model_name_or_path"):
        if config.kl_coef:
            _check_tokenizer(option, config)
    pairs = [(row, i) for row, draft in enumerate(drafts) for i in range(len(draft.responses))]
    if (repository := config.repository()) is not None:
        repository = ranks.once(repository.check)
    options = {"ranks": ranks, "overwrite": config.overwrite, "accepts": _is_result}
    with Journal(config.output, depends_on("score", config, drafts, ranks), **options) as journal:
        if repository is not None:
            ranks.once(repository.create)
        results = _score(journal, drafts, pairs, config)
        ratios = _log_ratios(journal, drafts, config) if config.kl_coef else None
        journal.share()

        def finish() -> Counter:
            return _finish(journal, drafts, pairs, config, results(), ratios and ratios())

        counts = ranks.once(finish)
    if repository is not None:
        ranks.once(lambda: push_rows(repository, config.output, "Scored responses", _how(config)))
    counts.update(report.left_out() | report.by_kind())
    return counts


def _how(config: ScoreConfig) -> dict:
    """How the responses were scored, for the dataset's card."""
    if config.judge_model:
        how = {"judge_model": without_paths(config.judge_model)}
    elif config.reward_fn:
        how = {"reward_fn": config.reward_fn}
    elif config.reward_model_name_or_path:
        how = {"reward_model": public_name(config.reward_model_name_or_path)}
    else:
        how = {"mean log-prob under": public_name(config.model_name_or_path)}
    if config.kl_coef:
        names = (config.model_name_or_path, config.reference_model_name_or_path)
        how |= {"kl_coef": config.kl_coef, "policy and reference": list(map(public_name, names))}
    return how


def _finish(
    journal: Journal,
    drafts: Sequence[Draft],
    pairs: Sequence[tuple[int, int]],
    config: ScoreConfig,
    results: list[dict],
    ratios: list[list[float | str]] | None,
) -> Counter:
    """Write the final rows; returns their counts."""
    if ratios is not None:
        results = [
            _penalised(result, ratios[row][i], config.kl_coef)
            for (row, i), result in zip(pairs, results, strict=True)
        ]
    if pairs and not any("score" in result for result in results):
        journal.forget(list(journal.done))
        raise ValueError(f"no response could be scored: {results[0]['error']}")
    counts = Counter(rows=len(drafts))
    journal.finish(_merged(drafts, results, ratios, counts))
    return counts


def _is_result(key: str, result: object) -> bool:
    """Whether `_judge` or `_in_batches` may have journalled this."""
    if isinstance(result, list):
        rows = result if key.startswith(_LOGPS) else [result]
        return all(isinstance(row, list) and all(map(_is_score, row)) for row in rows)
    if not isinstance(result, dict) or not is_usage(result.get("usage", {})):
        return False
    if "error" in result:
        return isinstance(result["error"], str)
    return type(result.get("score")) in (int, float) and isinstance(result.get("criteria"), dict)


def _is_score(value: object) -> bool:
    """A number or the reason why there is none; or the two numbers of `_logps`."""
    if isinstance(value, list):
        return len(value) == 2 and all(type(number) in (int, float) for number in value)
    return type(value) in (int, float, str)


def check_scorer(config: ScorerConfig) -> None:
    """Raise ValueError, with the option's name, if there is no such function or model, or the judge
    has an address or a key that cannot work."""
    if config.judge_model:
        Judge(config)
    elif config.reward_fn:
        load_reward_fn(config.reward_fn, "reward_fn")
    elif config.reward_model_name_or_path:
        _check_tokenizer("reward_model_name_or_path", config)
    elif config.policy_as_reward:
        _check_tokenizer("model_name_or_path", config)


def _check_tokenizer(option: str, config: ScorerConfig) -> None:
    name, code = getattr(config, option), config.trust_remote_code
    load_tokenizer(name, trust_remote_code=code, option=option)


def _score(
    journal: Journal, drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]], config: ScoreConfig
) -> Read[list[dict]]:
    """{"score": ...} or {"error": ...} for each pair (row, response)."""
    if config.judge_model:
        return _judge(journal, drafts, pairs, config)
    if config.policy_as_reward:
        logps = _logps(journal, "model_name_or_path", drafts, config)
        return lambda: [_result(p if isinstance(p, str) else p[0]) for p in _flat(logps(), pairs)]
    scorer = _reward_model if config.reward_model_name_or_path else _reward_fn
    scores = scorer(journal, drafts, pairs, config)
    return lambda: list(map(_result, scores()))


def _flat(by_row: list[list], pairs: Sequence[tuple[int, int]]) -> Iterator:
    return (by_row[row][i] for row, i in pairs)


def _in_batches(
    journal: Journal,
    name: str,
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], list],
    unit: str,
) -> Read[list]:
    """Compute and journal this rank's share of the missing batches of item numbers; the results
    are those of `work` by item number."""
    numbers = {f"{name}/{number}": number for number in range(len(batches))}
    mine = journal.mine(numbers)
    bar = {"total": sum(len(batches[numbers[key]]) for key in mine), "unit": unit}
    with tqdm(**bar, desc=one_line(name), disable=journal.ranks.bar) as progress:
        for key in mine:
            batch = batches[numbers[key]]
            journal.write(key, work(batch))
            progress.update(len(batch))

    def read() -> list:
        results = {}
        for key, number in numbers.items():
            batch, done = batches[number], journal.done[key]
            if not isinstance(done, list) or len(done) != len(batch):
                problem = f"is damaged (expected {len(batch)} results for {key})"
                raise ValueError(f"output: {journal.path} {problem}")
            results |= dict(zip(batch, done, strict=True))
        return [results[i] for i in range(len(results))]

    return read


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _texts(
    drafts: Sequence[Draft], pairs: Iterable[tuple[int, int]]
) -> tuple[list[Prompt], list[str]]:
    texts = [(drafts[row].prompt, drafts[row].responses[i]) for row, i in pairs]
    return [prompt for prompt, _ in texts], [response for _, response in texts]


def _reward_model(
    journal: Journal, drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]], config: ScoreConfig
) -> Read[list[float | str]]:
    model: RewardModel | None = None

    def encode(numbers: Sequence[int]) -> list[dict]:
        nonlocal model
        model = model or RewardModel(config)
        return model.encode(*_texts(drafts, (pairs[i] for i in numbers)))

    def measure(numbers: Sequence[int]) -> list[int]:
        return [len(row["input_ids"]) for row in encode(numbers)]

    def work(batch: Sequence[int]) -> list[float | str]:
        rows = encode(batch)
        return list(map(_score_or_reason, model.score(rows)))

    # Tokens are counted first, and kept only while their batch is scored: all of them may need more
    # memory than the texts.
    chunks = _chunks(len(pairs), _ENCODED_AT_ONCE)
    counts = _in_batches(journal, "tokens for the reward model", chunks, measure, "response")
    journal.share()
    batches = batches_by_length(journal.ranks.once(counts), config.batch_size)
    scores = _in_batches(journal, "reward model", batches, work, "response")

    def read() -> list[float | str]:
        """Equal responses tie: their scores differ by rounding where their batches do."""
        found, first = scores(), {}
        for i, (row, at) in enumerate(pairs):
            text = repr(drafts[row].prompt), drafts[row].responses[at]
            found[i] = found[first.setdefault(text, i)]
        return found

    return read


def _reward_fn(
    journal: Journal, drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]], config: ScoreConfig
) -> Read[list[float | str]]:
    function, name = load_reward_fn(config.reward_fn, "reward_fn"), config.reward_fn

    def call(batch: Sequence[int]) -> list[float | str]:
        prompts, responses = _texts(drafts, (pairs[i] for i in batch))
        scores = call_reward_fn(function, prompts, responses, name, "reward_fn")
        return list(map(_score_or_reason, scores.tolist()))

    batches = _chunks(len(pairs), config.batch_size)
    return _in_batches(journal, "reward function", batches, call, "response")


def _score_or_reason(score: float) -> float | str:
    """A score, or the reason why it is none."""
    return score if math.isfinite(score) else f"a score of {score}"


def _result(score: float | str) -> dict:
    """A score, or the reason why there is none, as {"score"} or {"error"}."""
    return {"error" if isinstance(score, str) else "score": score}


def _penalised(result: dict, ratio: float | str, kl_coef: float) -> dict:
    """Subtract kl_coef * ratio from the score of a result, whose score before is its "reward"."""
    if isinstance(ratio, str):
        return {"error": ratio}
    if "error" in result:
        return result
    score = _result(_score_or_reason(result["score"] - kl_coef * ratio))
    return score if "error" in score else result | score | {"reward": result["score"]}


def _judge(
    journal: Journal, drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]], config: ScoreConfig
) -> Read[list[dict]]:
    judge = Judge(config)
    work = {
        f"{row}/{i}": partial(judge.judge, drafts[row].prompt, drafts[row].responses[i])
        for row, i in pairs
    }
    ask_all(work, journal, config.max_concurrency, "judge")
    return lambda: [journal.done[key] for key in work]


def _logps(
    journal: Journal,
    option: str,
    drafts: Sequence[Draft],
    config: ScorerConfig,
    *,
    max_length: int | None = None,
) -> Read[list[list[list[float] | str]]]:
    """[row][response] -> [p, sum of the log-probs of its own tokens] under the option's model, or
    the reason why it has none; in a window of at most `max_length` tokens."""
    name, model = getattr(config, option), None

    def work(batch: Sequence[int]) -> list:
        nonlocal model
        model = model or LogProbs(name, config, option, max_length=max_length)
        by_row = model([drafts[row] for row in batch])
        out = []
        for row, responses in zip(batch, by_row, strict=True):
            reasons = drafts[row].finish_reasons or [None] * len(responses)
            out.append(
                [
                    logps if isinstance(logps, str) else _mean_and_sum(logps, reason)
                    for logps, reason in zip(responses, reasons, strict=True)
                ]
            )
        return out

    batches = _chunks(len(drafts), config.batch_size)
    title = f"{_LOGPS}{name}" + (f", {max_length} tokens" if max_length else "")
    return _in_batches(journal, title, batches, work, "row")


def _mean_and_sum(logps: np.ndarray, finish_reason: str | None) -> list[float] | str:
    values = [float(logps.mean()), float(generated(logps, finish_reason).sum())]
    return values if all(map(math.isfinite, values)) else f"a log-prob of {values[0]}"


def _log_ratios(
    journal: Journal, drafts: Sequence[Draft], config: ScoreConfig
) -> Read[list[list[float | str]]]:
    """[row][response] -> log(policy / reference), or the reason why it has none."""
    # Both sums are over the same tokens: a response is cut to the smaller window of the two.
    options = ("model_name_or_path", "reference_model_name_or_path")
    windows = {option: _window(option, config) for option in options}
    least = min(windows.values())

    def logps(option: str) -> Read[list[list[list[float] | str]]]:
        smaller = least if least < windows[option] else None
        return _logps(journal, option, drafts, config, max_length=smaller)

    policy = reference = logps("model_name_or_path")
    if config.model_name_or_path != config.reference_model_name_or_path:
        reference = logps("reference_model_name_or_path")
    return lambda: [
        [
            next((x for x in (p, r) if isinstance(x, str)), None) or p[1] - r[1]
            for p, r in zip(*of_row, strict=True)
        ]
        for of_row in zip(policy(), reference(), strict=True)
    ]


def _window(option: str, config: ScorerConfig) -> int:
    name, code = getattr(config, option), config.trust_remote_code
    with loading(name, option):
        return max_positions(read_config(name, trust_remote_code=code)) or DEFAULT_WINDOW


def _merged(
    drafts: Sequence[Draft],
    results: Sequence[dict],
    ratios: list[list[float]] | None,
    counts: Counter,
) -> Iterator[dict]:
    """The final rows, in input order; adds to `counts`."""
    remaining = iter(results)
    for row, draft in enumerate(drafts):
        results = list(islice(remaining, len(draft.responses)))
        keep = [i for i, result in enumerate(results) if "score" in result]
        out = {"prompt": draft.prompt, "responses": [draft.responses[i] for i in keep]}
        if ratios is not None:
            out["rewards"] = [results[i]["reward"] for i in keep]
            out["log_ratios"] = [ratios[row][i] for i in keep]
        out["scores"] = [results[i]["score"] for i in keep]
        for name in ("sources", "finish_reasons", "as_generated"):
            if (values := getattr(draft, name)) is not None:
                out[name] = [values[i] for i in keep]
        if any("criteria" in results[i] for i in keep):
            out["criteria"] = [results[i]["criteria"] for i in keep]
        unscored = [
            {
                "response": draft.responses[i],
                "source": draft.sources[i] if draft.sources else None,
                "error": result["error"],
            }
            | ({"answer": result["answer"]} if "answer" in result else {})
            for i, result in enumerate(results)
            if "error" in result
        ]
        yield draft.others | out | ({"unscored": unscored} if unscored else {})
        for result in results:
            counts.update(result.get("usage", {}))
        counts["scored"] += len(keep)
        counts["unscored"] += len(unscored)
        counts["unrankable"] += len(keep) < 2
