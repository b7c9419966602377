"""`--group_by`: rows of one response each -> one row per prompt."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from rrhf_fast.data.canonical import COMMON, RESPONSE_NAMES, SCORE_NAMES, fields_hint, number
from rrhf_fast.data.checks import (
    BadRow,
    Cell,
    check_flags,
    check_length,
    check_reasons,
    check_score,
    check_text,
    check_texts,
    from_json,
    listed,
)
from rrhf_fast.data.messages import answer_text, from_cell

# Rows that differ in one of these fields have different prompts.
_PARTS_OF_PROMPT = ("system", "tools", "chat_template_kwargs", "input", "history", "context")
_PARTS_OF_PROMPT += ("question", "query", "instruction", "passage", "document")


@dataclass
class _Group:
    where: str  # of the first row
    record: dict  # fields that are equal in all rows
    responses: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    sources: list = field(default_factory=list)
    flags: list = field(default_factory=list)  # as_generated
    reasons: list = field(default_factory=list)  # finish_reasons


def grouped(
    records: Iterable[tuple[str, dict]],
    group_by: str,
    on_bad: Callable[[BadRow], None],
    *,
    unused: Counter | None,
) -> Iterator[tuple[str, dict]]:
    """Join rows that are equal in the field `group_by` into records of the own format, in order of
    first appearance. Keeps all rows in memory.

    Args:
        records: (where, record), each with one response and its score.
        group_by: the field, which becomes the prompt of rows without one.
        on_bad: called with the error of each bad row, which is left out.
        unused: counts unused fields; every row then needs a score and a response that is not blank.
            If it is None, rows need neither, and fields that are equal in all rows are kept.
    """
    groups: dict[str, _Group] = {}
    for where, record in records:
        try:
            _add(groups, record, where, group_by, unused)
        except BadRow as error:
            on_bad(error)
    for group in groups.values():
        joined = group.record | {"responses": group.responses}
        if any(score is not None for score in group.scores):
            joined["scores"] = group.scores
        if all(isinstance(source, str) for source in group.sources):
            joined["sources"] = group.sources
        if any(flag is not None for flag in group.flags):  # without a flag: not as generated
            joined["as_generated"] = [False if flag is None else flag for flag in group.flags]
        if all(reason is not None for reason in group.reasons):
            joined["finish_reasons"] = group.reasons
        yield group.where, joined


def _add(
    groups: dict[str, _Group], record: dict, where: str, group_by: str, unused: Counter | None
) -> None:
    """Add a row to its group. Raises BadRow."""
    key = record.get(group_by)
    if key is None:
        problem = f"{group_by}: missing (the field of --group_by){fields_hint(record)}"
        raise BadRow("missing field", where, problem)
    # Read the response, its score and what describes it.
    name = _the_one(record, RESPONSE_NAMES, "response", where)
    if name is None or name == group_by:
        found = f"found the fields {listed(list(record))}"
        hint = "name yours with --columns '{response: FIELD}'"
        problem = f"response: missing (--group_by joins rows of one response each); {found}: {hint}"
        raise BadRow("missing field", where, problem)
    response = check_text(answer_text(from_cell(record[name]), name, where), name, where)
    score_name = _the_one(record, SCORE_NAMES, "score", where)
    score = None
    if unused is not None:
        if not response.strip():
            problem = f"{name}: empty, expected at least one visible character"
            raise BadRow("empty response", where, problem)
        if score_name is None:
            found = f"found the fields {listed(list(record))}"
            hint = "name yours with --columns '{score: FIELD}'"
            raise BadRow("missing score", where, f"score: missing; {found}: {hint}")
        score = check_score(number(record[score_name]), score_name, where)
    source = _single(record, "sources", where)
    source = record.get("model") if source is None else source
    flag, reason = (_single(record, name, where) for name in ("as_generated", "finish_reasons"))
    # Checked here and not with the group, which would be lost as a whole.
    check_texts([source] if isinstance(source, str) else [], "sources", where)
    check_flags(None if flag is None else [flag], "as_generated", where)
    check_reasons([reason], "finish_reasons", where)
    # The other fields describe the prompt.
    used = {name, score_name, "model", "sources", "as_generated", "finish_reasons"}
    rest = {k: value for k, value in record.items() if k not in used}
    if rest.get("prompt") is None:
        rest["prompt"] = rest.pop(group_by)
        if group_by == "instruction" and isinstance(rest["prompt"], str) and rest.get("input"):
            # As in the Alpaca layout.
            rest["prompt"] += "\n" + check_text(rest.pop("input"), "input", where)
    if unused is not None:
        spare = [name for name in rest if name not in ("prompt", *COMMON)]
        with_value = [name for name in spare if rest.pop(name) not in (None, "")]
        unused.update(name for name in with_value if name != group_by)
    # Join the group of all rows with the same prompt.
    parts = [key, *(record.get(part) for part in _PARTS_OF_PROMPT)]
    id_ = json.dumps(parts, sort_keys=True, default=str)
    if group := groups.get(id_):
        if group.record["prompt"] != rest["prompt"]:
            problem = f"prompt: differs from that of {group.where}, which has the same {group_by}"
            raise BadRow("unequal prompts", where, problem)
        group.record = {k: v for k, v in group.record.items() if k in rest and rest[k] == v}
    else:
        group = groups[id_] = _Group(where, record=rest)
    group.responses.append(response)
    group.scores.append(score)
    group.sources.append(source)
    group.flags.append(flag)
    group.reasons.append(reason)


def _the_one(record: dict, names: tuple[str, ...], what: str, where: str) -> str | None:
    """Return the field that holds the response or the score, if any: the first of `names`, or the
    only other one. Raises BadRow if it may be any of several, such as a reference answer."""
    found = [name for name in names if record.get(name) is not None]
    if len(found) > 1 and found[0] != names[0]:
        choice = f"--columns '{{{what}: {found[-1]}}}'"
        problem = f"{what}: expected one field, found {' and '.join(found)} (say which: {choice})"
        raise BadRow("two candidates", where, problem)
    return found[0] if found else None


def _single(record: dict, name: str, where: str) -> object:
    """Return a field's value for the row's one response, given alone or in a list of one."""
    value = record.get(name)
    if isinstance(value, Cell):
        value = from_json(value, name, where) if value.lstrip().startswith("[") else value or None
    if isinstance(value, list):
        check_length(name, value, 1, where)
        value = value[0]
    return value
