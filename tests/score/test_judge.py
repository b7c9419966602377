"""Real judges: they think, refuse, and support other parameters than older ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rrhf_fast.score import score
from rrhf_fast.score.__main__ import main
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.identity import identity
from tests.jsonl import write
from tests.openai_server import GRADES, ODD

CURE = "(raise the judge's token limit, judge_max_new_tokens)"
ROW = {"prompt": "Why?", "responses": ["easy", "hard", "easy too"], "sources": ["a", "b", "c"]}


@pytest.fixture
def judged(tmp_path, openai_server):
    return ScoreConfig(
        data=write(tmp_path / "rows.jsonl", [ROW]),
        output=str(tmp_path / "scored.jsonl"),
        judge_model="judge",
        base_url=openai_server.url,
        timeout=60.0,
        max_retries=0,
    )


def scored(config):
    """Score the row and return it."""
    score(config)
    return json.loads(Path(config.output).read_text())


@pytest.mark.parametrize("kind", ODD)
def test_a_judgement_without_text_leaves_its_response_unscored(kind, judged):
    row = scored(replace(judged, judge_model=f"{kind}:judge"))
    assert row["responses"] == ["easy", "easy too"] and row["scores"] == [18, 18]
    (unscored,) = row["unscored"]
    assert (unscored["response"], unscored["source"]) == ("hard", "b")
    assert unscored["error"] and "answer" not in unscored
    if kind.startswith("thought") and kind != "thought-only":
        assert unscored["error"] == f"ended while thinking {CURE}"


def test_if_no_judgement_has_text_the_error_says_why(judged):
    rows = [{"prompt": "Why?", "responses": ["hard"]}]
    judged.data = write(Path(judged.data).with_name("hard.jsonl"), rows)
    with pytest.raises(ValueError, match="no response could be scored: answered with a tool call"):
        score(replace(judged, judge_model="tool:judge"))
    assert not Path(judged.output).exists()


def test_a_judgement_follows_the_thought(judged, openai_server):
    judged.judge_model = "think:300"  # for 300 tokens
    judged.max_retries = 3
    with pytest.raises(ValueError, match="could be scored: ended while thinking") as error:
        score(judged)
    assert CURE in str(error.value)
    assert len(openai_server.answered) == 3  # a retry would end alike
    row = scored(replace(judged, judge_max_new_tokens=400))
    assert row["scores"] == [18, 18, 18] and "unscored" not in row
    assert [asked["max_tokens"] for asked in openai_server.answered] == [256] * 3 + [400] * 3


@pytest.mark.parametrize(
    "answer, total",
    [
        (f"<think>hmm</think>{GRADES}", 18),
        (f"\n<think>\n{GRADES} hmm {{}}</think>\n\nWell. {GRADES}", 18),
        (f"<thinking>hmm</thinking>{GRADES}", 18),
        (f"{GRADES} <think>", 18),
        (f"<think>{GRADES}</think>", None),
        # The opening mark may be in the judge's prompt.
        (f"hmm {GRADES}</think>\n\n{GRADES}", 18),
        (f"The format is {GRADES}, hmm</think>\n\nI cannot judge this.", None),
        (f"<think>{GRADES}</think> 5 out of 5", None),
        (f"<think>{GRADES}</thinking>", "ended while thinking " + CURE),
        (f"<think>{GRADES}", "ended while thinking " + CURE),
        ("<think>", "ended while thinking " + CURE),
    ],
)
def test_thoughts_are_not_judgements(answer, total, judged):
    judged.judge_model = "says:" + answer
    if isinstance(total, int):
        assert scored(judged)["scores"] == [total] * 3
    else:
        with pytest.raises(ValueError) as error:
            score(judged)
        assert str(error.value).endswith(total or "malformed judgement")


@pytest.mark.parametrize(
    ("more", "is_judged"), [("", True), (" " * 999, True), ("so " * 999, False)]
)
def test_an_answer_cut_off_counts_only_if_it_ends_with_a_judgement(more, is_judged, judged):
    """An unmarked thought may mention grades before it is cut off."""
    judged.judge_model = f"says:hmm {GRADES}" + more
    if is_judged:
        assert scored(judged)["scores"] == [18] * 3
    else:
        with pytest.raises(ValueError, match="malformed judgement, cut off"):
            score(judged)


def test_a_truncated_judgement_is_reported_as_cut_off(judged):
    judged.judge_model, judged.judge_max_new_tokens = "judge", 3
    with pytest.raises(ValueError, match="scored: malformed judgement, cut off .raise the judge's"):
        score(judged)


def test_requests_to_the_judge_follow_the_options(judged, openai_server):
    body = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    scored(replace(judged, judge_extra_body=body, judge_temperature=0.5))
    for asked in openai_server.answered:
        assert asked["temperature"] == 0.5 and "seed" not in asked
        assert {name: asked[name] for name in body} == body


def test_the_judge_sees_who_said_what(judged, openai_server):
    call = {"function": {"name": "look_up", "arguments": {"word": "sky"}}, "type": "function"}
    prompt = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": {"colour": "blue"}},
        {"role": "user", "content": "So?"},
    ]
    chat = write(Path(judged.output).with_name("chat.jsonl"), [ROW | {"prompt": prompt}])
    scored(replace(judged, data=chat))
    for asked in openai_server.answered:
        shown = asked["text"].split("<request>\n")[1].split("\n</request>")[0]
        user, assistant, tool, last = shown.split("\n\n")
        assert (user, last) == ("user: Why?", "user: So?")
        assert assistant.startswith("assistant: I look.\n") and "look_up" in assistant
        assert tool == 'tool: {"colour": "blue"}'


def test_parameters_suit_a_newer_judge(judged, openai_server):
    judged.judge_model = "newer"
    with pytest.raises(ValueError, match=r"judge_temperature: .*\(set it to null\)"):
        score(judged)
    assert not Path(judged.output + ".journal").exists()
    judged.judge_temperature = None
    assert scored(judged)["scores"] == [18, 18, 18]
    for asked in openai_server.answered:
        assert asked["max_completion_tokens"] == 256
        assert not {"max_tokens", "temperature"} & set(asked)


def test_null_on_the_command_line_sends_no_temperature(judged, openai_server):
    arguments = ["--data", judged.data, "--output", judged.output, "--judge_model", "newer"]
    arguments += ["--base_url", judged.base_url, "--judge_temperature", "null"]
    assert main(arguments) == 0
    assert not any("temperature" in asked for asked in openai_server.answered)


def test_options_that_change_answers_are_part_of_the_identity(judged):
    changes = {
        "judge_max_new_tokens": 7,
        "judge_temperature": None,
        "judge_extra_body": {"a": 1},
        "token_limit_parameter": "max_tokens",
        "send_seed": True,
    }
    others = [identity(replace(judged, **{name: value})) for name, value in changes.items()]
    assert all(other != identity(judged) for other in others)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"judge_max_new_tokens": 0}, "judge_max_new_tokens: expected at least 1"),
        ({"judge_temperature": -1.0}, "judge_temperature: expected 0 or more"),
        ({"judge_extra_body": "a"}, "judge_extra_body: expected dict"),
        (
            {"token_limit_parameter": "n_predict"},
            "token_limit_parameter: expected auto, max_tokens or max_completion_tokens",
        ),
    ],
)
def test_invalid_options_are_refused(options, problem, judged):
    with pytest.raises(ValueError, match=problem):
        replace(judged, **options).validate()


def test_failures_survive_a_kill(judged, openai_server):
    judged.judge_model, judged.max_concurrency = "refusal:judge", 1
    whole = replace(judged, output=judged.output + "-whole")
    score(whole)
    openai_server.stop()
    arguments = ["--data", judged.data, "--output", judged.output, "--max_retries", "0"]
    arguments += ["--judge_model", judged.judge_model, "--base_url", judged.base_url]
    arguments += ["--max_concurrency", "1"]
    assert main(arguments) == 1
    journal = Path(judged.output + ".journal")
    usage = {"requests": 1, "prompt_tokens": 7, "completion_tokens": 3}
    done = {"error": "the model refused: I can't help with that.", "usage": usage}
    record = json.dumps({"key": "0/1", "result": done})
    journal.write_text(journal.read_text() + record + "\n" + record[:20])  # torn
    openai_server.start()
    before = len(openai_server.answered)
    assert main(arguments) == 0
    assert len(openai_server.answered) - before == 2
    assert Path(judged.output).read_bytes() == Path(whole.output).read_bytes()
