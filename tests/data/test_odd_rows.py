"""Rows whose prompt is easily misread: repeated, unnamed, in two fields, or merged."""

import json
from dataclasses import replace

import pytest

from rrhf_fast.data.load import RowReport, load_rows
from rrhf_fast.data.rows import BadRow, parse_row
from rrhf_fast.data.split import prompt_key
from rrhf_fast.data.tokenise import tokenise_rows
from rrhf_fast.score.reward_model import plain_text
from tests.data.test_chat import CHATML, make_tokenizer

HH = "\n\nHuman: Why?\n\nAssistant:"


def pair(chosen, rejected, **more):
    return parse_row({"chosen": chosen, "rejected": rejected} | more, "f:1")


def test_a_prompt_that_both_answers_repeat_is_removed_from_them():
    row = pair("Q: Why? So.", "Q: Why? No.", prompt="Q: Why?")
    assert (row.prompt, row.responses) == ("Q: Why?", [" So.", " No."])
    chance = pair("Hi there!", "Hi you!", prompt="Hi")
    assert (chance.prompt, chance.responses) == ("Hi", ["Hi there!", "Hi you!"])
    for prompt in ("Why?", "Q: Why?\n", "Why: ", HH, "为什么"):
        row = pair(prompt + " So", prompt + "No", prompt=prompt)
        assert (row.prompt, row.responses) == (prompt, [" So", "No"])
        bare = pair(prompt + "x", prompt, prompt=prompt) if prompt != HH else None
        assert bare is None or bare.responses == [prompt + "x", prompt]
    one = pair("Why? So.", "No.", prompt="Why?")
    assert (one.prompt, one.responses) == ("Why?", ["Why? So.", "No."])


@pytest.mark.parametrize(
    "texts",
    [
        ("I think yes", "I think no"),
        ("Q: a\nA: x", "Q: a\nA: y"),
        ("Sum:\nten", "Sum:\ntwo"),
        ("My Assistant: a", "My Assistant: b"),
        ("一加一是二", "一加一是三"),
    ],
)
def test_only_transcripts_contain_their_prompt(texts):
    with pytest.raises(BadRow, match="^f:1: prompt: missing.*chosen, rejected.*--columns"):
        pair(*texts)


def test_transcripts_replace_a_separate_prompt():
    row = pair(HH + " So.", HH + " No.", prompt="Why?")
    assert (row.prompt, row.responses) == (HH, [" So.", " No."])


def test_transcripts_that_differ_early_are_refused():
    with pytest.raises(BadRow, match="^f:1: chosen: expected an answer, found further turns"):
        pair(HH + " So.\n\nHuman: And?\n\nAssistant: x", HH + " No.")
    with pytest.raises(BadRow, match="^f:1: rejected: expected an answer, found further turns"):
        pair(" So.", "x\n\nHuman: B\n\nAssistant: y", prompt=HH)
    with pytest.raises(BadRow, match="^f:1: rejected: expected an answer, found further turns"):
        pair("Human: a\nAssistant: b", "Human: a\nAssistant: x\nHuman: B\nAssistant: y")


@pytest.mark.parametrize("name", ["messages", "context", "instruction_text", "question"])
def test_no_prompt_is_made_up_if_another_field_may_hold_it(name):
    texts = ("I think yes", "I think no")
    if name == "question":  # a known layout
        assert pair(*texts, question="Q").prompt == "Q"
    elif name == "instruction_text":  # a name without meaning
        with pytest.raises(BadRow, match=f"prompt: missing.*{name}.*--columns"):
            pair(*texts, **{name: "Q"})
    else:
        with pytest.raises(BadRow, match=f"^f:1: prompt: missing, and {name} may be it"):
            pair(*texts, **{name: "Q"})


def test_the_label_decides_between_equal_votes():
    ref = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 5, "score_B": 5}
    assert parse_row(ref | {"labels": 1}, "f:1").rewards == [1.0, 0.0]
    assert parse_row(ref | {"labels": 0}, "f:1").rewards == [0.0, 1.0]


def test_an_input_is_part_of_the_question(tmp_path):
    items = [{"response": "a", "overall_score": 2}, {"response": "b", "overall_score": 1}]
    row = parse_row({"instruction": "Translate.", "input": "chat", "completions": items}, "f:1")
    assert row.prompt == "Translate.\nchat"
    rows = [
        {"instruction": "Translate.", "input": text, "output": answer, "score": score}
        for text, answer, score in (
            ("chat", "cat", 2), ("chien", "dog", 2), ("chat", "pet", 1), ("chien", "cat", 1),
        )
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    joined, _ = load_rows(str(path), group_by="instruction")
    assert [(row.prompt, row.responses) for row in joined] == [
        ("Translate.\nchat", ["cat", "pet"]),
        ("Translate.\nchien", ["dog", "cat"]),
    ]


MESSAGES = [{"role": "user", "content": "Why?"}]
ANSWER = {"role": "assistant", "content": "So."}


@pytest.mark.parametrize("dump", [json.dumps, lambda value: "  " + json.dumps(value, indent=1)])
def test_messages_written_as_json_are_parsed(dump):
    row = {"prompt": dump(MESSAGES), "chosen": dump([ANSWER]), "rejected": dump(ANSWER)}
    parsed = parse_row(row, "f:1")
    assert parsed.prompt == MESSAGES and parsed.responses == ["So.", "So."]
    (message,) = MESSAGES
    assert parse_row(row | {"prompt": dump(message)}, "f:1").prompt == MESSAGES
    whole = {"chosen": dump([*MESSAGES, ANSWER]), "rejected": dump([*MESSAGES, ANSWER])}
    assert parse_row(whole, "f:1").prompt == MESSAGES
    own = {"prompt": dump(MESSAGES), "responses": ["a", "b"], "scores": [1, 0]}
    assert parse_row(own, "f:1").prompt == MESSAGES


@pytest.mark.parametrize("text", ["[{", '[{"a": 1}]', "[{x}]", '{"role": "x"}', "[{'a': 1}]"])
def test_texts_that_only_look_like_messages_stay_texts(text):
    assert pair("a", "b", prompt=text).prompt == text


@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_messages_printed_by_python_are_refused(name):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    for value in (MESSAGES, MESSAGES[0]):
        with pytest.raises(BadRow, match=f"^f:1: {name}: messages as Python prints them"):
            parse_row(row | {name: str(value)}, "f:1")


def test_messages_that_continue_a_separate_prompt():
    said = [{"role": "assistant", "content": "a1"}, {"role": "user", "content": "Q2"}]
    row = pair([*said, ANSWER], [*said, ANSWER], prompt="Q1")
    assert row.prompt == [{"role": "user", "content": "Q1"}, *said]
    system = {"role": "system", "content": "Be brief."}
    row = pair([system, ANSWER], [system, ANSWER], prompt="Q1")
    assert row.prompt == [system, {"role": "user", "content": "Q1"}]
    whole = pair([*MESSAGES, ANSWER], [*MESSAGES, ANSWER], prompt="Why?")
    assert whole.prompt == MESSAGES
    with pytest.raises(BadRow, match="^f:1: rejected: its first messages differ"):
        pair([*MESSAGES, ANSWER], [system, *MESSAGES, ANSWER], prompt="Why?")


@pytest.mark.parametrize(
    "columns",
    [{"score": "s"}, {"score_chosen": "s"}, {"response": "chosen", "score": "s"}],
)
def test_unused_columns_are_refused(columns, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "s": 3}) + "\n")
    with pytest.raises(BadRow, match="rows.jsonl:1: columns: .*(score|response).* unused in a"):
        load_rows(str(path), columns=columns)


@pytest.mark.parametrize("role", ["User", "human", "ASSISTANT", "gpt"])
def test_roles_unknown_to_templates_are_refused(role):
    row = {"prompt": [{"role": role, "content": "Why?"}], "responses": ["a", "b"], "scores": [1, 0]}
    with pytest.raises(BadRow, match=r"^f:1: prompt\[0\].role: expected user, .* found .*" + role):
        parse_row(row, "f:1")


def test_a_tools_result_may_be_an_object():
    result = {"role": "tool", "content": {"degrees": 20}}
    record = {"prompt": [*MESSAGES, result], "responses": ["a", "b"], "scores": [1, 0]}
    row = parse_row(record, "f:1")
    assert prompt_key(row) != prompt_key(replace(row, prompt=MESSAGES))
    assert plain_text(row.prompt) == 'Why?\n\n{"degrees": 20}'
    shows = CHATML.replace(
        "{{ m.content }}", "{{ m.content if m.content is string else m.content | tojson }}"
    )
    for template in (CHATML, shows):
        query = tokenise_rows([row], make_tokenizer(template), RowReport(), max_length=999)[0][0]
        assert "degrees" in make_tokenizer().decode(query.prompt_ids)
