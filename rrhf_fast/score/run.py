"""The stage `score`: add scores to the responses of rows."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
from tqdm import tqdm

from rrhf_fast.data.checks import one_line
from rrhf_fast.data.load import load_drafts
from rrhf_fast.data.rows import Draft
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.model.generate import batches_by_length
from rrhf_fast.score.config import ScoreConfig, ScorerConfig
from rrhf_fast.score.judge import Judge
from rrhf_fast.score.logprobs import LogProbs, generated
from rrhf_fast.score.reward_model import Prompt, RewardModel
from rrhf_fast.stages.endpoint import ask_all
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.journal import Journal, fingerprint, is_usage
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.reward_fn import call_reward_fn, load_reward_fn

# How the journal's keys of log-probs begin.
_LOGPS = "log-probs of "


def run(config: ScoreConfig) -> Counter:
    """See `rrhf_fast.score`."""
    config.validate()
    drafts, report = load_drafts(config.data, needs_responses=True, **config.reading())
    for line in report.lines("data"):
        say(line)
    texts = [asdict(draft) | {"where": None} for draft in drafts]
    check_scorer(config)  # fail early on a bad model name
    for option in ("model_name_or_path", "reference_model_name_or_path"):
        if config.kl_coef:
            _check_tokenizer(option, config)
    pairs = [(row, i) for row, draft in enumerate(drafts) for i in range(len(draft.responses))]
    depends_on = fingerprint("score", identity(config), texts)
    options = {"overwrite": config.overwrite, "accepts": _is_result}
    with Journal(config.output, depends_on, **options) as journal:
        results = _score(journal, drafts, pairs, config)
        ratios = _log_ratios(journal, drafts, config) if config.kl_coef else None
        if ratios is not None:
            results = [
                _penalised(result, ratios[row][i], config.kl_coef)
                for (row, i), result in zip(pairs, results, strict=True)
            ]
        rows, counts = _merge(drafts, pairs, results, ratios)
        if pairs and not counts["scored"]:
            reason = next(row["unscored"] for row in rows if "unscored" in row)[0]["error"]
            journal.forget(list(journal.done))
            raise ValueError(f"no response could be scored: {reason}")
        journal.finish(rows)
    counts.update(report.left_out() | report.by_kind())
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
) -> list[dict]:
    """{"score": ...} or {"error": ...} for each pair (row, response)."""
    if config.judge_model:
        return _judge(journal, drafts, pairs, config)
    if config.reward_model_name_or_path:
        return _reward_model(journal, drafts, pairs, config)
    if config.reward_fn:
        return _reward_fn(journal, drafts, pairs, config)
    logps = _logps(journal, "model_name_or_path", drafts, config)
    return [_result(p if isinstance(p, str) else p[0]) for p in (logps[row][i] for row, i in pairs)]


def _in_batches(
    journal: Journal,
    name: str,
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], list],
    unit: str,
) -> dict[int, object]:
    """Results of `work` by item number; missing batches are computed and journalled."""
    results, title = {}, one_line(name)
    with tqdm(total=sum(map(len, batches)), unit=unit, desc=title, disable=None) as progress:
        for number, batch in enumerate(batches):
            key = f"{name}/{number}"
            if key not in journal.done:
                journal.write(key, work(batch))
            done = journal.done[key]
            if not isinstance(done, list) or len(done) != len(batch):
                problem = f"is damaged (expected {len(batch)} results for {key})"
                raise ValueError(f"output: {journal.path} {problem}")
            results |= dict(zip(batch, done, strict=True))
            progress.update(len(batch))
    return results


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _texts(
    drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]]
) -> tuple[list[Prompt], list[str]]:
    prompts = [drafts[row].prompt for row, _ in pairs]
    return prompts, [drafts[row].responses[i] for row, i in pairs]


def _reward_model(
    journal: Journal, drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]], config: ScoreConfig
) -> list[dict]:
    model = RewardModel(config)
    rows = model.encode(*_texts(drafts, pairs))
    batches = batches_by_length([len(row["input_ids"]) for row in rows], config.batch_size)

    def work(batch: Sequence[int]) -> list[float | str]:
        return list(map(_score_or_reason, model.score([rows[i] for i in batch])))

    scores = _in_batches(journal, "reward model", batches, work, "response")
    return [_result(scores[i]) for i in range(len(pairs))]


def _reward_fn(
    journal: Journal, drafts: Sequence[Draft], pairs: Sequence[tuple[int, int]], config: ScoreConfig
) -> list[dict]:
    function, name = load_reward_fn(config.reward_fn, "reward_fn"), config.reward_fn

    def call(batch: Sequence[int]) -> list[float | str]:
        prompts, responses = _texts(drafts, [pairs[i] for i in batch])
        scores = call_reward_fn(function, prompts, responses, name, "reward_fn")
        return list(map(_score_or_reason, scores.tolist()))

    batches = _chunks(len(pairs), config.batch_size)
    scores = _in_batches(journal, "reward function", batches, call, "response")
    return [_result(scores[i]) for i in range(len(pairs))]


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
) -> list[dict]:
    judge = Judge(config)
    work = {
        f"{row}/{i}": partial(judge.judge, drafts[row].prompt, drafts[row].responses[i])
        for row, i in pairs
    }
    ask_all(work, journal, config.max_concurrency, "judge")
    return [journal.done[key] for key in work]


def _logps(
    journal: Journal, option: str, drafts: Sequence[Draft], config: ScorerConfig
) -> list[list[list[float] | str]]:
    """[row][response] -> [p, sum of the log-probs of its own tokens] under the option's model, or
    the reason why it has none."""
    name, model = getattr(config, option), None

    def work(batch: Sequence[int]) -> list:
        nonlocal model
        model = model or LogProbs(name, config, option)
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
    by_row = _in_batches(journal, f"{_LOGPS}{name}", batches, work, "row")
    return [by_row[row] for row in range(len(drafts))]


def _mean_and_sum(logps: np.ndarray, finish_reason: str | None) -> list[float] | str:
    values = [float(logps.mean()), float(generated(logps, finish_reason).sum())]
    return values if all(map(math.isfinite, values)) else f"a log-prob of {values[0]}"


def _log_ratios(
    journal: Journal, drafts: Sequence[Draft], config: ScoreConfig
) -> list[list[float | str]]:
    """[row][response] -> log(policy / reference), or the reason why it has none."""
    policy = _logps(journal, "model_name_or_path", drafts, config)
    if config.model_name_or_path == config.reference_model_name_or_path:
        reference = policy
    else:
        reference = _logps(journal, "reference_model_name_or_path", drafts, config)
    return [
        [
            next((x for x in (p, r) if isinstance(x, str)), None) or p[1] - r[1]
            for p, r in zip(policy[row], reference[row], strict=True)
        ]
        for row in range(len(drafts))
    ]


def _merge(
    drafts: Sequence[Draft],
    pairs: Sequence[tuple[int, int]],
    results: Sequence[dict],
    ratios: list[list[float]] | None,
) -> tuple[list[dict], Counter]:
    """The final rows, in input order."""
    by_pair = dict(zip(pairs, results, strict=True))
    counts, rows = Counter(rows=len(drafts)), []
    for row, draft in enumerate(drafts):
        results = [by_pair[row, i] for i in range(len(draft.responses))]
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
        rows.append(draft.others | out | ({"unscored": unscored} if unscored else {}))
        for result in results:
            counts.update(result.get("usage", {}))
        counts["scored"] += len(keep)
        counts["unscored"] += len(unscored)
        counts["unrankable"] += len(keep) < 2
    return rows, counts
