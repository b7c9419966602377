"""Rows of scored responses: read them, check every field, say exactly what is wrong with a bad one.

A row is a record of a file or a dataset (see files.py) in the format

    {"prompt": str | [messages], "responses": [str], "scores": [float], "sources": [str]}

or in one of the layouts of published datasets (see layouts.py), or in any other with the help of
`columns` and `group_by`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from rrhf_fast.data.canonical import Canonical, what_serves
from rrhf_fast.data.checks import (
    BadRow,
    check_flags,
    check_length,
    check_list,
    check_score,
    check_text,
    check_texts,
    show,
)
from rrhf_fast.data.columns import Columns
from rrhf_fast.data.files import NO_ARRAY, InMemory, Records, read_records
from rrhf_fast.data.grouped import grouped
from rrhf_fast.data.layouts import canonical
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

    def pick(self, keep: Sequence[int]) -> "Row":
        """The same prompt with these of its responses."""
        return _pick(self, keep, ("responses", "scores", "sources", "as_generated"))


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

    def pick(self, keep: Sequence[int]) -> "Draft":
        """The same prompt with these of its responses."""
        return _pick(self, keep, ("responses", "sources", "finish_reasons", "as_generated"))

    def as_row(self) -> Row:
        """A row of the same tokens, without scores."""
        responses = self.responses or []
        return Row(
            prompt=self.prompt,
            responses=responses,
            scores=[0.0] * len(responses),
            sources=self.sources,
            where=self.where,
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
            as_generated=self.as_generated,
        )


def _pick(row: T, keep: Sequence[int], per_response: tuple[str, ...]) -> T:
    lists = {name: getattr(row, name) for name in per_response}
    kept = {name: values and [values[i] for i in keep] for name, values in lists.items()}
    return replace(row, **kept)


def _with_hint(error: BadRow) -> BadRow:
    """Append what to do about it to an error."""
    kind, where, problem = error.args
    return BadRow(kind, where, f"{problem} ({HINT})")


@dataclass
class RowReport:
    """What became of the rows."""

    read: int = 0
    kept: int = 0
    bad: Counter = field(default_factory=Counter)  # skipped rows, by kind
    bad_responses: Counter = field(default_factory=Counter)  # left out of kept rows, by kind
    unused: Counter = field(default_factory=Counter)  # rows with an unused field, by its name

    def skip(self, error: BadRow, on_bad_rows: str) -> None:
        """Count a bad row, or stop at it: raises `error`, with what to do, when `on_bad_rows` is
        "error"."""
        if on_bad_rows == "error":
            raise _with_hint(error)
        self.bad[error.kind] += 1

    def left_out(self) -> dict[str, int]:
        """Return non-zero counts of skipped rows and bad responses, for the counts of a stage."""
        counts = {"skipped": self.bad.total(), "bad_responses": self.bad_responses.total()}
        return {name: count for name, count in counts.items() if count}

    def add(self, other: "RowReport") -> None:
        """Add the counts of another report, except `kept`."""
        self.read += other.read
        for name in ("bad", "bad_responses", "unused"):
            getattr(self, name).update(getattr(other, name))


def load_rows(
    sources: str | InMemory | list[str],
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
        sources: see files.py for what can be named, or rows in memory.
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
    rows = _load(
        sources,
        report,
        partial(
            _row,
            report=report,
            drop=on_bad_rows == "skip",
            use_responses=use_responses,
            stop_strings=stop_strings or [],
        ),
        on_bad_rows=on_bad_rows,
        columns=columns,
        group_by=group_by,
        apply_chat_template=apply_chat_template,
        unused=report.unused,
    )
    return rows, report


def load_drafts(
    sources: str | InMemory | list[str],
    *,
    on_bad_rows: str = "error",
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    apply_chat_template: bool = False,
) -> tuple[list[Draft], RowReport]:
    """Read prompts, with or without responses, from what `load_rows` reads; it raises the same."""
    report = RowReport()
    drafts = _load(
        sources,
        report,
        partial(_draft, report=report, drop=on_bad_rows == "skip"),
        on_bad_rows=on_bad_rows,
        columns=columns,
        group_by=group_by,
        apply_chat_template=apply_chat_template,
    )
    return drafts, report


def _load(
    sources: str | InMemory | list[str],
    report: RowReport,
    parse: Callable[[Canonical, dict, str], T],
    *,
    on_bad_rows: str,
    columns: dict[str, str] | None,
    group_by: str | None,
    apply_chat_template: bool,
    unused: Counter | None = None,
) -> list[T]:
    """Parse all records with `parse`; `unused` as in `grouped`."""
    paths = Columns(columns) if columns else None
    sources = sources if isinstance(sources, list) else [sources]
    records = _counted((item for source in sources for item in read_records(source)), report)
    if group_by is not None:

        def on_bad(error: BadRow) -> None:
            if on_bad_rows == "error":
                raise _with_hint(error)
            report.bad_responses[error.kind] += 1

        mapped = _mapped(records, paths, group_by, on_bad)
        records, paths = grouped(mapped, group_by, on_bad, unused=unused), None
    rows = []
    for where, record in records:
        try:
            canon = _complete(record, where, paths, apply_chat_template)
            rows.append(parse(canon, record, where))
        except BadRow as error:
            report.skip(error, on_bad_rows)
    if not rows:
        names = ", ".join(map(str, sources))
        raise ValueError(
            f"{names}: no usable row among the {report.read} read {_kinds(report.bad)}".rstrip()
        )
    report.kept = len(rows)
    return rows


def _counted(records: Iterable[tuple[str, object]], report: RowReport) -> Records:
    for item in records:
        report.read += 1
        yield item


def _mapped(
    records: Records, paths: Columns | None, group_by: str, on_bad: Callable[[BadRow], None]
) -> Records:
    """Replace the fields that `--columns` names by what it finds, in records of one response."""
    moved = paths.fields - {group_by} if paths else set()
    for where, record in records:
        try:
            record = _check_object(record, where)
            if paths:
                rest = {name: value for name, value in record.items() if name not in moved}
                record = rest | paths.find(record, where)
        except BadRow as error:
            on_bad(error)
        else:
            yield where, record


def parse_row(record: object, where: str) -> Row:
    """Check one record and turn it into a `Row`; raises `BadRow` that names the field and what was
    expected."""
    return _row(_complete(record, where), record, where)


def parse_draft(record: object, where: str) -> Draft:
    """Check one record and turn it into a `Draft`; raises `BadRow` like `parse_row`."""
    return _draft(_complete(record, where), record, where)


def _complete(
    record: object, where: str, paths: Columns | None = None, apply_chat_template: bool = False
) -> Canonical:
    """Convert a record to canonical form and complete its prompt: check it, add the system
    message."""
    record = _check_object(record, where)
    canon = canonical(record, where, paths.find(record, where) if paths else None)
    if paths:
        canon.used |= paths.fields
    if canon.prompt is None:
        problem = "prompt: missing (a string or a list of messages was expected)"
        raise BadRow("missing field", where, problem + what_serves(record))
    if isinstance(canon.prompt, str):
        prompt = check_text(canon.prompt, canon.prompt_name, where)
    elif isinstance(canon.prompt, list):
        prompt = check_messages(canon.prompt, canon.prompt_name, where)
    else:
        problem = f"{canon.prompt_name}: expected a string or messages, found {show(canon.prompt)}"
        raise BadRow("wrong type", where, problem)
    common = canon.common
    common["tools"] = check_tools(common["tools"], where)
    common["chat_template_kwargs"] = check_kwargs(common["chat_template_kwargs"], where)
    prompt = with_system(prompt, common["system"], where)
    # Tools have their place in a chat template, and nowhere in a text.
    canon.prompt = as_messages(prompt) if apply_chat_template or common["tools"] else prompt
    return canon


def _row(
    canon: Canonical,
    record: dict,
    where: str,
    *,
    report: RowReport | None = None,
    drop: bool = False,
    use_responses: str = "all",
    stop_strings: Sequence[str] = (),
) -> Row:
    """The row of a complete record. Bad responses raise BadRow, or if `drop` are left out and
    counted, as long as two good ones remain."""
    if report is not None:
        report.unused.update(_unused(canon, record))
    responses, scores = (
        _needed(value, name, record, where)
        for name, value in (("responses", canon.responses), ("scores", canon.scores))
    )
    sources = check_texts(canon.sources, "sources", where)
    as_generated = check_flags(canon.common["as_generated"], "as_generated", where)
    for name, values in (("scores", scores), ("sources", sources), ("as_generated", as_generated)):
        check_length(name, values, len(responses), where)
    chosen = range(len(responses))
    if use_responses != "all":
        own = _provided(sources, len(responses))
        chosen = [i for i in chosen if own[i] == (use_responses == "provided")]
    keep, texts, numbers, bad = [], [], [], []
    for i in chosen:
        try:
            text = _response(canon, responses[i], i, where, stop_strings)
            number = check_score(scores[i], _name_of(canon.score_names, "scores", i), where)
        except BadRow as error:
            if not drop:
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
    if bad:
        report.bad_responses.update(error.kind for error in bad)
    return Row(
        canon.prompt,
        texts,
        numbers,
        sources and [sources[i] for i in keep],
        where,
        canon.common["tools"],
        canon.common["chat_template_kwargs"],
        as_generated and [as_generated[i] for i in keep],
    )


def _draft(
    canon: Canonical,
    record: dict,
    where: str,
    *,
    report: RowReport | None = None,
    drop: bool = False,
) -> Draft:
    """The draft of a complete record. Bad responses raise BadRow, or if `drop` are left out and
    counted."""
    raw = None if canon.responses is None else check_list(canon.responses, "responses", where)
    sources = check_texts(canon.sources, "sources", where)
    as_generated = check_flags(canon.common["as_generated"], "as_generated", where)
    reasons = canon.common["finish_reasons"]
    reasons = None if reasons is None else check_list(reasons, "finish_reasons", where)
    parts = {"sources": sources, "finish_reasons": reasons, "as_generated": as_generated}
    for name, values in parts.items():
        check_length(name, values, len(raw or []), where)
    keep, texts = [], []
    for i, answer in enumerate(raw or []):
        name = _name_of(canon.names, "responses", i)
        try:
            texts.append(check_text(answer_text(answer, name, where), name, where))
        except BadRow as error:
            if not drop:
                raise
            report.bad_responses[error.kind] += 1
            continue
        keep.append(i)
    parts = {name: values and [values[i] for i in keep] for name, values in parts.items()}
    used = canon.used | {*OF_STAGES} - {"failures"}
    others = {name: value for name, value in record.items() if name not in used}
    # These two go on as they are, whatever a stage makes of the responses.
    named = {name: canon.common[name] for name in ("tools", "chat_template_kwargs")}
    others |= {name: value for name, value in named.items() if value is not None}
    return Draft(
        canon.prompt,
        None if raw is None else texts,
        parts["sources"],
        parts["finish_reasons"],
        others,
        where,
        **named,
        as_generated=parts["as_generated"],
    )


def _response(canon: Canonical, answer: object, i: int, where: str, stop_strings: list[str]) -> str:
    name = _name_of(canon.names, "responses", i)
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


def _unused(canon: Canonical, record: dict) -> list[str]:
    """List the fields of a record that nothing uses."""
    used = canon.used.union(OF_STAGES)
    return [name for name, value in record.items() if name not in used and value is not None]


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


def cut_at(stop_strings: Sequence[str], response: str) -> str:
    """The response up to the first of the stop strings that it holds."""
    places = (at for stop in stop_strings if (at := response.find(stop)) >= 0)
    return response[: min(places, default=None)]


def _kinds(bad: Counter) -> str:
    return f"({', '.join(f'{count} {kind}' for kind, count in bad.most_common())})" if bad else ""
