"""The stage `sample`: add responses to rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields

from tqdm import tqdm

from rrhf_fast.data.checks import one_line
from rrhf_fast.data.load import load_drafts
from rrhf_fast.data.rows import Draft, provided_mask
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.sample.local import LocalModel, seed_of
from rrhf_fast.sample.remote import ask_endpoint, check_endpoint
from rrhf_fast.sample.vllm import VllmModel, check_vllm
from rrhf_fast.stages.cards import without_paths
from rrhf_fast.stages.dataset_card import push_rows
from rrhf_fast.stages.hub import public_name
from rrhf_fast.stages.identity import depends_on, refuse_pipes
from rrhf_fast.stages.journal import Journal, is_usage
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks, join_ranks
from rrhf_fast.stages.serve import Servers

# Options of a policy that may name what is private: places, addresses, keys.
_NOT_ON_CARDS = ("method", "model", "engine_kwargs", "base_url", "api_key_env", "tokenizer")
_NOT_ON_CARDS += ("extra_body", "source")


def run(config: SampleConfig) -> Counter:
    """See `rrhf_fast.sample`."""
    config.validate()
    with join_ranks("sample", config) as ranks:
        return _run(config, ranks)


def _run(config: SampleConfig, ranks: Ranks) -> Counter:
    if ranks.size > 1:
        refuse_pipes(config)
    drafts, report = load_drafts(config.data, **config.reading())
    for line in report.lines("data"):
        say(line)
    if config.serve_command is not None and not any(map(config.is_served, config.policies)):
        say("note: serve_command: no policy of method openai without base_url uses it")
    for number, policy in enumerate(config.policies):  # fail early on a bad name, address or key
        if policy.method == "openai":
            check_endpoint(number, config)
        elif policy.method != "provided":
            if policy.backend == "vllm":
                check_vllm(f"policies[{number}].")
            name, option = _model_of(number, config)
            load_tokenizer(name, trust_remote_code=config.trust_remote_code, option=option)
    if (repository := config.repository()) is not None:
        repository = ranks.once(repository.check)
    options = {"ranks": ranks, "overwrite": config.overwrite, "accepts": _is_result}
    key, log = depends_on("sample", config, drafts, ranks), f"{config.output}.server.log"
    with Journal(config.output, key, **options) as journal, Servers(config, log, ranks) as servers:
        if repository is not None:
            ranks.once(repository.create)
        loaded: list[LocalModel | VllmModel] = []  # at most one
        for number, policy in enumerate(config.policies):
            if policy.method == "openai":
                loaded.clear()  # memory for the server
                ask_endpoint(journal, number, policy, drafts, config, servers)
            elif policy.method != "provided":
                servers.stop()
                _decode(journal, number, policy, drafts, config, loaded)
        counts = ranks.once(lambda: _finish(journal, drafts, config))
    if repository is not None:
        ranks.once(lambda: push_rows(repository, config.output, "Sampled responses", _how(config)))
    counts.update(report.left_out() | report.by_kind())
    return counts


def _how(config: SampleConfig) -> dict:
    """How the responses were made, for the dataset's card."""
    names = [f.name for f in fields(Policy) if f.name not in _NOT_ON_CARDS]
    policies = []
    for policy in config.policies:
        changed = {name: getattr(policy, name) for name in names}
        changed = {name: value for name, value in changed.items() if value != getattr(Policy, name)}
        policies.append({"method": policy.method, **changed})
        model = policy.model or config.model_name_or_path
        if policy.method == "openai":
            policies[-1]["model"] = f"{without_paths(model)}, behind an endpoint"
        elif policy.method != "provided":
            policies[-1]["model"] = public_name(model)
    return {"policies": policies, "stop_strings": config.stop_strings, "seed": config.seed}


def _finish(journal: Journal, drafts: Sequence[Draft], config: SampleConfig) -> Counter:
    counts = Counter(rows=len(drafts))
    journal.finish(_merged(journal, drafts, config, counts))
    return counts


def _is_result(key: str, result: object) -> bool:
    """Whether `_decode` or `ask_endpoint` may have journalled this."""
    if key.endswith("/all"):
        return result is None
    by_row = {key: result} if "/batch " not in key else result
    rows = by_row.values() if isinstance(by_row, dict) else [None]
    return all(isinstance(row, list) and all(map(_is_answer, row)) for row in rows)


def _is_answer(result: object) -> bool:
    """A response, or the reason why there is none."""
    if not isinstance(result, dict) or not is_usage(result.get("usage", {})):
        return False
    names = ("error",) if "error" in result else ("text", "finish_reason")
    return all(isinstance(result.get(name), str) for name in names)


def _decode(
    journal: Journal,
    number: int,
    policy: Policy,
    drafts: Sequence[Draft],
    config: SampleConfig,
    loaded: list[LocalModel | VllmModel],
) -> None:
    """Decode the batches missing in the journal, by the loaded model or one that takes its place
    and remains for the next policies."""
    if journal.has(f"{number}/all"):
        return
    name, option = _model_of(number, config)
    if not loaded or not _decodes(loaded[0], policy, name):
        loaded.clear()  # free the old weights before loading new ones
        if policy.backend == "vllm":
            kwargs = policy.engine_kwargs
            loaded.append(VllmModel(name, drafts, config, option, kwargs))
        else:
            loaded.append(LocalModel(name, drafts, config, option))
        for line in loaded[0].report.lines(f"policies[{number}]"):
            say(line)
    local = loaded[0]
    numbers = {f"{number}/batch {index}": index for index in range(len(local.batches))}
    mine = journal.mine(numbers)
    bar = {"total": sum(len(local.batches[numbers[key]]) for key in mine), "unit": "prompt"}
    title = one_line(policy.recorded_source)
    with tqdm(**bar, desc=title, disable=journal.ranks.bar) as progress:
        for key in mine:
            index = numbers[key]
            responses = local.answer(policy, index, seed_of(config.seed, number, index))
            batch = local.batches[index]
            journal.write(key, dict(zip(map(str, batch), responses, strict=True)))
            progress.update(len(batch))
    journal.share()
    for key in journal.mine([f"{number}/all"]):
        journal.write(key, None)  # a resumed run need not load this model


def _decodes(local: LocalModel | VllmModel, policy: Policy, name: str) -> bool:
    """Whether this is the model that a policy needs, in the engine that it names."""
    if isinstance(local, LocalModel):
        return policy.backend == "transformers" and local.name == name
    same = local.name == name and local.engine_kwargs == policy.engine_kwargs
    return policy.backend == "vllm" and same


def _model_of(number: int, config: SampleConfig) -> tuple[str, str]:
    """The model of a policy and the option that names it."""
    if config.policies[number].model:
        return config.policies[number].model, f"policies[{number}].model"
    return config.model_name_or_path, "model_name_or_path"


def _merged(
    journal: Journal, drafts: Sequence[Draft], config: SampleConfig, counts: Counter
) -> Iterator[dict]:
    """The final rows, in input order, from the journal alone; adds to `counts`."""
    results = _results(journal, drafts, config)
    for row, draft in enumerate(drafts):
        out = {"prompt": draft.prompt, "responses": [], "sources": [], "finish_reasons": []}
        failures, as_generated = [], []
        for number, policy in enumerate(config.policies):
            counts["unanswered"] += policy.method != "provided" and not results[number][row]
            for result in results[number][row]:
                counts.update(result.get("usage", {}))
                source = result.get("source", policy.recorded_source)
                if "error" in result:
                    failures.append({"source": source, "error": result["error"]})
                    continue
                problem = _problem(result, out["responses"], config)
                counts[problem or "responses"] += 1
                if problem is None:
                    counts["cut off at the limit"] += result["finish_reason"] == "length"
                    out["responses"].append(result["text"])
                    out["sources"].append(source)
                    out["finish_reasons"].append(result["finish_reason"])
                    as_generated.append(result.get("as_generated", False))
        counts["failures"] += len(failures)
        counts["unrankable"] += len(out["responses"]) < 2
        out |= {"failures": failures} if failures else {}
        if isinstance(draft.prompt, list) and any(as_generated):
            out["as_generated"] = as_generated
            # Recorded so that training sees the prompt that the responses were drawn for.
            kwargs = config.chat_template_kwargs | (draft.chat_template_kwargs or {})
            out |= {"chat_template_kwargs": kwargs} if kwargs else {}
        yield draft.others | out


def _results(
    journal: Journal, drafts: Sequence[Draft], config: SampleConfig
) -> list[list[list[dict]]]:
    """[policy][row] -> responses or failures, from the journal or the row itself."""
    results = []
    for number, policy in enumerate(config.policies):
        if policy.method == "provided":
            results.append([_provided(draft, policy) for draft in drafts])
        elif policy.method == "openai":
            results.append([journal.done.get(f"{number}/{row}", []) for row in range(len(drafts))])
        else:
            by_row: dict[str, list[dict]] = {}
            for key, batch in journal.done.items():
                if key.startswith(f"{number}/batch "):
                    by_row |= batch
            results.append([by_row.get(str(row), []) for row in range(len(drafts))])
    return results


def _provided(draft: Draft, policy: Policy) -> list[dict]:
    responses = draft.responses or []
    keep = [True] * len(responses)
    if policy.use_responses != "all" and responses:
        keep = [own == (policy.use_responses == "provided") for own in provided_mask(draft)]
    sources = draft.sources or [policy.source or "provided"] * len(responses)
    reasons = draft.finish_reasons or [None] * len(responses)
    generated = draft.as_generated or [False] * len(responses)
    parts = zip(responses, sources, reasons, generated, strict=True)
    names = ("text", "source", "finish_reason", "as_generated")
    return [
        dict(zip(names, part, strict=True)) for part, kept in zip(parts, keep, strict=True) if kept
    ]


def _problem(result: dict, earlier: list[str], config: SampleConfig) -> str | None:
    """Why a response is left out, as the name of its count."""
    if config.finished_only and result["finish_reason"] == "length":
        return "unfinished"
    if config.keep_all:
        return None
    if not result["text"].strip():
        return "empty"
    return "duplicates" if result["text"] in earlier else None
