"""A record -> a checked row, or an error that says exactly what is wrong with it.

The own format is

    {"prompt": str | [messages], "responses": [str], "scores": [float], "sources": [str]}

Records of other layouts are first converted to it (layouts.py).
"""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from rrhf_fast.data.canonical import Canonical, fields_hint
from rrhf_fast.data.checks import (
    BadRow,
    check_flags,
    check_json,
    check_length,
    check_list,
    check_object,
    check_reasons,
    check_score,
    check_text,
    check_texts,
    listed,
    show,
)
from rrhf_fast.data.columns import Columns
from rrhf_fast.data.layouts import PER_RESPONSE, canonical
from rrhf_fast.data.messages import (
    answer_text,
    as_messages,
    check_kwargs,
    check_messages,
    check_tools,
    with_system,
)
from rrhf_fast.data.pairs import as_turns

T = TypeVar("T")

# The released format stores the dataset's own two responses last, after the sampled ones.
NUM_PROVIDED = 2
# Prefixes of the sources of a dataset's own responses; the last two are those of a pair.
PROVIDED = ("provided", "chosen", "rejected")
# Fields in which an earlier `sample` or `score` described the responses.
STAGE_FIELDS = ("rewards", "log_ratios", "criteria", "unscored", "failures")


@dataclass(frozen=True)
class Row:
    """A query with its k >= 2 rated responses. `where` is "file:line" or "dataset[index]"."""

    prompt: str | list[dict]
    responses: list[str]
    rewards: list[float]  # `scores` in files
    sources: list[str] | None
    where: str
    tools: list[dict] | None = None  # for the chat template
    chat_template_kwargs: dict | None = None  # override those of the options
    # Per response, True if a model wrote it directly after the generation prompt, special tokens
    # included, and False if it is the content of an assistant message.
    as_generated: list[bool] | None = None

    def pick(self, keep: Sequence[int]) -> "Row":
        """Return the row with only the responses at these indices."""
        return _pick(self, keep, ("responses", "rewards", "sources", "as_generated"))


@dataclass(frozen=True)
class Draft:
    """An unfinished row, the input of `sample` and `score`. Responses may be missing, empty or
    fewer than two; scores are ignored."""

    prompt: str | list[dict]
    responses: list[str] | None
    sources: list[str] | None
    # Per response "stop" or "length" (cut off by a limit) as the sampler reported it, else None.
    finish_reasons: list[str | None] | None
    others: dict  # fields that the stages pass on, as JSON
    where: str
    # As in `Row`.
    tools: list[dict] | None = None
    chat_template_kwargs: dict | None = None
    as_generated: list[bool] | None = None

    def pick(self, keep: Sequence[int]) -> "Draft":
        """Return the draft with only the responses at these indices."""
        return _pick(self, keep, ("responses", "sources", "finish_reasons", "as_generated"))

    def as_row(self) -> Row:
        """Return a row with the same tokens and rewards of 0."""
        responses = self.responses or []
        return Row(
            prompt=self.prompt,
            responses=responses,
            rewards=[0.0] * len(responses),
            sources=self.sources,
            where=self.where,
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
            as_generated=self.as_generated,
        )


def _pick(row: T, keep: Sequence[int], per_response: tuple[str, ...]) -> T:
    lists = {name: getattr(row, name) for name in per_response}
    return replace(row, **{name: _at(keep, values) for name, values in lists.items()})


def _at(keep: Sequence[int], values: list | None) -> list | None:
    return values and [values[i] for i in keep]


def parse_row(record: object, where: str) -> Row:
    """Convert one record of any layout to a `Row`. Raises `BadRow`, which names the field and what
    was expected."""
    return row_of(complete(record, where), record, where)[0]


def complete(
    record: object, where: str, paths: Columns | None = None, apply_chat_template: bool = False
) -> Canonical:
    """Convert a record to canonical form with a checked prompt, the system message included; its
    responses and scores are not checked yet. Raises BadRow."""
    record = check_object(record, where)
    canon = canonical(record, where, paths.find(record, where) if paths else None)
    if paths:
        canon.used |= paths.fields
    if canon.prompt is None:
        problem = "prompt: missing (expected a string or a list of messages)"
        raise BadRow("missing field", where, problem + fields_hint(record, "prompt"))
    if isinstance(canon.prompt, str):
        prompt = check_text(canon.prompt, canon.prompt_name, where)
    elif isinstance(canon.prompt, list):
        prompt = check_messages(canon.prompt, canon.prompt_name, where)
    else:
        problem = f"{canon.prompt_name}: expected a string or messages, found {show(canon.prompt)}"
        raise BadRow("wrong type", where, problem)
    if apply_chat_template and isinstance(canon.prompt, str):
        as_turns(canon)
        prompt = canon.prompt
    common = canon.common
    common["tools"] = check_tools(common["tools"], where)
    common["chat_template_kwargs"] = check_kwargs(common["chat_template_kwargs"], where)
    prompt = with_system(prompt, common["system"], where)
    # Only a chat template can render tools, so a string prompt becomes a message.
    canon.prompt = as_messages(prompt) if apply_chat_template or common["tools"] else prompt
    return canon


def row_of(
    canon: Canonical,
    record: dict,
    where: str,
    *,
    drop: bool = False,
    use_responses: str = "all",
    stop_strings: Sequence[str] = (),
) -> tuple[Row, list[BadRow]]:
    """Check the responses and scores of a complete record.

    Returns:
        The row, and the errors of its bad responses, which are left out if `drop` is True.

    Raises:
        BadRow: the first bad response, unless `drop` is True and two good ones remain.
    """
    # Check the lists that describe the responses; all have one item per response.
    responses = _needed(canon.responses, "responses", record, where)
    scores = _needed(canon.scores, "scores", record, where)
    sources = check_texts(canon.sources, "sources", where)
    as_generated = check_flags(canon.common["as_generated"], "as_generated", where)
    for name, values in (("scores", scores), ("sources", sources), ("as_generated", as_generated)):
        check_length(name, values, len(responses), where)
    chosen = range(len(responses))
    if use_responses != "all":
        is_own = _provided(sources, len(responses))
        chosen = [i for i in chosen if is_own[i] == (use_responses == "provided")]
    # Check each chosen response and its score.
    keep, texts, rewards, bad = [], [], [], []
    for i in chosen:
        try:
            text = _response(canon, responses[i], i, where, stop_strings)
            reward = check_score(scores[i], _name_of(canon.score_names, "scores", i), where)
        except BadRow as error:
            if not drop:
                raise
            bad.append(error)
            continue
        keep.append(i)
        texts.append(text)
        rewards.append(reward)
    _check_unanswered(canon, texts, where)
    if len(keep) < 2 and bad:
        raise bad[0]
    if len(keep) < 2:
        which = "" if use_responses == "all" else f" that are {use_responses}"
        problem = f"responses: ranking needs at least 2, found {len(keep)}{which}"
        raise BadRow("fewer than 2 responses", where, problem)
    canon.noted = _notes(canon, keep, rewards, where)
    row = Row(
        prompt=canon.prompt,
        responses=texts,
        rewards=rewards,
        sources=_at(keep, sources),
        where=where,
        tools=canon.common["tools"],
        chat_template_kwargs=canon.common["chat_template_kwargs"],
        as_generated=_at(keep, as_generated),
    )
    return row, bad


def _check_unanswered(canon: Canonical, texts: list[str], where: str) -> None:
    """Raise BadRow if the prompt ends with one of the responses. Responses continue a last message
    of the assistant, so that they would follow themselves."""
    last = canon.prompt[-1] if isinstance(canon.prompt, list) else {}
    content = last.get("content") if last.get("role") == "assistant" else None
    if content and content.strip() in [text.strip() for text in texts]:
        problem = f"{canon.prompt_name}: its last message is one of the responses, which would "
        problem += "continue it (leave it out, as by --columns '{prompt: FIELD[:-1]}')"
        raise BadRow("answered prompt", where, problem)


def _notes(canon: Canonical, keep: list[int], rewards: list[float], where: str) -> Counter:
    """What is worth a warning in a row that is used: `cut off`, its responses that a limit of
    length ended; `contradicted`, 1 for a pair whose own scores prefer the rejected side."""
    counts = Counter()
    with suppress(BadRow):  # training needs no reasons
        reasons = check_reasons(canon.common["finish_reasons"], "finish_reasons", where) or []
        counts["cut off"] = sum(reasons[i] == "length" for i in keep if i < len(reasons))
    is_pair = canon.score_names is not None and canon.names == ["chosen", "rejected"]
    if is_pair and len(rewards) == 2:
        counts["contradicted"] = int(rewards[0] < rewards[1])
    return +counts


def draft_of(
    canon: Canonical,
    record: dict,
    where: str,
    *,
    drop: bool = False,
    needs_responses: bool = False,
) -> tuple[Draft, list[BadRow]]:
    """Check the responses of a complete record, if it has any or `needs_responses`.

    Returns:
        The draft, and the errors of its bad responses, which are left out if `drop` is True.

    Raises:
        BadRow: the first bad response, unless `drop` is True.
    """
    # Check the lists that describe the responses; all have one item per response.
    raw = canon.responses
    if raw is not None or needs_responses:
        raw = _needed(raw, "responses", record, where)
    sources = check_texts(canon.sources, "sources", where)
    as_generated = check_flags(canon.common["as_generated"], "as_generated", where)
    reasons = check_reasons(canon.common["finish_reasons"], "finish_reasons", where)
    lists = {"sources": sources, "finish_reasons": reasons, "as_generated": as_generated}
    for name, values in lists.items():
        check_length(name, values, len(raw or []), where)
    # Check each response.
    keep, texts, bad = [], [], []
    for i, answer in enumerate(raw or []):
        name = _name_of(canon.names, "responses", i)
        try:
            texts.append(check_text(answer_text(answer, name, where), name, where))
        except BadRow as error:
            if not drop:
                raise
            bad.append(error)
            continue
        keep.append(i)
    # Everything that was not read into the draft is passed on, and so are these two, whatever a
    # stage does to the responses.
    # Lists for each response describe those of the layout's own fields at best.
    used = canon.used | {*STAGE_FIELDS, "scores", *PER_RESPONSE} - {"failures"}
    others = {name: value for name, value in record.items() if name not in used}
    others = _passed_on(others, "the name of a field", where)
    named = {name: canon.common[name] for name in ("tools", "chat_template_kwargs")}
    others |= {name: value for name, value in named.items() if value is not None}
    last = canon.prompt[-1] if isinstance(canon.prompt, list) else {}
    if raw is None and last.get("role") == "assistant":
        canon.noted["continued"] = 1
    draft = Draft(
        prompt=canon.prompt,
        responses=None if raw is None else texts,
        others=others,
        where=where,
        **named,
        **{name: _at(keep, values) for name, values in lists.items()},
    )
    return draft, bad


def _passed_on(value: object, name: str, where: str) -> object:
    """Return a value as it can be written: NaN and infinity, which JSON lacks, as null, bytes as
    base64. Raises BadRow for half of a surrogate pair."""
    if isinstance(value, dict):
        for key in value:
            check_json(key, name, where)
        return {key: _passed_on(item, listed([key]), where) for key, item in value.items()}
    if isinstance(value, list):
        return [_passed_on(item, name, where) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    check_json(value, name, where)
    return value


def _response(
    canon: Canonical, answer: object, i: int, where: str, stop_strings: Sequence[str]
) -> str:
    name = _name_of(canon.names, "responses", i)
    text = check_text(answer_text(answer, name, where), name, where)
    if not text.strip():
        problem = f"{name}: empty, expected at least one visible character"
        raise BadRow("empty response", where, problem)
    text = cut_at(stop_strings, text)
    if not text.strip():
        raise BadRow("empty response", where, f"{name}: empty once cut at a stop string")
    return text


def _needed(value: object, name: str, record: dict, where: str) -> list:
    if value is None:
        problem = f"{name}: missing (expected a list){fields_hint(record)}"
        raise BadRow("missing field", where, problem)
    return check_list(value, name, where)


def _name_of(names: list[str] | None, field_name: str, i: int) -> str:
    return f"{field_name}[{i}]" if names is None else names[i]


def unused_fields(canon: Canonical, record: dict) -> list[str]:
    """Return the fields of a record that have a value which nothing uses."""
    used = canon.used.union(STAGE_FIELDS)
    return [name for name, value in record.items() if name not in used and value is not None]


def provided_mask(row: Row | Draft) -> list[bool]:
    """Return per response whether it is the dataset's own: its source says so or, in rows without
    sources, it is one of the last two."""
    return _provided(row.sources, len(row.responses))


def _provided(sources: list[str] | None, count: int) -> list[bool]:
    if sources is not None:
        return [source.startswith(PROVIDED) for source in sources]
    return [i >= count - NUM_PROVIDED for i in range(count)]


def cut_at(stop_strings: Sequence[str], response: str) -> str:
    """Cut a response at the first stop string that it contains."""
    places = (at for stop in stop_strings if (at := response.find(stop)) >= 0)
    return response[: min(places, default=None)]
