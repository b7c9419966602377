"""The canonical record: the fields of the own format, to which every layout is converted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice

from rrhf_fast.data.checks import listed
from rrhf_fast.data.messages import from_cell

# Fields that a record of any layout may have too.
COMMON = ("system", "tools", "chat_template_kwargs", "as_generated", "finish_reasons")
# Fields of the response and its score in rows of one response, which `--group_by` joins.
RESPONSE_NAMES = ("response", "completion", "answer", "output")
SCORE_NAMES = ("score", "rating", "reward", "helpfulness")
# Fields whose names are often misspelt.
_KNOWN = {"prompt", "responses", "scores", "chosen", "rejected", "instruction", "completions"}
_PROMPTS = {"prompt", "query"}


@dataclass
class Canonical:
    """A record in the fields of the own format; values are not checked yet."""

    prompt: object = None  # text, messages or None
    prompt_name: str = "prompt"
    responses: object = None  # a list of texts or messages, or None
    scores: object = None  # a list of numbers, or None
    sources: object = None
    used: set[str] = field(default_factory=set)  # fields of the record that were read
    names: list[str] | None = None  # per response, for errors; by default responses[i]
    score_names: list[str] | None = None  # per score; by default scores[i]
    common: dict = field(default_factory=dict)  # the fields in COMMON
    noted: Counter = field(default_factory=Counter)  # what is worth a warning, though it is used


def fields_hint(record: dict, missing: str = "") -> str:
    """Return the end of an error about a missing field (its name may be given): the record's
    fields, and what to do."""
    hint = "name yours with --columns, or see the table of layouts in docs/data.md"
    if len(record) == 1 and any(mark in next(iter(record)) for mark in ";\t"):
        hint = "is it a CSV file with another delimiter than the comma?"
    typo = ""
    for name in islice(record, 50):  # a hostile row may have any number, of any length
        near = get_close_matches(name[:50], _KNOWN - record.keys(), 1, 0.8)
        if near and name not in _KNOWN | {*RESPONSE_NAMES}:
            typo = f" (is {listed([name])} {near[0]}?)"
            break
    items = record.get("responses")
    if isinstance(items, list) and items and isinstance(items[0], dict):
        hint = "for a list of objects say --columns '{responses: responses[].TEXT, scores: "
        hint += f"responses[].SCORE}}', of the names {listed(list(items[0]))}"
    elif items is not None and record.get("scores") is None:
        hint = f"score them with python -m rrhf_fast.score, {hint}"
    elif {*record} & _PROMPTS and record.keys() - {*COMMON} <= _PROMPTS | {"id", "prompt_id"}:
        hint = f"sample responses with python -m rrhf_fast.sample, or {hint}"
    elif any(name in record for name in RESPONSE_NAMES):
        hint = f"for one response per row say --group_by prompt, else {hint}"
    elif missing == "prompt" and record.get("messages") is not None:
        hint = "for messages as prompts say --columns '{prompt: messages}', or messages[:-1] where "
        hint += "they end with an answer"
    if not record:
        return "; found no fields"
    return f"; found the fields {listed(list(record))}{typo}: {hint}"


def prompt_of(record: dict, names: Iterable[str]) -> tuple[object, str]:
    """Return the first of these fields that has a value, and its name."""
    name = next((name for name in names if record.get(name) is not None), "prompt")
    prompt = from_cell(record.get(name))
    return [prompt] if isinstance(prompt, dict) else prompt, name


def number(value: object) -> object:
    """Convert a number given as text; other values are checked later, where their name is known."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
