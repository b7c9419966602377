"""Rows and files that could mean two things: they are read the right way, or refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from rrhf_fast.data.load import load_rows
from rrhf_fast.data.rows import BadRow, parse_row
from rrhf_fast.data.sources import InMemory, read_records
from tests.jsonl import write

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def rows_of(records, **options):
    return load_rows(InMemory("d", records), **options)[0]


@pytest.mark.parametrize("gold", ["answer", "output"])
def test_a_reference_answer_is_not_taken_for_the_response(gold):
    """Rollouts often bring the right answer along."""
    (other,) = {"answer", "output"} - {gold}
    records = [
        {"question": "1 + 1?", gold: "2", other: text, "score": score}
        for text, score in (("It is 2", 1), ("It is 3", 0))
    ]
    with pytest.raises(
        BadRow, match=r"^d\[0\]: response: expected one field, found answer and out"
    ):
        rows_of(records, group_by="question")
    columns = {"response": other}
    (row,) = rows_of(records, group_by="question", columns=columns)
    assert row.responses == ["It is 2", "It is 3"]
    named = [record | {"response": record[other]} for record in records]
    assert rows_of(named, group_by="question")[0].responses == row.responses


def test_scores_of_two_kinds_are_not_mixed_up():
    records = [
        {"prompt": "a", "response": text, "rating": 1 - score, "reward": str(score)}
        for text, score in (("It is 2", 1), ("It is 3", 0))
    ]
    with pytest.raises(BadRow, match="score: expected one field, found rating and reward"):
        rows_of(records, group_by="prompt")
    (row,) = rows_of(records, group_by="prompt", columns={"score": "reward"})
    assert row.rewards == [1, 0]


def test_hints_name_what_helps():
    kto = {"prompt": "a", "completion": "b", "label": 1}
    with pytest.raises(BadRow, match=r"score: missing; found .*label: name yours .*'\{score: FI"):
        rows_of([kto], group_by="prompt")
    with pytest.raises(BadRow, match=r"response: missing .*: name yours .*'\{response: FIELD"):
        rows_of([{"prompt": "a", "text": "b", "score": 1}], group_by="prompt")
    objects = [{"text": "b", "score": 1}, {"text": "c", "score": 0}]
    with pytest.raises(BadRow, match=r"responses: responses\[\].TEXT, .* of the names text, score"):
        rows_of([{"prompt": "a", "responses": objects}])


def test_prompts_of_a_group_that_differ_are_named():
    records = [
        {"id": 1, "prompt": prompt, "response": prompt + "!", "score": 1} for prompt in ("a", "b")
    ]
    problem = r"^d\[1\]: prompt: differs from that of d\[0\], which has the same id"
    with pytest.raises(BadRow, match=problem):
        rows_of(records, group_by="id")


@pytest.mark.parametrize(
    "record",
    [
        PAIR | {"prompt": [USER, ANSWER]},
        {"conversations": [USER, ANSWER], "chosen": ANSWER, "rejected": "No."},
        {"prompt": [USER, ANSWER], "responses": ["No.", "So. "], "scores": [0, 1]},
    ],
)
def test_a_response_does_not_follow_itself(record):
    with pytest.raises(BadRow, match="its last message is one of the responses"):
        parse_row(record, "f:1")


def test_a_prompt_among_messages_is_named_without_its_answer():
    record = {"messages": [USER, ANSWER], "chosen": "So.", "rejected": "No."}
    with pytest.raises(BadRow, match=r"--columns '\{prompt: messages\[:-1\]\}'"):
        parse_row(record, "f:1")
    (row,) = rows_of([record], columns={"prompt": "messages[:-1]"})
    assert row.prompt == [USER]
    # An answer that the responses continue is no such case.
    begun = [USER, {"role": "assistant", "content": "It is"}]
    assert parse_row(PAIR | {"prompt": begun}, "f:1").prompt == begun


def test_a_transcript_ends_where_its_turns_do():
    """Not at a line of a dialogue that the answer writes."""
    start = "\n\nHuman: Write a dialogue\n\nAssistant:"
    told = " Sure.\nUser: hi\nAssistant: "
    row = parse_row({side: start + told + side for side in ("chosen", "rejected")}, "f:1")
    assert row.prompt == start and row.responses == [told + "chosen", told + "rejected"]


@pytest.mark.parametrize("pads", ["", " "])
def test_transcripts_become_turns_for_a_chat_template(pads):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\nthere\n\nHuman: Why?\n\nAssistant:" + pads
    hh = {"chosen": f"{start} So.", "rejected": f"{start} No."}
    nectar = [{"answer": "So.", "rank": 1}, {"answer": "No.", "rank": 2}]
    for record in (hh, {"prompt": start, "answers": nectar}):
        (row,) = rows_of([record], apply_chat_template=True)
        hello = {"role": "assistant", "content": "Hello\nthere"}
        assert row.prompt == [{"role": "user", "content": "Hi"}, hello, USER]
        assert row.responses == ["So.", "No."]
        (row,) = rows_of([record])
        assert row.prompt.strip() == start.strip()


@pytest.mark.parametrize(
    "text", ["{'value': 3}", "{'role': 'admin'} is a dict", "[{'content': 1}]"]
)
def test_what_python_prints_may_be_an_answer(text):
    assert parse_row(PAIR | {"chosen": text}, "f:1").responses[0] == text
    chats = [[USER, ANSWER], {"from": "gpt", "value": "{a}"}, [{"content": "{}", "role": "user"}]]
    for messages in map(str, chats):
        with pytest.raises(BadRow, match="as Python prints them"):
            parse_row(PAIR | {"chosen": messages}, "f:1")


@pytest.mark.parametrize("answer", [[{"name": "Ann"}], [{"name": "a", "value": 1}], [{}]])
def test_an_answer_in_csv_may_be_json(tmp_path, answer):
    path, text = tmp_path / "rows.csv", json.dumps(answer)
    cell = text.replace('"', '""')
    path.write_text(f'prompt,chosen,rejected\nWho?,"{cell}",No.\n')
    assert load_rows(str(path))[0][0].responses[0] == text


@pytest.mark.parametrize("key", ["function_call", "tool_plan", "thought", "refusal"])
def test_parts_of_an_answer_are_not_lost(key):
    with pytest.raises(BadRow, match=f"holds {key}, but only the content"):
        parse_row(PAIR | {"chosen": ANSWER | {key: "more"}}, "f:1")
    assert parse_row(PAIR | {"chosen": ANSWER | {key: None}}, "f:1").responses[0] == "So."


@pytest.mark.parametrize("role", ["prompter", "model", "bot"])
def test_roles_of_other_formats_are_refused(role):
    with pytest.raises(BadRow, match="role: expected user, assistant, system or tool"):
        parse_row(PAIR | {"prompt": [{"role": role, "content": "Why?"}]}, "f:1")


def test_a_boolean_score_says_what_to_write():
    with pytest.raises(BadRow, match="found bool True .write 1 for true, 0 for false"):
        parse_row({"prompt": "a", "responses": ["b", "c"], "scores": [True, False]}, "f:1")


def names_in(source):
    return sorted(record["id"] for _, record in read_records(str(source)))


def shard(path, **record):
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), path)


def test_splits_of_a_folder_from_the_hub_keep_apart(tmp_path):
    splits = ("train_prefs", "train_sft", "test_prefs")
    for split in splits:
        for number in range(2):
            shard(tmp_path / "data" / f"{split}-0000{number}-of-00002.parquet", id=split)
    for split in splits:
        assert names_in(f"{tmp_path}:{split}") == [split] * 2
    with pytest.raises(ValueError, match="no split 'train', only test_prefs, train_prefs, tr"):
        names_in(tmp_path)


def test_suffixes_in_capitals_are_read(tmp_path):
    write(tmp_path / "a.JSONL", [{"id": 1}])
    shard(tmp_path / "b.PARQUET", id=2)
    assert names_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.json.zip", "b.CSV.XZ", "b.parquet.tar"])
def test_files_that_are_packed_otherwise_are_refused(tmp_path, name):
    write(tmp_path / "a.jsonl", [{"id": 1}])
    (tmp_path / name).write_bytes(b"BZh9")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"files of this kind are not read \(expected .jsonl"):
            names_in(source)


@pytest.mark.parametrize("pattern", ["", "/*.jsonl"])
def test_a_link_to_nothing_is_no_missing_row(tmp_path, pattern):
    write(tmp_path / "a.jsonl", [{"id": 1}])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="b.jsonl: a link to a file that is not there"):
        names_in(f"{tmp_path}{pattern}")


def test_a_link_to_a_folder_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "a.jsonl", [{"id": 1}])
    (tmp_path / "rows" / "more").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="a link to a folder, which is not followed"):
        names_in(tmp_path / "rows")


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["p"], ["q"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="two columns have the same name"):
        names_in(tmp_path / "rows.parquet")
