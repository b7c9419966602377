"""A stage's identity includes the content of its rows."""

import gzip
import json

import pytest

from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.stages.identity import identity


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(json.dumps({"prompt": text}) + "\n")


@pytest.mark.parametrize("name", ["one.jsonl", "two.jsonl.gz"])
@pytest.mark.parametrize("kind", ["file", "folder", "pattern", "split", "list"])
def test_changed_rows_change_the_identity(kind, name, tmp_path):
    file = tmp_path / "rows" / name
    write(file, "Why?")
    sources = {
        "file": str(file),
        "folder": str(file.parent),
        "pattern": str(file.parent / "*.jsonl*"),
        "split": f"{file.parent}:train",
        "list": [str(file)],
    }
    config = SampleConfig(data=sources[kind], output="out")
    before = identity(config)
    assert identity(config) == before
    write(file, "How?")
    assert identity(config) != before


def test_a_dataset_of_the_hub_has_no_content():
    assert not [
        key for key in identity(SampleConfig(data="someone/rows:train")) if "content" in key
    ]
