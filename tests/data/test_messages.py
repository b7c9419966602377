"""Messages, system messages, tools and answers as datasets store them."""

import json
import re

import pytest

from rrhf_fast.data.load import load_drafts, load_rows
from rrhf_fast.data.messages import check_messages
from rrhf_fast.data.rows import BadRow, parse_row
from tests.drafts import parse_draft

GOOD = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 0]}
ASK = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"default": None}}}]
CALLS = [{"type": "function", "function": {"name": "w", "arguments": {}}}]


def prompt_of(**fields):
    row, draft = (parse(GOOD | fields, "f:1") for parse in (parse_row, parse_draft))
    assert row.prompt == draft.prompt
    return row.prompt


def problem_of(**fields):
    for parse in (parse_row, parse_draft):
        with pytest.raises(BadRow) as caught:
            parse(GOOD | fields, "f:1")
    return caught.value


def test_a_system_becomes_the_first_message():
    assert prompt_of(system="Be brief.") == [SYSTEM, ASK]
    assert prompt_of(system="Be brief.", prompt=[ASK]) == [SYSTEM, ASK]
    assert prompt_of(system="Be brief.", prompt=[SYSTEM, ASK]) == [SYSTEM, ASK]
    for nothing in (None, "", " \n"):
        assert prompt_of(system=nothing) == "Why?"
        assert prompt_of(system=nothing, prompt=[ASK]) == [ASK]
    error = problem_of(system="Be long.", prompt=[SYSTEM, ASK])
    assert error.kind == "two system messages"
    assert problem_of(system=3).kind == "wrong type"


def test_a_system_is_not_dropped_from_a_pair():
    record = {"system": "Answer in French.", "prompt": "Name a bird."}
    row = parse_row(record | {"chosen": "Un merle.", "rejected": "Un chat."}, "f:1")
    assert row.prompt == [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Name a bird."},
    ]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_passed_to_the_template_and_to_later_stages(tools):
    row, draft = (parse(GOOD | {"tools": tools}, "f:1") for parse in (parse_row, parse_draft))
    assert row.tools == draft.tools == draft.others["tools"] == TOOLS
    assert row.prompt == draft.prompt == [ASK]


def test_empty_tools_and_arguments_are_none_and_bad_ones_are_refused():
    for nothing in (None, [], "", "[]"):
        row = parse_row(GOOD | {"tools": nothing}, "f:1")
        assert row.tools is None and row.prompt == "Why?"
    for nothing in (None, {}, "", "{}"):
        row = parse_row(GOOD | {"chat_template_kwargs": nothing}, "f:1")
        assert row.chat_template_kwargs is None
    for bad in ("x", 3, ["w"], '["w"]', {}, "{"):
        assert str(problem_of(tools=bad)).startswith("f:1: tools: expected ")
    for bad in ("x", 3, [1], "[1]"):
        error = problem_of(chat_template_kwargs=bad)
        assert str(error).startswith("f:1: chat_template_kwargs: expected ")


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_arguments_of_the_template(kwargs):
    record = GOOD | {"chat_template_kwargs": kwargs}
    row, draft = (parse(record, "f:1") for parse in (parse_row, parse_draft))
    assert row.chat_template_kwargs == draft.chat_template_kwargs == {"enable_thinking": False}
    assert draft.others["chat_template_kwargs"] == {"enable_thinking": False}


def test_as_generated_is_filtered_like_the_responses(tmp_path):
    record = {
        "prompt": [ASK],
        "responses": ["a", "", "c", "d"],
        "scores": [1, 2, 3, 4],
        "sources": ["x", "x", "provided", "x"],
        "as_generated": [True, False, False, True],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record))
    (row,), report = load_rows(str(path), on_bad_rows="skip")
    assert row.as_generated == [True, False, True] and report.bad_responses == {"empty response": 1}
    (row,), _ = load_rows(str(path), on_bad_rows="skip", use_responses="sampled")
    assert (row.responses, row.as_generated) == (["a", "d"], [True, True])
    (draft,), _ = load_drafts(str(path))
    assert draft.as_generated == record["as_generated"] and "as_generated" not in draft.others
    assert problem_of(as_generated=[True]).kind == "unequal lengths"
    assert "as_generated[1]: expected true or false" in str(problem_of(as_generated=[True, 1]))


def test_a_prompt_may_begin_the_answer():
    prefill = [ASK, {"role": "assistant", "content": "Because"}]
    assert prompt_of(prompt=prefill) == prefill


def test_keys_that_are_none_are_dropped_and_text_parts_joined():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    assert prompt_of(prompt=[message]) == [ASK]
    calling = [ASK, {"role": "assistant", "content": None, "tool_calls": CALLS, "name": None}]
    calling += [{"role": "tool", "content": {"rain": 3}}, {"role": "tool", "content": parts}]
    assert prompt_of(prompt=calling) == [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": {"rain": 3}},
        {"role": "tool", "content": "Why?"},
    ]
    absent = [ASK, {"role": "assistant", "tool_calls": CALLS}, {"role": "tool", "content": "x"}]
    assert prompt_of(prompt=absent) == absent


@pytest.mark.parametrize(
    "message, problem",
    [
        ({"role": "user", "content": None}, 'prompt[0]: expected {"role": str, "content": str}'),
        ({"role": "assistant", "content": None, "tool_calls": []}, "prompt[0]: expected {"),
        ({"role": "user", "tool_calls": CALLS}, "prompt[0]: expected {"),
        ({"role": 3, "content": "x"}, "prompt[0]: expected {"),
        ("Why?", "prompt[0]: expected {"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "prompt[0].content[0]: parts of type 'image_url' are not supported, only text",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": None}]},
            "prompt[0].content[0].text: expected a string",
        ),
        ({"role": "user", "content": ["Why?"]}, "prompt[0].content[0]: expected {"),
        ({"role": "us\ud800er", "content": "x"}, "prompt[0].role: holds half of a surrogate"),
    ],
)
def test_bad_messages_are_refused(message, problem):
    assert str(problem_of(prompt=[message])).startswith(f"f:1: {problem}")


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "a"},
        [{"role": "assistant", "content": "a", "tool_calls": []}],
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "thinking": None},
        {"from": "gpt", "value": "a"},
    ],
)
def test_a_response_may_be_a_message(answer):
    assert parse_row(GOOD | {"responses": [answer, "b"]}, "f:1") == parse_row(GOOD, "f:1")
    assert parse_draft(GOOD | {"responses": [answer, "b"]}, "f:1").responses == ["a", "b"]


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "thinking"])
def test_other_parts_of_an_answer_are_refused_by_name(key):
    answer = {"role": "assistant", "content": "a", key: CALLS if key == "tool_calls" else "hm"}
    error = problem_of(responses=[answer, "b"])
    assert str(error).startswith(f"f:1: responses[0]: holds {key}, but only the content")
    pair = {"prompt": [ASK], "chosen": [ASK, answer], "rejected": "b"}
    with pytest.raises(BadRow, match=f"chosen: holds {key}"):
        parse_row(pair, "f:1")


@pytest.mark.parametrize(
    "answer", [[], [ASK], ASK, [{"role": "assistant", "content": "a"}] * 2, {"content": "a"}]
)
def test_other_values_are_refused_as_answers(answer):
    assert re.match(r"f:1: responses\[0\]: ", str(problem_of(responses=[answer, "b"])))


def test_apply_chat_template_makes_string_prompts_messages(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"prompt": [SYSTEM, ASK]}))
    for load in (load_rows, load_drafts):
        rows, _ = load(str(path), apply_chat_template=True)
        assert [row.prompt for row in rows] == [[ASK], [SYSTEM, ASK]]


def test_a_key_that_parquet_fills_in_does_not_replace_a_value():
    message = {"from": "human", "value": "Why?", "content": None, "weight": None}
    assert check_messages([message], "m", "f:1") == [{"role": "user", "content": "Why?"}]
