"""Endpoints that answer without text or reject what they are sent."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.data.rows import Draft
from rrhf_fast.sample import sample
from rrhf_fast.sample.__main__ import main
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.sample.remote import ask_endpoint
from rrhf_fast.stages.answer import NoCompletion, Refused, read_answers
from rrhf_fast.stages.journal import Journal
from rrhf_fast.stages.serve import Servers
from tests.jsonl import read, write
from tests.openai_server import ODD

ROWS = [{"prompt": f"{kind} {i}"} for i, kind in enumerate(["easy", "hard", "easy", "long"])]
ENDED = "ended while thinking (raise the token limit, policies[0].max_new_tokens)"
TEXTLESS = "an answer without text (finish_reason stop)"
FILTERED = "a content filter ended the answer (finish_reason content_filter)"
REASONS = {
    "null": TEXTLESS,
    "no-content": TEXTLESS,
    "no-parts": TEXTLESS,
    "image": TEXTLESS,
    "number": TEXTLESS,
    "refusal": "the model refused: I can't help with that.",
    "refusal-part": "the model refused: I can't.",
    "filter": FILTERED,
    "filter-midway": FILTERED,
    "abort": "the server aborted the answer (finish_reason abort)",
    "thought": ENDED,
    "thought-newer": ENDED,
    "thought-bare": ENDED,
    "thought-empty": ENDED,
    "thought-parts": ENDED,
    "thought-only": "thought, but gave no answer",
    "thought-hidden": ENDED,
    "tool": "answered with a tool call",
    "surrogate": "an answer that is not valid Unicode",
    "no-message": "an answer without a message",
    "no-choices": "an answer without choices",
    "null-choices": "an answer without choices",
    "odd-choices": "an answer without choices",
    "nothing": "an answer without choices",
    "list": "an answer that is not a JSON object",
    "error": "an error instead of an answer: the provider is overloaded",
    "error-string": "an error instead of an answer: out of order",
}
OF_COMPLETIONS = {"null": TEXTLESS, "filter-midway": FILTERED, "no-choices": REASONS["no-choices"]}


@pytest.fixture
def remote(tmp_path, openai_server):
    policy = Policy(method="openai", base_url=openai_server.url, max_new_tokens=64)
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", ROWS),
        output=str(tmp_path / "sampled.jsonl"),
        policies=[policy],
        timeout=60.0,
        max_retries=0,
    )


def asking(remote, **options):
    """`remote` with these options of its policy."""
    return replace(remote, policies=[replace(remote.policies[0], **options)])


def test_every_odd_answer_has_a_reason():
    assert set(REASONS) == set(ODD)


@pytest.mark.parametrize("kind", ODD)
def test_an_answer_without_text_is_a_failure_of_its_row(kind, remote):
    counts = sample(asking(remote, model=kind))
    assert (counts["responses"], counts["failures"], counts["requests"]) == (3, 1, 4)
    for prompt, row in zip(ROWS, read(remote.output), strict=True):
        if "hard" in prompt["prompt"]:
            source = f"openai:{kind}"
            assert row["failures"] == [{"source": source, "error": REASONS[kind]}]
            assert row["responses"] == row["sources"] == row["finish_reasons"] == []
        else:
            assert "failures" not in row
            assert "answer" in row["responses"][0] and row["finish_reasons"] == ["stop"]


@pytest.mark.parametrize("kind", OF_COMPLETIONS)
def test_a_completion_without_text_is_a_failure_of_its_row(kind, remote):
    counts = sample(asking(remote, model=kind, chat=False))
    assert (counts["responses"], counts["failures"]) == (3, 1)
    assert read(remote.output)[1]["failures"][0]["error"] == OF_COMPLETIONS[kind]


@pytest.mark.parametrize("kind", ["thought", "error"])
def test_if_no_answer_has_text_the_error_says_why(kind, tmp_path, remote):
    remote.data = write(tmp_path / "hard.jsonl", [{"prompt": "hard"}])
    with pytest.raises(ValueError, match=r"policies\[0\]: every request was refused: ") as error:
        sample(asking(remote, model=kind))
    assert str(error.value).endswith(REASONS[kind])
    assert not Path(remote.output).exists()


def test_only_answers_that_a_retry_may_fix_are_retried(remote, openai_server):
    remote.max_retries = 1
    for kind, tries in (("thought", 1), ("refusal", 1), ("error", 2), ("no-choices", 2)):
        config = replace(asking(remote, model=kind), output=f"{remote.output}-{kind}")
        before = len(openai_server.answered)
        counts = sample(config)
        asked = openai_server.answered[before:]
        assert [request["text"] for request in asked].count("hard 1") == tries
        assert counts["requests"] == len(asked) == 3 + tries


def test_text_parts_are_joined(remote):
    sample(asking(remote, model="parts"))
    for row in read(remote.output):
        assert len(row["responses"][0].removeprefix("Human: ")) == len("answer 123456")


def test_thoughts_in_the_text_are_kept(remote):
    sample(asking(remote, model="think:3"))
    for row in read(remote.output):
        assert "<think>\nhmm hmm hmm " in row["responses"][0]


@pytest.mark.parametrize("stop, reason", [([], "length"), (["s"], "stop")])
def test_a_response_cut_at_a_stop_string_has_ended(stop, reason, remote):
    remote.stop_strings = stop
    sample(asking(remote, model="echo", max_new_tokens=1))
    first = read(remote.output)[0]
    assert first["responses"] == ["an" if stop else "answ"] and first["finish_reasons"] == [reason]


def test_failures_survive_a_kill(remote, openai_server):
    whole = replace(asking(remote, model="thought"), output=remote.output + "-whole")
    sample(whole)
    config = asking(remote, model="thought")
    openai_server.stop()
    assert main(as_arguments(config)) == 1
    journal = Path(config.output + ".journal")
    done = {"error": ENDED, "usage": {"requests": 1, "prompt_tokens": 7, "completion_tokens": 3}}
    record = json.dumps({"key": "0/1", "result": [done]})
    journal.write_text(journal.read_text() + record + "\n" + record[:20])  # torn
    openai_server.start()
    config = asking(config, base_url=openai_server.url)
    before = len(openai_server.answered)
    assert main(as_arguments(config)) == 0
    assert len(openai_server.answered) - before == 3
    assert Path(config.output).read_bytes() == Path(whole.output).read_bytes()


def as_arguments(config):
    (policy,) = config.policies
    names = ("method", "base_url", "model", "max_new_tokens")
    policies = json.dumps([{name: getattr(policy, name) for name in names}])
    paths = ["--data", config.data, "--output", config.output]
    return [*paths, "--policies", policies, "--max_retries", "0"]


def sent(openai_server, *names):
    return [{name: asked.get(name) for name in names} for asked in openai_server.answered]


def test_max_completion_tokens_is_sent_where_needed(remote, openai_server):
    remote.max_concurrency = 1
    sample(asking(remote, model="newer", max_new_tokens=50))
    limits = {"max_tokens": None, "max_completion_tokens": 50}
    assert sent(openai_server, *limits) == [limits] * 4
    assert len(openai_server.refused) == 1  # tried once


def test_a_limit_that_is_too_large_keeps_its_name(remote, openai_server):
    remote.max_concurrency = 1
    counts = sample(asking(remote, model="too-large"))
    assert (counts["responses"], counts["failures"]) == (3, 1)
    assert "too large" in read(remote.output)[3]["failures"][0]["error"]
    assert all(asked["max_tokens"] == 64 for asked in openai_server.answered)


def test_the_name_of_the_limit_can_be_set(remote, openai_server):
    remote.token_limit_parameter = "max_completion_tokens"
    sample(asking(remote, model="echo"))
    limits = {"max_tokens": None, "max_completion_tokens": 64}
    assert sent(openai_server, *limits) == [limits] * 4


def test_null_parameters_are_not_sent(remote, openai_server):
    sample(asking(remote, model="no-seed", temperature=None, top_p=None))
    names = {"temperature", "top_p", "seed", "stop", "tools"}
    assert len(openai_server.answered) == 4
    assert not any(names & set(asked) for asked in openai_server.answered)


def test_endpoints_accept_temperature_zero(remote, openai_server):
    sample(asking(remote, model="echo", temperature=0.0))
    assert sent(openai_server, "temperature") == [{"temperature": 0.0}] * 4


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"model": "newer", "temperature": 0.5}, "policies[0].temperature: .*(set it to null)"),
        ({"model": "no-seed"}, "send_seed: .*extra_forbidden.*(set it to false)"),
    ],
)
def test_an_unsupported_parameter_names_its_option(options, problem, remote):
    remote.send_seed = True
    option, _, cure = problem.partition(".*")
    with pytest.raises(ValueError) as error:
        sample(asking(remote, **options))
    assert str(error.value).startswith(option) and str(error.value).endswith(cure[-15:])
    assert not Path(remote.output + ".journal").exists()


def test_a_request_echoed_in_an_error_names_no_option(remote):
    counts = sample(asking(remote, model="repeats"))
    assert (counts["responses"], counts["failures"]) == (3, 1)


def test_a_limit_under_the_wrong_name_names_its_option(remote):
    remote.token_limit_parameter = "max_tokens"
    with pytest.raises(ValueError, match=r"token_limit_parameter: .*\(set it to auto\)"):
        sample(asking(remote, model="newer"))


@pytest.mark.parametrize("name, value", [("temperature", None), ("top_p", None)])
def test_null_is_only_for_endpoints(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number"):
        Policy(**{name: value}).validate()
    with pytest.raises(ValueError, match="temperature: expected 0 or more"):
        Policy(method="openai", temperature=-1.0).validate()
    with pytest.raises(ValueError, match="temperature: expected more than 0"):
        Policy(temperature=0.0).validate()
    Policy(method="openai", temperature=0.0).validate()
    with pytest.raises(ValueError, match="extra_body: chat_template_kwargs"):
        Policy(method="openai", extra_body={"chat_template_kwargs": 1}).validate()


def ask(tmp_path, config, *drafts):
    with Journal(tmp_path / "out.jsonl", "test") as journal:
        servers = Servers(config, "no.log")
        ask_endpoint(journal, 0, config.policies[0], drafts, config, servers)


def draft(prompt, **fields):
    return Draft(prompt, None, None, None, {}, "test", **fields)


def test_tools_and_template_arguments_are_sent(tmp_path, remote, openai_server):
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    own = {"enable_thinking": True}
    remote.chat_template_kwargs = {
        "enable_thinking": False, "language": "de", "chat_template": "mine",
    }  # fmt: skip
    config = asking(remote, model="echo", extra_body={"chat_template_kwargs": {"language": "fr"}})
    ask(tmp_path, config, draft("0", tools=[]), draft("1", tools=tools, chat_template_kwargs=own))
    first, second = sorted(openai_server.answered, key=lambda asked: asked["text"])
    assert "tools" not in first and second["tools"] == tools
    assert first["chat_template_kwargs"] == {"enable_thinking": False, "language": "fr"}
    assert second["chat_template_kwargs"] == {"enable_thinking": True, "language": "fr"}


def test_a_policy_can_suppress_template_arguments(tmp_path, remote, openai_server):
    remote.chat_template_kwargs = {"enable_thinking": False}
    config = asking(remote, model="echo", extra_body={"chat_template_kwargs": {}})
    ask(tmp_path, config, draft("0", chat_template_kwargs={"a": 1}))
    (asked,) = openai_server.answered
    assert "chat_template_kwargs" not in asked


def test_completions_get_no_template_arguments(tmp_path, remote, openai_server):
    config = asking(remote, model="echo", chat=False)
    ask(tmp_path, config, draft("0", tools=[{}], chat_template_kwargs={"a": 1}))
    (asked,) = openai_server.answered
    assert not {"tools", "chat_template_kwargs", "messages"} & set(asked)


def test_an_answer_begun_in_the_prompt_is_continued(tmp_path, remote, openai_server):
    user, begun = ({"role": role, "content": "0"} for role in ("user", "assistant"))
    config = asking(remote, model="echo")
    ask(tmp_path, config, draft([user]), draft([user, begun]), draft("0"))
    names = ("continue_final_message", "add_generation_prompt")
    for asked in openai_server.answered:
        begins = [True, False] if len(asked["messages"]) == 2 else [None, None]
        assert [asked.get(name) for name in names] == begins


NAMES = ["choices", "message", "content", "text", "error", "usage", "tool_calls", "refusal"]
NAMES += ["finish_reason", "type", "completion_tokens_details", "reasoning", "prompt_tokens"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "text", "length", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
)
CHOICES = st.fixed_dictionaries({}, optional={name: VALUES for name in NAMES})


@given(CHOICES, st.fixed_dictionaries({}, optional={name: VALUES for name in NAMES}), st.booleans())
def test_any_json_is_an_answer_or_a_failure(choice, body, chat):
    body = json.dumps(body | {"choices": [choice]}).encode()
    try:
        answers = read_answers(body, chat, 1)
    except NoCompletion as error:
        str(error).encode()
    else:
        (answer,) = answers
        str(answer if isinstance(answer, Refused) else answer.text).encode()
        assert all(type(count) is int for count in answer.usage.values())


@pytest.mark.parametrize("usage", [None, 3, {"prompt_tokens": "7"}, {"prompt_tokens": True}, []])
def test_malformed_usage_counts_as_zero(usage):
    body = {"choices": [{"message": {"content": "a"}, "finish_reason": 3}], "usage": usage}
    (answer,) = read_answers(json.dumps(body).encode(), True, 2)
    assert answer.usage == {"requests": 2, "prompt_tokens": 0, "completion_tokens": 0}
    assert answer.finish_reason is None


def test_the_key_is_not_printed(remote, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    with pytest.raises(RuntimeError, match=r"no such key: Bearer \[key\]"):
        sample(asking(remote, model="echoes-key"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very\nsecret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY does not fit into an HTTP header"):
        sample(asking(remote, model="echo"))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_file(tmp_path, remote, killed_at_random):
    rows = [{"prompt": f"{'hard' if i % 3 else 'easy'} {i}"} for i in range(40)]
    config = replace(asking(remote, model="thought"), data=write(tmp_path / "many.jsonl", rows))
    config.max_concurrency = 1
    sample(config)
    other = replace(config, output=config.output + "-killed")
    assert killed_at_random(sample, other, kills=4, seed=int.from_bytes(os.urandom(4))) == 4
    assert Path(other.output).read_bytes() == Path(config.output).read_bytes()
