"""The stage `sample`: add responses to rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from rrhf_fast.data.checks import one_line
from rrhf_fast.data.load import load_drafts
from rrhf_fast.data.rows import Draft, cut_at, provided_mask
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.sample.local import LocalModel, seed_of
from rrhf_fast.stages.answer import EndedThinking, Refused
from rrhf_fast.stages.endpoint import Endpoint, ask_all
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.journal import Journal, fingerprint, is_usage
from rrhf_fast.stages.outlet import say


def run(config: SampleConfig) -> Counter:
    """See `rrhf_fast.sample`."""
    config.validate()
    drafts, report = load_drafts(config.data, **config.reading())
    for line in report.lines("data"):
        say(line)
    prompts = [asdict(draft) | {"where": None} for draft in drafts]
    for number, policy in enumerate(config.policies):  # fail early on a bad name, address or key
        if policy.method == "openai":
            _endpoint(number, config)
        elif policy.method != "provided":
            name, option = _model_of(number, config)
            load_tokenizer(name, trust_remote_code=config.trust_remote_code, option=option)
    depends_on = fingerprint("sample", identity(config), prompts)
    options = {"overwrite": config.overwrite, "accepts": _is_result}
    with Journal(config.output, depends_on, **options) as journal:
        local: LocalModel | None = None
        for number, policy in enumerate(config.policies):
            if policy.method == "openai":
                _ask_endpoint(journal, number, policy, drafts, config)
            elif policy.method != "provided":
                local = _decode(journal, number, policy, drafts, config, local)
        rows, counts = _merge(journal, drafts, config)
        journal.finish(rows)
    counts.update(report.left_out() | report.by_kind())
    return counts


def _is_result(key: str, result: object) -> bool:
    """Whether `_decode` or `_ask_endpoint` may have journalled this."""
    if key.endswith("/all"):
        return result is None
    if "/batch " not in key:
        return _is_answer(result)
    rows = result.values() if isinstance(result, dict) else [None]
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
    local: LocalModel | None,
) -> LocalModel | None:
    """Decode the batches missing in the journal; returns the model, for the next policies."""
    if f"{number}/all" in journal.done:
        return local
    name, option = _model_of(number, config)
    if local is None or local.name != name:
        local = None  # free the old weights before loading new ones
        local = LocalModel(name, drafts, config, option)
        for line in local.report.lines(f"policies[{number}]"):
            say(line)
    title = one_line(source_of(policy))
    with tqdm(total=len(local.prompts), unit="prompt", desc=title, disable=None) as progress:
        for index, batch in enumerate(local.batches):
            key = f"{number}/batch {index}"
            if key not in journal.done:
                responses = local.answer(policy, index, seed_of(config.seed, number, index))
                journal.write(key, dict(zip(map(str, batch), responses, strict=True)))
            progress.update(len(batch))
    journal.write(f"{number}/all", None)  # a resumed run need not load this model
    return local


def _model_of(number: int, config: SampleConfig) -> tuple[str, str]:
    """The model of a policy and the option that names it."""
    if config.policies[number].model:
        return config.policies[number].model, f"policies[{number}].model"
    return config.model_name_or_path, "model_name_or_path"


def _endpoint(number: int, config: SampleConfig) -> Endpoint:
    """The endpoint of a policy. Raises ValueError for an address or a key that cannot work."""
    cures = {name: (f"policies[{number}].{name}", "null") for name in ("temperature", "top_p")}
    cures |= {"top_k": (f"policies[{number}].top_k", "0")}
    cures |= {"seed": ("send_seed", "false"), "stop": ("stop_strings", "[]")}
    if config.token_limit_parameter != "auto":
        cures[config.token_limit_parameter] = ("token_limit_parameter", "auto")
    policy = config.policies[number]
    return Endpoint(policy.base_url, policy.api_key_env, config, cures, f"policies[{number}].")


def _ask_endpoint(
    journal: Journal, number: int, policy: Policy, drafts: Sequence[Draft], config: SampleConfig
) -> None:
    endpoint = _endpoint(number, config)
    model = policy.model or config.model_name_or_path

    def ask(row: int, copy: int) -> dict:
        seed = seed_of(config.seed, number, row, copy) % 2**31 if config.send_seed else None
        try:
            answer = endpoint.ask(model, seed=seed, **_request(policy, drafts[row], config))
        except Refused as refusal:
            cure = ""
            if isinstance(refusal, EndedThinking):
                cure = f" (raise the token limit, policies[{number}].max_new_tokens)"
            return {"error": f"{refusal}{cure}", "usage": refusal.usage}
        text = cut_at(config.stop_strings, answer.text)
        cut_off = answer.finish_reason == "length" and text == answer.text
        reason = "length" if cut_off else "stop"
        return {"text": text, "finish_reason": reason, "usage": answer.usage}

    work = {
        f"{number}/{row}/{copy}": partial(ask, row, copy)
        for row in range(len(drafts))
        for copy in range(policy.count)
    }
    ask_all(work, journal, config.max_concurrency, source_of(policy))
    if all("error" in journal.done[key] for key in work):
        problem = f"every request was refused: {journal.done[f'{number}/0/0']['error']}"
        journal.forget(work)
        raise ValueError(f"policies[{number}]: {problem}")


def _request(policy: Policy, draft: Draft, config: SampleConfig) -> dict:
    """The arguments of `Endpoint.ask` for this row."""
    # Fields that OpenAI lacks but local servers support.
    extra = ({"top_k": policy.top_k} if policy.top_k else {}) | policy.extra_body
    chat, tools = policy.chat or isinstance(draft.prompt, list), None
    if chat:
        tools = draft.tools or None  # some endpoints refuse an empty list
        own = extra.pop("chat_template_kwargs", None)
        kwargs = config.chat_template_kwargs | (own or {}) | (draft.chat_template_kwargs or {})
        kwargs.pop("chat_template", None)  # names a template of the local tokenizer
        # An empty dict in the policy suppresses them, for endpoints that refuse them.
        if kwargs and own != {}:
            extra["chat_template_kwargs"] = kwargs
    if isinstance(draft.prompt, list) and draft.prompt[-1]["role"] == "assistant":
        # The answer continues the last message.
        extra = {"continue_final_message": True, "add_generation_prompt": False} | extra
    return {
        "prompt": draft.prompt,
        "chat": chat,
        "tools": tools,
        "max_tokens": policy.max_new_tokens,
        "temperature": policy.temperature,
        "top_p": policy.top_p,
        "stop": config.stop_strings or None,
        "extra_body": extra or None,
    }


def source_of(policy: Policy) -> str:
    """The entry in `sources` of a new response of this policy."""
    if policy.source is not None:
        return policy.source
    if policy.method == "openai":
        return f"openai:{policy.model}" if policy.model else "openai"
    return f"{policy.method}:{Path(policy.model).name}" if policy.model else policy.method


def _merge(
    journal: Journal, drafts: Sequence[Draft], config: SampleConfig
) -> tuple[list[dict], Counter]:
    """The final rows, in input order, from the journal alone."""
    results = _results(journal, drafts, config)
    counts, rows = Counter(rows=len(drafts)), []
    for row, draft in enumerate(drafts):
        out = {"prompt": draft.prompt, "responses": [], "sources": [], "finish_reasons": []}
        failures, as_generated = [], []
        for number, policy in enumerate(config.policies):
            is_local = policy.method not in ("openai", "provided")
            counts["unanswered"] += is_local and not results[number][row]
            for result in results[number][row]:
                counts.update(result.get("usage", {}))
                source = result.get("source", source_of(policy))
                if "error" in result:
                    failures.append({"source": source, "error": result["error"]})
                    continue
                problem = _problem(result, out["responses"], config)
                counts[problem or "responses"] += 1
                if problem is None:
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
        rows.append(draft.others | out)
    return rows, counts


def _results(
    journal: Journal, drafts: Sequence[Draft], config: SampleConfig
) -> list[list[list[dict]]]:
    """[policy][row] -> responses or failures, from the journal or the row itself."""
    results = []
    for number, policy in enumerate(config.policies):
        if policy.method == "provided":
            results.append([_provided(draft, policy) for draft in drafts])
        elif policy.method == "openai":
            keys = [
                [f"{number}/{row}/{copy}" for copy in range(policy.count)]
                for row in range(len(drafts))
            ]
            results.append([[journal.done[key] for key in of_row] for of_row in keys])
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
