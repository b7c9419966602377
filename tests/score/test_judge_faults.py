"""Faulty judges: malformed judgements, judges that die, runs that are repeated."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.score.judge import parse_judgement
from rrhf_fast.stages.endpoint import EndpointDown
from tests.jsonl import read, write

ROWS = [
    {
        "prompt": "Why?",
        "responses": ["Because.", "No idea at all.", ""],
        "sources": ["a", "b", "c"],
    },
    {"prompt": "Who?", "responses": ["You.", "A man who came by."]},
    {"prompt": "When?", "responses": []},
    {"prompt": [{"role": "user", "content": "Where?"}], "responses": ["Here."]},
]


@pytest.fixture
def judged(tmp_path, openai_server):
    return ScoreConfig(
        data=write(tmp_path / "rows.jsonl", ROWS),
        output=str(tmp_path / "scored.jsonl"),
        batch_size=2,
        judge_model="judge",
        base_url=openai_server.url,
        timeout=60.0,
        max_retries=3,
    )


def test_a_judge_gives_the_sum_of_four_criteria(judged, openai_server):
    counts = score(judged)
    assert counts["requests"] == len(openai_server.answered) == 6
    for row in read(judged.output):
        for value, criteria in zip(row["scores"], row.get("criteria", []), strict=True):
            assert value == sum(criteria.values()) and 4 <= value <= 20


def test_malformed_judgements_are_retried_and_then_recorded(tmp_path, judged, openai_server):
    row = {"prompt": "a", "responses": ["once", "never", "fine"], "sources": ["x", "y", "z"]}
    judged = replace(judged, data=write(tmp_path / "malformed.jsonl", [row]))
    counts = score(judged)
    assert (counts["scored"], counts["unscored"]) == (2, 1)
    assert counts["requests"] == len(openai_server.answered) == 1 + 2 + 4
    (scored,) = read(judged.output)
    assert scored["responses"] == ["once", "fine"] and scored["sources"] == ["x", "z"]
    (unscored,) = scored["unscored"]
    assert unscored["error"] == "malformed judgement" and unscored["source"] == "y"
    assert unscored["response"] == "never" and "high" in unscored["answer"]


def test_a_judge_whose_answers_are_all_malformed_writes_no_rows(tmp_path, judged):
    row = {"prompt": "a", "responses": ["never"]}
    judged = replace(judged, data=write(tmp_path / "never.jsonl", [row]))
    with pytest.raises(ValueError, match="no response could be scored: malformed judgement"):
        score(judged)
    assert not os.path.exists(judged.output)


def test_a_fixed_judge_is_asked_again(tmp_path, judged, openai_server):
    rows = [{"prompt": "a", "responses": []}, {"prompt": "a", "responses": ["never"]}]
    judged = replace(judged, data=write(tmp_path / "never.jsonl", rows), max_retries=0)
    for asked in (1, 2):
        with pytest.raises(ValueError, match="no response could be scored"):
            score(judged)
        assert len(openai_server.answered) == asked


def test_after_a_judge_died_nothing_is_judged_twice(tmp_path, judged, openai_server):
    rows = [{"prompt": str(i), "responses": ["a", "b"]} for i in range(10)]
    judged = replace(judged, data=write(tmp_path / "many.jsonl", rows), max_retries=0)
    whole = replace(judged, output=judged.output + "-whole")
    score(whole)
    openai_server.stop()
    with pytest.raises(EndpointDown):
        score(judged)
    # Half of the work was done when the judge died.
    journal = Path(judged.output + ".journal")
    text = json.dumps({"key": "0/0", "result": {"error": "refused", "usage": {}}})
    journal.write_text(journal.read_text() + text + "\n")
    openai_server.start()
    asked = len(openai_server.answered)
    score(judged)
    assert len(openai_server.answered) - asked == 19
    assert read(judged.output)[1:] == read(whole.output)[1:]
    assert read(judged.output)[0]["unscored"][0]["error"] == "refused"


@pytest.mark.parametrize(
    "answer, total",
    [
        ('{"relevance": 1, "correctness": 2, "coherence": 3, "safety": 4}', 10),
        ('Sure! ```json\n{"Relevance": 5, "correctness": 5, "coherence": 5, "SAFETY": 5}```', 20),
        ('{"a": 1} then {"relevance": 1, "correctness": 1, "coherence": 1.5, "safety": 1}', 4.5),
        ('{"relevance": 1, "correctness": 2, "coherence": 3}', None),
        ('{"relevance": 1, "correctness": 2, "coherence": 3, "safety": 6}', None),
        ('{"relevance": "1", "correctness": 2, "coherence": 3, "safety": 4}', None),
        ('{"relevance": true, "correctness": 2, "coherence": 3, "safety": 4}', None),
        ('{"relevance": NaN, "correctness": 2, "coherence": 3, "safety": 4}', None),
        ("4 out of 5", None),
        ("{", None),
        ("", None),
    ],
)
def test_judgements_are_parsed_strictly(answer, total):
    criteria = parse_judgement(answer)
    assert (None if criteria is None else sum(criteria.values())) == total
