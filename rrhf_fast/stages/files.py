"""Small files, written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield `<path>.saving` to write to; once the block ends it is synced and renamed to `path`.

    A crash at any moment leaves the earlier file or the new one, never half of it.
    """
    staging = path.with_name(f"{path.name}.saving")
    yield staging
    with staging.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(staging, path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a JSONL file in one step."""
    with replacing(path) as staging, staging.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_json(path: Path) -> dict:
    """Read the JSON object that a stage wrote. Raises ValueError, with the file's name, if it is
    damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (expected a JSON object)")
    return record
