"""The fuzzer of rows and options: some thousand inputs hold, and faults put back are found."""

import json
import re

import pytest

from rrhf_fast.data import files, load, rows
from tests.hostile import fuzz
from tests.hostile.inputs import draw

CHUNK = 250


@pytest.fixture(scope="module", autouse=True)
def models_of_this_file():
    yield
    fuzz.forget()


@pytest.mark.parametrize("start", range(0, 2000, CHUNK))
def test_hostile_inputs(start):
    _, failures = fuzz.try_range(range(start, start + CHUNK))
    said = [f"--seed {seed}: {failure}" for seed, failure in failures.items()]
    assert not said, "\n".join(said)


def test_an_input_depends_on_its_seed_alone():
    first, again = draw(7), draw(7)
    assert first == again != draw(8)


FAULTS = {
    # An integer of thousands of digits stops the file, without its name.
    "int": (files, "_next_value", lambda text, at, where: json.JSONDecoder().raw_decode(text, at)),
    # A skipped row is not counted.
    "count": (load.RowReport, "skip", lambda self, error, on_bad_rows: None),
    # What is no Unicode is written.
    "unicode": (rows, "_passed_on", lambda value, name, where: value),
}
FOUND = {"int": "b: names no file: Exceeds", "count": "c: ", "unicode": "d: out.jsonl: 'utf-8'"}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name, monkeypatch):
    monkeypatch.setattr(*FAULTS[name])
    failures = (fuzz.attempt(draw(seed))[1] for seed in range(CHUNK))
    assert re.match(FOUND[name], next(filter(None, failures)))


def test_a_failing_input_is_made_smaller(monkeypatch):
    monkeypatch.setattr(*FAULTS["unicode"])
    cases = (draw(seed) for seed in range(CHUNK))
    case = next(case for case in cases if len(case.items) > 2 and fuzz.attempt(case)[1])
    small = fuzz.shrink(case, fuzz.attempt(case)[1])
    assert len(small.items) == 1 < len(case.items)
