"""Rows: the formats that are read, and errors with file, line, field and what was expected."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.data.rows import BadRow, parse_row
from tests.drafts import parse_draft

GOOD = {"prompt": "Why?", "responses": ["Because.", "No idea."], "scores": [1, 0.5]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def answered(text):
    return [*MESSAGES, {"role": "assistant", "content": text}]


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_plain_row():
    row = parse_row(GOOD | {"sources": ["human", "model"], "more": {"is": "ignored"}}, "f:1")
    assert (row.prompt, row.responses) == ("Why?", ["Because.", "No idea."])
    assert (row.rewards, row.sources, row.where) == ([1.0, 0.5], ["human", "model"], "f:1")


def test_query_is_an_alias_and_prompt_wins():
    released = {"query": "Why?", "responses": GOOD["responses"], "scores": GOOD["scores"]}
    assert parse_row(released, "f:1") == parse_row(GOOD, "f:1")
    assert parse_row(GOOD | {"query": "unused"}, "f:1").prompt == "Why?"


def test_messages_as_prompt():
    assert parse_row(GOOD | {"prompt": MESSAGES}, "f:1").prompt == MESSAGES


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}, "Why?"),
        ({"prompt": MESSAGES, "chosen": "Yes.", "rejected": "No."}, MESSAGES),
        ({"prompt": MESSAGES, "chosen": answered("Yes.")[2:], "rejected": "No."}, MESSAGES),
        # The usual layout of preference datasets: whole conversations, and the prompt again.
        ({"chosen": answered("Yes."), "rejected": answered("No.")}, MESSAGES),
        ({"prompt": "Why?", "chosen": answered("Yes."), "rejected": answered("No.")}, MESSAGES),
    ],
)
def test_pairs(record, prompt):
    row = parse_row(record, "f:1")
    assert (row.prompt, row.responses, row.rewards) == (prompt, ["Yes.", "No."], [1.0, 0.0])
    assert row.sources == ["chosen", "rejected"]


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


BAD = {
    "a number": (3, "not an object", "expected a JSON object, found int 3"),
    "no prompt": (without("prompt"), "missing field", "prompt: missing"),
    "null prompt": (GOOD | {"prompt": None}, "missing field", "prompt: missing"),
    "no responses": (without("responses"), "missing field", "responses: missing"),
    "a prompt alone": (
        {"prompt": "p", "system": "s", "id": 1},
        "missing field",
        "responses: missing (expected a list); found the fields prompt, system, id: sample "
        "responses with python -m rrhf_fast.sample, or",
    ),
    "fields of Nectar's names": (
        {"question": "q", "answers": [{"text": "a", "votes": 1}]},
        "wrong type",
        "answers[0]: expected an object with answer, as Nectar has it, found the fields text, "
        "votes; name yours with --columns",
    ),
    "a misspelt field": (
        {"prompt": "p", "choosen": "a", "rejected": "b"},
        "missing field",
        "responses: missing (expected a list); found the fields prompt, choosen, rejected (is "
        "choosen chosen?): name yours",
    ),
    "another delimiter": (
        {"prompt;chosen;rejected": "p;a;b"},
        "missing field",
        "prompt: missing (expected a string or a list of messages); found the fields "
        "prompt;chosen;rejected: is it a CSV file with another delimiter",
    ),
    "messages under their usual name": (
        {"messages": [{"role": "user", "content": "p"}], "id": 1},
        "missing field",
        "prompt: missing (expected a string or a list of messages); found the fields messages, id: "
        "for messages as prompts say --columns '{prompt: messages}', or messages[:-1] where",
    ),
    "messages of one response": (
        {"messages": [{"role": "user", "content": "p"}], "response": "a", "rating": 1},
        "missing field",
        "prompt: missing (expected a string or a list of messages); found the fields messages, "
        "response, rating: for one response per row say --group_by prompt",
    ),
    "no scores": (without("scores"), "missing field", "scores: missing"),
    "number as prompt": (GOOD | {"prompt": 7}, "wrong type", "prompt: expected a string or mess"),
    "no messages": (GOOD | {"prompt": []}, "wrong type", "prompt: an empty list"),
    "a message without content": (
        GOOD | {"prompt": [{"role": "user"}]},
        "wrong type",
        'prompt[0]: expected {"role": str, "content": str}',
    ),
    "text as responses": (GOOD | {"responses": "ab"}, "wrong type", "responses: expected a list"),
    "null response": (GOOD | {"responses": ["a", None]}, "wrong type", "responses[1]: expected a"),
    "text score": (GOOD | {"scores": [1, "2"]}, "wrong type", "scores[1]: expected a number"),
    "true as score": (GOOD | {"scores": [1, True]}, "wrong type", "scores[1]: expected a number"),
    "NaN": (GOOD | {"scores": [1, math.nan]}, "non-finite score", "scores[1]: expected a finite"),
    "infinity": (GOOD | {"scores": [math.inf, 1]}, "non-finite score", "scores[0]: expected a fin"),
    "huge integer": (GOOD | {"scores": [10**400, 1]}, "non-finite score", "scores[0]: expected a"),
    "blank response": (GOOD | {"responses": ["a", " \n"]}, "empty response", "responses[1]: empty"),
    "half a pair": (GOOD | {"responses": ["a", "\ud800"]}, "not Unicode", "responses[1]: holds h"),
    "3 scores": (GOOD | {"scores": [1, 2, 3]}, "unequal lengths", "scores: expected one for each"),
    "1 source": (GOOD | {"sources": ["a"]}, "unequal lengths", "sources: expected one for each"),
    "source 5": (GOOD | {"sources": ["a", 5]}, "wrong type", "sources[1]: expected a string"),
    "one response": (
        GOOD | {"responses": ["a"], "scores": [1]},
        "fewer than 2 responses",
        "responses: ranking needs at least 2, found 1",
    ),
    "pair without prompt": ({"chosen": "a", "rejected": "b"}, "missing field", "prompt: missing"),
    "pair of 3": (PAIR | {"rejected": 3}, "wrong type", "rejected: expected a string, found int 3"),
    "pair of unlike prompts": (
        {"chosen": answered("a"), "rejected": [*MESSAGES[:1], *answered("b")[1:], *answered("b")]},
        "unequal prompts",
        "rejected: its first messages differ",
    ),
    "pair that ends with the user": (
        PAIR | {"chosen": MESSAGES},
        "wrong type",
        "chosen: the last message must be the assistant's",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_with_file_line_and_field(name, tmp_path):
    record, kind, problem = BAD[name]
    path = write(tmp_path / "rows.jsonl", GOOD, record)
    with pytest.raises(BadRow) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}:2: {problem}")
    assert "\n" not in str(caught.value)
    assert caught.value.kind == kind


def test_bad_rows_are_skipped_and_counted_by_kind(tmp_path):
    records = [record for record, _, _ in BAD.values()]
    path = write(tmp_path / "rows.jsonl", GOOD, *records, "{not json", "", GOOD)
    rows, report = load_rows(path, on_bad_rows="skip")
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:{len(BAD) + 4}"]
    assert report.read == len(BAD) + 3 and report.kept == 2
    assert sum(report.bad.values()) == len(BAD) + 1
    assert report.bad["wrong type"] == sum(kind == "wrong type" for _, kind, _ in BAD.values())
    assert report.bad["not JSON"] == 1


@pytest.mark.parametrize("line", ["{not json", "[" * 100_000])
def test_a_line_that_is_not_json_is_a_bad_row(tmp_path, line):
    path = write(tmp_path / "rows.jsonl", GOOD, line)
    with pytest.raises(BadRow, match=r":2: expected a JSON object on one line"):
        load_rows(path)


def test_results_of_an_earlier_scoring_are_not_passed_on(tmp_path):
    path, stale = tmp_path / "rows.jsonl", ("rewards", "log_ratios", "criteria", "unscored")
    path.write_text(json.dumps({"prompt": "a", "responses": ["b"], "id": 1} | dict.fromkeys(stale)))
    assert load_drafts(str(path))[0][0].others == {"id": 1}


def test_unusable_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="missing.jsonl: cannot be read"):
        load_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="neither a file nor a dataset"):
        load_rows(str(tmp_path / "no_such_folder"))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b"\n" * 20_000 + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl:20001: not UTF-8 text \(byte 20015 of"):
        load_rows(str(latin))
    path = write(tmp_path / "rows.jsonl", {}, {})
    with pytest.raises(ValueError, match="no usable row among the 2 read.*2 missing field"):
        load_rows(path, on_bad_rows="skip")


def test_several_files_and_a_byte_order_mark(tmp_path):
    first = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(GOOD))
    second = write(tmp_path / "b.jsonl", GOOD)
    rows, _ = load_rows([first, second])
    assert [row.where for row in rows] == [f"{first}:1", f"{second}:1"]


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([GOOD, GOOD | {"prompt": "How?"}])
    table.save_to_disk(tmp_path / "one")
    rows, _ = load_rows(str(tmp_path / "one"))
    assert [row.prompt for row in rows] == ["Why?", "How?"]
    assert rows[1].where == f"{tmp_path / 'one'}[1]"
    datasets.DatasetDict({"held_out": table}).save_to_disk(tmp_path / "split")
    assert len(load_rows(f"{tmp_path / 'split'}:held_out")[0]) == 2
    with pytest.raises(ValueError, match="no split 'train', only held_out"):
        load_rows(str(tmp_path / "split"))


RELEASED = {"query": "q", "responses": ["s1", "s2", "p1", "p2"], "scores": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "use, sources, kept",
    [
        ("all", None, [1, 2, 3, 4]),
        ("provided", None, [3, 4]),  # the released format stores them last
        ("sampled", None, [1, 2]),
        ("provided", ["provided_good", "beam", "provided", "beam"], [1, 3]),
        ("sampled", ["provided_good", "beam", "provided", "beam"], [2, 4]),
    ],
)
def test_only_provided_or_only_sampled(tmp_path, use, sources, kept):
    path = write(tmp_path / "rows.jsonl", RELEASED | ({"sources": sources} if sources else {}))
    (row,), _ = load_rows(path, use_responses=use)
    assert row.rewards == kept and row.sources == (sources and [sources[i - 1] for i in kept])


def test_too_few_provided_or_sampled_responses(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(BadRow, match="needs at least 2, found 0 that are sampled"):
        load_rows(path, use_responses="sampled")


def test_responses_are_cut_at_the_first_stop_string(tmp_path):
    texts = ["Hello.\n\nHuman: more\n\nAssistant:", "Bye.\n\nAssistant: x\n\nHuman:"]
    path = write(tmp_path / "rows.jsonl", GOOD | {"responses": texts})
    (row,), _ = load_rows(path, stop_strings=["\n\nAssistant:", "\n\nHuman:"])
    assert row.responses == ["Hello.", "Bye."]
    path = write(tmp_path / "rows.jsonl", GOOD | {"responses": ["\n\nHuman: x", "a"]})
    with pytest.raises(BadRow, match=r"responses\[0\]: empty once cut at a stop string"):
        load_rows(path, stop_strings=["\n\nHuman:"])


MIXED = {"prompt": "p", "responses": ["a", "", None, "b", "c"], "scores": [1, 2, 3, None, 5]}


def test_a_bad_response_is_left_out_of_its_row(tmp_path):
    sources = {"sources": ["x", "y", "z", "provided", "provided"]}
    path = write(tmp_path / "rows.jsonl", MIXED | sources)
    with pytest.raises(BadRow, match=r"responses\[1\]: empty.*--on_bad_rows skip leaves out bad"):
        load_rows(path)
    (row,), report = load_rows(path, on_bad_rows="skip")
    assert (row.responses, row.rewards, row.sources) == (["a", "c"], [1, 5], ["x", "provided"])
    assert report.bad_responses == {"empty response": 1, "wrong type": 1, "missing score": 1}
    assert not report.bad and report.kept == 1
    (draft,), report = load_drafts(path, on_bad_rows="skip")
    assert draft.responses == ["a", "", "b", "c"] and draft.sources == ["x", "y", *["provided"] * 2]
    assert report.left_out() == {"bad_responses": 1}


def test_a_row_with_fewer_than_two_good_responses_is_bad(tmp_path):
    one_left = MIXED | {"scores": [1, 2, 3, None, math.nan]}
    path = write(tmp_path / "rows.jsonl", GOOD, one_left)
    rows, report = load_rows(path, on_bad_rows="skip")
    assert len(rows) == 1 and report.bad == {"empty response": 1}
    assert not report.bad_responses  # the row is counted, not its responses
    assert report.left_out() == {"skipped": 1}


def test_the_last_two_are_provided_even_if_one_is_bad(tmp_path):
    record = {"prompt": "p", "responses": ["s", "t", "u", ""], "scores": [1, 2, 3, 4]}
    path = write(tmp_path / "rows.jsonl", record, GOOD)
    with pytest.raises(BadRow, match=r"responses\[3\]: empty"):
        load_rows(path, use_responses="provided")
    (row,), report = load_rows(path, use_responses="provided", on_bad_rows="skip")
    assert row.prompt == "Why?" and report.bad == {"empty response": 1}
    (row, *_), _ = load_rows(write(tmp_path / "one.jsonl", record), use_responses="sampled")
    assert row.responses == ["s", "t"]


def test_a_response_cut_to_nothing_is_left_out_of_its_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", {**MIXED, "responses": ["a", "#b", "c#", "d", "#"]})
    with pytest.raises(BadRow, match=r"responses\[1\]: empty once cut at a stop string"):
        load_rows(path, stop_strings=["#"])
    (row,), report = load_rows(path, stop_strings=["#"], on_bad_rows="skip")
    assert row.responses == ["a", "c"]
    assert report.bad_responses == {"empty response": 2, "missing score": 1}


def test_unused_fields_are_counted(tmp_path):
    more = {"id": 3, "empty": None, "rewards": [1, 2], "tools": None, "finish_reasons": None}
    path = write(tmp_path / "rows.jsonl", GOOD | more, GOOD | {"id": 4}, GOOD | {"note": "x"})
    assert load_rows(path)[1].unused == {"id": 2, "note": 1}
    queries = [GOOD | {"query": query} for query in (GOOD["prompt"], "another", None)]
    assert load_rows(write(tmp_path / "queries.jsonl", *queries))[1].unused == {"query": 1}


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=6,
)
fields = st.sampled_from(
    ["prompt", "query", "responses", "scores", "sources", "chosen", "rejected"]
)


@given(st.dictionaries(fields, values | st.sampled_from([GOOD["responses"], [1.0, 2.0], MESSAGES])))
def test_any_record_gives_a_valid_row_or_one_line(record):
    try:
        row = parse_row(record, "file:1")
    except BadRow as error:
        assert str(error).startswith("file:1: ") and "\n" not in str(error)
    else:
        assert len(row.responses) == len(row.rewards) >= 2
        assert all(text.strip() for text in row.responses)
        assert all(math.isfinite(score) for score in row.rewards)


def test_pairs_are_provided(tmp_path):
    path = write(tmp_path / "pairs.jsonl", PAIR)
    assert load_rows(path, use_responses="provided")[0][0].responses == ["b", "c"]


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"responses": ["a"]}, "prompt: missing"),
        ({"prompt": "a", "responses": "b"}, "responses: expected a list"),
        ({"prompt": "a", "responses": ["b", 1]}, "responses[1]: expected a string"),
        ({"prompt": "a", "responses": ["b"], "sources": []}, "sources: expected one for each"),
        ({"prompt": "a", "finish_reasons": ["stop"]}, "finish_reasons: expected one for each"),
        ({"prompt": "a", "finish_reasons": 1}, "finish_reasons: expected a list"),
        ({"prompt": "a", "responses": ["b"], "sources": [1]}, "sources[0]: expected a string"),
        ([], "expected a JSON object"),
    ],
)
def test_drafts_are_checked_where_present(record, problem):
    with pytest.raises(BadRow, match=re.escape(problem)):
        parse_draft(record, "here")


def test_a_draft_needs_only_a_prompt():
    draft = parse_draft({"query": "a", "id": 7}, "here")
    assert (draft.prompt, draft.responses, draft.others) == ("a", None, {"id": 7})
    draft = parse_draft({"prompt": "a", "responses": ["", "b"], "scores": None}, "here")
    assert draft.responses == ["", "b"] and draft.others == {}


def test_prompts_that_end_with_an_answer_are_noted(tmp_path):
    """Samples continue it, which is meant for a prefix and an accident for whole conversations."""
    chats = [{"messages": answered("Because.")}, {"messages": MESSAGES}]
    source = write(tmp_path / "chats.jsonl", *chats)
    _, report = load_drafts(source, columns={"prompt": "messages"})
    (line,) = report.lines("data")
    assert "note: 1 of 2 prompts end with a message of the assistant" in line
    _, report = load_drafts(source, columns={"prompt": "messages[:-1]"})
    assert not report.lines("data")
    row = {"prompt": answered("Be"), "responses": ["cause.", "fore."]}
    _, report = load_drafts(write(tmp_path / "row.jsonl", row), needs_responses=True)
    assert not report.lines("data")
