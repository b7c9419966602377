"""Rows of scored responses: read them, check every field, say exactly what is wrong with a bad one.

A row is a JSON object (one a line) or one record of a Hugging Face dataset:

    {"prompt": str | [messages], "responses": [str], "scores": [float], "sources": [str]}

`query` is an alias of `prompt` (the released RRHF format), and `prompt/chosen/rejected` rows are
read as k = 2. Other fields are ignored.
"""

import json
import math
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# The released format stores the data set's own two responses last; the ones before are sampled.
NUM_PROVIDED = 2
# How the sources of a data set's own responses begin; the last two name those of a pair.
PROVIDED = ("provided", "chosen", "rejected")
NO_ARRAY = "expected a JSON object on each line, found what looks like a JSON array"


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

    def pick(self, keep: Sequence[int]) -> "Draft":
        """The same prompt with these of its responses."""
        per_response = ("responses", "sources", "finish_reasons", "as_generated")
        lists = {name: getattr(self, name) for name in per_response}
        kept = {name: values and [values[i] for i in keep] for name, values in lists.items()}
        return replace(self, **kept)

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


class BadRow(ValueError):
    """A row that cannot be used. `kind` is a short name that the summary counts by."""

    def __init__(self, kind: str, where: str, problem: str):
        super().__init__(kind, where, problem)  # all of them, so that other ranks can be sent it
        self.kind = kind

    def __str__(self) -> str:
        _, where, problem = self.args
        return f"{where}: {problem}"


@dataclass
class RowReport:
    """What became of the rows: `bad` counts the skipped ones by kind."""

    read: int = 0
    kept: int = 0
    bad: Counter = field(default_factory=Counter)

    def skip(self, error: BadRow, on_bad_rows: str) -> None:
        """Count a bad row, or stop at it: raises `error` when `on_bad_rows` is "error"."""
        if on_bad_rows == "error":
            raise error
        self.bad[error.kind] += 1


def load_rows(
    sources: str | list[str],
    *,
    on_bad_rows: str = "error",
    use_responses: str = "all",
    stop_strings: list[str] | None = None,
) -> tuple[list[Row], RowReport]:
    """Read and validate rows from JSONL files and Hugging Face datasets, in order.

    Args:
        sources: paths of .jsonl/.json files, or dataset names as `name`, `name:split` (default
            split "train"); a local folder that `datasets` can load works too.
        on_bad_rows: "error" stops at the first bad row; "skip" leaves bad rows out and counts them
            by kind.
        use_responses: "all"; "provided" keeps the responses whose source starts with "provided",
            "chosen" or "rejected" (rows without `sources`: the last two, as in the released
            format); "sampled" keeps the others.
        stop_strings: each response is cut at the first of these strings that it contains.

    Returns:
        The rows, and a report of how many were read, kept and skipped.

    Raises:
        ValueError: a source cannot be read or holds no usable row.
        BadRow: (a ValueError) a row is bad and `on_bad_rows` is "error"; names file, line, field
            and what was expected.
    """

    def parse(record: object, where: str) -> Row:
        return _choose_responses(parse_row(record, where), use_responses, stop_strings or [])

    return _load(sources, on_bad_rows, parse)


def load_drafts(
    sources: str | list[str], *, on_bad_rows: str = "error"
) -> tuple[list[Draft], RowReport]:
    """Read prompts, with or without responses, from what `load_rows` reads; it raises the same."""
    return _load(sources, on_bad_rows, parse_draft)


def _load(
    sources: str | list[str], on_bad_rows: str, parse: Callable[[object, str], T]
) -> tuple[list[T], RowReport]:
    rows, report = [], RowReport()
    for source in [sources] if isinstance(sources, str) else sources:
        for where, record in _records(source):
            report.read += 1
            try:
                rows.append(parse(record, where))
            except BadRow as error:
                report.skip(error, on_bad_rows)
    if not rows:
        raise ValueError(
            f"{sources}: no usable row among the {report.read} read {_kinds(report.bad)}".rstrip()
        )
    report.kept = len(rows)
    return rows, report


def parse_draft(record: object, where: str) -> Draft:
    """Check one record and turn it into a `Draft`; raises `BadRow` like `parse_row`."""
    if _is_pair(_check_object(record, where)):
        pair = _parse_pair(record, where)
        prompt, responses, sources = pair.prompt, pair.responses, pair.sources
    else:
        prompt = _find_prompt(record, where)
        responses = sources = None
        if record.get("responses") is not None:
            responses = _check_list(record, "responses", where)
        if record.get("sources") is not None:
            sources = _check_list(record, "sources", where)
    for i, response in enumerate(responses or []):
        _check_text(response, f"responses[{i}]", where)
    for i, source in enumerate(sources or []):
        _check_text(source, f"sources[{i}]", where)
    finish_reasons = None
    if record.get("finish_reasons") is not None:
        finish_reasons = _check_list(record, "finish_reasons", where)
    for name, values in (("sources", sources), ("finish_reasons", finish_reasons)):
        if values is not None and len(values) != len(responses or []):
            raise _unequal(name, len(values), len(responses or []), where)
    used = {"prompt", "query", "responses", "scores", "sources", "finish_reasons"}
    # What an earlier `score` said about other scores, maybe of other responses.
    used |= {"rewards", "log_ratios", "criteria", "unscored"}
    used |= {"chosen", "rejected"} if _is_pair(record) else set()
    others = {name: value for name, value in record.items() if name not in used}
    return Draft(prompt, responses, sources, finish_reasons, others, where)


def parse_row(record: object, where: str) -> Row:
    """Check one record and turn it into a `Row`; raises `BadRow` that names the field and what was
    expected."""
    if _is_pair(_check_object(record, where)):
        return _parse_pair(record, where)
    prompt = _find_prompt(record, where)
    responses = _check_list(record, "responses", where)
    scores = _check_list(record, "scores", where)
    sources = None if record.get("sources") is None else _check_list(record, "sources", where)
    for i, response in enumerate(responses):
        _check_response(response, f"responses[{i}]", where)
    for i, score in enumerate(scores):
        scores[i] = _check_score(score, f"scores[{i}]", where)
    for i, source in enumerate(sources or []):
        _check_text(source, f"sources[{i}]", where)
    for other, values in (("scores", scores), ("sources", sources)):
        if values is not None and len(values) != len(responses):
            raise _unequal(other, len(values), len(responses), where)
    if len(responses) < 2:
        raise BadRow(
            "fewer than 2 responses",
            where,
            f"responses: ranking needs at least 2, found {len(responses)}",
        )
    return Row(prompt, responses, scores, sources, where)


def _records(source: str) -> Iterator[tuple[str, object]]:
    """Yield ("where", record) for each record of a JSONL file or a Hugging Face dataset."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        yield from _json_lines(path)
        return
    import datasets  # slow to import, and needed only here

    name, _, split = source.partition(":")
    split = split or "train"
    try:
        dataset = (
            datasets.load_from_disk(name)
            if Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists()
            else datasets.load_dataset(name, split=split)
        )
    except Exception as error:  # `datasets` raises a dozen types for "there is no such data set"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{source}: neither a file nor a data set that could be loaded ({reason})"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{source}: no split {split!r}, only {', '.join(dataset)}")
        dataset = dataset[split]
    for index, record in enumerate(dataset):
        yield f"{name}[{index}]", record


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        start = 0  # of this line, in bytes
        for number, encoded in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                line = encoded.removeprefix(BOM_UTF8 if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                place = start + encoded.index(error.object) + error.start
                raise ValueError(f"{where}: not UTF-8 text (byte {place} of the file)") from error
            start += len(encoded)
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                if number == 1 and line.lstrip().startswith("["):
                    raise ValueError(f"{path}: {NO_ARRAY}") from error
                yield (
                    where,
                    BadRow("not JSON", where, f"expected a JSON object on one line ({reason})"),
                )


def _check_object(record: object, where: str) -> dict:
    if isinstance(record, BadRow):  # a line that is no JSON
        raise record
    if isinstance(record, list):
        raise BadRow("not an object", where, NO_ARRAY)
    if not isinstance(record, dict):
        raise BadRow("not an object", where, f"expected a JSON object, found {_show(record)}")
    return record


def _is_pair(record: dict) -> bool:
    return "chosen" in record and "rejected" in record and "responses" not in record


def _find_prompt(record: dict, where: str) -> str | list[dict]:
    name = "prompt" if record.get("prompt") is not None else "query"
    if record.get(name) is None:
        raise BadRow(
            "missing field", where, "prompt: missing (a string or a list of messages was expected)"
        )
    return _check_prompt(record[name], name, where)


def _unequal(name: str, found: int, num_responses: int, where: str) -> BadRow:
    expected = f"expected one for each of the {num_responses} responses"
    return BadRow("unequal lengths", where, f"{name}: {expected}, found {found}")


def _parse_pair(record: dict, where: str) -> Row:
    """`prompt/chosen/rejected`, each a string or messages; messages may carry the prompt in front
    of the last one."""
    prompt, texts = record.get("prompt", record.get("query")), []
    for name in ("chosen", "rejected"):
        value = record[name]
        if isinstance(value, list):
            *history, last = _check_messages(value, name, where)
            if last["role"] != "assistant":
                raise BadRow(
                    "wrong type", where, f"{name}: the last message must be the assistant's"
                )
            if history and prompt is not None and not isinstance(prompt, list):
                prompt = history  # the string `prompt` of such rows repeats the first message
            if history and prompt is None:
                prompt = history
            if history and history != prompt:
                raise BadRow(
                    "unequal prompts", where, f"{name}: its first messages differ from the prompt"
                )
            value = last["content"]
        _check_response(value, name, where)
        texts.append(value)
    if prompt is None:
        raise BadRow(
            "missing field", where, "prompt: missing (a string or a list of messages was expected)"
        )
    return Row(
        _check_prompt(prompt, "prompt", where), texts, [1.0, 0.0], ["chosen", "rejected"], where
    )


def _check_prompt(prompt: object, name: str, where: str) -> str | list[dict]:
    if isinstance(prompt, str):
        _check_unicode(prompt, name, where)
        return prompt
    if not isinstance(prompt, list):
        raise BadRow(
            "wrong type", where, f"{name}: expected a string or messages, found {_show(prompt)}"
        )
    messages = _check_messages(prompt, name, where)
    if messages[-1]["role"] == "assistant":
        raise BadRow(
            "wrong type",
            where,
            f"{name}: the last message is the assistant's, so nothing is left to answer",
        )
    return messages


def _check_messages(messages: list, name: str, where: str) -> list[dict]:
    if not messages:
        raise BadRow("wrong type", where, f"{name}: an empty list, expected messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            expected = '{"role": str, "content": str}'
            raise BadRow(
                "wrong type", where, f"{name}[{i}]: expected {expected}, found {_show(message)}"
            )
        _check_unicode(message["content"], f"{name}[{i}].content", where)
    return messages


def _check_response(response: object, name: str, where: str) -> None:
    _check_text(response, name, where)
    if not response.strip():
        raise BadRow(
            "empty response", where, f"{name}: empty, expected at least one visible character"
        )


def _check_text(text: object, name: str, where: str) -> None:
    if not isinstance(text, str):
        raise BadRow("wrong type", where, f"{name}: expected a string, found {_show(text)}")
    _check_unicode(text, name, where)


def _check_unicode(text: str, name: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow(
            "not Unicode", where, f"{name}: holds half of a surrogate pair, expected valid Unicode"
        )


def _check_list(record: dict, name: str, where: str) -> list:
    value = record.get(name)
    if value is None:
        raise BadRow("missing field", where, f"{name}: missing (a list was expected)")
    if not isinstance(value, list):
        raise BadRow("wrong type", where, f"{name}: expected a list, found {_show(value)}")
    return list(value)


def _check_score(score: object, name: str, where: str) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise BadRow("wrong type", where, f"{name}: expected a number, found {_show(score)}")
    try:
        score = float(score)
    except OverflowError:  # an integer of more than 308 digits
        score = math.inf
    if not math.isfinite(score):
        raise BadRow("non-finite score", where, f"{name}: expected a finite number, found {score}")
    return score


def provided_mask(row: Row | Draft) -> list[bool]:
    """For each response, whether it is the data set's own: its source says so, or, in rows without
    sources, it is one of the last two."""
    if row.sources is not None:
        return [source.startswith(PROVIDED) for source in row.sources]
    return [i >= len(row.responses) - NUM_PROVIDED for i in range(len(row.responses))]


def _choose_responses(row: Row, use_responses: str, stop_strings: list[str]) -> Row:
    """Apply `use_responses` and `stop_strings`; raises `BadRow` when too little is left."""
    keep = range(len(row.responses))
    if use_responses != "all":
        is_provided = provided_mask(row)
        keep = [i for i in keep if is_provided[i] == (use_responses == "provided")]
        if len(keep) < 2:
            problem = (
                f"responses: ranking needs at least 2, found {len(keep)} that are {use_responses}"
            )
            raise BadRow("fewer than 2 responses", row.where, problem)
    responses = []
    for i in keep:
        responses.append(cut_at(stop_strings, row.responses[i]))
        if not responses[-1].strip():
            raise BadRow(
                "empty response", row.where, f"responses[{i}]: empty once cut at a stop string"
            )
    sources = None if row.sources is None else [row.sources[i] for i in keep]
    return Row(row.prompt, responses, [row.scores[i] for i in keep], sources, row.where)


def cut_at(stop_strings: list[str], response: str) -> str:
    """The response up to the first of the stop strings that it holds."""
    found = (at for stop in stop_strings if (at := response.find(stop)) >= 0)
    return response[: min(found, default=None)]


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _kinds(bad: Counter) -> str:
    return f"({', '.join(f'{count} {kind}' for kind, count in bad.most_common())})" if bad else ""
