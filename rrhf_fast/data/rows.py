"""Rows of scored responses: read them, check every field, say exactly what is wrong with a bad one.

A row is a record of a file or a dataset (see files.py) in the format

    {"prompt": str | [messages], "responses": [str], "scores": [float], "sources": [str]}

or in one of the layouts of published datasets (see layouts.py), or in any other with the help of
`columns` and `group_by`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from rrhf_fast.data.checks import (
    BadRow,
    check_list,
    check_score,
    check_text,
    show,
)
from rrhf_fast.data.columns import Columns
from rrhf_fast.data.files import NO_ARRAY, read_records
from rrhf_fast.data.grouped import grouped
from rrhf_fast.data.layouts import Canonical, canonical, what_serves
from rrhf_fast.data.messages import (
    answer_text,
    as_messages,
    check_kwargs,
    check_messages,
    check_tools,
    with_system,
)

T = TypeVar("T")

# The released format stores the dataset's own two responses last; the ones before are sampled.
NUM_PROVIDED = 2
# How the sources of a dataset's own responses begin; the last two name those of a pair.
PROVIDED = ("provided", "chosen", "rejected")
# What an earlier `sample` or `score` said about responses.
OF_STAGES = ("rewards", "log_ratios", "criteria", "unscored", "failures")
HINT = "--on_bad_rows skip leaves out bad responses, and rows with fewer than 2 good ones"


@dataclass(frozen=True)
class Row:
    """One query with its k >= 2 scored responses. `where` is "file:line" or "dataset[index]"."""

    prompt: str | list[dict]
    responses: list[str]
    scores: list[float]
    sources: list[str] | None
    where: str
    tools: list[dict] | None = None  # for the chat template
    chat_template_kwargs: dict | None = None  # of this row, over those of the options
    # Per response, whether it is what a model wrote behind the generation prompt, special tokens
    # included; else it is the content of an assistant's message.
    as_generated: list[bool] | None = None


@dataclass(frozen=True)
class Draft:
    """A row on its way to the trainer: what `sample` and `score` read. Responses may be missing,
    too few or empty, and scores do not matter yet."""

    prompt: str | list[dict]
    responses: list[str] | None
    sources: list[str] | None
    # Per response "stop" or "length" (cut off by a limit) as a sampler reported it, else None.
    finish_reasons: list[str | None] | None
    others: dict  # fields that the stages pass on as they are
    where: str
    # As in `Row`.
    tools: list[dict] | None = None
    chat_template_kwargs: dict | None = None
    as_generated: list[bool] | None = None


@dataclass
class RowReport:
    """What became of the rows."""

    read: int = 0
    kept: int = 0
    bad: Counter = field(default_factory=Counter)  # skipped rows by kind
    bad_responses: Counter = field(default_factory=Counter)  # left out of kept rows, by kind
    unused: Counter = field(default_factory=Counter)  # rows with a field that nothing uses, by name

    def skip(self, error: BadRow, on_bad_rows: str) -> None:
        """Count a bad row, or stop at it: raises `error`, with what to do, when `on_bad_rows` is
        "error"."""
        if on_bad_rows == "error":
            kind, where, problem = error.args
            raise BadRow(kind, where, f"{problem} ({HINT})") from error
        self.bad[error.kind] += 1

    def left_out(self) -> dict[str, int]:
        """What is missing, for the counts of a stage: nothing where there is nothing to tell."""
        counts = {"skipped": self.bad.total(), "bad_responses": self.bad_responses.total()}
        return {name: count for name, count in counts.items() if count}

    def add(self, other: "RowReport") -> None:
        """Count what another report counted; `kept` is left alone."""
        self.read += other.read
        for name in ("bad", "bad_responses", "unused"):
            getattr(self, name).update(getattr(other, name))


def load_rows(
    sources: str | list[str],
    *,
    on_bad_rows: str = "error",
    use_responses: str = "all",
    stop_strings: list[str] | None = None,
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    apply_chat_template: bool = False,
) -> tuple[list[Row], RowReport]:
    """Read and validate rows from files, folders and Hugging Face datasets, in order.

    Args:
        sources: see files.py for what can be named.
        on_bad_rows: "error" stops at the first bad row; "skip" leaves out bad responses, and rows
            with fewer than two good ones, and counts both by kind.
        use_responses: "all"; "provided" keeps the responses whose source starts with "provided",
            "chosen" or "rejected" (rows without `sources`: the last two, as in the released
            format); "sampled" keeps the others.
        stop_strings: each response is cut at the first of these strings that it contains.
        columns: JMESPath expressions by the field that they lead to.
        group_by: join rows of one response each that are equal in this field.
        apply_chat_template: turn string prompts into a user's message.

    Returns:
        The rows, and a report of how many were read, kept and skipped.

    Raises:
        ValueError: a source cannot be read or holds no usable row, or a path is no JMESPath.
        BadRow: (a ValueError) a row is bad and `on_bad_rows` is "error"; names file, line, field
            and what was expected.
    """
    report = RowReport()

    def parse(found: Canonical, record: dict, where: str) -> Row:
        _count_unused(report, found, record)
        return _row(
            found,
            record,
            where,
            report=None if on_bad_rows == "error" else report,
            use_responses=use_responses,
            stop_strings=stop_strings or [],
        )

    reading = (columns, group_by, apply_chat_template)
    return _load(sources, on_bad_rows, report, parse, *reading, of_rows=True), report


def load_drafts(
    sources: str | list[str],
    *,
    on_bad_rows: str = "error",
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    apply_chat_template: bool = False,
) -> tuple[list[Draft], RowReport]:
    """Read prompts, with or without responses, from what `load_rows` reads; it raises the same."""
    report = RowReport()

    def parse(found: Canonical, record: dict, where: str) -> Draft:
        return _draft(found, record, where, report=None if on_bad_rows == "error" else report)

    reading = (columns, group_by, apply_chat_template)
    return _load(sources, on_bad_rows, report, parse, *reading, of_rows=False), report


def _load(
    sources: str | list[str],
    on_bad_rows: str,
    report: RowReport,
    parse: Callable[[Canonical, dict, str], T],
    columns: dict[str, str] | None,
    group_by: str | None,
    apply_chat_template: bool,
    *,
    of_rows: bool,
) -> list[T]:
    paths = Columns(columns) if columns else None
    sources = [sources] if isinstance(sources, str) else sources
    records = (item for source in sources for item in read_records(source))
    if group_by is not None:
        records = _grouped(records, group_by, paths, on_bad_rows, report, of_rows)
        paths = None  # of single rows
    rows = []
    for where, record in records:
        report.read += group_by is None
        try:
            mapped = paths.find(_check_object(record, where), where) if paths else None
            found = canonical(_check_object(record, where), where, mapped)
            if paths:
                found.used |= paths.fields
            _complete_prompt(found, record, where, apply_chat_template)
            rows.append(parse(found, record, where))
        except BadRow as error:
            report.skip(error, on_bad_rows)
    if not rows:
        names = ", ".join(sources)
        raise ValueError(
            f"{names}: no usable row among the {report.read} read {_kinds(report.bad)}".rstrip()
        )
    report.kept = len(rows)
    return rows


def _grouped(
    records: Iterator[tuple[str, object]],
    group_by: str,
    paths: Columns | None,
    on_bad_rows: str,
    report: RowReport,
    of_rows: bool,
) -> Iterator[tuple[str, dict]]:
    def on_bad(error: BadRow) -> None:
        if on_bad_rows == "error":
            report.skip(error, on_bad_rows)
        report.bad_responses[error.kind] += 1

    def good() -> Iterator[tuple[str, dict]]:
        for where, record in records:
            report.read += 1
            try:
                record = _check_object(record, where)
                yield where, record | paths.find(record, where) if paths else record
            except BadRow as error:
                on_bad(error)

    return grouped(good(), group_by, on_bad, unused=report.unused if of_rows else None)


def parse_row(record: object, where: str) -> Row:
    """Check one record and turn it into a `Row`; raises `BadRow` that names the field and what was
    expected."""
    found = canonical(_check_object(record, where), where)
    _complete_prompt(found, record, where, False)
    return _row(found, record, where)


def parse_draft(record: object, where: str) -> Draft:
    """Check one record and turn it into a `Draft`; raises `BadRow` like `parse_row`."""
    found = canonical(_check_object(record, where), where)
    _complete_prompt(found, record, where, False)
    return _draft(found, record, where)


def _complete_prompt(found: Canonical, record: dict, where: str, apply_chat_template: bool) -> None:
    """Check the prompt and what belongs to it; put the system message in."""
    if found.prompt is None:
        problem = "prompt: missing (a string or a list of messages was expected)"
        raise BadRow("missing field", where, problem + what_serves(record))
    if isinstance(found.prompt, str):
        prompt = check_text(found.prompt, found.prompt_name, where)
    elif isinstance(found.prompt, list):
        prompt = check_messages(found.prompt, found.prompt_name, where)
    else:
        problem = f"{found.prompt_name}: expected a string or messages, found {show(found.prompt)}"
        raise BadRow("wrong type", where, problem)
    common = found.common
    common["tools"] = check_tools(common["tools"], where)
    common["chat_template_kwargs"] = check_kwargs(common["chat_template_kwargs"], where)
    prompt = with_system(prompt, common["system"], where)
    # Tools have their place in a chat template, and nowhere in a text.
    if apply_chat_template or common["tools"]:
        prompt = as_messages(prompt)
    found.prompt = prompt


def _row(
    found: Canonical,
    record: dict,
    where: str,
    *,
    report: RowReport | None = None,
    use_responses: str = "all",
    stop_strings: list[str] | None = None,
) -> Row:
    """The row of a record whose prompt is complete. With a report, responses that are bad are
    counted there and left out, as long as two remain; else they raise BadRow."""
    responses, scores = (
        _needed(value, name, record, where)
        for name, value in (("responses", found.responses), ("scores", found.scores))
    )
    sources = _texts(found.sources, "sources", where)
    as_generated = _flags(found.common["as_generated"], where)
    for name, values in (("scores", scores), ("sources", sources), ("as_generated", as_generated)):
        _check_length(name, values, len(responses), where)
    chosen = range(len(responses))
    if use_responses != "all":
        own = _provided(sources, len(responses))
        chosen = [i for i in chosen if own[i] == (use_responses == "provided")]
    keep, texts, numbers, bad = [], [], [], []
    for i in chosen:
        try:
            text = _response(found, responses[i], i, where, stop_strings or [])
            number = check_score(scores[i], _name_of(found.score_names, "scores", i), where)
        except BadRow as error:
            if report is None:
                raise
            bad.append(error)
            continue
        keep.append(i)
        texts.append(text)
        numbers.append(number)
    if len(keep) < 2 and bad:
        raise bad[0]
    if len(keep) < 2:
        which = "" if use_responses == "all" else f" that are {use_responses}"
        problem = f"responses: ranking needs at least 2, found {len(keep)}{which}"
        raise BadRow("fewer than 2 responses", where, problem)
    if report is not None:
        report.bad_responses.update(error.kind for error in bad)
    return Row(
        found.prompt,
        texts,
        numbers,
        sources and [sources[i] for i in keep],
        where,
        found.common["tools"],
        found.common["chat_template_kwargs"],
        as_generated and [as_generated[i] for i in keep],
    )


def _draft(found: Canonical, record: dict, where: str, *, report: RowReport | None = None) -> Draft:
    """The draft of a record whose prompt is complete. With a report, responses that are bad are
    counted there and left out."""
    raw = None if found.responses is None else check_list(found.responses, "responses", where)
    sources = _texts(found.sources, "sources", where)
    as_generated = _flags(found.common["as_generated"], where)
    reasons = found.common["finish_reasons"]
    reasons = None if reasons is None else check_list(reasons, "finish_reasons", where)
    parts = {"sources": sources, "finish_reasons": reasons, "as_generated": as_generated}
    for name, values in parts.items():
        _check_length(name, values, len(raw or []), where)
    keep, texts = [], []
    for i, answer in enumerate(raw or []):
        name = _name_of(found.names, "responses", i)
        try:
            texts.append(check_text(answer_text(answer, name, where), name, where))
        except BadRow as error:
            if report is None:
                raise
            report.bad_responses[error.kind] += 1
            continue
        keep.append(i)
    parts = {name: values and [values[i] for i in keep] for name, values in parts.items()}
    used = found.used | {*OF_STAGES} - {"failures"}
    others = {name: value for name, value in record.items() if name not in used}
    # These two go on as they are, whatever a stage makes of the responses.
    named = {name: found.common[name] for name in ("tools", "chat_template_kwargs")}
    others |= {name: value for name, value in named.items() if value is not None}
    return Draft(
        found.prompt,
        None if raw is None else texts,
        parts["sources"],
        parts["finish_reasons"],
        others,
        where,
        **named,
        as_generated=parts["as_generated"],
    )


def _response(found: Canonical, answer: object, i: int, where: str, stop_strings: list[str]) -> str:
    name = _name_of(found.names, "responses", i)
    text = check_text(answer_text(answer, name, where), name, where)
    if not text.strip():
        problem = f"{name}: empty, expected at least one visible character"
        raise BadRow("empty response", where, problem)
    if stop_strings:
        text = cut_at(stop_strings, text)
        if not text.strip():
            raise BadRow("empty response", where, f"{name}: empty once cut at a stop string")
    return text


def _needed(value: object, name: str, record: dict, where: str) -> list:
    if value is None:
        problem = f"{name}: missing (a list was expected){what_serves(record)}"
        raise BadRow("missing field", where, problem)
    return check_list(value, name, where)


def _name_of(names: list[str] | None, field_name: str, i: int) -> str:
    return f"{field_name}[{i}]" if names is None else names[i]


def _flags(value: object, where: str) -> list[bool] | None:
    if value is None:
        return None
    flags = check_list(value, "as_generated", where)
    for i, flag in enumerate(flags):
        if not isinstance(flag, bool):
            problem = f"as_generated[{i}]: expected true or false, found {show(flag)}"
            raise BadRow("wrong type", where, problem)
    return flags


def _texts(value: object, name: str, where: str) -> list[str] | None:
    if value is None:
        return None
    texts = check_list(value, name, where)
    return [check_text(text, f"{name}[{i}]", where) for i, text in enumerate(texts)]


def _check_length(name: str, values: list | None, count: int, where: str) -> None:
    if values is not None and len(values) != count:
        expected = f"expected one for each of the {count} responses"
        raise BadRow("unequal lengths", where, f"{name}: {expected}, found {len(values)}")


def _count_unused(report: RowReport, found: Canonical, record: dict) -> None:
    for name, value in record.items():
        if name not in found.used and name not in OF_STAGES and value is not None:
            report.unused[name] += 1


def _check_object(record: object, where: str) -> dict:
    if isinstance(record, BadRow):  # a line that is no JSON
        raise record
    if isinstance(record, list):
        raise BadRow("not an object", where, NO_ARRAY)
    if not isinstance(record, dict):
        raise BadRow("not an object", where, f"expected a JSON object, found {show(record)}")
    return record


def provided_mask(row: Row | Draft) -> list[bool]:
    """For each response, whether it is the dataset's own: its source says so, or, in rows without
    sources, it is one of the last two."""
    return _provided(row.sources, len(row.responses))


def _provided(sources: list[str] | None, count: int) -> list[bool]:
    if sources is not None:
        return [source.startswith(PROVIDED) for source in sources]
    return [i >= count - NUM_PROVIDED for i in range(count)]


def cut_at(stop_strings: list[str], response: str) -> str:
    """The response up to the first of the stop strings that it holds."""
    found = (at for stop in stop_strings if (at := response.find(stop)) >= 0)
    return response[: min(found, default=None)]


def _kinds(bad: Counter) -> str:
    return f"({', '.join(f'{count} {kind}' for kind, count in bad.most_common())})" if bad else ""
