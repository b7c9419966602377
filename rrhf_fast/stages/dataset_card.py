"""The card of a file of rows: what the Hugging Face hub shows of it, and how it is loaded."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.cards import OURS, PAPER, block, counted, is_ours, versions, without_paths
from rrhf_fast.stages.files import write_rows, write_text
from rrhf_fast.stages.hub import ROWS, Repository
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.secrets import hide

# Fields that tell of failures.
_PRIVATE = ("failures", "unscored")
# Sources and fields that are listed, at most.
_MOST = 50


@dataclass
class _Rows:
    """What a file of rows holds."""

    rows: int = 0
    responses: int = 0
    types: dict[str, set[str]] = field(default_factory=dict)  # of each field's values
    sources: Counter = field(default_factory=Counter)  # responses of each
    scores: list[float] = field(default_factory=list)


def push_rows(repository: Repository, output: str, title: str, options: Mapping) -> None:
    """Write the card of the rows in `output` beside them, OUTPUT.card.md, unless there is one that
    a person wrote; then push both. Rows with what is nobody else's business are pushed as a copy
    without that, OUTPUT.public. `options`: how the rows were made. Raises HubFailed."""
    rows, card = _public_copy(Path(output)), Path(f"{output}.card.md")
    try:
        if is_ours(card):
            write_text(card, _text(_read(rows), title, options))
        problem = None if card.is_file() else "is no file"
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        say(f"note: {card} {problem}, so that the rows are pushed without a card")
    repository.push_rows(rows, None if problem else card)


def _public_copy(output: Path) -> Path:
    """The rows; where they tell why responses failed, which names servers, or name folders as
    sources, a copy of them without."""
    with output.open(encoding="utf-8") as file:
        if not any(_public(row) != row for row in map(json.loads, file)):
            return output
    copy = Path(f"{output}.public")
    with output.open(encoding="utf-8") as file:
        write_rows(copy, (_public(row) for row in map(json.loads, file)))
    return copy


def _public(row: dict) -> dict:
    public = {name: value for name, value in row.items() if name not in _PRIVATE}
    if "sources" in row:
        public["sources"] = without_paths(row["sources"])
    return public


def _read(output: Path) -> _Rows:
    found = _Rows()
    with output.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found.rows += 1
            found.responses += len(row["responses"])
            found.sources.update(row.get("sources") or [])
            found.scores += row.get("scores") or []
            for name, value in row.items():
                found.types.setdefault(name, set()).add(_type(value))
    return found


def _type(value: object) -> str:
    if isinstance(value, list):
        return f"list of {' or '.join(sorted({_type(item) for item in value})) or 'anything'}"
    kinds = {dict: "mapping", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else kinds[type(value)]


def _text(found: _Rows, title: str, options: Mapping) -> str:
    from huggingface_hub import DatasetCardData

    metadata = DatasetCardData(
        task_categories=["text-generation"],
        tags=["rrhf", "rrhf_fast", "preference", "arxiv:2304.05302"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": ROWS}]}],
    )
    lines = [f"{counted(found.rows, 'row')} with {counted(found.responses, 'response')}"]
    if found.scores:
        mean = sum(found.scores) / len(found.scores)
        low, high = min(found.scores), max(found.scores)
        lines.append(
            f"{counted(len(found.scores), 'score')} from {low:.4g} to {high:.4g}, mean {mean:.4g}"
        )
    sources = found.sources.most_common(_MOST)
    lines += [f"{counted(n, 'response')} from {_cell(name)}" for name, n in sources]
    fields = [
        f"| {_cell(name)} | {' or '.join(sorted(types))} |"
        for name, types in list(found.types.items())[:_MOST]
    ]
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n{OURS}",
        f"# {title}",
        f"Prompts with several responses each, for training by RRHF ({PAPER}).",
        "\n".join(f"* {line}" for line in lines),
        "\n".join(["## Fields", "", "| field | type |", "|---|---|", *fields]),
        f"## How it was made\n\n{block(options)}",
        f"## Versions\n\n{versions()}",
    ]
    return hide("\n\n".join(parts) + "\n")


def _cell(text: str) -> str:
    """A text from rows within a table or a list."""
    return "`" + one_line(text, 80).replace("`", "'").replace("|", "/") + "`"
