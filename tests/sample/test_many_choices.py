"""All responses to a prompt from one request: what endpoints make of n, tokens and beams."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rrhf_fast import demo
from rrhf_fast.data.encode import decode_response
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from tests.jsonl import read, write

PROMPTS = ["One day", "hard times", "The end"]
MODEL = str(demo.MODEL_DIR)


@pytest.fixture
def remote(tmp_path, openai_server):
    policy = Policy(method="openai", model="echo", base_url=openai_server.url, num_responses=5)
    return SampleConfig(
        data=write(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        output=str(tmp_path / "sampled.jsonl"),
        policies=[policy],
        max_retries=0,
        max_concurrency=2,
    )


def asking(remote, **options):
    """`remote` with these options of its policy."""
    return replace(remote, policies=[replace(remote.policies[0], **options)])


def requests_of(openai_server, prompt):
    return [asked for asked in openai_server.answered if asked["text"] == prompt]


def test_all_responses_come_from_one_request(remote, openai_server):
    counts = sample(remote)
    assert (counts["responses"], counts["requests"]) == (15, 3)
    assert [asked["n"] for asked in openai_server.answered] == [5] * 3
    assert not any("seed" in asked for asked in openai_server.answered)
    for row in read(remote.output):
        assert len(set(row["responses"])) == 5 and row["finish_reasons"] == ["stop"] * 5


def test_a_seed_is_sent_where_asked_for(remote, openai_server):
    sample(replace(remote, send_seed=True))
    assert len({asked["seed"] for asked in openai_server.answered}) == 3


@pytest.mark.parametrize("most", [1, 2, 4])
def test_what_an_endpoint_gave_too_few_of_is_asked_for_again(most, remote, openai_server):
    counts = sample(replace(asking(remote, model=f"few:{most}"), send_seed=True))
    assert (counts["responses"], counts["failures"], counts["duplicates"]) == (15, 0, 0)
    asked = requests_of(openai_server, "One day")
    assert len(asked) == -(-5 // most) == counts["requests"] / 3
    assert len({request["seed"] for request in asked}) == len(asked)
    if most == 2:
        assert [request.get("n") for request in asked] == [5, 3, None]


@pytest.mark.parametrize("kind", ["ignores-n", "refuses-n"])
def test_an_endpoint_without_n_is_asked_for_each_response(kind, remote, openai_server, capsys):
    counts = sample(replace(asking(remote, model=kind), send_seed=True))
    assert (counts["responses"], counts["requests"]) == (15, 15)
    said = capsys.readouterr().out
    assert said.count("gives one response per request") == 1 and "policies[0]: http" in said
    assert len(openai_server.refused) <= 2  # of as many threads


def test_choices_without_text_are_asked_for_again(remote, openai_server):
    counts = sample(replace(asking(remote, model="partly"), send_seed=True))
    assert (counts["responses"], counts["failures"], counts["requests"]) == (15, 0, 5)
    assert [asked.get("n") for asked in requests_of(openai_server, "hard times")] == [5, 2, None]


def test_a_prompt_without_any_text_is_not_asked_for_again(remote, openai_server):
    counts = sample(asking(remote, model="thought"))
    assert (counts["responses"], counts["failures"], counts["requests"]) == (10, 5, 3)
    assert len(read(remote.output)[1]["failures"]) == 5


def test_a_prompt_that_is_mostly_refused_ends(tmp_path, remote, openai_server):
    remote.data = write(tmp_path / "hard.jsonl", [{"prompt": "hard"}])
    counts = sample(asking(remote, model="mostly", num_responses=8))
    received = sum(asked.get("n", 1) for asked in openai_server.answered)
    assert received <= 16 and counts["responses"] + counts["failures"] == 8
    assert counts["responses"] > 0 and counts["failures"] > 0


def test_beams_are_asked_for_at_once(remote, openai_server):
    beams = {"extra_body": {"use_beam_search": True}, "num_beams": 6, "num_responses": 4}
    counts = sample(asking(remote, **beams))
    assert (counts["responses"], counts["duplicates"], counts["requests"]) == (12, 0, 3)
    for asked in openai_server.answered:
        assert (asked["n"], asked["use_beam_search"], asked["temperature"]) == (6, True, 0.0)
    few = replace(asking(remote, model="few:2", **beams), output=remote.output + "-few")
    counts = sample(few)
    assert (counts["responses"], counts["failures"], counts["requests"]) == (6, 6, 3)
    assert read(few.output)[0]["failures"][0]["error"] == "2 of 4 beams"


def test_tokens_are_those_that_local_models_read(remote, openai_server):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = asking(remote, model="parrot", send_tokens=True, tokenizer=MODEL)
    sample(replace(config, keep_all=True))
    for prompt, row in zip(PROMPTS, read(config.output), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        (asked,) = requests_of(openai_server, " ".join(map(str, ids)))
        assert asked["prompt"] == ids and "messages" not in asked
        assert asked["skip_special_tokens"] is False and asked["return_token_ids"] is True
        assert asked["stop_token_ids"] == [tokenizer.eos_token_id] and asked["top_k"] == 0
        expected = [decode_response(tokenizer, ids[: i + 2]) for i in range(5)]
        assert row["responses"] == expected


def test_responses_to_messages_sent_as_tokens_are_as_generated(tmp_path, remote, openai_server):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %} So{% endif %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    config = asking(remote, send_tokens=True, tokenizer=str(tmp_path / "tokenizer"))
    sample(replace(config, data=write(tmp_path / "messages.jsonl", rows)))
    for row, asked in zip(read(config.output), PROMPTS, strict=True):
        assert row["as_generated"] == [True] * 5
        ids = tokenizer(asked + " So", add_special_tokens=False)["input_ids"]
        assert requests_of(openai_server, " ".join(map(str, ids)))


def test_an_endpoint_that_takes_no_tokens_names_the_option(remote):
    config = asking(remote, model="no-tokens", send_tokens=True, tokenizer=MODEL)
    with pytest.raises(ValueError, match=r"policies\[0\].send_tokens: .* \(set it to false\)"):
        sample(config)
    with pytest.raises(ValueError, match=r"policies\[0\].model: echo: "):
        sample(asking(remote, send_tokens=True))


def test_a_base_model_behind_chat_is_told_to_complete(remote):
    with pytest.raises(ValueError, match=r"chat template .*set policies\[0\].chat to false"):
        sample(asking(remote, model="base"))
    assert sample(asking(remote, model="base", chat=False))["responses"] == 15


def test_a_journal_of_other_results_is_refused(remote):
    config = asking(remote, model="dies:0")
    with pytest.raises(RuntimeError):
        sample(config)
    journal = Path(config.output + ".journal")
    record = {"key": "0/0", "result": {"text": "a", "finish_reason": "stop"}}
    journal.write_text(journal.read_text() + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="is damaged at line 2"):
        sample(config)
